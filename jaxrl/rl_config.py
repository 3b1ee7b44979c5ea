"""The options of `python -m jaxrl.rl`: environment, rollouts, algorithm.

Imports no JAX, as `jaxrl.config`.
"""

# ruff: noqa: RUF009 - `option` and `group` are dataclasses.field

import dataclasses
import json
from typing import Any, Literal

from jaxrl.config import LossConfig, StepConfig, check_seq_len
from jaxrl.options import ConfigError, above, at_least, group, option
from jaxrl.run_config import RunConfig


@dataclasses.dataclass(frozen=True)
class EnvConfig:
    """The environment: tasks, what answers the model, rewards."""

    name: str = option(
        "reverse_text",
        "`reverse_text`, `guess_number`, `reasoning_gym`, `verifiers`, or MODULE:CALLABLE.",
    )
    options: str = option("{}", 'What it is made with, as JSON, e.g. `{"seed": 1}`.')
    workers: int = option(1, "Processes that reply and score.")
    timeout_s: float = option(30.0, "Seconds after which a reply or a reward has failed.")
    make_timeout_s: float = option(600.0, "Seconds for making the environment in its process.")
    max_turns: int = option(8, "Turns of the model in a rollout.")

    def __post_init__(self):
        at_least(self, 1, "workers", "max_turns")
        above(self, 0, "timeout_s", "make_timeout_s")
        parsed(self.options, "options")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Held-out tasks, before training, at an interval, and after it."""

    tasks: int = option(0, "How many; 0: no evaluation.")
    options: str = option("{}", "Environment options that differ from training's, as JSON.")
    every: int = option(0, "Steps between evaluations; 0: only before and after.")
    samples: int = option(1, "Rollouts of each task, k of avg@k.")
    temperature: float = option(-1.0, "Of evaluations; below 0: training's. 0: likeliest tokens.")
    solved: float = option(1.0, "Reward from which a rollout counts as solved (pass@1).")

    def __post_init__(self):
        at_least(self, 0, "tasks", "every")
        at_least(self, 1, "samples")
        parsed(self.options, "options")


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How completions are drawn, and the engine's sizes on each device."""

    max_tokens: int = option(0, "Tokens of a turn; 0: as many as `seq_len` leaves.")
    temperature: float = option(1.0, "Logits are divided by it, in training, too.")
    top_p: float = option(1.0, "Only the likeliest tokens that have this much probability.")
    top_k: int = option(0, "Only so many likeliest tokens; 0: all.")
    min_p: float = option(0.0, "Only tokens with this much of the likeliest one's probability.")
    slots: int = option(64, "Sequences that a device decodes at once.")
    cache_tokens: int = option(
        0, "Tokens that its cache holds; 0: slots x seq_len, of a GPU's memory 40 % at most."
    )
    weights: Literal["auto", "divided", "whole"] = option(
        "auto",
        "What the trainer's devices draw with: its arrays, each layer gathered for each token "
        "(`divided`), or a copy of all layers on each device (`whole`); `auto`: `whole` on GPUs "
        "where that takes a quarter of the memory at most.",
    )
    page: int = option(32, "Tokens to a page of the cache.")
    decode_steps: int = option(8, "Tokens drawn between two looks at what is waiting.")
    prefill_tokens: int = option(4096, "Prompt tokens that are prefilled together.")
    max_staleness: int = option(
        0,
        "Updates that rollouts may be behind the weights that learn from them; older ones are "
        "dropped. 0: rollouts and updates in turns, more: at the same time.",
    )

    servers: tuple[str, ...] = option(
        (), "URLs of servers that draw the rollouts; none: the trainer's own devices do."
    )
    server_kind: Literal["jaxrl", "vllm", "sglang"] = option("jaxrl", "What those servers are.")
    server_timeout_s: float = option(
        600.0, "Seconds for an answer of theirs, and without any of them, before it is given up."
    )
    server_start_s: float = option(0.0, "Seconds to wait for servers that are not there yet.")
    ray_workers: int = option(
        0, "Actors on a Ray cluster that draw the rollouts, in place of servers."
    )
    ray_address: str = option(
        "", "The cluster's; `auto`: this host's; empty: RAY_ADDRESS's, or a new one of this host."
    )
    ray_gpus: float = option(0.0, "GPUs of each of those actors.")

    @property
    def elsewhere(self) -> bool:
        """Whether other processes draw the rollouts."""
        return bool(self.servers or self.ray_workers)

    def __post_init__(self):
        if self.servers and self.ray_workers:
            raise ConfigError(
                f"ray_workers is {self.ray_workers}, and servers are given, too; give one of them"
            )
        above(self, 0, "server_timeout_s")
        at_least(self, 0, "ray_workers", "ray_gpus")
        at_least(self, 0, "max_tokens", "top_k", "min_p", "cache_tokens", "max_staleness")
        at_least(self, 0, "server_start_s")
        above(self, 0, "temperature", "top_p")
        at_least(self, 1, "slots", "page", "decode_steps", "prefill_tokens")


@dataclasses.dataclass(frozen=True)
class AlgorithmConfig:
    """From rewards to advantages, and which groups are trained on."""

    group_size: int = option(8, "Rollouts of each task.")
    advantage: Literal["mean", "grpo", "leave_one_out", "max_rl"] = option(
        "mean", "Reward less the group's mean; `grpo` over its deviation; see the code for all."
    )
    keep_flat: bool = option(False, "Train on groups of equal rewards, which teach nothing, too.")
    length_penalty: float = option(0.0, "Taken from the reward of a turn of `max_tokens` tokens.")
    length_margin: int = option(0, "Tokens before the limit over which that penalty rises.")

    def __post_init__(self):
        at_least(self, 2, "group_size")
        at_least(self, 0, "length_penalty", "length_margin")
        if self.length_penalty and not self.length_margin:
            raise ConfigError(
                f"length_penalty is {self.length_penalty}, and length_margin, over which it rises, "
                "is 0; give tokens, e.g. a quarter of rollout.max_tokens"
            )
        if self.length_penalty and self.advantage == "max_rl":
            raise ConfigError(
                "advantage max_rl is for rewards that are not negative, which length_penalty makes "
                "of some; choose another, e.g. mean"
            )


@dataclasses.dataclass(frozen=True)
class CurriculumConfig:
    """Which tasks are asked less often, after a group whose mean reward says that the model always
    or never solves them."""

    use: Literal["none", "easy", "hard", "both"] = option("none", "Which tasks are put aside.")
    easy: float = option(1.0, "Mean reward from which a task is easy.")
    hard: float = option(0.0, "Mean reward up to which a task is hard.")
    easy_share: float = option(0.0, "Of an easy task's turns, the share at which it is asked.")
    hard_share: float = option(0.0, "Of a hard task's turns, the share at which it is asked.")

    def __post_init__(self):
        at_least(self, 0, "easy_share", "hard_share")


@dataclasses.dataclass(frozen=True)
class RlLossConfig(LossConfig):
    """The loss of RL runs; the published benchmark's is `LossConfig`."""

    name: Literal["masked_ratio", "dppo_kl", "ppo_clip", "gspo", "cispo"] = option(
        "dppo_kl",
        "`masked_ratio` drops tokens by ratio, `dppo_kl` by probability change; `ppo_clip` (GRPO), "
        "`gspo` (by sequence) and `cispo` clip r.",
    )


@dataclasses.dataclass(frozen=True)
class RlConfig(RunConfig):
    """`python -m jaxrl.rl`: the model, what it learns from, and how."""

    output: str = option("runs/rl", "Folder of the run: checkpoints, metrics, logs.")
    chat_template: str = option("", "Jinja file that replaces the tokenizer's chat template.")
    env: EnvConfig = group(EnvConfig, "The environment.")
    eval: EvalConfig = group(EvalConfig, "Held-out tasks.")
    rollout: RolloutConfig = group(RolloutConfig, "How completions are drawn.")
    algorithm: AlgorithmConfig = group(AlgorithmConfig, "From rewards to advantages.")
    curriculum: CurriculumConfig = group(CurriculumConfig, "Tasks that are asked less often.")
    loss: RlLossConfig = group(RlLossConfig, "The loss.")
    seq_len: int = option(2048, "Tokens of a rollout at most, and of a row; a multiple of 128.")
    share_prompts: Literal["auto", "yes", "no"] = option(
        "auto",
        "Train on the prompt that rollouts begin with once, where that saves micro-batches; "
        "`auto`: if attention can and experts are not balanced by their load.",
    )
    tasks_per_step: int = option(16, "Groups that a step trains on.")
    max_steps: int = option(100, "Optimizer steps.")
    seed: int = option(0, "Seed of adapters, of the tasks' order and of what is drawn.")

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "tasks_per_step", "max_steps")
        check_seq_len(self.seq_len)

    @property
    def step(self) -> StepConfig:
        """The training step's config."""
        return StepConfig(
            type="rl",
            loss=self.loss,
            temperature=self.rollout.temperature,
            context_method=self.mesh.context_method,
            skip_empty=True,
            **dataclasses.asdict(self.train),
        )


def parsed(text: str, name: str) -> dict[str, Any]:
    """A JSON object. Raises ConfigError for anything else."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{name} is {text!r}, no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f'{name} is {text!r}, no JSON object; write e.g. {{"seed": 1}}')
    return found
