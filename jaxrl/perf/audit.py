"""What is held against every planned program: arrays that it must not hold, gathers that nothing
runs beside, and weights that arrive before their layer."""

import dataclasses
import functools

from jaxrl.perf import gathered, hlo, plan, schedule
from jaxrl.perf.forbidden import forbidden_arrays
from jaxrl.perf.hardware import Gpu
from jaxrl.train.program import Program


@dataclasses.dataclass(frozen=True)
class Audit:
    """`forbidden`: held arrays by what is wrong with them (`forbidden_arrays`). `overlapped` and
    `hidden`: shares of the layers' gathered bytes that compute runs beside, and whose transfer
    nothing waits for. `layers_ahead`: layers whose gathered weights wait for their turn."""

    forbidden: dict[str, list[hlo.HloArray]]
    overlapped: float
    hidden: float
    layers_ahead: float


def audit(program: Program, text: str, gpu: Gpu) -> Audit:
    """Look through `text`, `program` compiled and scheduled for `gpu`. One document a row."""
    kernels = functools.partial(plan.kernel_flops, program=program, docs=[program.seq_len])
    found = schedule.overlap(text, gpu, kernel_flops=kernels)
    return Audit(
        _forbidden(program, text),
        schedule.overlapped_fraction(found),
        schedule.hidden_fraction(found),
        gathered.layers_ahead(text, layer_bytes(program)),
    )


def _forbidden(program: Program, text: str) -> dict[str, list[hlo.HloArray]]:
    model, mesh = program.layout.model.config, program.layout.mesh
    tokens = program.rows_per_device * program.seq_len // mesh.shape["context"]
    chunk = min(program.step.config.experts_chunk or tokens, tokens)
    experts = {
        "experts": model.num_experts // mesh.shape["expert"],
        "rows": chunk * model.num_experts_per_tok,
        "features": (model.hidden_size, model.moe_intermediate_size),
    }
    return forbidden_arrays(
        text,
        tokens=tokens,
        vocab=model.vocab_size,
        vocab_shards=mesh.size,
        **(experts if program.has_experts else {}),
    )


def layer_bytes(program: Program) -> int:
    """Bytes of the largest layer's matrices as gathered for compute, in bf16: of its experts those
    that are a device's own."""
    expert_axis = program.layout.mesh.shape["expert"]
    layers: dict[str, int] = {}
    for path, spec in (program.layout.trainable_specs | program.layout.frozen_specs).items():
        if spec.axes[0] == "layers" and len(spec.shape) > 2:
            here = spec.size // spec.shape[0] // (expert_axis if "experts" in spec.axes else 1)
            layers[path[0]] = layers.get(path[0], 0) + 2 * here
    return max(layers.values())
