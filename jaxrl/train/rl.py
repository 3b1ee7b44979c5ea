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

from jaxrl.cli import HostLostError, OutputError
from jaxrl.data.tokenizer import Tokenizer, load_tokenizer
from jaxrl.models.hf_config import read_config
from jaxrl.models.transformer import merge_trees
from jaxrl.options import ConfigError
from jaxrl.parallel.distributed import any_process, is_reporter
from jaxrl.parallel.first_process import from_first, on_first
from jaxrl.rl_config import RlConfig
from jaxrl.rollout.generation import InTurns
from jaxrl.rollout.rollouts import Group, Rollout
from jaxrl.train.pretrained import find_checkpoint
from jaxrl.train.profile import Profile
from jaxrl.train.program import Program, rl_program
from jaxrl.train.reference import Reference
from jaxrl.train.rl_batch import device_batch, pack_rollouts
from jaxrl.train.rl_groups import training_rollouts, verdict
from jaxrl.train.rl_metrics import each, failures, show, statistics, trace
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
    taken for the step that is to come, `flat` of them with equal rewards."""

    config: RlConfig
    generation: InTurns | Elsewhere
    evaluation: Evaluation | None  # in process 0
    reference: Reference | None
    tokenizer: Tokenizer
    drawn: list[Group] = dataclasses.field(default_factory=list)
    flat: int = 0

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
    """The loop, from `step` on; returns the exit code. The last state is saved, also where those
    who draw are lost, and evaluated unless the run was stopped or gave up."""
    config, stopped, saved = run.config, False, step
    update(run, state, step)
    if step == 0 and config.eval.tasks:
        tell(run, 0, evaluate(run))
    profiles = pathlib.Path(config.output) / "profile"
    with StopSignals() as stop, Profile(config.profile, profiles) as profile:
        while step < config.max_steps and not stopped and not run.gave_up:
            began = time.perf_counter()
            profile.before(step + 1)
            values: dict[str, float] = {}  # of a step that is not told of yet
            try:  # what fails here fails in all processes
                groups = gather_for_all(run, step, stop)
                if groups is not None:
                    state, values = one_step(run, state, step + 1, groups, began)
                    step += 1
                    trained = time.perf_counter()
                    update(run, state, step)
                    synced = time.perf_counter()
                    values |= {"sync_s": synced - trained, "total_s": synced - began}
                    stopped, last = any_process(stop.requested), step == config.max_steps
                    cut_short = stopped or run.gave_up
                    wanted = last or due(config.eval.every, step)
                    if config.eval.tasks and wanted and not cut_short:
                        values |= evaluate(run)
                    told, values = values, {}
                    tell(run, step, told)
            except (ConfigError, HostLostError, OutputError):
                with contextlib.suppress(OutputError):  # the first error is the one to show
                    if values:
                        tell(run, step, values)
                with contextlib.suppress(OutputError):
                    if step > saved:
                        run.save(state, step, run.place)
                        run.checkpoints.wait()
                raise
            if groups is None:  # stopped: the last step is the last
                if step > saved:
                    run.save(state, step, run.place)
                stopped = True
                break
            profile.after(step)
            if cut_short or last or due(config.checkpoint.every, step):
                run.save(state, step, run.place)
                saved = step
        run.checkpoints.wait()
        if step == config.max_steps and not (stopped or run.gave_up) and not evaluated(run, step):
            tell(run, step, evaluate(run))  # a signal came before it, in the run before this
    return report(run, step, stopped)


def one_step(
    run: Run, state: TrainState, step: int, groups: Sequence[Group], began: float
) -> tuple[TrainState, dict[str, float]]:
    """One update on these groups, for which the run has waited since `began`; (the new state, and
    the step's metrics)."""
    gathered = time.perf_counter()
    seen, run.drawn, flat, run.flat = run.drawn, [], run.flat, 0
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
        "groups_flat": flat / len(seen),
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
        "tokens_per_s_train": tokens / (trained - gathered),
        "tokens_per_s_rollout": sum(r.length for r in each(seen)) / max(drawing, 1e-9),
    }
    metered = run.meter.step(rows.lengths, trained - gathered, rows.prefixes)
    del metered["tokens_per_s"]
    values |= {name: value for name, value in metered.items() if name != "step_s"}
    values |= {f"total/{name}": float(n) for name, n in run.counts.items()}
    if is_reporter():
        values |= run.drawing.curriculum_figures()
    show(run.monitor, rollouts[:2], step)
    return state, values


def tell(run: Run, step: int, values: dict[str, float]) -> None:
    """The metrics of a step, to whoever asked for them. Raises OutputError in all processes."""
    from_first(lambda: run.monitor.log(step, values))
    run.console.step(step, values)


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


def evaluated(run: Run, step: int) -> bool:
    """Whether the metrics have an evaluation of this step, or need none."""
    return not run.config.eval.tasks or from_first(
        lambda: any("eval/reward_mean" in line for line in run.monitor.lines(step))
    )


def gather_for_all(run: Run, step: int, stop: StopSignals) -> list[Group] | None:
    """`gather`, which process 0 does for all of them."""
    if jax.process_count() == 1:
        return gather(run, step, stop)

    def ask() -> list[Any] | None:
        found = gather(run, step, stop)
        if found is None:
            return None
        return [(group.number, [r.plain for r in group.rollouts]) for group in found]

    said = from_first(ask)
    if said is None:
        return None
    if not is_reporter():
        run.drawn = [
            Group(number, [Rollout.of_plain(values) for values in rollouts])
            for number, rollouts in said
        ]
    # In one order for all: each host packs all of them, and moves the rows that are its own.
    drawn = {group.number: group for group in run.drawn}
    return [drawn[number] for number, _ in said]


def gather(run: Run, step: int, stop: StopSignals) -> list[Group] | None:
    """The groups that step `step` + 1 trains on: rollouts of tasks until enough have rewards that
    differ. None where a signal came before. `run.drawn` is all that was drawn."""
    config, generation, waits = run.config, run.drawing, PATIENCE * run.config.tasks_per_step
    good: list[Group] = []
    found: collections.Counter[str] = collections.Counter()
    while len(good) < config.tasks_per_step:
        if stop.requested:
            return None
        for group in generation.take(config.tasks_per_step - len(good)):
            run.drawn.append(group)
            trace(config.output, group, step + 1)
            if group.rewards:
                generation.record(group.number, float(np.mean(group.rewards)))
            said = verdict(config, group, step)
            found[said] += 1
            if said == "good" or (said == "flat" and config.algorithm.keep_flat):
                good.append(group)
            else:  # waiting may be long, and memory is not endless
                for rollout in group.rollouts:
                    rollout.forget()
        if len(good) < config.tasks_per_step and len(run.drawn) >= waits:
            waits *= 2
            tell_of_few(run, len(good))
    if stop.requested:
        return None
    run.flat = found["flat"]
    counts = collections.Counter({f"groups_{why}": n for why, n in found.items() if why != "good"})
    counts.update(groups=len(run.drawn), rollouts=sum(len(g.rollouts) for g in run.drawn))
    for reason, count in failures(run.drawn).items():
        counts.update({"failed": count, f"failed_{reason}": count})
    run.counts.update(counts)
    return sorted(good, key=lambda group: group.number)


def tell_of_few(run: Run, good: int) -> None:
    """Say that only `good` of so many groups teach anything. Raises ConfigError where all of them
    failed, and were as many as there are tasks."""
    groups, rollouts = len(run.drawn), list(each(run.drawn))
    reasons = collections.Counter(r.failure for r in rollouts if r.failure).most_common(1)
    why = "".join(f"; {n} x {reason}" for reason, n in reasons)
    if groups >= run.drawing.order.count and all(r.failure for r in rollouts):
        raise ConfigError(
            f"all rollouts of {groups} groups in a row failed, as many groups as there are tasks"
            f"{why}"
        )
    run.console.say(
        f"{good} of {groups} groups have rewards that differ; waiting for more{why}",
        style="yellow",
    )


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
    return (
        f"{program.summary}; {tasks:,} tasks of {config.env.name}, {config.max_steps:,} steps of "
        f"{config.tasks_per_step} tasks x {config.algorithm.group_size} rollouts, loss "
        f"{config.loss.name}"
    )
