"""Measure a row: run its program on devices that are here, step by step."""

import contextlib
import dataclasses
import pathlib
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from jaxrl.config import BenchConfig, E2eConfig
from jaxrl.data.fake import fake_batch
from jaxrl.models.config import ModelConfig
from jaxrl.models.presets import preset
from jaxrl.parallel.distributed import global_batch, in_order, is_reporter
from jaxrl.perf import flops
from jaxrl.perf.compile_only import memory
from jaxrl.perf.e2e import cache_bytes, time_e2e
from jaxrl.perf.hardware import GiB, gpu, measure_matmul_peak
from jaxrl.perf.plan import compiled_attention, count_flops, program_for
from jaxrl.perf.rows import CPU, Row
from jaxrl.train.program import Program, floor_bytes

# progress(stage, step, of, **scalars)
type Progress = Callable[..., None]


def measure_row(row: Row, config: BenchConfig, progress: Progress) -> dict[str, Any]:
    """Compile, warm up, time `config.steps` steps one by one; the keys of `results.jsonl`.

    A row whose gpu is "CPU" is this host's proxy: fewer layers, `config.proxy`'s shape, and MFU
    against the matmul peak measured here, in the same process, just before.

    Where several processes run the row together, process 0 has the numbers; the others have only
    the peak memory of their own devices.
    """
    progress("compiling")
    if proxy := row.gpu == CPU:
        config = dataclasses.replace(config, e2e=_proxy_e2e(config))
    program = _proxy_program(row, config) if proxy else _gpu_program(row, config)
    start = time.perf_counter()
    compiled = program.lower().compile()
    compile_s = time.perf_counter() - start
    if not is_reporter() and not row.is_e2e:
        _time_steps(program, compiled, row, config, progress)
        return {"peak_mem_gib": _peak_memory(program) / GiB}
    text = compiled.as_text() or ""
    counted = count_flops(program, text)
    # A proxy's peak is measured before and after: a busy moment must not pass for the host's best.
    dtype = program.step.config.compute_dtype
    peak = measure_matmul_peak(dtype) if proxy else gpu(row.gpu).bf16_flops
    phases: dict[str, float] = {}
    if row.is_e2e:
        times, phases = time_e2e(program, compiled, config, progress)
    else:
        times = _time_steps(program, compiled, row, config, progress)
    if proxy:
        peak = max(peak, measure_matmul_peak(dtype))
    seconds = statistics.median(times)
    tps = program.tokens_per_step / seconds
    devices = program.layout.mesh.size
    model = program.layout.model.config
    floor = floor_bytes(program) + (cache_bytes(program, config) if row.is_e2e else 0)
    low, _, high = statistics.quantiles(times, n=4)
    result = {
        "attn_compiled": compiled_attention(text, program),
        "mfu_pct": 100 * flops.mfu(counted["model_flops_per_token"], tps, peak, devices),
        "hfu_pct": 100 * counted["hardware_flops_per_step"] / seconds / (peak * devices),
        "tps": tps,
        "step_time_s": seconds / program.micro_batches,
        "step_time_iqr_s": (high - low) / program.micro_batches,
        "peak_mem_gib": _peak_memory(program) / GiB,
        "floor_mem_gib": floor / GiB,
        "host_mem_gib": memory(compiled).host_gib,
        "compile_s": compile_s,
        "num_layers": model.num_layers,
        "peak_flops": peak,
        **counted,
        **phases,
    }
    lora = (
        flops.lora_params(model, row.lora_rank, config.train.lora.targets) if row.lora_rank else 0
    )
    page = flops.primerl_flops_per_token(model, row.seq_len, lora_params=lora)
    page_peak = peak if proxy else gpu(row.gpu).primerl_bf16_flops
    result["mfu_primerl_pct"] = 100 * flops.mfu(page, tps, page_peak, devices)
    return result


def _gpu_program(row: Row, config: BenchConfig) -> Program:
    kinds, hosts = gpu(row.gpu).device_kinds, jax.process_count()
    devices = in_order(d for d in jax.devices() if d.device_kind in kinds)
    # Over several hosts every GPU takes part, or a host would wait for a program it has no part of.
    if len(devices) < row.num_gpus or (hosts > 1 and len(devices) > row.num_gpus):
        where = f"these {hosts} hosts have" if hosts > 1 else "this host has"
        raise ValueError(f"{row.hardware} asked for, and {where} {len(devices)} {row.gpu}")
    return program_for(row, config, devices[: row.num_gpus])


def _proxy_program(row: Row, config: BenchConfig) -> Program:
    proxy = config.proxy
    return program_for(
        dataclasses.replace(row, seq_len=proxy.seq_len),
        config,
        jax.devices("cpu")[:1],
        model=proxy_model(preset(row.model), proxy.num_layers),
        rows_per_device=proxy.batch,
        compute_dtype=proxy.compute_dtype,
    )


def _proxy_e2e(config: BenchConfig) -> E2eConfig:
    """A step of few rollouts; prompts that do not fit the proxy's rows are a quarter of them."""
    e2e, proxy = config.e2e, config.proxy
    return dataclasses.replace(
        e2e,
        tasks=min(e2e.tasks, proxy.tasks),
        group_size=min(e2e.group_size, proxy.group_size),
        prompt_tokens=e2e.prompt_tokens if e2e.prompt_tokens < proxy.seq_len else 0,
    )


def proxy_model(model: ModelConfig, num_layers: int) -> ModelConfig:
    """The model cut down to `num_layers`; with experts, also to a size that fits a laptop: dense
    layers no more than half of all, 8 experts of which a token gets 2, and 32,768 tokens."""
    if not model.num_experts:
        return model.replace(num_layers=num_layers)
    return model.replace(
        num_layers=num_layers,
        first_k_dense=min(model.first_k_dense, num_layers // 2),
        num_experts=min(model.num_experts, 8),
        num_experts_per_tok=min(model.num_experts_per_tok, 2),
        vocab_size=min(model.vocab_size, 32768),
    )


def _time_steps(
    program: Program, compiled, row: Row, config: BenchConfig, progress: Progress
) -> list[float]:
    """Seconds of each timed step, the device synchronised before and after."""
    state = program.layout.initialize(jax.random.key(config.seed))
    shape = (program.micro_batches, program.rows, program.seq_len)
    batch = global_batch(
        program.abstract_batch(),
        lambda rows: fake_batch(row.type, *shape, seed=config.seed, only=rows),
    )
    times = []
    with jax.transfer_guard("disallow"):
        for i in range(config.warmup_steps):
            progress("warming up", i + 1, config.warmup_steps)
            state, metrics = jax.block_until_ready(compiled(state, batch))
        for i in range(config.steps):
            start = time.perf_counter()
            state, metrics = jax.block_until_ready(compiled(state, batch))
            times.append(time.perf_counter() - start)
            loss, norm = (float(jax.device_get(metrics[k])) for k in ("loss", "grad_norm"))
            progress("step", i + 1, config.steps, loss=loss, grad_norm=norm, step_s=times[-1])
        if config.profile:
            folder = pathlib.Path(config.output) / "profile" / row.slug
            with _trace(folder) if is_reporter() else contextlib.nullcontext():
                for i in range(config.profile_steps):
                    progress("profiling", i + 1, config.profile_steps)
                    with jax.profiler.StepTraceAnnotation("train", step_num=i):
                        state, _ = jax.block_until_ready(compiled(state, batch))
    return times


@contextlib.contextmanager
def _trace(folder: pathlib.Path):
    folder.mkdir(parents=True, exist_ok=True)
    with jax.transfer_guard("allow"), jax.profiler.trace(str(folder)):
        yield


def _peak_memory(program: Program) -> int:
    """Peak bytes in use, the most over this process's devices; on CPU its peak resident size."""
    stats = [d.memory_stats() for d in program.layout.mesh.local_devices]
    if all(s is None for s in stats):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return max(s["peak_bytes_in_use"] for s in stats if s)
