"""Supervised fine-tuning: from its options to a trained checkpoint."""

import collections
import contextlib
import dataclasses
import functools
import itertools
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxrl.data.chat import SampleError
from jaxrl.data.pipeline import Batches, GlobalBatch, batches, validation_batches
from jaxrl.data.sources import Samples, hold_out, open_samples
from jaxrl.data.tokenizer import Tokenizer, load_tokenizer
from jaxrl.models.hf_config import read_config
from jaxrl.options import ConfigError
from jaxrl.parallel.distributed import any_process, global_batch, is_reporter
from jaxrl.sft_config import SftConfig
from jaxrl.train.batch import Batch
from jaxrl.train.evaluate import Evaluation
from jaxrl.train.pretrained import find_checkpoint
from jaxrl.train.profile import Profile
from jaxrl.train.program import Program, sft_program
from jaxrl.train.session import GAVE_UP, Session, begin, due
from jaxrl.train.signals import StopSignals
from jaxrl.train.state import TrainState


@dataclasses.dataclass(kw_only=True)
class Run(Session):
    """What the loop works with. `counts`: of samples and of updates."""

    config: SftConfig
    evaluation: Evaluation
    stream: Batches
    held_out: Callable[[], Batches] | None
    clock: float = 0.0
    recent: collections.deque = dataclasses.field(default_factory=collections.deque)


@dataclasses.dataclass(frozen=True)
class Pending:
    """A step whose metrics are still on the devices."""

    step: int
    metrics: Mapping[str, jax.Array]
    batch: GlobalBatch
    data_s: float


def train(config: SftConfig) -> int:
    """Train as `config` says; returns the exit code: 0 done or stopped by a signal, 1 gave up.

    Raises ConfigError for input that cannot be used, `cli.OutputError` for a disk that is full.
    """
    samples, held_out = open_data(config)  # before a model is downloaded for nothing
    folder = find_checkpoint(config.model)
    model = read_config(folder)
    tokenizer = load_tokenizer(
        config.tokenizer or folder, model.vocab_size, config.data.chat_template
    )
    stream = batches(
        config.data,
        samples,
        tokenizer,
        batch_size=config.batch_size,
        seed=config.seed,
        epochs=config.epochs,
    )
    total = config.max_steps or stream.estimated_steps()
    program = sft_program(config, model, jax.devices(), total_steps=total)
    with contextlib.ExitStack() as stack:
        stack.callback(stream.close)
        session, state, step = begin(
            "sft",
            config,
            program,
            folder,
            stream,
            total=total,
            first=describe(config, program, samples, total),
            stack=stack,
        )
        run = Run(
            **vars(session),
            config=config,
            evaluation=Evaluation(program.step),
            stream=stream,
            held_out=functools.partial(
                validation_batches,
                config.data,
                held_out,
                tokenizer,
                batch_size=config.batch_size,
            )
            if held_out is not None
            else None,
        )
        run.monitor.text("samples", sample_text(stream, tokenizer), step)
        return fit(run, state, step)


def fit(run: Run, state: TrainState, step: int) -> int:
    """The loop, from `step` on; returns the exit code. The last state is saved, and validated
    unless the run was stopped or gave up."""
    config, done, stopped = run.config, None, False
    saved, profiles = step, pathlib.Path(config.output) / "profile"
    if step == 0 and run.held_out is not None:
        values = validate(run, state)
        run.monitor.log(0, values)
        run.console.step(0, values)
    with (
        StopSignals() as stop,
        Profile(config.profile, profiles) as profile,
        jax.transfer_guard("disallow"),
    ):
        run.clock = time.perf_counter()
        place = run.stream.get_state()
        batch, waited = following(run, step)
        while batch is not None:
            step, place = step + 1, run.stream.get_state()
            profile.before(step)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = run.program.step(state, device_batch(run.program, batch))
            # A step's metrics are fetched while the devices work on the next one.
            last, done = done, Pending(step, metrics, batch, waited)
            if last is not None:
                finish(run, last)
            if run.gave_up:
                break
            stopped = any_process(stop.requested)
            try:
                batch, waited = following(run, step, stopped)
            except ConfigError:  # a sample that cannot be used: nothing before it is lost
                finish(run, done)
                run.save(state, step, place)
                raise
            ends = batch is None
            keep = ends or due(config.checkpoint.every, step)
            evaluate = not stopped and (ends or due(config.eval_every, step))
            if evaluate or keep or profile.ends(step):
                finish(run, done, state if evaluate else None)
                done = None
            if run.gave_up:
                break
            if keep:
                run.save(state, saved := step, place)
            profile.after(step)
        if done is not None:
            finish(run, done)
        if step != saved:
            run.save(state, step, place)
        run.checkpoints.wait()
    return report(run, step, stopped)


def following(run: Run, step: int, stopped: bool = False) -> tuple[GlobalBatch | None, float]:
    """The batch of the step behind `step`, None where the run ends, and seconds waited for it."""
    if stopped or step == run.config.max_steps > 0:
        return None, 0.0
    began = time.perf_counter()
    batch = next(run.stream, None)  # None: all epochs are through
    return batch, time.perf_counter() - began


def finish(run: Run, done: Pending, state: TrainState | None = None) -> None:
    """Wait for a step and tell its metrics; with `state`, also a validation's, if there is data."""
    fetched = jax.device_get({k: v for k, v in done.metrics.items() if v.ndim == 0})
    now = time.perf_counter()
    seconds, run.clock = now - run.clock, now
    values = {k: float(v) for k, v in fetched.items()}
    values["trained_tokens"] = values.pop("tokens")
    run.counts.update(done.batch.counts)
    lengths = done.batch.doc_lengths
    values |= run.meter.step(lengths, seconds) | {
        "data_s": done.data_s,
        "documents": len(lengths),
        "fill_pct": 100 * sum(lengths) / run.program.tokens_per_step,
        "epoch": done.batch.epoch,
    }
    if values.get("skipped"):
        if values["trained_tokens"]:
            run.counts["updates_skipped"] += 1
            run.bad_in_a_row += 1
            run.recent.append((done.step, done.batch))
        else:
            run.counts["batches_without_trained_tokens"] += 1
            run.console.say(f"step {done.step}: no token of its batch is trained; no update")
    else:
        run.bad_in_a_row = 0
        run.recent.clear()
    values |= {f"total/{name}": float(n) for name, n in run.counts.items()}
    if state is not None and run.held_out is not None:
        values |= validate(run, state)
        run.clock = time.perf_counter()  # a validation is no part of a step
    run.monitor.log(done.step, values)
    run.console.step(done.step, values)


def validate(run: Run, state: TrainState) -> dict[str, float]:
    """`eval_loss`, per trained token of the validation data, and how many there were."""
    assert run.held_out is not None
    total = collections.Counter()
    with contextlib.closing(run.held_out()) as held_out:
        for batch in itertools.islice(held_out, run.config.eval_batches or None):
            found = jax.device_get(run.evaluation(state, device_batch(run.program, batch)))
            total.update({name: float(value) for name, value in found.items()})
    if not total["tokens"]:
        raise ConfigError("no token of the validation data is trained; see config.data.validation")
    return {"eval_loss": total["loss"] / total["tokens"], "eval_tokens": total["tokens"]}


def device_batch(program: Program, batch: GlobalBatch) -> Batch:
    """The rows [B, T] of a global batch as micro-batches on the devices; each process moves its
    own."""
    abstract = program.abstract_batch()
    shape = abstract.tokens.shape

    def make(rows: slice) -> Batch:
        def part(a: np.ndarray) -> Any:
            return a.reshape(shape)[:, rows]  # [batch_size, T] -> [M, B, T]

        return Batch(
            tokens=part(batch.tokens),
            loss_mask=part(batch.loss_mask),
            positions=part(batch.positions),
            segment_ids=part(batch.segment_ids),
        )

    return global_batch(abstract, make)


def report(run: Run, step: int, stopped: bool) -> int:
    """Say how the run ended; returns its exit code."""
    say, output = run.console.say, run.config.output
    counts = ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in run.counts.items() if n)
    say(f"data so far: {counts or 'nothing'}")
    if run.gave_up:
        folder = write_aside(run)
        say(
            f"gave up at step {step}: {run.bad_in_a_row} gradients in a row were not finite. Their "
            f"batches are in {folder}; the checkpoint of this step has the parameters as they were "
            "before, and the same command goes on behind those batches",
            style="red",
        )
        return GAVE_UP
    if stopped:
        say(f"stopped at step {step}, which is saved; the same command goes on from there")
    else:
        say(f"done: {step} steps; python -m jaxrl.export {output} OUT_DIR writes the model")
    return 0


def write_aside(run: Run) -> pathlib.Path:
    """The batches of the last steps without an update, as .npz files."""
    folder = pathlib.Path(run.config.output) / "bad_batches"
    if is_reporter():
        folder.mkdir(exist_ok=True)
        for step, batch in run.recent:
            arrays = {
                name: getattr(batch, name)
                for name in ("tokens", "loss_mask", "positions", "segment_ids")
            }
            np.savez_compressed(folder / f"step_{step:06d}.npz", **arrays)
    return folder


def describe(config: SftConfig, program: Program, samples: Samples, total: int | None) -> str:
    """The run in one line."""
    about = "about " if not config.max_steps else "at most " if config.epochs else ""
    steps = f"{about}{total:,} steps" if total else "steps without end"
    return (
        f"{program.summary}; {len(samples):,} samples, {steps} of {program.tokens_per_step:,} "
        f"tokens, {program.micro_batches} micro-batches each"
    )


def sample_text(stream: Batches, tokenizer: Tokenizer, count: int = 3) -> str:
    """The first samples as the model reads them, in markdown; what is trained is bold."""
    texts = []
    for index in range(min(count, len(stream.pack.samples))):
        try:
            document = stream.pack.encode(index)
        except SampleError as error:
            texts.append(str(error))
            continue
        parts = []
        pairs = zip(document.tokens.tolist(), document.mask.tolist(), strict=True)
        for trained, run in itertools.groupby(pairs, key=lambda pair: pair[1]):
            text = tokenizer.hf.decode([token for token, _ in run])
            parts.append(f"**{text}**" if trained else text)
        texts.append("".join(parts).replace("<", "&lt;").replace("\n", "  \n"))
    return "\n\n---\n\n".join(texts)


def open_data(config: SftConfig) -> tuple[Samples, Samples | None]:
    """(training samples, validation samples or None)."""
    if not config.data.train:
        raise ConfigError("config.data.train names no data; e.g. --config.data.train=chats.jsonl")
    samples = open_samples(config.data.train, config.data.split)
    if config.data.validation:
        return samples, open_samples(config.data.validation, config.data.validation_split)
    if config.data.hold_out:
        return hold_out(samples, config.data.hold_out, config.seed)
    return samples, None
