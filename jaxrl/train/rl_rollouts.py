"""What an RL run's rollouts are drawn with, from its options: engine, environments, collectors."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxrl.data.tokenizer import Tokenizer
from jaxrl.envs.curriculum import Curriculum
from jaxrl.envs.isolated import Isolated
from jaxrl.envs.messages import TaskFailed, take_task
from jaxrl.envs.order import TaskOrder
from jaxrl.envs.protocol import Environment, Task, make_environment
from jaxrl.options import ConfigError
from jaxrl.rl_config import RlConfig, parsed
from jaxrl.rollout.collector import Collector, Generates
from jaxrl.rollout.engine import Engine, EngineLimits
from jaxrl.rollout.generation import InTurns, Overlapped
from jaxrl.rollout.handover import Handover
from jaxrl.rollout.memory import Held, holds_whole_layers, trainers_limits
from jaxrl.rollout.programs import Programs
from jaxrl.rollout.requests import Sampling
from jaxrl.rollout.workers import Worker, WorkerPool
from jaxrl.serve_config import EngineConfig as ServeEngineConfig
from jaxrl.serve_config import ServeConfig, ServerConfig
from jaxrl.train.program import Program


@dataclasses.dataclass(frozen=True)
class Environments:
    """training: the run's tasks; held_out: those of evaluations, None without any. Each with the
    options that it was made with."""

    training: Environment
    training_options: Mapping[str, Any]
    held_out: Environment | None
    held_out_options: Mapping[str, Any]


def make_environments(config: RlConfig) -> Environments:
    """Raises ConfigError where they cannot be made, or there are too few held-out tasks."""
    options = parsed(config.env.options, "env.options")
    training = make_environment(config.env.name, options)
    if not len(training):
        raise ConfigError(
            f"the environment {config.env.name} has no tasks with config.env.options "
            f"{config.env.options!r}; make it with some"
        )
    other, wanted = options | parsed(config.eval.options, "eval.options"), config.eval.tasks
    held_out = make_environment(config.env.name, other) if wanted else None
    if held_out is not None and len(held_out) < wanted:
        raise ConfigError(
            f"config.eval.tasks is {wanted}, and the held-out environment has {len(held_out)}; "
            "make it with more in config.eval.options"
        )
    return Environments(training, options, held_out, other)


def make_order(config: RlConfig, environment: Environment) -> TaskOrder:
    options = config.curriculum
    curriculum = Curriculum(
        config.seed,
        easy=options.easy if options.use in ("easy", "both") else None,
        hard=options.hard if options.use in ("hard", "both") else None,
        easy_share=options.easy_share,
        hard_share=options.hard_share,
    )
    return TaskOrder(len(environment), config.seed, curriculum)


def make_pool(
    config: RlConfig,
    program: Program,
    folder: pathlib.Path,
    say: Callable[[str], None],
    stack: contextlib.ExitStack,
) -> WorkerPool:
    """Of the servers or of the Ray actors that the options ask for, closed with `stack`. Raises
    ConfigError where one is not there."""
    options = config.rollout
    if options.servers:
        layout = program.layout
        vocab_size = layout.model.config.vocab_size
        workers = _servers(config, adapters=layout.is_lora, vocab_size=vocab_size, say=say)
    else:
        from jaxrl.rollout.ray_workers import ray_workers

        if program.step.target.backend == "gpu" and not options.ray_gpus:
            say("Ray's rollout workers get no GPU, and draw on CPUs; see config.rollout.ray_gpus")
        made = ray_workers(
            _served(config, folder),
            options.ray_workers,
            address=options.ray_address,
            gpus=options.ray_gpus,
        )
        workers = stack.enter_context(made)
    weights = pathlib.Path(config.output) / "weights"
    pool = WorkerPool(
        workers,
        Handover(program.layout.model, weights, folder, config.train.compute_dtype),
        say=say,
        patience_s=options.server_timeout_s,
    )
    return stack.enter_context(pool)


def _servers(
    config: RlConfig, *, adapters: bool, vocab_size: int, say: Callable[[str], None]
) -> Sequence[Worker]:
    if importlib.util.find_spec("httpx") is None:
        raise ConfigError('config.rollout.servers needs httpx: pip install "jaxrl[serve]"')
    from jaxrl.rollout.http_workers import http_worker

    options = config.rollout
    workers = [
        http_worker(
            options.server_kind,
            url,
            adapters=adapters,
            vocab_size=vocab_size,
            api_key=os.environ.get("JAXRL_API_KEY", ""),
            timeout_s=options.server_timeout_s,
        )
        for url in options.servers
    ]
    deadline = time.monotonic() + options.server_start_s
    for worker in workers:
        _wait_for(worker, config.seq_len, deadline, say)
    return workers


def _served(config: RlConfig, folder: pathlib.Path) -> ServeConfig:
    """What an actor serves: the run's model, as the trainer's own engine would draw with it."""
    rollout, train = config.rollout, config.train
    return ServeConfig(
        model=str(folder.absolute()),
        tokenizer=config.tokenizer,
        chat_template=config.chat_template,
        lora_rank=config.lora_rank,
        lora=config.lora,
        server=ServerConfig(max_waiting=2**20),
        engine=ServeEngineConfig(
            max_len=config.seq_len,
            slots=rollout.slots,
            cache_tokens=rollout.cache_tokens,
            weights=rollout.weights,
            page=rollout.page,
            decode_steps=rollout.decode_steps,
            prefill_tokens=rollout.prefill_tokens,
            dtype=train.compute_dtype,
            attention=train.attention,
            grouped_matmul=train.grouped_matmul,
            warm_up=False,
        ),
    )


def _wait_for(worker, max_len: int, deadline: float, say: Callable[[str], None]) -> None:
    from jaxrl.rollout.http_workers import ServerMissing

    told = False
    while True:
        try:
            return worker.check(max_len)
        except ServerMissing:
            if time.monotonic() >= deadline:
                raise
        if not told:
            say(f"waiting for the rollout server at {worker.name}")
            told = True
        time.sleep(1.0)


def make_engine(config: RlConfig, program: Program, tokenizer: Tokenizer) -> Engine:
    """On the trainer's devices. Raises ConfigError where its cache has no room there."""
    programs, limits = engine_parts(config, program)
    return Engine(programs, limits, stop_tokens=tokenizer.stop_ids)


def engine_parts(config: RlConfig, program: Program) -> tuple[Programs, EngineLimits]:
    """(what it runs, its sizes). Raises ConfigError as `make_engine`."""
    programs = make_programs(program, config.rollout.weights)
    return programs, trainers_limits(EngineLimits.of(config.rollout, config.seq_len), programs)


def make_programs(program: Program, held: Held = "auto") -> Programs:
    """What an engine runs on the trainer's devices, in its dtype; `held`: see
    `config.rollout.weights`."""
    config, layout = program.step.config, program.layout
    return Programs(
        layout.model,
        layout.mesh,
        dtype=config.compute_dtype,
        attention=config.attention,
        grouped_matmul=config.grouped_matmul,
        whole_layers=holds_whole_layers(held, layout.model, layout.mesh, config.compute_dtype),
    )


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """Makes what draws them, and closes it with `stack`."""

    config: RlConfig
    engine: Generates
    tokenizer: Tokenizer
    environments: Environments
    stack: contextlib.ExitStack

    def training(self, order: TaskOrder) -> InTurns:
        """The groups to train on."""
        config, environments = self.config, self.environments
        environment = environments.training
        collector = self._collector(
            environment,
            environments.training_options,
            group_size=config.algorithm.group_size,
            temperature=config.rollout.temperature,
        )
        late = config.rollout.max_staleness
        if not late:
            return self.stack.enter_context(InTurns(collector, environment, order))
        ahead = (1 + late) * config.tasks_per_step
        return self.stack.enter_context(Overlapped(collector, environment, order, ahead=ahead))

    def evaluation(self) -> "Evaluation | None":
        config, environments = self.config.eval, self.environments
        if environments.held_out is None:
            return None
        temperature = config.temperature
        collector = self._collector(
            environments.held_out,
            environments.held_out_options,
            group_size=config.samples,
            temperature=temperature if temperature >= 0 else self.config.rollout.temperature,
        )
        tasks, seen = held_out_tasks(environments.held_out, environments.training, config.tasks)
        return Evaluation(tasks, seen, collector, config.solved)

    def _collector(
        self,
        environment: Environment,
        options: Mapping[str, Any],
        *,
        group_size: int,
        temperature: float,
    ) -> Collector:
        env, rollout = self.config.env, self.config.rollout
        isolated = Isolated(
            env.name,
            options,
            workers=env.workers,
            timeout_s=env.timeout_s,
            make_s=env.make_timeout_s,
        )
        return Collector(
            self.engine,
            environment,
            self.stack.enter_context(isolated),
            self.tokenizer,
            group_size=group_size,
            sampling=Sampling(
                max_tokens=rollout.max_tokens,
                temperature=temperature,
                top_k=rollout.top_k,
                top_p=rollout.top_p,
                min_p=rollout.min_p,
            ),
            max_len=self.config.seq_len,
            max_turns=env.max_turns,
        )


class Elsewhere:
    """Stands for the generation in processes that draw nothing."""

    overlaps, seconds = False, 0.0

    def set_weights(self, weights: Any, version: int) -> None:
        """Process 0's are to take them."""


def held_out_tasks(
    held_out: Environment, training: Environment, wanted: int
) -> tuple[list[Task], int]:
    """The first `wanted` held-out tasks that training has not. Where there are fewer, those that it
    has follow, and their number is the second of what is returned. Raises ConfigError for a
    held-out task that cannot be asked."""
    trained = set()
    for index in range(len(training)):
        with contextlib.suppress(TaskFailed):  # when its turn comes, it is counted
            trained.add(_content(take_task(training, index)))
    new: list[Task] = []
    seen: list[Task] = []
    for index in range(len(held_out)):
        if len(new) == wanted:
            break
        try:
            task = take_task(held_out, index)
        except TaskFailed as error:
            raise ConfigError(f"held-out task {index}: {error}") from error
        (seen if _content(task) in trained else new).append(task)
    return (new + seen)[:wanted], max(wanted - len(new), 0)


def _content(task: Task) -> str:
    """Alike for two tasks that ask the same, whatever they are called."""
    info = {name: value for name, value in task.info.items() if name != "index"}
    return json.dumps([task.messages, info], sort_keys=True, default=str)


@dataclasses.dataclass
class Evaluation:
    """Held-out tasks, of which training has `seen`, too."""

    tasks: Sequence[Task]
    seen: int
    collector: Collector
    solved: float

    def __call__(self) -> dict[str, float]:
        """avg@k (`eval/reward_mean`), pass@1 and pass@k over all tasks; rollouts that failed have
        no reward and count as 0."""
        groups = self.collector.collect(self.tasks, range(len(self.tasks)))
        rewards = np.array([[r.reward or 0.0 for r in group.rollouts] for group in groups])
        lengths = [r.length for group in groups for r in group.rollouts]
        failed = sum(r.failure is not None for group in groups for r in group.rollouts)
        solved = rewards >= self.solved
        return {
            "eval/reward_mean": float(rewards.mean()),
            "eval/pass@1": float(solved.mean()),
            f"eval/pass@{rewards.shape[1]}": float(solved.any(axis=1).mean()),
            "eval/length_mean": float(np.mean(lengths)),
            "eval/failed": float(failed),
            "eval/seen": float(self.seen),
        }
