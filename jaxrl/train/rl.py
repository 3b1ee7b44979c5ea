"""Reinforcement learning: from its options to a trained checkpoint.

A step: rollouts of tasks are drawn until enough groups have rewards that differ; the training step
learns from them; the engine goes on with its new parameters. In turns the engine draws with the
trainer's own arrays; otherwise it draws while the trainer steps, with a copy of them. Over several
hosts servers draw: process 0 asks them, scores, and tells the others what to train on.
"""

import collections
import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxrl.data.tokenizer import Tokenizer, load_tokenizer
from jaxrl.models.hf_config import read_config
from jaxrl.models.transformer import merge_trees
from jaxrl.options import ConfigError
from jaxrl.parallel.distributed import any_process, is_reporter
from jaxrl.parallel.first_process import from_first, on_first
from jaxrl.rl_config import RlConfig
from jaxrl.rollout.generation import InTurns
from jaxrl.rollout.rollouts import Group, Rollout
from jaxrl.train.advantages import group_advantages, is_flat, length_penalty
from jaxrl.train.pretrained import find_checkpoint
from jaxrl.train.profile import Profile
from jaxrl.train.program import Program, rl_program
from jaxrl.train.reference import Reference
from jaxrl.train.rl_batch import device_batch, pack_rollouts
from jaxrl.train.rl_metrics import each, failures, statistics, trace
from jaxrl.train.rl_rollouts import (
    Elsewhere,
    Evaluation,
    Rollouts,
    make_engine,
    make_environments,
    make_order,
    make_pool,
)
from jaxrl.train.session import GAVE_UP, Session, begin, due
from jaxrl.train.signals import StopSignals
from jaxrl.train.state import TrainState

# Groups in a row that teach nothing after which the run says that it goes on waiting.
PATIENCE = 5


@dataclasses.dataclass(kw_only=True)
class Run(Session):
    """What the loop works with. `counts`: of rollouts, groups and updates. drawn: groups that were
    taken for the step that is to come."""

    config: RlConfig
    generation: InTurns | Elsewhere
    evaluation: Evaluation | None  # in process 0
    reference: Reference | None
    tokenizer: Tokenizer
    drawn: list[Group] = dataclasses.field(default_factory=list)

    @property
    def place(self) -> dict[str, Any]:
        """Where the run is among its tasks; groups that no step has learned from begin again."""
        return from_first(
            lambda: self.drawing.place([group.number for group in self.drawn]),
        )

    @property
    def drawing(self) -> InTurns:
        """Of process 0."""
        assert isinstance(self.generation, InTurns)
        return self.generation


def train(config: RlConfig) -> int:
    """Train as `config` says; returns the exit code: 0 done or stopped by a signal, 1 gave up.

    Raises ConfigError for input that cannot be used, `cli.OutputError` for a disk that is full.
    """
    if jax.process_count() > 1 and not config.rollout.elsewhere:
        raise ConfigError(
            f"jaxrl.rl was started as {jax.process_count()} processes, which train together on "
            "what servers or Ray's actors draw; give config.rollout.servers or "
            "config.rollout.ray_workers, or start one process"
        )
    environments = make_environments(config)  # before a model is downloaded
    folder = find_checkpoint(config.model)
    model = read_config(folder)
    tokenizer = load_tokenizer(config.tokenizer or folder, model.vocab_size, config.chat_template)
    program = rl_program(config, model, jax.devices())
    order = make_order(config, environments.training)
    with contextlib.ExitStack() as stack:
        session, state, step = begin(
            "rl",
            config,
            program,
            folder,
            order,
            total=config.max_steps,
            first=describe(config, program, order.count),
            stack=stack,
        )
        generation, evaluation = Elsewhere(), None

        def make_generation() -> None:
            nonlocal generation, evaluation
            if config.rollout.elsewhere:
                engine = make_pool(config, program, folder, session.console.say, stack)
            else:
                engine = make_engine(config, program, tokenizer)
            rollouts = Rollouts(config, engine, tokenizer, environments, stack)
            generation, evaluation = rollouts.training(order), rollouts.evaluation()
            if evaluation and evaluation.seen:
                known = f"{evaluation.seen} of the {len(evaluation.tasks)} held-out tasks"
                more = "make more of them in config.eval.options"
                session.console.say(f"{known} are training's, too; {more}", style="yellow")

        from_first(make_generation)
        run = Run(
            **vars(session),
            config=config,
            generation=generation,
            evaluation=evaluation,
            reference=Reference(program.step, folder) if config.loss.ref_kl_coef else None,
            tokenizer=tokenizer,
        )
        return fit(run, state, step)


def fit(run: Run, state: TrainState, step: int) -> int:
    """The loop, from `step` on; returns the exit code. The last state is saved, and evaluated
    unless the run was stopped or gave up."""
    config, stopped = run.config, False
    update(run, state, step)
    if step == 0 and config.eval.tasks:
        values = evaluate(run)
        run.monitor.log(0, values)
        run.console.step(0, values)
    profiles = pathlib.Path(config.output) / "profile"
    with StopSignals() as stop, Profile(config.profile, profiles) as profile:
        while step < config.max_steps and not stopped and not run.gave_up:
            began = time.perf_counter()
            profile.before(step + 1)
            groups = gather_for_all(run, step, stop)
            if groups is None:  # stopped: the last step is the last
                if step:
                    run.save(state, step, run.place)
                stopped = True
                break
            step += 1
            state, values = one_step(run, state, step, groups, began)
            stopped, last = any_process(stop.requested), step == config.max_steps
            cut_short = stopped or run.gave_up
            wanted = last or due(config.eval.every, step)
            if config.eval.tasks and wanted and not cut_short:
                values |= evaluate(run)
            profile.after(step)
            run.monitor.log(step, values)
            run.console.step(step, values)
            if cut_short or last or due(config.checkpoint.every, step):
                run.save(state, step, run.place)
        run.checkpoints.wait()
    return report(run, step, stopped)


def one_step(
    run: Run, state: TrainState, step: int, groups: Sequence[Group], began: float
) -> tuple[TrainState, dict[str, float]]:
    """One update on these groups, for which the run has waited since `began`; (the new state, which
    the engine draws with from now on, and the step's metrics)."""
    gathered = time.perf_counter()
    seen, run.drawn = run.drawn, []
    rollouts, advantages = training_rollouts(run.config, groups)
    rows = pack_rollouts(
        rollouts,
        advantages,
        seq_len=run.program.seq_len,
        rows=run.program.rows,
        micro_batches=run.program.micro_batches,
        pad_id=run.tokenizer.pad_id,
        share_prompts=run.program.shared_prompts,
    )
    batch = device_batch(run.program, rows)
    if run.reference is not None:
        batch = dataclasses.replace(batch, ref_logprobs=run.reference(state, batch))
    with jax.profiler.StepTraceAnnotation("train", step_num=step):
        state, metrics = run.program.step(state, batch)
    fetched = jax.device_get({k: v for k, v in metrics.items() if v.ndim == 0})
    trained = time.perf_counter()
    update(run, state, step)
    synced = time.perf_counter()
    tokens = sum(len(rollout.tokens) for rollout in rollouts)  # shared ones with each of them
    values = {name: float(value) for name, value in fetched.items()}
    values["trained_tokens"] = values.pop("tokens")
    if values.get("skipped"):
        run.counts["updates_skipped"] += 1
        run.bad_in_a_row += 1
    else:
        run.bad_in_a_row = 0
    drawing, run.generation.seconds = run.generation.seconds, 0.0
    values |= statistics(seen, step - 1)
    values |= {
        "groups_trained": float(len(groups)),
        "rollouts_trained": float(len(rollouts)),
        "micro_batches": float(rows.used),
        "fill_pct": 100 * sum(rows.lengths) / (rows.used * run.program.rows * run.program.seq_len),
        # Of the tokens of all rollouts, those that were computed with another one's.
        "shared_pct": 100 * (1 - sum(rows.lengths) / tokens),
        "rollout_s": drawing,
        # What the trainer had nothing to do for while others drew.
        "wait_s": gathered - began if run.generation.overlaps else 0.0,
        "train_s": trained - gathered,
        "sync_s": synced - trained,
        "total_s": synced - began,
        "tokens_per_s_train": tokens / (trained - gathered),
        "tokens_per_s_rollout": sum(r.length for r in each(seen)) / max(drawing, 1e-9),
    }
    metered = run.meter.step(rows.lengths, trained - gathered, rows.prefixes)
    del metered["tokens_per_s"]
    values |= {name: value for name, value in metered.items() if name != "step_s"}
    values |= {f"total/{name}": float(n) for name, n in run.counts.items()}
    if is_reporter():
        trace(run.config.output, run.monitor, seen, step)
    return state, values


def update(run: Run, state: TrainState, version: int) -> None:
    """The engine draws with these parameters from now on."""
    weights = merge_trees(state.params, state.frozen)
    if jax.process_count() > 1:
        weights = handed_over(run.program, state)
    from_first(lambda: run.generation.set_weights(weights, version))


def handed_over(program: Program, state: TrainState) -> Any:
    """In process 0 what is written for servers, in its host's memory: all parameters, or of a model
    with adapters only those; None in the others."""
    if program.layout.is_lora:
        adapters = on_first(state.params)
        return adapters and merge_trees(adapters, state.frozen)
    return on_first(merge_trees(state.params, state.frozen))


def evaluate(run: Run) -> dict[str, float]:
    """Of the engine's parameters."""

    def ask() -> dict[str, float]:
        assert run.evaluation is not None
        with run.drawing.paused():
            return run.evaluation()

    return from_first(ask)


def gather_for_all(run: Run, step: int, stop: StopSignals) -> list[Group] | None:
    """`gather`, which process 0 does for all of them."""
    if jax.process_count() == 1:
        return gather(run, step, stop)

    def ask() -> dict[str, Any] | None:
        found = gather(run, step, stop)
        if found is None:
            return None
        drawn = [(group.number, [r.plain for r in group.rollouts]) for group in run.drawn]
        return {"drawn": drawn, "good": [group.number for group in found]}

    said = from_first(ask)
    if said is None:
        return None
    if not is_reporter():
        run.drawn = [
            Group(number, [Rollout.of_plain(values) for values in rollouts])
            for number, rollouts in said["drawn"]
        ]
    by_number = {group.number: group for group in run.drawn}
    return [by_number[number] for number in said["good"]]


def gather(run: Run, step: int, stop: StopSignals) -> list[Group] | None:
    """The groups that step `step` + 1 trains on: rollouts of tasks until enough have rewards that
    differ. None where a signal came before. `run.drawn` is all that was drawn."""
    config, generation, told = run.config, run.drawing, 0
    good: list[Group] = []
    counts: collections.Counter[str] = collections.Counter()
    while len(good) < config.tasks_per_step:
        if stop.requested:
            return None
        for group in generation.take(config.tasks_per_step - len(good)):
            run.drawn.append(group)
            rewards = group.rewards
            if rewards:
                generation.record(group.number, float(np.mean(rewards)))
            if len(rewards) < 2:
                counts["groups_failed"] += 1
            elif oldest(group) < step - config.rollout.max_staleness:
                counts["groups_stale"] += 1
            elif is_flat(rewards) and not config.algorithm.keep_flat:
                counts["groups_flat"] += 1
            else:
                good.append(group)
        if not good and len(run.drawn) >= (told + 1) * PATIENCE * config.tasks_per_step:
            told += 1
            tell_of_none(run)
    if stop.requested:
        return None
    rollouts = list(each(run.drawn))
    counts.update(groups=len(run.drawn), rollouts=len(rollouts))
    for reason, count in failures(run.drawn).items():
        counts.update({"failed": count, f"failed_{reason}": count})
    run.counts.update(counts)
    return sorted(good, key=lambda group: group.number)


def tell_of_none(run: Run) -> None:
    """Say that no group of so many teaches anything. Raises ConfigError where all of them failed,
    and were as many as there are tasks."""
    groups, rollouts = len(run.drawn), list(each(run.drawn))
    reasons = collections.Counter(r.failure for r in rollouts if r.failure).most_common(1)
    why = "".join(f"; {n} x {reason}" for reason, n in reasons)
    if groups >= run.drawing.order.count and all(r.failure for r in rollouts):
        raise ConfigError(
            f"all rollouts of {groups} groups in a row failed, as many groups as there are tasks"
            f"{why}"
        )
    run.console.say(
        f"{groups} groups in a row have no rewards that differ; waiting for more{why}",
        style="yellow",
    )


def oldest(group: Group) -> int:
    """The version of the oldest weights that drew any of the group's scored rollouts."""
    return min(version for r in group.scored for version in r.versions if version >= 0)


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
    if stopped and not step:
        say("stopped before the first step; nothing is saved, and the same command begins anew")
    elif stopped:
        say(f"stopped at step {step}, which is saved; the same command goes on from there")
    else:
        say(f"done: {step} steps; python -m jaxrl.export {output} OUT_DIR writes the model")
    return 0


def describe(config: RlConfig, program: Program, tasks: int) -> str:
    """The run in one line."""
    mesh = program.layout.mesh
    axes = " x ".join(f"{axis} {n}" for axis, n in mesh.shape.items())
    learn = sum(s.size for s in program.layout.trainable_specs.values())
    return (
        f"{program.layout.model.config.name}: {learn:,} trained parameters on {mesh.size} "
        f"{mesh.devices.flat[0].device_kind} ({axes}); {tasks:,} tasks of "
        f"{config.env.name}, {config.max_steps:,} steps of {config.tasks_per_step} tasks x "
        f"{config.algorithm.group_size} rollouts, loss {config.loss.name}"
    )
