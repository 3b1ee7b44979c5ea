"""The contract of jaxrl.ops.tokamax_kernels: what it needs of tokamax, forward and backward.

The compilers run in one subprocess a GPU (this file as a script), which prints what it saw as
JSON: a Mosaic kernel that is wrong for its GPU aborts the process. The grouped product of Mosaic
also runs in Pallas' GPU interpreter; numbers of the other kernels need a GPU (`pytest -m gpu`).
"""

import dataclasses
import functools
import json
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import backend
from scripts import output_of
from validation import skip

from jaxrl.ops import tokamax_kernels

GPUS = ("H100", "H200", "B200", "A6000", "A100")
ATTENTION = ((1, 4096, 32, 8, 128), (1, 4096, 32, 8, 64))  # B T N K H
GROUPED = (8192, 2048, 768, 128)  # M K N E
LAYERS = (16, 16, 1024, 1024)  # L E K N, of 512 rows
M, E, R = 131072, 128, 16
# D, F of experts. 235B-A22B's are, as 30B-A3B's, multiples of every tile's sides: its kernels are
# those but for constants. GLM's F is no multiple of 256, a side of Hopper's and Blackwell's alone.
MODELS = {"30B-A3B": (2048, 768), "GLM-4.5-Air": (4096, 1408)}
SMEM = {"A6000": 99, "A100": 163, "H100": 227, "B200": 227}  # KiB per program
MMA = {"A6000": "HMMA", "A100": "HMMA", "H100": "HGMMA", "B200": "UTCHMMA"}
MOSAIC, TRITON = 'custom_call_target="mosaic_gpu_v2"', 'custom_call_target="triton_kernel_call_ffi"'
MiB = 2**20


@pytest.fixture(scope="module")
def compiled():
    """The cases of one GPU, compiled when first asked for."""
    return functools.partial(output_of, __file__)


@pytest.mark.slow
@pytest.mark.parametrize("gpu", GPUS[:3])
@pytest.mark.parametrize("shape", ATTENTION)
@pytest.mark.parametrize("packed", [False, True])
def test_attention_compiles_forward_and_backward(compiled, gpu, shape, packed):
    case = compiled(gpu)[f"attention {shape} {packed}"]
    B, T, N, _, H = shape
    text = case["text"]
    calls = [line for line in text.splitlines() if MOSAIC in line]
    forward, backward = 'FlashAttention\\"', 'FlashAttentionVjp\\"'
    assert sorted(forward in line for line in calls) == [False, False, True]
    assert sorted(backward in line for line in calls) == [False, True, True]
    assert text.count("custom_call_target=") == 3
    assert "while(" not in text and f"[{T},{T}]" not in text and f",{T},{T}]" not in text
    kernels = ("flash_attention_sm90",)  # tokamax does not name the backward ones
    if gpu == "B200":
        kernels = ("flash_attention_sm100", "sm100_dq_kernel", "sm100_dkv_kernel")
    for kernel in kernels:
        assert f"/{kernel}/" in text
    # Documents arrive as first keys alone, so that blocks above the diagonal are still skipped.
    first_keys = f'\\"k_start\\":\\"i32[{B},1,{T}]\\",\\"k_end\\":null'
    assert (first_keys in text) == packed
    assert '\\"causal_mask\\":{\\"offset\\":0,\\"window_size\\":null}' in text
    output, row_sums = 2 * B * T * N * H, 4 * B * T * N
    assert case["temp"] < output + 8 * row_sums


@pytest.mark.slow
def test_attention_kept_by_a_checkpoint_policy_runs_once(compiled):
    assert compiled("H100")["kept"]["text"].count(MOSAIC) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gpu", "implementation", "calls"),
    [
        ("H100", "mosaic", (2, 1)),
        ("H200", "mosaic", (2, 1)),
        ("B200", "mosaic", (2, 1)),
        ("A6000", "triton", (0, 3)),
        ("A100", "triton", (0, 3)),
        ("B200", "triton", (0, 3)),
    ],
)
def test_ragged_dot_compiles_forward_and_backward(compiled, gpu, implementation, calls):
    case = compiled(gpu)[f"ragged_dot {implementation}"]
    assert (case["text"].count(MOSAIC), case["text"].count(TRITON)) == calls
    M, K, N, E = GROUPED
    transposed_weights, rows = 2 * E * K * N, 2 * M * (K + N)
    assert case["temp"] < transposed_weights + 3 * rows  # densified: 2 * E * M * K, 4 GiB


@pytest.mark.slow
@pytest.mark.parametrize("gpu", GPUS)
def test_weights_of_all_layers_are_not_turned_in_front_of_the_loop(compiled, gpu):
    L, E, K, N = LAYERS
    assert compiled(gpu)["layers"]["temp"] < 2 * L * E * K * N / 3  # of bytes, turned once: 1


@pytest.mark.slow
def test_ragged_dot_takes_the_implementation_of_the_gpu(compiled):
    assert [compiled(gpu)["default"] for gpu in GPUS] == ["mosaic"] * 3 + ["triton"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("gpu", SMEM)
def test_triton_kernels_fit_each_gpu_at_the_shapes_of_the_models(compiled, gpu):
    seen = compiled(gpu)["kernels"]
    # Up and down share those of rows (forward of the one, dx of the other); a sum has its own.
    assert {model: len(kernels) for model, kernels in seen.items()} == {
        model: 6 + 6 for model in models_on(gpu)
    }
    for model, kernels in seen.items():
        for kernel in kernels:
            assert kernel["spill_bytes"] == 0, (model, kernel)
            assert kernel["smem_bytes"] <= SMEM[gpu] * 1024, (model, kernel)
            assert kernel["registers"] * 32 * kernel["num_warps"] <= 65536, (model, kernel)
            assert kernel["global_atomics"] == [], (model, kernel)
        # Sums 16 rows high, the gradients of up's and down's b, are too low for Hopper's and
        # Blackwell's own instructions, which take 64: warps multiply.
        others = [k["name"] for k in kernels if k["mma_kinds"] != [MMA[gpu]]]
        assert others == ["_ragged_contracting_dim_dot_kernel"] * (2 if gpu[0] != "A" else 0)


def models_on(gpu):
    return MODELS if gpu in ("H100", "B200") else {"30B-A3B": MODELS["30B-A3B"]}


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_triton_tiles_are_no_larger_than_the_product(capability):
    """What tokamax is called with, by shape: x [M, K] w [E, K, N], forward, dx and dw."""
    from tokamax.ops import gpu

    seen = []

    class Op:
        def __init__(self, config):
            self.config = config

        def __call__(self, a, b, **_):
            c = self.config
            seen.append((c.block_m, c.block_n, c.block_k))
            raise StopIteration

    def tiles_of(M, K, N):
        seen.clear()
        x, w, dout = (jnp.zeros(s, jnp.bfloat16) for s in ((M, K), (2, K, N), (M, N)))
        for a, b, dimensions in (
            (x, w, tokamax_kernels._ROWS_BY_EXPERT),
            (dout, w, tokamax_kernels._ROWS_BY_TRANSPOSED),
            (x, dout, tokamax_kernels._SUM_OVER_ROWS),
        ):
            with pytest.raises(StopIteration):
                tokamax_kernels._product(a, b, None, dimensions, "triton")
        return seen

    with (
        mock.patch.object(tokamax_kernels, "_compute_capability", lambda: capability),
        mock.patch.object(gpu, "PallasTritonRaggedDot", Op),
    ):
        rows, _, sums = wide = [*tiles_of(4096, 1024, 512)]
        assert min(min(tile) for tile in wide) >= 32
        m, n, k = rows
        assert tiles_of(4096, 1024, 16) == [(m, 16, k), (m, n, 16), (sums[0], 16, sums[2])]
        assert tiles_of(4096, 16, 512) == [(m, n, 16), (m, 16, k), (16, sums[1], sums[2])]
        assert tiles_of(5, 40, 3) == [(16, 16, min(k, 64)), (16, min(n, 64), 16), (64, 16, 16)]


def test_what_attention_cannot_do():
    why_not = tokamax_kernels.why_not_attention
    for capability in (90, 100, 103):
        assert why_not(capability, jnp.bfloat16, 128, True) is None
    assert why_not(86, jnp.bfloat16, 128, True) == "needs Hopper or Blackwell, and this is sm_86"
    assert why_not(90, jnp.float32, 128, False) == "takes bfloat16 or float16, not float32"
    assert (
        why_not(90, jnp.bfloat16, 256, False) == "takes head_dim up to 128 in steps of 8, not 256"
    )


def test_what_ragged_dot_cannot_do():
    why_not = tokamax_kernels.why_not_ragged_dot
    for capability in (80, 86, 90, 100):
        assert why_not(capability, jnp.bfloat16, (2048, 768)) is None
    assert why_not(86, jnp.bfloat16, (2048, 768), "mosaic") == (
        "needs Hopper or Blackwell, and this is sm_86"
    )
    assert why_not(75, jnp.bfloat16, (64, 64)) == (
        "needs Ampere, Hopper or Blackwell, and this is sm_75"
    )
    assert why_not(90, jnp.bfloat16, (2048, 16)) == "takes features in steps of 64, not 2048 x 16"
    assert why_not(90, jnp.bfloat16, (2048, 16), "triton") is None
    assert why_not(100, jnp.float32, (128, 128)) == "takes bfloat16 or float16, not float32"
    with pytest.raises(ValueError, match="unknown ragged_dot 'xla'; one of mosaic, triton"):
        why_not(90, jnp.bfloat16, (64, 64), "xla")


def test_not_installed(monkeypatch):
    monkeypatch.setattr(tokamax_kernels.importlib.util, "find_spec", lambda name: None)
    said = "is not installed: pip install 'jaxrl[tokamax]'"
    assert tokamax_kernels.why_not_attention(90, jnp.bfloat16, 128, False) == said
    assert tokamax_kernels.why_not_ragged_dot(90, jnp.bfloat16, (64, 64)) == said


def test_tokamax_is_imported_only_when_used():
    code = "import sys, jaxrl.ops.tokamax_kernels; sys.exit('tokamax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_errors_name_the_reason():
    q = jnp.ones((1, 8, 2, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="needs an NVIDIA GPU, and this program is for cpu"):
        tokamax_kernels.attention(q, q, q)
    with pytest.raises(ValueError, match="drops the gradient"):
        tokamax_kernels.attention(q, q, q, return_lse=True)
    with mock.patch.object(backend, "get_default_device", Hopper):
        with pytest.raises(ValueError, match="attention takes bfloat16 or float16, not float32"):
            tokamax_kernels.attention(*[q.astype(jnp.float32)] * 3)
        x, w, sizes = grouped(64, 48, 64, (64,))[:3]
        with pytest.raises(ValueError, match="ragged_dot 'mosaic' takes features in steps of 64"):
            tokamax_kernels.ragged_dot(x, w, sizes)


class Hopper:
    platform, compute_capability, core_count, device_kind = "gpu", "9.0", 2, "NVIDIA H100"


def grouped(M, K, N, sizes):
    """x, w, group_sizes, dout in bf16; rows that belong to no group hold not-a-number."""
    rng = np.random.default_rng(0)
    x, w, dout = (rng.standard_normal(s) for s in ((M, K), (len(sizes), K, N), (M, N)))
    x[sum(sizes) :] = dout[sum(sizes) :] = np.nan
    x, w, dout = (jnp.asarray(a, jnp.bfloat16) for a in (x, w, dout))
    return x, w, jnp.array(sizes, jnp.int32), dout


def grouped_oracle(x, w, sizes, dout):
    """out, dx, dw in fp64, group by group."""
    x, w, dout = (np.asarray(a, np.float64) for a in (x, w, dout))
    out, dx, dw = np.zeros(dout.shape), np.zeros(x.shape), np.zeros(w.shape)
    ends = np.cumsum(sizes)
    for e, (start, end) in enumerate(zip(ends - sizes, ends, strict=True)):
        rows = slice(start, end)
        out[rows], dx[rows], dw[e] = x[rows] @ w[e], dout[rows] @ w[e].T, x[rows].T @ dout[rows]
    return out, dx, dw


def close(got, expected, name):
    """Within bf16's rounding of the largest value; zeros are zeros."""
    error = np.max(np.abs(np.asarray(got, np.float64) - expected))
    assert error <= 2**-7 * np.max(np.abs(expected)), (name, error)


SIZES = {
    "empty_groups_and_spare_rows": (0, 20, 0, 33),
    "all_rows": (1, 63, 32, 32),
    "nothing": (0, 0, 0, 0),
}


@pytest.mark.parametrize("case", SIZES)
def test_mosaic_grouped_product_in_the_interpreter(case):
    from jax._src.pallas.mosaic_gpu.interpret.params import force_gpu_interpret_mode

    x, w, sizes, dout = grouped(128, 128, 64, SIZES[case])

    @jax.jit
    def value_and_dx(x, w, sizes, dout):  # dw is Triton's, which does not run on a CPU
        out, vjp = jax.vjp(lambda x: tokamax_kernels.ragged_dot(x, w, sizes), x)
        return out, *vjp(dout)

    with mock.patch.object(backend, "get_default_device", Hopper), force_gpu_interpret_mode():
        got = value_and_dx(x, w, sizes, dout)
    for name, a, b in zip(("out", "dx"), got, grouped_oracle(x, w, sizes, dout), strict=False):
        assert a.dtype == jnp.bfloat16
        close(a, b, name)


@pytest.mark.gpu
@pytest.mark.validates("grouped_matmul tokamax")
@pytest.mark.parametrize("implementation", tokamax_kernels.IMPLEMENTATIONS)
@pytest.mark.parametrize("sizes", [(0, 700, 1, 2000, 0, 299), (512,) * 8, (1, 0, 0, 30)])
def test_ragged_dot_on_gpu(implementation, sizes):
    why_not = tokamax_kernels.why_not_ragged_dot(
        capability_here(), jnp.bfloat16, (512, 384), implementation
    )
    if why_not:
        skip(why_not)
    x, w, sizes, dout = grouped(4096, 512, 384, sizes)

    @jax.jit
    def run(x, w, dout):
        fn = tokamax_kernels.ragged_dot
        out, vjp = jax.vjp(lambda x, w: fn(x, w, sizes, implementation=implementation), x, w)
        return out, *vjp(dout)

    expected = grouped_oracle(x, w, sizes, dout)
    for name, a, b in zip(("out", "dx", "dw"), run(x, w, dout), expected, strict=True):
        close(a, b, name)


def attention_oracle(q, k, v, starts, ends, causal):
    """Attention with all scores, in fp32 at full precision."""
    _, T, N, H = q.shape
    k, v = (jnp.repeat(a, N // k.shape[2], axis=2) for a in (k, v))
    keys, queries = jnp.arange(T)[None, None], jnp.arange(T)[None, :, None]
    visible = (keys >= starts[..., None]) & (keys < ends[..., None])
    visible = visible & (keys <= queries) if causal else visible
    with jax.default_matmul_precision("highest"):
        s = jnp.einsum("BTNH,BSNH->BNTS", q, k) / H**0.5
        p = jax.nn.softmax(jnp.where(visible[:, None], s, -1e30))
        return jnp.einsum("BNTS,BSNH->BTNH", p, v)


ON_GPU = {  # B, T, N, K, H, lengths of the documents, causal
    "one_document": (1, 1024, 8, 2, 128, (1024,), True),
    "head_dim_64": (2, 1024, 4, 4, 64, (1024,), True),
    "head_dim_96": (1, 512, 4, 2, 96, (100, 412), True),
    "documents": (1, 1024, 8, 2, 128, (1, 300, 212, 511), True),
    "documents_64": (2, 1024, 6, 2, 64, (700, 64, 260), True),
    "odd_length": (1, 1003, 4, 1, 128, (500, 503), True),
    "both_ways": (1, 512, 4, 2, 128, (200, 312), False),
}


@pytest.mark.gpu
@pytest.mark.validates("attention tokamax")
@pytest.mark.parametrize("case", ON_GPU)
def test_attention_on_gpu(case):
    B, T, N, K, H, lengths, causal = ON_GPU[case]
    why_not = tokamax_kernels.why_not_attention(capability_here(), jnp.bfloat16, H, True)
    if why_not:
        skip(why_not)
    rng = np.random.default_rng(0)
    q, k, v, dout = (
        jnp.asarray(rng.standard_normal((B, T, n, H)), jnp.bfloat16) for n in (N, K, K, N)
    )
    end = np.cumsum(lengths)
    starts, ends = (jnp.array(np.repeat(a, lengths))[None] for a in (end - lengths, end))
    starts, ends = (jnp.broadcast_to(a, (B, T)).astype(jnp.int32) for a in (starts, ends))

    def run(fn, *arrays):
        out, vjp = jax.vjp(fn, *arrays[:3])
        return out, *vjp(arrays[3])

    @jax.jit
    def ours(*arrays):
        given = {} if lengths == (T,) else {"starts": starts, "ends": ends}
        return run(
            lambda *qkv: tokamax_kernels.attention(*qkv, causal=causal, **given),
            *arrays,
        )

    exact = jax.jit(lambda *a: run(lambda *qkv: attention_oracle(*qkv, starts, ends, causal), *a))
    expected = exact(*(a.astype(jnp.float32) for a in (q, k, v, dout)))
    for name, a, b in zip(("out", "dq", "dk", "dv"), ours(q, k, v, dout), expected, strict=True):
        assert a.dtype == jnp.bfloat16
        close(a, np.asarray(b, np.float64), name)


def capability_here() -> int:
    return round(10 * float(jax.devices()[0].compute_capability))


def main(gpu):
    from jaxrl.perf import compile_only

    compile_only.prepare_environment()
    from jax.sharding import AxisType, Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    mesh = Mesh(np.array(compile_only.topology(gpu, 1)), ("fsdp",), axis_types=(AxisType.Auto,))
    bf16, int32 = jnp.bfloat16, jnp.int32

    def compile_on(fn, *args):
        replicated = NamedSharding(mesh, P())
        args = [jax.ShapeDtypeStruct(s, d, sharding=replicated) for s, d in args]
        with compile_only.as_device(mesh):
            lowered = jax.jit(fn).lower(*args)
        compiled = compile_only.compile_for(lowered)
        return {"text": compiled.as_text(), "temp": compile_only.memory(compiled).temp}

    def attention_gradient(packed):
        def loss(q, k, v, starts, ends):
            given = {"starts": starts, "ends": ends} if packed else {}
            out = tokamax_kernels.attention(q, k, v, **given)
            return jnp.sum(out.astype(jnp.float32) ** 2)

        return jax.grad(loss, argnums=(0, 1, 2))

    def ragged_dot_gradient(implementation):
        def loss(x, w, sizes):
            out = tokamax_kernels.ragged_dot(x, w, sizes, implementation=implementation)
            return jnp.sum(out.astype(jnp.float32) ** 2)

        return jax.grad(loss, argnums=(0, 1))

    def layers(x, w, sizes):
        """The gradient of x through layers of experts, stacked, that are not trained."""

        @jax.checkpoint
        def layer(x, w):
            return x + tokamax_kernels.ragged_dot(x, w, sizes), None

        return jnp.sum(jax.lax.scan(layer, x, w)[0].astype(jnp.float32) ** 2)

    def kept(x, starts):
        """The gradient of layers that keep attention's output and residual."""
        from jaxrl.ops.attention import keepable

        def layer(x, _):
            q = x.reshape(1, -1, 4, 128)
            out = attend(2 * q, q[:, :, :2], q[:, :, 2:], starts)
            return x + out.reshape(x.shape), None

        attend = keepable(lambda q, k, v, starts: tokamax_kernels.attention(q, k, v, starts=starts))
        names = ("attention_out", "attention_residual")
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        layer = jax.checkpoint(layer, policy=policy)
        return jnp.sum(jax.lax.scan(layer, x, length=4)[0].astype(jnp.float32) ** 2)

    def kernels(D, F):
        """tokamax's Triton kernels of one model's experts and their adapters, all trained."""
        from jaxrl_kernels import launch, resources

        product = functools.partial(tokamax_kernels.ragged_dot, implementation="triton")

        def projection(x, w, a, b, sizes):
            return product(x, w, sizes) + product(product(x, a, sizes), b, sizes)

        def gradients(x, dy, sizes, *weights):
            return jax.vjp(lambda *xw: projection(*xw, sizes), x, *weights)[1](dy)

        replicated = NamedSharding(mesh, P())
        with compile_only.as_device(mesh), launch.collect() as found:
            for K, N in ((D, F), (F, D)):
                shapes = (M, K), (M, N), (E,), (E, K, N), (E, K, R), (E, R, N)
                args = [
                    jax.ShapeDtypeStruct(s, int32 if s == (E,) else bf16, sharding=replicated)
                    for s in shapes
                ]
                jax.jit(gradients).lower(*args)
        return [
            dataclasses.asdict(resources.resources(k)) | {"num_warps": k.num_warps} for k in found
        ]

    seen = {}
    if gpu in SMEM:
        seen["kernels"] = {model: kernels(D, F) for model, (D, F) in models_on(gpu).items()}
    with compile_only.as_device(mesh):
        capability = tokamax_kernels._compute_capability()
    seen["default"] = tokamax_kernels.ragged_dot_implementation(capability)
    if capability >= 90:
        for shape in ATTENTION:
            B, T, N, K, H = shape
            args = [((B, T, n, H), bf16) for n in (N, K, K)] + [((B, T), int32)] * 2
            for packed in (False, True):
                seen[f"attention {shape} {packed}"] = compile_on(attention_gradient(packed), *args)
    if gpu == "H100":
        seen["kept"] = compile_on(jax.grad(kept), ((1, 1024, 512), bf16), ((1, 1024), int32))
    rows, K, N, experts = GROUPED
    args = ((rows, K), bf16), ((experts, K, N), bf16), ((experts,), int32)
    for name in {seen["default"], *(["triton"] if gpu == "B200" else [])}:
        seen[f"ragged_dot {name}"] = compile_on(ragged_dot_gradient(name), *args)
    L, experts, K, N = LAYERS
    args = ((512, K), bf16), ((L, experts, K, N), bf16), ((experts,), int32)
    seen["layers"] = compile_on(jax.grad(layers), *args)
    print(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1])
