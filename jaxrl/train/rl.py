"""Reinforcement learning: from its options to a trained checkpoint.

A step: the engine, on the trainer's own arrays, draws rollouts of tasks until enough groups have
rewards that differ; the training step learns from them; its new arrays are the engine's next ones.
"""

import collections
import contextlib
import dataclasses
import itertools
import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxrl.data.tokenizer import Tokenizer, load_tokenizer
from jaxrl.envs.isolated import Isolated
from jaxrl.envs.order import TaskOrder
from jaxrl.envs.protocol import Environment, make_environment
from jaxrl.models.hf_config import read_config
from jaxrl.models.transformer import merge_trees
from jaxrl.options import ConfigError
from jaxrl.parallel.distributed import global_batch
from jaxrl.rl_config import RlConfig, parsed
from jaxrl.rollout.collector import Collector
from jaxrl.rollout.engine import Engine, EngineLimits
from jaxrl.rollout.programs import Programs
from jaxrl.rollout.requests import Sampling
from jaxrl.rollout.rollouts import Group, Rollout
from jaxrl.train.advantages import group_advantages, is_flat, length_penalty
from jaxrl.train.batch import Batch
from jaxrl.train.pretrained import find_checkpoint
from jaxrl.train.program import Program, rl_program
from jaxrl.train.rl_batch import RlRows, pack_rollouts
from jaxrl.train.session import GAVE_UP, Session, begin, due
from jaxrl.train.signals import StopSignals
from jaxrl.train.state import TrainState

# Groups in a row that teach nothing after which the run says that it goes on waiting.
PATIENCE = 5


@dataclasses.dataclass(kw_only=True)
class Run(Session):
    """What the loop works with. `counts`: of rollouts, groups and updates."""

    config: RlConfig
    engine: Engine
    environment: Environment
    collector: Collector
    order: TaskOrder
    evaluation: "Evaluation | None"
    tokenizer: Tokenizer


@dataclasses.dataclass
class Evaluation:
    """Held-out tasks: the first of an environment of their own."""

    environment: Environment
    collector: Collector
    tasks: int
    solved: float

    def __call__(self) -> dict[str, float]:
        """avg@k (`eval/reward_mean`), pass@1 and pass@k over all tasks; rollouts that failed have
        no reward and count as 0."""
        tasks = [self.environment.task(i) for i in range(self.tasks)]
        groups = self.collector.collect(tasks, range(self.tasks))
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
        }


def train(config: RlConfig) -> int:
    """Train as `config` says; returns the exit code: 0 done or stopped by a signal, 1 gave up.

    Raises ConfigError for input that cannot be used, `cli.OutputError` for a disk that is full.
    """
    if jax.process_count() > 1:
        raise ConfigError(
            f"jaxrl.rl was started as {jax.process_count()} processes, and is one program over one "
            "host's devices so far; start one"
        )
    options = parsed(config.env.options, "env.options")
    environment = make_environment(config.env.name, options)  # before a model is downloaded
    held_out_options = options | parsed(config.eval.options, "eval.options")
    held_out = held_out_environment(config, held_out_options)
    folder = find_checkpoint(config.model)
    model = read_config(folder)
    tokenizer = load_tokenizer(config.tokenizer or folder, model.vocab_size, config.chat_template)
    program = rl_program(config, model, jax.devices())
    order = TaskOrder(len(environment), config.seed)
    with contextlib.ExitStack() as stack:
        session, state, step = begin(
            "rl",
            config,
            program,
            folder,
            order,
            total=config.max_steps,
            first=describe(config, program, environment),
            stack=stack,
        )
        engine = make_engine(config, program, tokenizer)
        evaluation = None
        if held_out is not None:
            temperature = config.eval.temperature
            collector = make_collector(
                config,
                engine,
                held_out,
                held_out_options,
                tokenizer,
                stack,
                group_size=config.eval.samples,
                temperature=temperature if temperature >= 0 else config.rollout.temperature,
            )
            evaluation = Evaluation(held_out, collector, config.eval.tasks, config.eval.solved)
        run = Run(
            **vars(session),
            config=config,
            engine=engine,
            environment=environment,
            collector=make_collector(
                config,
                engine,
                environment,
                options,
                tokenizer,
                stack,
                group_size=config.algorithm.group_size,
                temperature=config.rollout.temperature,
            ),
            order=order,
            evaluation=evaluation,
            tokenizer=tokenizer,
        )
        return fit(run, state, step)


def fit(run: Run, state: TrainState, step: int) -> int:
    """The loop, from `step` on; returns the exit code. The last state is saved, and evaluated
    unless the run was stopped or gave up."""
    config, stopped = run.config, False
    if step == 0 and run.evaluation is not None:
        update(run, state, step)
        values = run.evaluation()
        run.monitor.log(0, values)
        run.console.step(0, values)
    with StopSignals() as stop:
        while step < config.max_steps and not stopped and not run.gave_up:
            step += 1
            state, values = one_step(run, state, step)
            stopped, last = stop.requested, step == config.max_steps
            cut_short = stopped or run.gave_up
            evaluate = not cut_short and (last or due(config.eval.every, step))
            if run.evaluation is not None and evaluate:
                update(run, state, step)
                values |= run.evaluation()
            run.monitor.log(step, values)
            run.console.step(step, values)
            if cut_short or last or due(config.checkpoint.every, step):
                run.save(state, step, place(run))
        run.checkpoints.wait()
    return report(run, step, stopped)


def one_step(run: Run, state: TrainState, step: int) -> tuple[TrainState, dict[str, float]]:
    """Rollouts and one update; (the new state, the step's metrics)."""
    began = time.perf_counter()
    update(run, state, step - 1)
    synced = time.perf_counter()
    groups, seen = gather(run)
    drawn = time.perf_counter()
    rollouts, advantages = training_rollouts(run.config, groups)
    rows = pack_rollouts(
        rollouts,
        advantages,
        seq_len=run.program.seq_len,
        rows=run.program.rows,
        micro_batches=run.program.micro_batches,
        pad_id=run.tokenizer.pad_id,
    )
    state, metrics = run.program.step(state, device_batch(run.program, rows))
    fetched = jax.device_get({k: v for k, v in metrics.items() if v.ndim == 0})
    ended = time.perf_counter()
    values = {name: float(value) for name, value in fetched.items()}
    values["trained_tokens"] = values.pop("tokens")
    if values.get("skipped"):
        run.counts["updates_skipped"] += 1
        run.bad_in_a_row += 1
    else:
        run.bad_in_a_row = 0
    values |= statistics(seen, step - 1)
    values |= {
        "groups_trained": float(len(groups)),
        "rollouts_trained": float(len(rollouts)),
        "micro_batches": float(rows.used),
        "fill_pct": 100 * sum(rows.lengths) / (rows.used * run.program.rows * run.program.seq_len),
        "sync_s": synced - began,
        "rollout_s": drawn - synced,
        "train_s": ended - drawn,
        "wait_s": 0.0,  # the trainer and the engine take turns
        "total_s": ended - began,
        "tokens_per_s_rollout": sum(r.length for g in seen for r in g.rollouts) / (drawn - synced),
    }
    metered = run.meter.step(rows.lengths, ended - drawn)
    values["tokens_per_s_train"] = metered.pop("tokens_per_s")
    values |= {name: value for name, value in metered.items() if name != "step_s"}
    values |= {f"total/{name}": float(n) for name, n in run.counts.items()}
    trace(run, seen, step)
    return state, values


def update(run: Run, state: TrainState, version: int) -> None:
    """The engine draws with these parameters from now on; nothing is copied."""
    run.engine.set_weights(merge_trees(state.params, state.frozen), version)


def gather(run: Run) -> tuple[list[Group], list[Group]]:
    """(groups to train on, all that finished): rollouts of tasks until a step's groups have
    rewards that differ."""
    config, collector, order = run.config, run.collector, run.order
    good, seen, told = [], [], 0
    while len(good) < config.tasks_per_step:
        while len(good) + len(collector.in_flight) < config.tasks_per_step:
            number, index = order.take()
            collector.start(number, run.environment.task(index), order.draw_seed(number))
        for group in collector.poll():
            seen.append(group)
            rewards = group.rewards
            if len(rewards) < 2:
                run.counts["groups_failed"] += 1
            elif is_flat(rewards) and not config.algorithm.keep_flat:
                run.counts["groups_flat"] += 1
            else:
                good.append(group)
        if not good and len(seen) >= (told + 1) * PATIENCE * config.tasks_per_step:
            told += 1
            reasons = collections.Counter(r.failure for g in seen for r in g.rollouts if r.failure)
            why = f"; failures: {reasons.most_common(1)[0][0]}" if reasons else ""
            run.console.say(
                f"{len(seen)} groups in a row have no rewards that differ; waiting for more{why}",
                style="yellow",
            )
    run.counts.update(groups=len(seen))
    for name, count in run.collector.counts.items():
        run.counts[name.replace("failed: ", "failed_")] += count
    run.collector.counts.clear()
    return sorted(good, key=lambda group: group.number), seen


def training_rollouts(
    config: RlConfig, groups: Sequence[Group]
) -> tuple[list[Rollout], list[float]]:
    """The groups' scored rollouts, and the advantage of each."""
    rollouts, advantages = [], []
    options = config.algorithm
    limit = config.rollout.max_tokens or config.seq_len
    for group in groups:
        rewards = np.array(group.rewards, np.float64)
        lengths = [rollout.length for rollout in group.scored]
        margin = options.length_margin
        rewards = rewards - options.length_penalty * length_penalty(lengths, limit, margin)
        rollouts += group.scored
        advantages += group_advantages(rewards, options.advantage).tolist()
    return rollouts, advantages


def statistics(groups: Sequence[Group], version: int) -> dict[str, float]:
    """Of all rollouts of a step: rewards, lengths, how old, how hard the tasks were."""
    rollouts = [r for group in groups for r in group.rollouts]
    scored = [r for r in rollouts if r.reward is not None]
    rewards = np.array([reward for g in groups for reward in g.rewards] or [0.0])
    flat = [g for g in groups if len(g.rewards) > 1 and is_flat(g.rewards)]
    means = [np.mean(g.rewards) for g in groups if g.rewards]
    spreads = [np.std(g.rewards) for g in groups if g.rewards]
    ages = [version - v for r in scored for v in r.versions if v >= 0]
    values = {
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "group_reward_min": float(min(means, default=0.0)),
        "group_reward_max": float(max(means, default=0.0)),
        "group_reward_std": float(np.mean(spreads)) if spreads else 0.0,
        "groups_flat": len(flat) / len(groups),
        "staleness": float(np.mean(ages)) if ages else 0.0,
        "staleness_max": float(max(ages, default=0)),
        "length_mean": float(np.mean([r.length for r in rollouts])),
        "length_max": float(max(r.length for r in rollouts)),
        "truncated": float(np.mean([r.truncated for r in rollouts])),
        "failed": float(np.mean([r.failure is not None for r in rollouts])),
    }
    names = {name for r in scored for name in r.figures}
    return values | {
        f"env/{name}": float(np.mean([r.figures[name] for r in scored if name in r.figures]))
        for name in sorted(names)
    }


def trace(run: Run, groups: Sequence[Group], step: int) -> None:
    """Every rollout as a line of rollouts.jsonl, the step's first ones as TensorBoard text."""
    with (pathlib.Path(run.config.output) / "rollouts.jsonl").open("a", encoding="utf-8") as file:
        for group, rollout in ((g, r) for g in groups for r in g.rollouts):
            line = {
                "step": step,
                "group": group.number,
                "task": rollout.task.id,
                "messages": rollout.messages,
                "reward": rollout.reward,
                "figures": rollout.figures,
                "tokens": rollout.length,
                "truncated": rollout.truncated,
                "failure": rollout.failure,
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    shown = [
        f"reward {rollout.reward}  \n"
        + "  \n".join(f"**{m['role']}**: {m['content']}" for m in rollout.messages)
        for rollout in itertools.islice((r for g in groups for r in g.rollouts), 2)
    ]
    run.monitor.text("rollouts", "\n\n---\n\n".join(shown).replace("<", "&lt;"), step)


def device_batch(program: Program, rows: RlRows) -> Batch:
    """The rows on the devices; each process moves its own."""

    def make(here: slice) -> Batch:
        def part(a: np.ndarray) -> Any:
            return a[:, here]

        return Batch(
            tokens=part(rows.tokens),
            loss_mask=part(rows.loss_mask),
            positions=part(rows.positions),
            segment_ids=part(rows.segment_ids),
            advantages=part(rows.advantages),
            sampler_logprobs=part(rows.sampler_logprobs),
        )

    return global_batch(program.abstract_batch(), make)


def place(run: Run) -> dict[str, Any]:
    """Where the run is among its tasks. Groups that are in flight are begun again."""
    return run.order.get_state(run.collector.in_flight)


def report(run: Run, step: int, stopped: bool) -> int:
    """Say how the run ended; returns its exit code."""
    say, output = run.console.say, run.config.output
    counts = ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in run.counts.items() if n)
    say(f"so far: {counts or 'nothing'}")
    if run.gave_up:
        say(
            f"gave up at step {step}: {run.bad_in_a_row} gradients in a row were not finite; the "
            "checkpoint of this step has the parameters as they were before",
            style="red",
        )
        return GAVE_UP
    if stopped:
        say(f"stopped at step {step}, which is saved; the same command goes on from there")
    else:
        say(f"done: {step} steps; python -m jaxrl.export {output} OUT_DIR writes the model")
    return 0


def describe(config: RlConfig, program: Program, environment: Environment) -> str:
    """The run in one line."""
    mesh = program.layout.mesh
    axes = " x ".join(f"{axis} {n}" for axis, n in mesh.shape.items())
    learn = sum(s.size for s in program.layout.trainable_specs.values())
    return (
        f"{program.layout.model.config.name}: {learn:,} trained parameters on {mesh.size} "
        f"{mesh.devices.flat[0].device_kind} ({axes}); {len(environment):,} tasks of "
        f"{config.env.name}, {config.max_steps:,} steps of {config.tasks_per_step} tasks x "
        f"{config.algorithm.group_size} rollouts, loss {config.loss.name}"
    )


def make_engine(config: RlConfig, program: Program, tokenizer: Tokenizer) -> Engine:
    options, layout = config.rollout, program.layout
    return Engine(
        Programs(
            layout.model,
            layout.mesh,
            dtype=config.train.compute_dtype,
            attention=config.train.attention,
            grouped_matmul=config.train.grouped_matmul,
        ),
        EngineLimits(
            slots=options.slots,
            max_len=config.seq_len,
            cache_tokens=options.cache_tokens,
            page=options.page,
            steps=options.decode_steps,
            prefill_tokens=options.prefill_tokens,
        ),
        stop_tokens=tokenizer.stop_ids,
    )


def make_collector(
    config: RlConfig,
    engine: Engine,
    environment: Environment,
    options: Mapping[str, Any],
    tokenizer: Tokenizer,
    stack: contextlib.ExitStack,
    *,
    group_size: int,
    temperature: float,
) -> Collector:
    """Of rollouts of an environment that was made with `options`."""
    env, rollout = config.env, config.rollout
    isolated = Isolated(env.name, options, workers=env.workers, timeout_s=env.timeout_s)
    return Collector(
        engine,
        environment,
        stack.enter_context(isolated),
        tokenizer,
        group_size=group_size,
        sampling=Sampling(
            max_tokens=rollout.max_tokens,
            temperature=temperature,
            top_k=rollout.top_k,
            top_p=rollout.top_p,
            min_p=rollout.min_p,
        ),
        max_len=config.seq_len,
        max_turns=env.max_turns,
    )


def held_out_environment(config: RlConfig, options: Mapping[str, Any]) -> Environment | None:
    """The one of evaluations; None without any."""
    wanted = config.eval.tasks
    if not wanted:
        return None
    environment = make_environment(config.env.name, options)
    if len(environment) < wanted:
        raise ConfigError(
            f"config.eval.tasks is {wanted}, and the held-out environment has {len(environment)}; "
            "make it with more in config.eval.options"
        )
    return environment
