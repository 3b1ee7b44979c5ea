"""What runs of SFT and of RL have in common: where scalars go, and how throughput is measured."""

import dataclasses
import pathlib

from jaxrl.models.safetensors_folder import write_json
from jaxrl.monitor import Monitor, Silent
from jaxrl.options import flat
from jaxrl.parallel.distributed import is_reporter
from jaxrl.perf.flops import active_lora_params
from jaxrl.perf.meter import Meter
from jaxrl.rl_config import RlConfig
from jaxrl.sft_config import SftConfig
from jaxrl.trackers import Mlflow, Tracker, Wandb, start
from jaxrl.train.program import Program

type RunConfig = SftConfig | RlConfig


def open_monitor(config: RunConfig, output: pathlib.Path, resumed_at: int | None) -> Monitor:
    """Where the run's scalars go; of processes other than the first, nowhere."""
    if not is_reporter():
        return Silent()
    output.mkdir(parents=True, exist_ok=True)
    shown = flat(dataclasses.asdict(config))
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
