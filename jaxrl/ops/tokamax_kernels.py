"""Attention and grouped matmul by the kernels of tokamax (openxla/tokamax), Mosaic and Triton.

Everything here that is private to tokamax is in this one file, and nothing of tokamax is imported
before it is used. An implementation is always named: tokamax's own default falls back to XLA
without a word. So is a configuration: nothing is autotuned, looked up or run to choose it, and a
plan compiles the kernel that the run will take. tests/ops/test_tokamax_kernels.py is the contract.

Like all such kernels they are opaque to the SPMD partitioner: call them inside `shard_map`.
"""

import functools
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxrl_kernels import tiles
from jaxtyping import Array, Float, Int

IMPLEMENTATIONS = ("mosaic", "triton")  # of ragged_dot; attention is Mosaic
_DTYPES = (jnp.bfloat16, jnp.float16)
# Attention's backward is two kernels (dq; dk and dv), that make scores and dp twice: seven products
# over the scores in all.
BACKWARD_CALLS, BACKWARD_PRODUCTS = 2, 7

# Which dimensions of x [M, K], w [E, K, N] and dout [M, N] a grouped product contracts.
_ROWS_BY_EXPERT = jax.lax.RaggedDotDimensionNumbers((([1], [1]), ([], [])), [0], [0])
_ROWS_BY_TRANSPOSED = jax.lax.RaggedDotDimensionNumbers((([1], [2]), ([], [])), [0], [0])
_SUM_OVER_ROWS = jax.lax.RaggedDotDimensionNumbers((([0], [0]), ([], [])), [0], [])

# Tiles by architecture: what wins most of tokamax's own measurements of bf16 products with at
# least 16,384 rows (data/autotuning of 0.0.17: H100 and B200). It falls back to other tiles where
# it did not measure the very shape. Ampere's are its fallback, which fits any shared memory.
# Triton's are never larger than the product (`_clamped`): an adapter's rank of 16 takes 16.
_MOSAIC_TILES: dict[int, dict[str, Any]] = {
    9: dict(block_m=128, block_n=64, block_k=128, num_stages=4, split_k=1)
    | dict(persistent=True, grid_minor_dim=1, grid_tile_width=8),
    10: dict(block_m=128, block_n=128, block_k=128, num_stages=2, split_k=1)
    | dict(collective=True, grid_minor_dim=0, grid_tile_width=4),
}
_TRITON_TILES: dict[int, dict[str, Any]] = {
    8: dict(block_m=128, block_n=128, block_k=32, num_warps=4, num_stages=4),
    9: dict(block_m=128, block_n=128, block_k=32, num_warps=4, num_stages=4),
    # Compiled, not timed: no B200 has run it. tokamax's winner there, 256 x 256 by 4 warps, keeps
    # 512 sums a thread and spills 2.7 KB of them when it stores; this one spills nothing. By itself
    # `ragged_dot` would take Mosaic there: it is for ranks, which are too narrow for that.
    10: dict(block_m=128, block_n=256, block_k=64, num_warps=8, num_stages=3),
}
_TRITON_SUM_TILES: dict[int, dict[str, Any]] = {  # of the weights' gradient
    8: dict(block_m=128, block_n=128, block_k=32, num_warps=4, num_stages=4),
    9: dict(block_m=128, block_n=256, block_k=32, num_warps=8, num_stages=5),
    10: dict(block_m=256, block_n=256, block_k=32, num_warps=8, num_stages=5),
}


def why_not_attention(compute_capability: int, dtype, head_dim: int, packed: bool) -> str | None:
    """Why `attention` cannot run on a GPU of `compute_capability` (90 for sm_90), or None."""
    del packed  # documents are what it is here for
    if compute_capability // 10 not in (9, 10):
        return f"needs Hopper or Blackwell, and this is sm_{compute_capability}"
    if head_dim > 128 or head_dim % 8:
        return f"takes head_dim up to 128 in steps of 8, not {head_dim}"
    return _why_not_dtype(dtype) or _why_not_installed()


def why_not_ragged_dot(
    compute_capability: int, dtype, features: tuple[int, ...], implementation: str | None = None
) -> str | None:
    """Why `ragged_dot` cannot run on a GPU of `compute_capability`, or None.

    features: K and N of w [E, K, N]. implementation: "mosaic", "triton", or None for the one that
    `ragged_dot` takes by itself.
    """
    implementation = implementation or ragged_dot_implementation(compute_capability)
    _check_implementation(implementation)
    major = compute_capability // 10
    if implementation == "triton" and major not in _TRITON_TILES:
        return f"needs Ampere, Hopper or Blackwell, and this is sm_{compute_capability}"
    if implementation == "mosaic":
        if major not in _MOSAIC_TILES:
            return f"needs Hopper or Blackwell, and this is sm_{compute_capability}"
        step = _MOSAIC_TILES[major]["block_n"]
        if any(n % step for n in features):
            return f"takes features in steps of {step}, not {features[0]} x {features[1]}"
    return _why_not_dtype(dtype) or _why_not_installed()


def ragged_dot_implementation(compute_capability: int) -> str:
    """The faster of `IMPLEMENTATIONS` on that GPU: "mosaic" from Hopper on, else "triton"."""
    return "mosaic" if compute_capability // 10 in _MOSAIC_TILES else "triton"


def _why_not_dtype(dtype) -> str | None:
    if jnp.dtype(dtype) in _DTYPES:
        return None
    return f"takes bfloat16 or float16, not {jnp.dtype(dtype).name}"


def _why_not_installed() -> str | None:
    if all(importlib.util.find_spec(name) for name in ("tokamax", "triton", "jax_triton")):
        return None
    return "is not installed: pip install 'jaxrl[tokamax]'"


def _compute_capability() -> int:
    """Of the GPU that tokamax compiles for: JAX's default device, or the planner's."""
    from jax.extend import backend

    device = backend.get_default_device()
    if device.platform not in ("gpu", "cuda"):
        raise ValueError(f"tokamax needs an NVIDIA GPU, and this program is for {device.platform}")
    return round(10 * float(device.compute_capability))


def _refuse(what: str, why_not: str | None) -> None:
    if why_not:
        raise ValueError(f"tokamax {what} {why_not}")


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    starts: Int[Array, "B T"] | None = None,
    ends: Int[Array, "B T"] | None = None,
    causal: bool = True,
    scale: float | None = None,
    return_lse: bool = False,
) -> Float[Array, "B T N H"]:
    """softmax(scale q k^T) v by flash attention (Mosaic GPU), forward and backward.

    starts, ends: first key (inclusive) and end (exclusive) of the document of each query; documents
    are contiguous, and starts <= t < ends for every query t. None: one document a row. scale: by
    default 1 / sqrt(H). N is a multiple of K (grouped queries).

    Key blocks that lie before a query block's documents are skipped forward, and not backward: the
    gradient of a packed row costs a full causal triangle. Kept for the backward are q, k, v, the
    output and the log-sum-exp (fp32 [B, N, T]).

    Raises ValueError where it cannot run (`why_not_attention`), and for `return_lse`: tokamax drops
    the gradient of the log-sum-exp in silence.
    """
    if return_lse:
        raise ValueError(
            "tokamax attention has no log-sum-exp output: it drops the gradient of it; use another"
        )
    H = q.shape[-1]
    packed = starts is not None or ends is not None
    _refuse("attention", why_not_attention(_compute_capability(), q.dtype, H, packed))
    if causal:
        # Below the diagonal the end of a document limits nothing, and given one tokamax would turn
        # the causal mask into per-query ends and no longer skip the blocks above it.
        ends = None
    return _attention(q, k, v, starts, ends, causal, H**-0.5 if scale is None else float(scale))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(q, k, v, starts, ends, causal, scale):
    return _flash(q, k, v, starts, ends, causal, scale)[0]()


def _flash(q, k, v, starts, ends, causal, scale):
    """(tokamax's op with its arguments, its backward op with those that both take)."""
    from tokamax._src.ops.attention.base import Mask
    from tokamax.ops.gpu import PallasMosaicFlashAttention

    per_query = [None if a is None else a[:, None].astype(jnp.int32) for a in (starts, ends)]
    mask = Mask(k_start=per_query[0], k_end=per_query[1], is_causal=causal)
    op: Any = PallasMosaicFlashAttention()
    bound = op.bind(q, k, v, mask=mask, logits_scale=scale)
    forward = functools.partial(_configured(op, bound), q, k, v, mask=mask, logits_scale=scale)
    shared = {name: x for name, x in bound.kwargs.items() if name != "return_residuals"}
    return forward, functools.partial(op.vjp.bind, **shared)


def _configured(op, bound):
    """`op` with its heuristic configuration, so that it looks for no other."""
    return op.replace(config=bound.heuristics_config)


def _attention_forward(q, k, v, starts, ends, causal, scale):
    forward, _ = _flash(q, k, v, starts, ends, causal, scale)
    out, (top, total) = forward(return_residuals=True)
    # A scan that keeps `out` for the backward would otherwise run the kernel twice a layer: XLA
    # fuses the call with the write into the stack, and again with nothing for the other reader.
    out = jax.lax.optimization_barrier(out)
    return out, (q, k, v, starts, ends, out, top + jnp.log(total))


def _attention_backward(causal, scale, residuals, dout):
    q, k, v, starts, ends, out, lse = residuals
    _, bind = _flash(q, k, v, starts, ends, causal, scale)
    # A maximum of lse and a sum of one are the same softmax as the two residuals of the forward.
    bound = bind((lse, jnp.ones_like(lse)), out, dout.astype(out.dtype), q, k, v)
    grads = _configured(bound.op, bound)(*bound.args, **bound.kwargs)
    return grads["q"], grads["k"], grads["v"], None, None


_attention.defvjp(_attention_forward, _attention_backward)


def ragged_dot(
    x: Float[Array, "M K"],
    w: Float[Array, "E K N"],
    group_sizes: Int[Array, "E"],
    *,
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """Rows of x times the matrix of their group; the first group_sizes[0] rows are group 0's.

    Rows beyond sum(group_sizes) (<= M) are zero, in the output and in the gradient of x, whatever
    x and the output's cotangent hold there.

    implementation: "mosaic" (Hopper, Blackwell) or "triton" (also Ampere); None takes
    `ragged_dot_implementation`. The gradient of w is Triton's either way: Mosaic has none for
    Blackwell, and on H100 tokamax measured its Mosaic one at five times Triton's time. Sums are
    fp32.

    Memory: one transposed copy of w, forward on Blackwell's Mosaic and backward elsewhere.
    Raises ValueError where it cannot run (`why_not_ragged_dot`).
    """
    capability = _compute_capability()
    implementation = implementation or ragged_dot_implementation(capability)
    why_not = why_not_ragged_dot(capability, x.dtype, w.shape[1:], implementation)
    _refuse(f"ragged_dot {implementation!r}", why_not)
    return _ragged_dot(x, w, group_sizes.astype(jnp.int32), implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _ragged_dot(x, w, group_sizes, implementation):
    out = _product(x, _row_major(w), group_sizes, _ROWS_BY_EXPERT, implementation)
    return _zero_beyond(out, group_sizes)


def _ragged_dot_forward(x, w, group_sizes, implementation):
    return _ragged_dot(x, w, group_sizes, implementation), (x, w, group_sizes)


def _ragged_dot_backward(implementation, residuals, dout):
    x, w, group_sizes = residuals
    dout = dout.astype(x.dtype)
    dx = _product(dout, _row_major(w), group_sizes, _ROWS_BY_TRANSPOSED, implementation)
    dw = _product(x, dout, group_sizes, _SUM_OVER_ROWS, "triton")
    return _zero_beyond(dx, group_sizes), dw, None


_ragged_dot.defvjp(_ragged_dot_forward, _ragged_dot_backward)


def _row_major(w):
    """`w` as it lies in memory. The kernels want one of K and N last, in one pass or the other, and
    XLA would rather turn the weights of all layers, once, in front of the loop over layers: a
    second copy of every expert that no gather brings anew (235B on 8 GPUs with an expert axis of 8:
    53 GiB). So a layer's are turned in its turn."""
    return with_layout_constraint(w, Layout(major_to_minor=(0, 1, 2)))


def _product(a, b, group_sizes, dimensions, implementation):
    from tokamax.ops import gpu

    major = _compute_capability() // 10
    op: Any
    if implementation == "mosaic":
        config = gpu.PallasMosaicRaggedDotConfig(**_MOSAIC_TILES[major])
        op = gpu.PallasMosaicRaggedDot(config=config)
    else:
        sums = dimensions is _SUM_OVER_ROWS
        k, m = a.shape if sums else a.shape[::-1]
        n = b.shape[1 if dimensions is not _ROWS_BY_EXPERT else 2]
        tile = _clamped((_TRITON_SUM_TILES if sums else _TRITON_TILES)[major], m, n, k)
        if sums and major == 8 and tile["block_m"] == 16:
            tile |= {"num_stages": 3}  # with four an A100 spills, of a rank's few registers
        op = gpu.PallasTritonRaggedDot(config=gpu.PallasTritonRaggedDotConfig(**tile))
    return op(
        a,
        b,
        group_sizes=group_sizes,
        ragged_dot_dimension_numbers=dimensions,
        preferred_element_type=a.dtype,
    )


def _clamped(tile: dict[str, Any], m: int, n: int, k: int) -> dict[str, Any]:
    """`tile`, its blocks at most the sides of an m x k by k x n product, rounded up to a power of
    two: beyond them all is masked, and the tensor cores would multiply zeros."""
    sides = {"block_m": m, "block_n": n, "block_k": k}
    return tile | {name: min(tile[name], tiles.power_of_two(x)) for name, x in sides.items()}


def _zero_beyond(rows, group_sizes):
    """The kernels leave rows of no group as the buffer was."""
    used = jnp.arange(rows.shape[0])[:, None] < jnp.sum(group_sizes)
    return jnp.where(used, rows, 0)


def _check_implementation(name: str) -> None:
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"unknown ragged_dot {name!r}; one of {', '.join(IMPLEMENTATIONS)}")
