"""The options of the commands, as frozen dataclasses that the training code takes too.

Imports no JAX: `--help` and bad input must answer at once. Declared and filled with
`jaxrl.options`.
"""

# ruff: noqa: RUF009 - `option` and `group` are dataclasses.field

import dataclasses
from collections.abc import Sequence
from typing import Literal

from ml_collections import ConfigDict

from jaxrl.options import (
    ConfigError,
    above,
    at_least,
    default_config,
    from_config,
    group,
    option,
    options_table,
)

__all__ = ["ConfigError", "default_config", "from_config", "options_table", "table_config"]

Type = Literal["rl", "sft"]
ActivationCheckpointing = Literal["none", "recompute", "selective", "offload"]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, with global-norm clipping and a learning-rate schedule."""

    name: Literal["adamw", "muon", "adafactor", "sgd"] = option(
        "adamw", "`muon`: layers' matrices, Adam for the rest."
    )
    learning_rate: float = option(1e-6, "Peak learning rate.")
    schedule: Literal["constant", "linear", "cosine", "wsd"] = option(
        "constant", "After warm-up: stay, fall until `total_steps`, or stay and fall last (`wsd`)."
    )
    warmup_steps: int = option(0, "Steps over which the learning rate rises linearly from 0.")
    total_steps: int = option(0, "Step at which the learning rate has fallen; 0: the run's last.")
    decay_steps: int = option(0, "`wsd`: how many of them it falls over, linearly; 0: a tenth.")
    final_fraction: float = option(0.0, "What it falls to, as a fraction of `learning_rate`.")
    weight_decay: float = option(0.01, "Decoupled weight decay.")
    b1: float = option(0.9, "Decay of Adam's first moment.")
    b2: float = option(0.999, "Decay of Adam's second moment.")
    eps: float = option(1e-8, "Added to the root of Adam's second moment.")
    momentum: float = option(0.95, "Decay of the momentum of Muon and SGD.")
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this global norm.")

    def __post_init__(self):
        at_least(self, 0, "learning_rate", "warmup_steps", "weight_decay", "b1", "b2", "eps")
        at_least(self, 0, "momentum", "total_steps", "decay_steps", "final_fraction")
        above(self, 0, "max_grad_norm")
        for name in ("b1", "b2", "momentum"):
            if getattr(self, name) >= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be below 1")
        if self.final_fraction > 1:
            raise ConfigError(f"final_fraction is {self.final_fraction}; it must be at most 1")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The RL loss: r is the ratio of trainer to sampler probability of a token."""

    name: Literal["masked_ratio", "dppo_kl", "ppo_clip", "gspo", "cispo"] = option(
        "masked_ratio",
        "`masked_ratio` drops tokens by ratio, `dppo_kl` by probability change; `ppo_clip` (GRPO), "
        "`gspo` (by sequence) and `cispo` clip r.",
    )
    token_ratio_low: float = option(0.125, "masked_ratio: drop a token whose r is below.")
    token_ratio_high: float = option(8.0, "masked_ratio: drop a token whose r is above.")
    sequence_ratio_low: float = option(
        0.1, "masked_ratio: drop a sequence whose geometric mean of r is below."
    )
    sequence_ratio_high: float = option(
        10.0, "masked_ratio: drop a sequence whose geometric mean of r is above."
    )
    max_ratio: float = option(100.0, "masked_ratio: drop a sequence whose largest r is above.")
    delta: float = option(
        0.2,
        "dppo_kl: drop a token whose probability moved further, the advantage's way.",
    )
    kl_coef: float = option(1e-3, "dppo_kl: weight of (log r)^2.")
    clip_low: float = option(0.2, "ppo_clip, cispo: r is clipped at 1 minus this.")
    clip_high: float = option(0.2, "ppo_clip, cispo: r is clipped at 1 plus this.")
    sequence_clip_low: float = option(3e-4, "gspo: the sequence's r is clipped at 1 minus this.")
    sequence_clip_high: float = option(4e-4, "gspo: the sequence's r is clipped at 1 plus this.")
    ref_kl_coef: float = option(0.0, "Weight of the divergence from the reference model.")

    def __post_init__(self):
        above(self, 0, "token_ratio_low", "sequence_ratio_low", "max_ratio", "delta")
        at_least(self, 0, "kl_coef", "ref_kl_coef", "clip_low", "clip_high")
        at_least(self, 0, "sequence_clip_low", "sequence_clip_high")
        for kind in ("token", "sequence"):
            low, high = (
                getattr(self, f"{kind}_ratio_low"),
                getattr(self, f"{kind}_ratio_high"),
            )
            if low >= high:
                raise ConfigError(
                    f"{kind}_ratio_low is {low}, not below {kind}_ratio_high {high}; "
                    "every token would be dropped"
                )


@dataclasses.dataclass(frozen=True)
class LoraOptions:
    """LoRA (arXiv:2106.09685) beside its rank, which belongs to the row or the recipe."""

    alpha: float = option(32.0, "Adapters are scaled by alpha / rank.")
    targets: tuple[str, ...] = option(
        ("q", "k", "v", "o", "gate", "up", "down"), "Linear maps that get adapters."
    )

    def __post_init__(self):
        known = LoraOptions.targets
        for target in self.targets:
            if target not in known:
                raise ConfigError(f"targets has {target!r}; choose among {', '.join(known)}")
        if not self.targets:
            raise ConfigError(f"targets is empty; choose among {', '.join(known)}")


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """What every training step is asked, whatever its loss."""

    compute_dtype: Literal["bfloat16", "float32"] = option(
        "bfloat16",
        "Dtype of activations and matmuls; master weights are always float32.",
    )
    head_chunk: int = option(0, "Tokens per chunk of the log-prob head; 0 is automatic.")
    mlp_chunk: int = option(0, "Tokens per chunk of the MLP; 0 is automatic.")
    experts_chunk: int = option(0, "Tokens per chunk of expert layers; 0 is automatic.")
    grouped_matmul: Literal["auto", "triton", "tokamax", "xla"] = option(
        "auto", "Implementation of the experts' products."
    )
    router_bias_rate: float = option(
        0.0,
        "What a step adds to the router's bias of experts with less than their share, and takes "
        "from the others (GLM); 0 leaves it.",
    )
    offload_optimizer: bool = option(
        False,
        "Adam's moments live in the host's pinned memory and visit the GPU layer by layer (full "
        "fine-tuning).",
    )

    def __post_init__(self):
        at_least(self, 0, "head_chunk", "mlp_chunk", "experts_chunk", "router_bias_rate")


@dataclasses.dataclass(frozen=True)
class StepConfig(StepOptions):
    """What `jaxrl.train.step.TrainStep` is built from, beside the model and the optimizer."""

    type: Type = option("rl", "RL or SFT loss.")
    ac: ActivationCheckpointing = option("recompute", "What of a layer is kept for backward.")
    attention: str = option("auto", "Attention implementation.")
    loss: LossConfig = group(LossConfig, "The RL loss.")
    temperature: float = option(1.0, "Logits are divided by it before the softmax.")
    context_method: Literal["ring", "ulysses"] = option(
        "ulysses", "How attention works over the context axis."
    )
    routing: Literal["model", "balanced", "zipf"] = option("model", "Who chooses experts.")
    skip_empty: bool = option(
        False, "Last micro-batches without a trained token, and others' logits, cost nothing."
    )


@dataclasses.dataclass(frozen=True)
class TrainConfig(StepOptions):
    """How a row is trained; type, LoRA rank, checkpointing and attention are the row's."""

    optimizer: OptimizerConfig = group(OptimizerConfig, "AdamW, clipping, schedule.")
    loss: LossConfig = group(LossConfig, "The RL loss.")
    lora: LoraOptions = group(LoraOptions, "LoRA beside its rank.")
    temperature: float = option(1.0, "Logits are divided by it before the softmax.")
    routing: Literal["model", "balanced", "zipf"] = option(
        "model",
        "Who chooses experts: the model's routers, or benchmarks' even (`balanced`) or uneven "
        "(`zipf`) draws.",
    )

    def __post_init__(self):
        super().__post_init__()
        above(self, 0, "temperature")

    def step(self, *, type: Type, ac: ActivationCheckpointing, attention: str) -> StepConfig:
        """The step's config for one row."""
        shared = (*(f.name for f in dataclasses.fields(StepOptions)), "loss", "temperature")
        values = {name: getattr(self, name) for name in (*shared, "routing")}
        return StepConfig(type=type, ac=ac, attention=attention, **values)


@dataclasses.dataclass(frozen=True)
class ProxyConfig:
    """The row measured on this host's CPU: the same architecture, cut down to run anywhere."""

    num_layers: int = option(2, "Layers of the proxy.")
    seq_len: int = option(128, "Tokens per sequence; a multiple of 128.")
    batch: int = option(1, "Sequences per micro-batch.")
    tasks: int = option(2, "Prompts of a step of `rl_e2e`, at most.")
    group_size: int = option(4, "Rollouts of each of them, at most.")
    compute_dtype: Literal["bfloat16", "float32"] = option("float32", "Dtype of activations.")

    def __post_init__(self):
        at_least(self, 1, "num_layers", "batch", "tasks", "group_size")
        check_seq_len(self.seq_len)


@dataclasses.dataclass(frozen=True)
class E2eConfig:
    """A step of `rl_e2e` rows: every rollout fills a row of `seq_len` tokens."""

    tasks: int = option(8, "Prompts of a step.")
    group_size: int = option(8, "Rollouts of each prompt.")
    prompt_tokens: int = option(0, "Tokens of a prompt; 0: a quarter of `seq_len`.")
    slots: int = option(64, "Sequences that a device decodes at once, at most.")

    def __post_init__(self):
        at_least(self, 1, "tasks", "group_size", "slots")
        at_least(self, 0, "prompt_tokens")


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """`python -m jaxrl.bench`: which rows, how, and where results go."""

    model: str = option("", "Preset of rows that name none, e.g. Qwen3-0.6B.")
    table: tuple[str, ...] = option(
        (),
        "Rows, each like `rl lora16 16384 recompute fa3 8xH100` (`full` for no LoRA), with or "
        "without a model's name before it.",
    )
    rows: str = option("", "Only rows with these values, e.g. `gpu=H100|A6000,type=rl`.")
    mode: Literal["auto", "planned", "measured", "proxy"] = option(
        "auto",
        "`auto` measures rows whose GPUs this host has, plans the others, and adds one proxy row.",
    )
    output: str = option("runs/bench", "Folder for results; finished rows in it are reused.")
    resume: bool = option(True, "Reuse finished rows of the same settings, versions and source.")
    baseline: str = option(
        "prime_rl",
        "Published table to compare with: a name in `bench/baselines` or a CSV file.",
    )
    jobs: int = option(0, "Rows planned at once; 0 is one per CPU core.")
    time_limit_s: float = option(1800.0, "Seconds after which a row is stopped and has failed.")
    join_timeout_s: float = option(
        600.0, "Many hosts: seconds that one waits for the others to start."
    )
    tensorboard: bool = option(True, "Write TensorBoard scalars under the output folder.")
    profile: bool = option(False, "Write a trace of measured rows for TensorBoard's profiler.")
    profile_steps: int = option(2, "Steps in that trace.")
    warmup_steps: int = option(2, "Steps before the timed ones.")
    steps: int = option(10, "Timed steps of a measured row; at least 10.")
    micro_batches: int = option(2, "Micro-batches accumulated per optimizer step.")
    seed: int = option(0, "Seed of weights and fake data.")
    train: TrainConfig = group(TrainConfig, "How rows are trained.")
    e2e: E2eConfig = group(E2eConfig, "Rollouts of rows that draw them.")
    proxy: ProxyConfig = group(ProxyConfig, "The row measured on this host's CPU.")

    def __post_init__(self):
        at_least(self, 0, "jobs", "seed")
        at_least(self, 1, "profile_steps", "warmup_steps", "micro_batches")
        at_least(self, 10, "steps")
        above(self, 0, "time_limit_s", "join_timeout_s")


def table_config(
    model: str, table: Sequence[str], arg: str = "", extra: Sequence[str] = ()
) -> ConfigDict:
    """The ConfigDict of a benchmark table, for a config file's `get_config(arg)`.

    arg: a filter of rows as `BenchConfig.rows`; with "extra" before it, or alone, of the rows
    `extra` instead of those of `table`.
    """
    first, _, rest = arg.partition(",")
    if first.strip() == "extra":
        if not extra:
            raise ConfigError(f"{model or 'this table'} has no extra rows; leave 'extra' out")
        table, arg = extra, rest
    return default_config(BenchConfig, model=model, table=tuple(table), rows=arg)


def check_seq_len(seq_len: int) -> None:
    """Raise ConfigError unless `seq_len` is a positive multiple of 128, naming the nearest."""
    if seq_len < 1 or seq_len % 128:
        nearest = max(128, (seq_len + 64) // 128 * 128)
        raise ConfigError(f"seq_len {seq_len} is no positive multiple of 128; use {nearest}")
