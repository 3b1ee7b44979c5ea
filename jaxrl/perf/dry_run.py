"""What a training run would need, before anything is loaded: `--dry_run`.

The run's own step is compiled, for GPUs that need not be here, and its memory is XLA's buffer
assignment, as of the bench's planned rows.
"""

import dataclasses
import math
import pathlib
import re

import jax
from rich import box
from rich.console import Console
from rich.table import Table

from jaxrl.models.config import ModelConfig
from jaxrl.models.hf_config import read_config
from jaxrl.models.params import specs
from jaxrl.models.presets import PRESETS, preset
from jaxrl.options import ConfigError, flat, show_value
from jaxrl.perf import compile_only
from jaxrl.perf.hardware import GiB, gpu
from jaxrl.perf.plan import plan_memory
from jaxrl.rl_config import RlConfig
from jaxrl.run_config import RunConfig
from jaxrl.sft_config import SftConfig
from jaxrl.train.program import Program, floor_bytes, local_bytes, rl_program, sft_program


def dry_run(config: SftConfig | RlConfig) -> int:
    """Print the resolved options, the parameters and the memory plan; returns the exit code.

    Needs the model's config.json only, or nothing where jaxrl knows the model by its name.
    """
    model = model_config(config.model)
    name, devices = _devices(config.gpu)
    if isinstance(config, SftConfig):
        program = sft_program(config, model, devices)
    else:
        program = rl_program(config, model, devices)
    console = Console()
    console = console if console.is_terminal else Console(width=100)
    console.print(_options_table(config))
    console.print(_parameters_table(program))
    try:
        if isinstance(config, RlConfig) and not config.rollout.elsewhere:
            plan = _plan_rl(config, program, name)
        else:
            plan = _plan_step(program) if name == "CPU" else plan_memory(program, name)[0]
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"this run {error}") from error
    console.print(_plan_table(program, name, plan))
    return 0


def _plan_step(program: Program) -> dict:
    """On this host's CPU."""
    peak = compile_only.memory(program.lower().compile()).peak
    return {"peak_mem_gib": peak / GiB, "floor_mem_gib": floor_bytes(program) / GiB}


def _plan_rl(config: RlConfig, program: Program, name: str) -> dict:
    """Of a run whose own devices draw the rollouts: the engine's needs stand beside the step's."""
    from jaxrl.perf.e2e import plan_engine
    from jaxrl.train.rl_rollouts import engine_parts

    programs, limits = engine_parts(config, program)
    tokens = (limits.pages - 1) * limits.page
    if name != "CPU":
        planned, _ = plan_memory(program, name)
        found = plan_engine(planned, program, programs, limits, name)
        return found | {"cache_tokens": tokens}
    cache = local_bytes(programs.abstract_cache(limits.pages, limits.page)) / GiB
    plan = {key: gib + cache for key, gib in _plan_step(program).items()}
    return plan | {"cache_gib": cache, "cache_tokens": tokens}


def model_config(name: str) -> ModelConfig:
    """Shapes of the model in a checkpoint folder, or of a preset ("Qwen/Qwen3-4B", "Qwen3-4B")."""
    if not name:
        raise ConfigError("config.model names no checkpoint; give a folder or a model's name")
    if pathlib.Path(name).is_dir():
        return read_config(name)
    last = name.rpartition("/")[2]
    if last in PRESETS:
        return preset(last)
    raise ConfigError(
        f"config.model {name!r} is no folder and no model that jaxrl knows; download it first, or "
        f"use one of {', '.join(PRESETS)}"
    )


def _devices(text: str):
    """(name, devices) of "8xH100"; of "", this host's."""
    if not text:
        here = jax.devices()
        if here[0].platform == "cpu":
            return "CPU", here
        text = here[0].device_kind
        try:
            return gpu(text).name, here
        except ValueError as error:
            raise ConfigError(f"this host's {error}; plan for one with config.gpu") from None
    match = re.fullmatch(r"(?:(\d+)x)?(\w+)", text)
    if not match:
        raise ConfigError(f"config.gpu is {text!r}; write COUNTxGPU, e.g. 8xH100")
    try:
        name = gpu(match[2]).name
    except ValueError as error:
        raise ConfigError(f"config.gpu: {error}") from None
    return name, compile_only.topology(name, int(match[1] or 1))


def _table(title: str, *columns: str) -> Table:
    return Table(*columns, title=title, title_justify="left", box=box.SIMPLE, show_edge=False)


def _options_table(config: RunConfig) -> Table:
    table = _table("Options", "option", "value")
    for key, value in flat(dataclasses.asdict(config)).items():
        table.add_row(key, show_value(value))
    return table


def _parameters_table(program: Program) -> Table:
    """Parameters and what of the state each device holds."""
    layout = program.layout
    state = layout.abstract()
    table = _table("State", "", "parameters", "GiB per device")
    learn = sum(s.size for s in layout.trainable_specs.values())
    rest = sum(s.size for s in specs(layout.model).values()) - learn

    def held(tree) -> str:
        parts = jax.tree.leaves(tree)
        here = (math.prod(s.sharding.shard_shape(s.shape)) * s.dtype.itemsize for s in parts)
        return f"{sum(here) / GiB:.2f}"

    table.add_row("trained (fp32)", f"{learn:,}", held(state.params))
    table.add_row("frozen", f"{rest:,}", held(state.frozen))
    table.add_row("optimizer", "", held(state.opt_state))
    return table


def _plan_table(program: Program, name: str, plan: dict) -> Table:
    mesh = program.layout.mesh
    table = _table(f"Plan: {mesh.size}x{name}", "", "")
    axes = " x ".join(f"{axis} {n}" for axis, n in mesh.shape.items())
    table.add_row("mesh", axes)
    rows = f"{program.micro_batches} micro-batches of {program.rows} rows of {program.seq_len}"
    table.add_row("optimizer step", f"{rows} tokens = {program.tokens_per_step:,} tokens")
    for what, implementation in program.kernels.items():
        table.add_row(what, implementation)
    table.add_row("peak memory per device", f"{plan['peak_mem_gib']:.2f} GiB (planned)")
    if name != "CPU":
        memory = f"{gpu(name).memory_gib:.1f} GiB, of which {gpu(name).pool_gib:.1f} can be had"
        table.add_row("memory of the device", memory)
    if "train_peak_gib" in plan:
        table.add_row("while it trains", f"{plan['train_peak_gib']:.2f} GiB")
        table.add_row("while it draws", f"{plan['decode_peak_gib']:.2f} GiB")
    if "cache_gib" in plan:
        of = f"of {plan['cache_tokens']:,} tokens"
        table.add_row("the engine's cache", f"{plan['cache_gib']:.2f} GiB, {of}")
    if plan.get("engine_weights_gib"):
        table.add_row("the engine's weights", f"{plan['engine_weights_gib']:.2f} GiB")
    table.add_row("floor", f"{plan['floor_mem_gib']:.2f} GiB")
    if plan.get("host_mem_gib"):
        table.add_row("pinned host memory", f"{plan['host_mem_gib']:.2f} GiB")
    if "compile_s" in plan:
        table.add_row("compiled in", f"{plan['compile_s']:.0f} s")
    return table
