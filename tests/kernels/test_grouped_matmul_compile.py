"""Every grouped product, forward and backward, compiled for GPUs that are not here.

At the shapes of the MoE models the kernels must fit the registers and the shared memory of each
GPU, spill nothing, run on its own matrix units, and sum in a fixed order. Each GPU's kernels are
compiled in a subprocess (this file as a script), which prints what ptxas and the disassembler say
of them as JSON.
"""

import dataclasses
import functools
import json
import sys

import pytest
from jaxrl_kernels import tiles
from scripts import output_of

from jaxrl.perf import hardware

M, E, R = 131072, 128, 16
MODELS = {"30B-A3B": (2048, 768), "235B-A22B": (4096, 1536), "GLM-4.5-Air": (4096, 1408)}  # D, F
SMEM = {"A6000": 99, "A100": 163, "H100": 227, "H200": 227, "B200": 227}  # KiB per program
REGISTERS = 65536  # of a multiprocessor
# The fastest tensor-core instruction of each: of a warp, a warpgroup, and with tensor memory.
MMA = {"A6000": "HMMA", "A100": "HMMA", "H100": "HGMMA", "H200": "HGMMA", "B200": "UTCHMMA"}
# Of an adapter, the gradient of b is 16 rows high, and warpgroups and tensor memory multiply 64 at
# least: a warp's instruction does it. Memory bounds it, not the tensor cores.
BY_WARPS = ["weights_kernel"]
UPS = ("up", "down")
OPS = ("up", "down", "swiglu", "up lora", "down lora")
# Per model: three of up, three of down, h, h with residuals and its dx, and twice six with LoRA
# (two forward, two for dx, da, db).
KERNELS = 3 + 3 + 3 + 2 * 6


def models_on(gpu):
    """Two models of the same tiles, which divide the sides of both or of neither, so that the same
    loads are masked, have the same kernels but for constants: the first of them will do."""
    kinds = {}
    for model in MODELS:
        tiles_of = [(which, K, N, tile(gpu, which, K, N)) for which, K, N in cases(model)]
        kind = tuple((which, t, K % t.block_k, N % t.block_n) for which, K, N, t in tiles_of)
        kinds.setdefault(kind, model)
    return {model: MODELS[model] for model in kinds.values()}


def compiled(gpu):
    """What the script prints. An H200 is an H100 to the compiler: with its tiles, once will do."""
    if gpu == "H200" and all(tile(gpu, *case) == tile("H100", *case) for case in cases()):
        return compiled("H100")
    return output_of(__file__, gpu)


def cases(*models):
    for D, F in (MODELS[model] for model in models or MODELS):
        for K, N in ((D, F), (F, D), (D, R), (R, F), (R, D), (F, R)):
            for which in ("forward", "dx", "dw", "swiglu"):
                yield which, K, N


def tile(gpu, which, K, N):
    of = hardware.gpu(gpu)
    capability = round(10 * float(of.compute_capability))
    return tiles.grouped_matmul(which, of.device_kinds[0], capability, "bfloat16", M, K, N)


@pytest.mark.slow
@pytest.mark.parametrize("gpu", SMEM)
def test_kernels_fit_each_gpu_at_the_shapes_of_the_models(gpu):
    seen = compiled(gpu)
    models = models_on(gpu)
    assert set(seen["kernels"]) == {f"{model} {op}" for model in models for op in OPS}
    assert sum(map(len, seen["kernels"].values())) == len(models) * KERNELS
    for case, kernels in seen["kernels"].items():
        for kernel in kernels:
            assert kernel["spill_bytes"] == 0, (case, kernel)
            assert kernel["smem_bytes"] <= SMEM[gpu] * 1024, (case, kernel)
            assert kernel["registers"] * 32 * kernel["num_warps"] <= REGISTERS, (case, kernel)
            assert kernel["global_atomics"] == [], (case, kernel)
            assert set(kernel["mma_kinds"]) <= {MMA[gpu], "HMMA"}, (case, kernel)
    others = {
        case: [k["name"] for k in kernels if k["mma_kinds"] != [MMA[gpu]]]
        for case, kernels in seen["kernels"].items()
    }
    expected = set() if MMA[gpu] == "HMMA" else {f"{m} {op} lora" for m in models for op in UPS}
    assert {case: names for case, names in others.items() if names} == dict.fromkeys(
        expected, BY_WARPS
    )


def test_models_that_differ_in_tiles_are_compiled():
    """GLM's F is no multiple of 256, a side of Hopper's and Blackwell's tiles alone."""
    models = {gpu: list(models_on(gpu)) for gpu in SMEM}
    ampere, later = ["30B-A3B"], ["30B-A3B", "GLM-4.5-Air"]
    assert models == {"A6000": ampere, "A100": ampere, "H100": later, "H200": later, "B200": later}


@pytest.mark.slow
@pytest.mark.parametrize("gpu", SMEM)
def test_gradient_needs_no_dense_temporaries(gpu):
    """jax.lax.ragged_dot takes 88 GiB here. Weights that are fp32 arrays are cast to bf16 once."""
    seen = compiled(gpu)
    D, F = MODELS["30B-A3B"]
    assert seen["temp"]["bfloat16"] < 2**20
    assert seen["temp"]["float32"] < 2 * E * D * F + 2**20 < 2**30


@pytest.mark.slow
@pytest.mark.parametrize("gpu", SMEM)
def test_calls_carry_their_names_and_costs(gpu):
    text = compiled(gpu)["text"]
    calls = [line for line in text.splitlines() if "custom_call_target=" in line]
    assert all('"triton_kernel_call_ffi"' in line for line in calls)
    for which in ("forward", "dx", "dw"):
        assert sum(f"jaxrl_grouped_matmul_{which}" in line for line in calls) == 1, which
    assert len(calls) == 3


def main(gpu):
    from jaxrl.perf import compile_only

    compile_only.prepare_environment()
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
    from jaxrl_kernels import launch, resources
    from jaxrl_kernels.grouped_matmul import triton

    devices = compile_only.topology(gpu, 1)
    capability = int(float(devices[0].compute_capability) * 10)
    mesh = Mesh(np.array(devices), ("fsdp",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())

    def array(*shape, dtype="bfloat16"):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=everywhere)

    def lower(op, K, N, *weights):
        call = functools.partial(
            getattr(triton, op), gpu=devices[0].device_kind, capability=capability
        )

        def value_and_gradients(x, dy, sizes, *weights):
            out, vjp = jax.vjp(lambda x, *w: call(x, *w, sizes), x, *weights)
            return out, vjp(dy), call(x, *weights, sizes)

        arguments = (array(M, K), array(M, N), array(E, dtype="int32"), *weights)
        with compile_only.as_device(mesh):
            return jax.jit(value_and_gradients).lower(*arguments)

    kernels = {}
    with launch.collect() as found:  # each once, in the first case that has it
        for model, (D, F) in models_on(gpu).items():
            for op in OPS:
                K, N = (F, D) if op.startswith("down") else (D, F)
                name, weights = "grouped_matmul", [array(E, K, N)]
                if op == "swiglu":
                    name, weights = "grouped_swiglu", weights * 2
                elif op.endswith("lora"):
                    weights += [array(E, K, R), array(E, R, N)]
                    name = "grouped_lora_matmul"
                before = len(found)
                lower(name, K, N, *weights)
                kernels[f"{model} {op}"] = [
                    dataclasses.asdict(resources.resources(k)) | {"num_warps": k.num_warps}
                    for k in found[before:]
                ]
    D, F = MODELS["30B-A3B"]
    temp, text = {}, ""
    for dtype in ("bfloat16", "float32"):
        lowered = lower("grouped_matmul", D, F, array(E, D, F, dtype=dtype))
        program = compile_only.compile_for(lowered)
        temp[dtype], text = compile_only.memory(program).temp, program.as_text()
    print(json.dumps({"kernels": kernels, "temp": temp, "text": text}))


if __name__ == "__main__":
    main(sys.argv[1])
