"""What runs of SFT and of RL have in common: how they begin, what they write, when they give up."""

import collections
import contextlib
import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from jaxrl.cli import writing
from jaxrl.models.safetensors_folder import write_json
from jaxrl.monitor import Monitor, Silent
from jaxrl.options import flat
from jaxrl.parallel.distributed import is_reporter
from jaxrl.parallel.first_process import from_first
from jaxrl.perf.flops import active_lora_params
from jaxrl.perf.meter import Meter
from jaxrl.progress import RunConsole
from jaxrl.run_config import RunConfig
from jaxrl.trackers import Mlflow, Tracker, Wandb, start
from jaxrl.train.checkpoint import Checkpoints, Restored
from jaxrl.train.pretrained import completed, kept, load_state
from jaxrl.train.program import Program
from jaxrl.train.resume import Stream, resume
from jaxrl.train.state import TrainState

GAVE_UP = 1  # exit code


@dataclasses.dataclass(kw_only=True)
class Session:
    """What every loop works with. `counts`: since the run began, of what it has seen and done."""

    program: Program
    checkpoints: Checkpoints
    monitor: Monitor
    console: RunConsole
    meter: Meter
    source: Mapping[str, Any]  # what every checkpoint tells of the run, beside its place
    counts: collections.Counter
    max_bad_steps: int
    bad_in_a_row: int = 0

    @property
    def gave_up(self) -> bool:
        return self.bad_in_a_row >= self.max_bad_steps

    def save(self, state: TrainState, step: int, place: Any) -> None:
        """Begin to write a checkpoint of `step`, which all metrics were told of; `place`: in the
        data, behind its batch."""
        held = kept(self.program.layout, state)
        extra = {"data": place, "counts": dict(self.counts)}
        self.checkpoints.save(step, held, {**self.source, **extra})


def begin(
    kind: str,
    config: RunConfig,
    program: Program,
    folder: pathlib.Path,
    stream: Stream,
    *,
    total: int | None,
    first: str,
    stack: contextlib.ExitStack,
) -> tuple[Session, TrainState, int]:
    """(session, state, step) from which the run goes on: at its newest checkpoint, another run's,
    or the weights in `folder`. `stream` is moved to its place.

    total: steps, if known. first: what is said first. Raises as `resume` and `load_state` do.
    """
    output = pathlib.Path(config.output)
    checkpoints = Checkpoints(
        output / "checkpoints",
        keep_last=config.checkpoint.keep_last,
        keep_every=config.checkpoint.keep_every,
    )
    stack.enter_context(checkpoints)
    said = [first]
    restored = resume(config, checkpoints, program.layout, stream, said.append)
    if fresh := restored is None:
        state = load_state(program.layout, folder, jax.random.key(config.seed))
        restored = Restored(0, state, {})
    else:
        state = completed(program.layout, restored.state, folder)
    step, quiet = restored.step, not is_reporter()
    console = RunConsole(total, step, every=config.log_every, quiet=quiet)
    for line in said:
        console.say(line)
    made: list[Monitor] = []

    def make_monitor() -> None:
        made.append(stack.enter_context(open_monitor(config, output, -1 if fresh else step)))

    from_first(make_monitor)
    session = Session(
        program=program,
        checkpoints=checkpoints,
        monitor=made[0] if made else Silent(),
        console=stack.enter_context(console),
        meter=make_meter(config, program),
        source={
            "kind": kind,
            "config": dataclasses.asdict(config),
            "model_folder": str(folder.absolute()),
        },
        counts=collections.Counter(restored.extra.get("counts", {})),
        max_bad_steps=config.max_bad_steps,
    )
    return session, state, step


def due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def open_monitor(config: RunConfig, output: pathlib.Path, resumed_at: int | None) -> Monitor:
    """Where the run's scalars go. Raises OutputError where nothing can be written there."""
    shown = flat(dataclasses.asdict(config))
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "config.json", dataclasses.asdict(config))
    trackers: list[Tracker] = []
    if config.wandb:
        trackers.append(start(Wandb, config.wandb, output, shown))
    if config.mlflow:
        trackers.append(start(Mlflow, config.mlflow, output, shown))
    monitor = Monitor(
        output, tensorboard=config.tensorboard, trackers=trackers, resumed_at=resumed_at
    )
    monitor.options(shown)
    return monitor


def make_meter(config: RunConfig, program: Program) -> Meter:
    model, rank = program.layout.model.config, config.lora_rank
    return Meter(
        model,
        list(program.layout.mesh.devices.flat),
        lora_params=active_lora_params(model, rank, config.lora.targets) if rank else 0,
        dtype=config.train.compute_dtype,
    )
