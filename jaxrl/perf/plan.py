"""Plan a row: compile its program for GPUs that are not here, and read what it would need."""

import dataclasses
import math
import re
import time
from collections.abc import Sequence
from typing import Any

from jaxrl_kernels.flash_attention import cost

from jaxrl.config import BenchConfig
from jaxrl.models.config import ModelConfig
from jaxrl.models.presets import preset
from jaxrl.ops import attention_xla, grouped_matmul_xla, tokamax_kernels
from jaxrl.ops.attention import cudnn_workspace_bytes
from jaxrl.parallel.mesh import make_mesh
from jaxrl.perf import compile_only, flops, hlo
from jaxrl.perf.hardware import GiB, gpu
from jaxrl.perf.rows import Row
from jaxrl.train.program import Program, build_program, floor_bytes, lower_reference

# What the table's attention names run as: our Triton kernel, and Mosaic kernels for the GPUs that
# the other two are named for.
ATTENTION = {"fa2": "triton", "fa3": "tokamax", "fa4": "tokamax"}


def program_for(
    row: Row,
    config: BenchConfig,
    devices,
    *,
    model: ModelConfig | None = None,
    rows_per_device: int = 1,
    compute_dtype: str | None = None,
) -> Program:
    """The program of a row on these devices; `model` replaces the row's preset (proxies)."""
    attention = ATTENTION.get(row.attn, row.attn)
    step = config.train.step(type=row.trains, ac=row.ac, attention=attention)
    step = dataclasses.replace(step, context_method=row.cp_method)
    if compute_dtype:
        step = dataclasses.replace(step, compute_dtype=compute_dtype)
    mesh, micro_batches = make_mesh(devices, expert=row.ep, context=row.cp), config.micro_batches
    if row.is_e2e:  # each rollout fills a row
        rows = rows_per_device * mesh.shape["fsdp"] * mesh.shape["expert"]
        micro_batches = -(-config.e2e.tasks * config.e2e.group_size // rows)
    return build_program(
        model or preset(row.model),
        mesh=mesh,
        step=step,
        optimizer=config.train.optimizer,
        lora_rank=row.lora_rank,
        lora=config.train.lora,
        seq_len=row.seq_len,
        micro_batches=micro_batches,
        rows_per_device=rows_per_device,
        packed=row.is_e2e,
    )


def plan_row(row: Row, config: BenchConfig) -> dict[str, Any]:
    """Memory and FLOPs of the row's compiled program, per the keys of `results.jsonl`.

    Nothing runs, so nothing is said of time. Raises ValueError where the program needs more
    memory than the GPU has.
    """
    program = program_for(row, config, compile_only.topology(row.gpu, row.num_gpus, row.num_hosts))
    if row.is_e2e:
        from jaxrl.perf.e2e import plan_e2e

        return plan_e2e(program, config, row.gpu)
    return plan_program(program, row.gpu)


def plan_program(program: Program, gpu_name: str) -> dict[str, Any]:
    """As `plan_row`, of a program on the compile-only devices of that GPU."""
    found, text = plan_memory(program, gpu_name)
    return found | count_flops(program, text)


def plan_memory(program: Program, gpu_name: str) -> tuple[dict[str, Any], str]:
    """(the same without FLOPs, the compiled program's text)."""
    start = time.perf_counter()
    with compile_only.as_device(program.layout.mesh), compile_only.cudnn_assumed():
        lowered = program.lower()
    compiled = compile_only.compile_for(lowered)
    seconds = time.perf_counter() - start
    text = compiled.as_text() or ""
    memory = compile_only.memory(compiled)
    attention = compiled_attention(text, program)
    peak = (memory.peak + _unplanned_bytes(attention, program)) / GiB
    check_fits(peak, gpu_name)
    found = {
        "attn_compiled": attention,
        **({"experts_compiled": compiled_experts(text, program)} if program.has_experts else {}),
        "peak_mem_gib": peak,
        "floor_mem_gib": floor_bytes(program) / GiB,
        "host_mem_gib": memory.host_gib,
        "compile_s": seconds,
    }
    return found, text


def check_fits(peak: float, gpu_name: str) -> None:
    """Raise ValueError where `peak` GiB are more than programs can have of the GPU's memory."""
    device = gpu(gpu_name)
    if peak > device.pool_gib:
        raise ValueError(
            f"needs {peak:.1f} GiB on each {gpu_name}, where {device.pool_gib:.1f} of "
            f"{device.memory_gib:.1f} can be had; use more GPUs, a shorter seq_len, offload or LoRA"
        )


def _unplanned_bytes(attention: str, program: Program) -> int:
    """What a kernel asks for at run time, which the compiler does not know: a bound, as the peak
    may lie elsewhere."""
    if attention != "cudnn":
        return 0
    rows, model = program.rows_per_device, program.layout.model.config
    heads = model.num_heads // program.layout.mesh.shape["context"]
    return cudnn_workspace_bytes(rows, program.seq_len, heads, model.head_dim)


def count_flops(
    program: Program, text: str, doc_lengths: Sequence[int] | None = None
) -> dict[str, float]:
    """`model_flops_per_token` (XLA's count of the plain reference, attention as it declares
    itself) and `hardware_flops_per_step` (every product of the compiled program, on all devices).

    doc_lengths: of the documents of each row, where rows are packed; default one document.
    """
    model, tokens = program.layout.model.config, program.seq_len
    dense = flops.cost_analysis_flops(
        lambda n: lower_reference(program, n), model.num_layers - model.first_k_dense
    )
    docs = _documents(program, doc_lengths)
    forward, backward = (_attention_flops(program, 1, w, docs) for w in ("forward", "backward"))
    return {
        "model_flops_per_token": (dense + model.num_layers * (forward + backward)) / tokens,
        "hardware_flops_per_step": hardware_flops(program, text, docs) * program.layout.mesh.size,
    }


def hardware_flops(program: Program, text: str, doc_lengths: Sequence[int] | None = None) -> float:
    """FLOPs of one step on one device: what the compiled program's products and kernels do.

    A kernel's FLOPs are those it declares; the blocked attention's loops, whose trip counts the
    compiler does not know, visit the blocks on and below the diagonal that share a document (of
    `doc_lengths`, as in `count_flops`), those of the experts' products all of a device's rows, on
    average. Raises RuntimeError where the program holds a loop or a
    product that nobody declares, ValueError where the documents are not a row's tokens.
    """
    docs = _documents(program, doc_lengths)
    summary = hlo.summarize(text)
    total = summary.flops
    total += sum(c.count * kernel_flops(c, program, docs) for c in summary.call_sites)
    for loop in summary.unknown_loops:
        if grouped_matmul_xla.REST in loop.op_name:
            continue
        if grouped_matmul_xla.WHOLE in loop.op_name:
            total += _grouped_loop_flops(loop, program)
            continue
        if "attend" not in loop.op_name:
            raise RuntimeError(f"a loop of unknown length is not counted: {loop.op_name}")
        total += loop.runs * loop.iteration.flops * _attention_rounds(program, docs)
    if summary.uncounted:
        raise RuntimeError(f"products that are not counted: {dict(summary.uncounted)}")
    return total


def _attention_rounds(program: Program, docs: Sequence[int]) -> float:
    """Iterations of a loop of the blocked attention, over the visits of a device's rows; those of a
    ring share the visits out, on average."""
    heads, devices = program.layout.model.config.num_heads, program.layout.mesh.shape["context"]
    parts, loops = 1, 1
    if program.step.config.context_method == "ulysses":
        heads //= devices
    else:
        parts, loops = devices, 2 * devices - 1  # its own keys, and two blocks of each other's
    rows, seq_len = program.rows_per_device, program.seq_len // parts
    block = attention_xla.block_size(seq_len)
    visits = rows * cost.visited_blocks(docs, block, block) / parts / loops
    return math.ceil(visits / attention_xla.visits_at_once(rows, seq_len, heads, block))


def _grouped_loop_flops(loop: hlo.LoopBody, program: Program) -> float:
    """Of all runs of a loop over an expert's blocks of rows: as if all rows lay in whole blocks."""
    model, config = program.layout.model.config, program.step.config
    tokens = program.rows * program.seq_len // program.layout.mesh.size
    rows = min(config.experts_chunk or tokens, tokens) * model.num_experts_per_tok
    products = loop.runs / (model.num_experts // program.layout.mesh.shape["expert"])
    return products * loop.iteration.flops * rows / min(grouped_matmul_xla.BLOCK, rows)


def _documents(program: Program, doc_lengths: Sequence[int] | None) -> Sequence[int]:
    docs = doc_lengths or [program.seq_len]
    if sum(docs) != program.seq_len:
        raise ValueError(f"documents of {sum(docs)} tokens, and rows of {program.seq_len}")
    return docs


def kernel_flops(call: hlo.CallSite, program: Program, docs: Sequence[int]) -> float:
    """FLOPs of one run of a custom call that is no plain matrix product, which `hlo` counts."""
    whole = [program.seq_len]
    # The devices of a context group share a row's heads.
    rows = program.rows_per_device / program.layout.mesh.shape["context"]
    if call.flops is not None:
        if "jaxrl_grouped" in call.op_name:  # declared for the room that a device has for rows
            return call.flops / program.layout.mesh.shape["expert"]
        if "jaxrl_flash_attention" in call.op_name:  # declared for one document
            return call.flops * cost.pairs(docs) / cost.pairs(whole)
        return call.flops
    if call.target.startswith("__cudnn$fmha"):
        which = "flash_backward" if "Backward" in call.target else "forward"
        return _attention_flops(program, rows, which, whole)
    if call.target.startswith("mosaic_gpu") and "/attend/" in call.op_name:
        # Recomputed within the layer's backward, a forward is still one: look behind "attend".
        if "transpose(" not in call.op_name.rpartition("/attend/")[2]:
            return _attention_flops(program, rows, "forward", docs)
        # Backward skips no block outside the documents.
        forward = _attention_flops(program, rows, "forward", whole)
        products = tokamax_kernels.BACKWARD_PRODUCTS / tokamax_kernels.BACKWARD_CALLS
        return forward * products / flops.ATTENTION_PRODUCTS["forward"]
    if "/attend/" not in call.op_name and (product := _grouped_flops(call)):
        return product / program.layout.mesh.shape["expert"]
    if call.target.startswith(("mosaic_gpu", "triton_kernel_call")):
        raise RuntimeError(f"a kernel that declares no FLOPs is not counted: {call.op_name}")
    return 0


def _grouped_flops(call: hlo.CallSite) -> int:
    """FLOPs of tokamax's grouped products, which declare none: rows [M, K] times weights [E, K, N]
    in either order of K and N, or with rows [M, N], for the weights' gradient; 0 for what is no
    such call."""
    if not call.target.startswith(("mosaic_gpu", "triton_kernel_call")) or len(call.operands) < 3:
        return 0
    (_, rows), (_, other), (dtype, _) = call.operands[:3]
    if len(rows) != 2 or dtype != "s32":  # the groups' sizes
        return 0
    if len(other) == 3 and rows[1] in other[1:]:
        return 2 * rows[0] * other[1] * other[2]
    return 2 * rows[0] * rows[1] * other[1] if len(other) == 2 and other[0] == rows[0] else 0


def _attention_flops(program: Program, rows: float, which: str, docs: Sequence[int]) -> float:
    """Of one layer, for so many rows with all heads."""
    model = program.layout.model.config
    return rows * flops.attention_flops(1, model.num_heads, model.head_dim, docs, which=which)


# What the program's text shows of each implementation.
_CALLS = {
    "cudnn": r'custom_call_target="__cudnn\$fmha',
    "triton": r'custom_call_target="triton_kernel_call_ffi".*/jvp\(jaxrl_flash_attention',
    "tokamax": r'custom_call_target="mosaic_gpu_v2".*/attend/',
}


def compiled_attention(text: str, program: Program) -> str:
    """The attention that the compiled program really calls. Raises RuntimeError if not as asked."""
    asked = program.step.attention(packed=program.packed, seq_len=program.seq_len).name
    found = [name for name, call in _CALLS.items() if re.search(call, text)] or ["xla"]
    if found != [asked]:
        raise RuntimeError(f"attention {asked} was asked for, {' and '.join(found)} was compiled")
    return asked


_EXPERT_CALLS = {
    "triton": r'custom_call_target="triton_kernel_call_ffi".*jaxrl_grouped',
    "tokamax": r'custom_call_target="mosaic_gpu_v2".*/ragged_dot_'
    r'|custom_call_target="triton_kernel_call_ffi"(?!.*jaxrl_).*/mlp/',
}


def compiled_experts(text: str, program: Program) -> str:
    """The grouped products that the compiled program really calls. Raises RuntimeError if not as
    asked."""
    asked = program.step.grouped_matmul().name
    found = [name for name, call in _EXPERT_CALLS.items() if re.search(call, text)] or ["xla"]
    if found != [asked]:
        raise RuntimeError(f"grouped_matmul {asked} was asked for, {' and '.join(found)} compiled")
    return asked
