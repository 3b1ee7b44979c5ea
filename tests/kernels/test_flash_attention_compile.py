"""The attention kernels compiled for GPUs that are not here, at the shapes of the eight models.

They must fit the registers and the shared memory of each GPU, spill nothing, run on its own matrix
units, sum in a fixed order, and need next to no memory beside their arrays. Each GPU's kernels are
compiled in a subprocess (this file as a script), which prints what the compiler, ptxas and the
disassembler say.
"""

import dataclasses
import json
import sys

import pytest
from jaxrl_kernels import tiles
from scripts import output_of

from jaxrl.perf import hardware

# T, N, K, H of the eight models' layers (two share theirs), the widest head, and the longest
# published row.
SHAPES = {
    "Qwen3-0.6B": (16384, 16, 8, 128),
    "Qwen3-4B, Llama-3.1-8B": (16384, 32, 8, 128),
    "Qwen3-30B-A3B": (16384, 32, 4, 128),
    "Qwen3-235B-A22B": (16384, 64, 4, 128),
    "INTELLECT-3": (16384, 96, 8, 128),
    "Llama-3.2-1B": (16384, 32, 8, 64),
    "Llama-3.2-3B": (16384, 24, 8, 128),
    "head_dim 256": (4096, 24, 8, 256),
    "longest": (65536, 32, 8, 128),
}
PACKED = ("Qwen3-4B, Llama-3.1-8B", "Llama-3.2-1B", "INTELLECT-3", "head_dim 256")
ALL = SHAPES.keys() | {f"{name} packed" for name in PACKED}
# Kernels differ in head_dim, in whether documents are packed, and in whether heads are a power of
# two (addresses); beyond that in constants. All of them on Hopper, and one of each kind elsewhere,
# for the suite's time: bench/kernels.py compiles all everywhere, and tests/bench reads its table.
DENSE = {"Qwen3-0.6B", "Qwen3-4B, Llama-3.1-8B", "Qwen3-30B-A3B", "Qwen3-235B-A22B"}  # as "longest"
FEW = ALL - DENSE - {"Llama-3.2-3B"}  # as INTELLECT-3
CASES = {"A6000": FEW, "A100": FEW, "H100": ALL, "H200": ALL, "B200": FEW}
# The fastest tensor-core instruction of each: of a warp, a warpgroup, and with tensor memory.
MMA = {"A6000": "HMMA", "A100": "HMMA", "H100": "HGMMA", "H200": "HGMMA", "B200": "UTCHMMA"}
# Sums of dk and dv at head_dim 256 leave registers for 32 keys, and those units multiply 64 at
# least: a warp's instruction does it.
BY_WARPS = [("head_dim 256", "dkv_kernel"), ("head_dim 256 packed", "dkv_kernel")]
SMEM = {"A6000": 99, "A100": 163, "H100": 227, "H200": 227, "B200": 227}  # KiB per program
REGISTERS = 65536  # of a multiprocessor
NAMES = ["dkv_kernel", "dq_kernel", "forward_kernel"]


def compiled(gpu):
    """What the script prints. An H200 is an H100 to the compiler: with its tiles, once will do."""
    if gpu == "H200" and all(tile(gpu, *case) == tile("H100", *case) for case in cases()):
        return compiled("H100")
    return output_of(__file__, gpu)


def cases():
    for T, N, _, H in SHAPES.values():
        for which in ("forward", "dq", "dkv"):
            yield which, H, T, N


def tile(gpu, which, H, T, N):
    (kind, *_) = hardware.gpu(gpu).device_kinds
    return tiles.attention(which, kind, 90, "bfloat16", H, T, N)


@pytest.mark.slow
@pytest.mark.parametrize("gpu", SMEM)
def test_kernels_fit_each_gpu_at_the_shapes_of_the_models(gpu):
    seen = compiled(gpu)
    assert set(seen["kernels"]) == CASES[gpu]
    for case, kernels in seen["kernels"].items():
        assert sorted(k["name"] for k in kernels) == NAMES, case
        for kernel in kernels:
            assert kernel["spill_bytes"] == 0, (case, kernel)
            assert kernel["smem_bytes"] <= SMEM[gpu] * 1024, (case, kernel)
            assert kernel["registers"] * 32 * kernel["num_warps"] <= REGISTERS, (case, kernel)
            mma = "HMMA" if (case, kernel["name"]) in BY_WARPS else MMA[gpu]
            assert kernel["mma_kinds"] == [mma], (case, kernel)
            assert kernel["global_atomics"] == [], (case, kernel)


@pytest.mark.slow
@pytest.mark.parametrize("gpu", SMEM)
def test_the_gradient_holds_no_scores(gpu):
    """At T 65536 the scores of one head would take 8 GiB; out and dout take 0.5 GiB each."""
    seen = compiled(gpu)
    assert seen["temp"] <= 0.6 * 2**30
    for which in ("forward", "dq", "dkv"):
        assert f"jaxrl_flash_attention_{which}" in seen["text"]
    assert seen["text"].count('custom_call_target="triton_kernel_call_ffi"') == 3


@pytest.mark.slow
def test_what_a_loop_over_layers_keeps_is_not_computed_again():
    """XLA would copy the call that makes a stored output: forward must run once per layer."""
    assert compiled("H100")["kept"].count('custom_call_target="triton_kernel_call_ffi"') == 3


def main(gpu):
    from jaxrl.perf import compile_only

    compile_only.prepare_environment()
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
    from jaxrl_kernels import launch, resources

    from jaxrl.ops.attention import resolve_attention
    from jaxrl.ops.registry import Target

    devices = compile_only.topology(gpu, 1)
    target = Target.of(devices[0])
    mesh = Mesh(np.array(devices), ("fsdp",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())

    def array(*shape, dtype="bfloat16"):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=everywhere)

    def attend(H, T, packed):
        case = {"dtype": jnp.bfloat16, "head_dim": H, "seq_len": T, "packed": packed}
        return resolve_attention("triton", target=target, **case).fn

    def lower(T, N, K, H, packed):
        def gradients(q, k, v, dout, ids):
            ids = ids if packed else None
            return jax.vjp(lambda *qkv: attend(H, T, packed)(*qkv, ids), q, k, v)[1](dout)

        arrays = [array(1, T, n, H) for n in (N, K, K, N)]
        with compile_only.as_device(mesh), launch.collect() as found:
            lowered = jax.jit(gradients).lower(*arrays, array(1, T, dtype="int32"))
        return lowered, found

    kernels = {}
    for name, shape in SHAPES.items():
        for packed in (False, True):
            case = f"{name} packed" if packed else name
            if case not in CASES[gpu]:
                continue
            lowered, found = lower(*shape, packed)
            kernels[case] = [
                dataclasses.asdict(resources.resources(kernel)) | {"num_warps": kernel.num_warps}
                for kernel in found
            ]
            if name == "longest":
                program = compile_only.compile_for(lowered)
    said = {"kernels": kernels, "temp": compile_only.memory(program).temp}
    said["text"] = program.as_text()
    if gpu == "H100":

        def layer(x, _):
            q = x.reshape(1, 1024, 8, 64)
            out = attend(64, 1024, False)(2 * q, q[:, :, :2], q[:, :, 2:4], None)
            return x + out.reshape(x.shape), None

        names = ("attention_out", "attention_residual")
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        kept = jax.checkpoint(layer, policy=policy)

        def loss(x):
            return jnp.sum(jax.lax.scan(kept, x, length=4)[0].astype(jnp.float32) ** 2)

        with compile_only.as_device(mesh):
            lowered = jax.jit(jax.grad(loss)).lower(array(1, 1024, 512))
        said["kept"] = compile_only.compile_for(lowered).as_text()
    print(json.dumps(said))


if __name__ == "__main__":
    main(sys.argv[1])
