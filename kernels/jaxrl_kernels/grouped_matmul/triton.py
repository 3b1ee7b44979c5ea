"""Grouped products through the Triton kernels: sm_80 and later, groups of any sizes, any K, N."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_kernels import tiles
from jaxrl_kernels.grouped_matmul import arguments, cost
from jaxrl_kernels.grouped_matmul.schedule import num_tiles, offsets, schedule
from jaxrl_kernels.launch import launch

DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True)
class _Static:
    """What a call is compiled for. `gpu`: a name in the tiles' file, or None."""

    gpu: str | None
    capability: int | None


def grouped_matmul(
    x: Array,
    w: Array,
    group_sizes: Array,
    *,
    gpu: str | None = None,
    capability: int | None = None,
) -> Array:
    """Rows times their expert's weights: [M, N] in the dtype of x, differentiable in x and w.

    x [M, K] in bf16, fp16 or fp32: group_sizes[0] rows of expert 0, then those of expert 1, ...;
    rows beyond all groups yield zeros, and zero gradients. w [E, K, N] of any floating dtype: it
    is multiplied in the dtype of x, and its gradient has its own dtype, straight from the fp32
    sums. group_sizes: int [E]. gpu: whose tuned tiles to use; capability: what to compile for, e.g.
    90 (None: the GPU that is here).

    Deterministic, forward and backward. Raises ValueError for shapes and dtypes it cannot take.
    """
    _check(x, group_sizes, w=w)
    return _matmul(_Static(gpu, capability), x, w, group_sizes)


def grouped_lora_matmul(
    x: Array,
    w: Array,
    a: Array,
    b: Array,
    group_sizes: Array,
    *,
    gpu: str | None = None,
    capability: int | None = None,
) -> Array:
    """x w[e] + (x a[e]) b[e], as `grouped_matmul`: the second product of a LoRA adapter (a
    [E, K, R], b [E, R, N]) is a last step of the first one's sum, forward and for dx, and takes no
    pass over [M, N] of its own. LoRA's alpha / R is a factor of b, to be multiplied in outside.
    """
    _check(x, group_sizes, w=w, a=a)
    if b.shape != (w.shape[0], a.shape[2], w.shape[2]):
        raise ValueError(f"b {b.shape}: want {(w.shape[0], a.shape[2], w.shape[2])}")
    return _lora(_Static(gpu, capability), x, w, a, b, group_sizes)


def grouped_swiglu(
    x: Array,
    w_gate: Array,
    w_up: Array,
    group_sizes: Array,
    *,
    gpu: str | None = None,
    capability: int | None = None,
) -> Array:
    """silu(x w_gate[e]) * (x w_up[e]), as `grouped_matmul`: one kernel reads x once for both.

    Not differentiated it writes its result only; else it also keeps both products, [M, N] each.
    `cost.swiglu_bytes` says what that saves.
    """
    _check(x, group_sizes, w_gate=w_gate, w_up=w_up)
    if w_gate.shape != w_up.shape:
        raise ValueError(f"w_gate {w_gate.shape} and w_up {w_up.shape} differ")
    return _swiglu(_Static(gpu, capability), x, w_gate, w_up, group_sizes)


def _check(x, group_sizes, **weights) -> None:
    arguments.check(x, group_sizes, **weights)
    if x.dtype.name not in DTYPES:
        raise ValueError(f"x is {x.dtype}: want one of {', '.join(DTYPES)}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(static: _Static, x, w, group_sizes) -> Array:
    return rows_product(static, "forward", [(x, w)], group_sizes)


def _matmul_forward(static, x, w, group_sizes):
    return _matmul(static, x, w, group_sizes), (x, w, group_sizes)


def _matmul_backward(static, residuals, dy):
    x, w, group_sizes = residuals
    dx = rows_product(static, "dx", [(dy, w)], group_sizes)
    return dx, weights_gradient(static, x, dy, group_sizes, w.dtype), None


_matmul.defvjp(_matmul_forward, _matmul_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lora(static: _Static, x, w, a, b, group_sizes) -> Array:
    return _lora_forward(static, x, w, a, b, group_sizes)[0]


def _lora_forward(static, x, w, a, b, group_sizes):
    xa = rows_product(static, "forward", [(x, a)], group_sizes)
    y = rows_product(static, "forward", [(x, w), (xa, b)], group_sizes)
    return y, (x, w, a, b, xa, group_sizes)


def _lora_backward(static, residuals, dy):
    x, w, a, b, xa, group_sizes = residuals
    dxa = rows_product(static, "dx", [(dy, b)], group_sizes)
    dx = rows_product(static, "dx", [(dy, w), (dxa, a)], group_sizes)
    return (
        dx,
        weights_gradient(static, x, dy, group_sizes, w.dtype),
        weights_gradient(static, x, dxa, group_sizes, a.dtype),
        weights_gradient(static, xa, dy, group_sizes, b.dtype),
        None,
    )


_lora.defvjp(_lora_forward, _lora_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _swiglu(static: _Static, x, w_gate, w_up, group_sizes) -> Array:
    return swiglu(static, x, w_gate, w_up, group_sizes, residuals=False)[0]


def _swiglu_forward(static, x, w_gate, w_up, group_sizes):
    h, gate, up = swiglu(static, x, w_gate, w_up, group_sizes, residuals=True)
    return h, (x, w_gate, w_up, gate, up, group_sizes)


def _swiglu_backward(static, residuals, dh):
    x, w_gate, w_up, gate, up, group_sizes = residuals
    _, vjp = jax.vjp(_silu_times, gate, up)
    dgate, dup = vjp(dh.astype(jnp.float32))
    dx = rows_product(static, "dx", [(dgate, w_gate), (dup, w_up)], group_sizes)
    return (
        dx,
        weights_gradient(static, x, dgate, group_sizes, w_gate.dtype),
        weights_gradient(static, x, dup, group_sizes, w_up.dtype),
        None,
    )


def _silu_times(gate: Array, up: Array) -> Array:
    """In fp32; the gradients have the dtype of the arguments."""
    return jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)


# A rematerialised forward pass keeps no products either: it calls `_swiglu`.
_swiglu.defvjp(_swiglu_forward, _swiglu_backward, optimize_remat=True)


def rows_product(
    static: _Static, which: str, pairs: Sequence[tuple[Array, Array]], group_sizes: Array
) -> Array:
    """[M, N]: the sum over one or two (x [M, K], w) of each row of x times w[its expert].

    w is [E, K, N] where `which` is "forward", and [E, N, K] where it is "dx". Of the dtype of the
    first x.
    """
    from jaxrl_kernels.grouped_matmul.kernels import rows_kernel

    dtype, transposed = pairs[0][0].dtype, which == "dx"
    pairs = [(x.astype(dtype), w.astype(dtype)) for x, w in pairs]
    x, w = pairs[0]
    (M, K), E, N = x.shape, w.shape[0], w.shape[1 if transposed else 2]
    x2, w2 = pairs[1] if len(pairs) > 1 else pairs[0]
    K2 = x2.shape[1] if len(pairs) > 1 else 0
    tile = tiles.grouped_matmul(which, static.gpu, static.capability, dtype, M, K, N)
    (out,) = launch(
        rows_kernel,
        *(x, w, x2, w2, schedule(group_sizes, M, tile.block_m)),
        out=[jax.ShapeDtypeStruct((M, N), dtype)],
        name=f"jaxrl_grouped_matmul_{which}",
        flops=cost.flops(M, [(x.shape[1], N) for x, _ in pairs]),
        bytes_accessed=cost.rows_bytes(M, E, [x.shape[1] for x, _ in pairs], N, dtype.itemsize),
        K2=K2,
        TRANSPOSED=transposed,
        BLOCK_K2=min(tile.block_k, tiles.power_of_two(K2)),
        **_walk(static, tile, M, E, K, N, dtype),
    )
    return out


def swiglu(
    static: _Static, x: Array, w_gate: Array, w_up: Array, group_sizes: Array, *, residuals: bool
) -> list[Array]:
    """[h], or with `residuals` [h, x w_gate[e], x w_up[e]]; [M, N] each."""
    from jaxrl_kernels.grouped_matmul.kernels import swiglu_kernel

    (M, K), (E, _, N), dtype = x.shape, w_gate.shape, x.dtype
    tile = tiles.grouped_matmul("swiglu", static.gpu, static.capability, dtype, M, K, N)
    missing = {} if residuals else {"gate_out_ptr": None, "up_out_ptr": None}
    return launch(
        swiglu_kernel,
        *(x, w_gate.astype(dtype), w_up.astype(dtype), schedule(group_sizes, M, tile.block_m)),
        out=[jax.ShapeDtypeStruct((M, N), dtype)] * (3 if residuals else 1),
        name="jaxrl_grouped_swiglu",
        flops=cost.flops(M, [(K, N)] * 2),
        bytes_accessed=cost.swiglu_bytes(M, E, K, N, dtype.itemsize, residuals=residuals),
        RESIDUALS=residuals,
        **missing,
        **_walk(static, tile, M, E, K, N, dtype),
    )


def weights_gradient(static: _Static, x: Array, dy: Array, group_sizes: Array, out_dtype) -> Array:
    """[E, K, N]: x_e^T dy_e over the rows of each expert, from fp32 sums in `out_dtype`."""
    from jaxrl_kernels.grouped_matmul.kernels import weights_kernel

    (M, K), N, E = x.shape, dy.shape[1], group_sizes.shape[0]
    tile = tiles.grouped_matmul("dw", static.gpu, static.capability, x.dtype, M, K, N)
    itemsizes = x.dtype.itemsize, jnp.dtype(out_dtype).itemsize
    (dw,) = launch(
        weights_kernel,
        *(x, dy.astype(x.dtype), offsets(group_sizes, M)),
        out=[jax.ShapeDtypeStruct((E, K, N), out_dtype)],
        grid=(_ceil(K, tile.block_k) * _ceil(N, tile.block_n), E),
        name="jaxrl_grouped_matmul_dw",
        flops=cost.flops(M, [(K, N)]),
        bytes_accessed=cost.weights_bytes(M, E, K, N, *itemsizes),
        **_compiled_for(static, tile, K, N, x.dtype),
    )
    return dw


def _walk(static: _Static, tile: tiles.GroupedTile, M: int, E: int, K: int, N: int, dtype) -> dict:
    """Grid and parameters of the kernels that walk a schedule of tiles of rows."""
    rows = num_tiles(M, E, tile.block_m)
    return {
        "grid": (rows * _ceil(N, tile.block_n),),
        "TILES": rows,
        "E": E,
        **_compiled_for(static, tile, K, N, dtype),
    }


def _compiled_for(static: _Static, tile: tiles.GroupedTile, K: int, N: int, dtype) -> dict:
    return {
        "capability": static.capability,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "K": K,
        "N": N,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "BAND": tile.band,
        # Three TF32 products per fp32 one would still round; these are exact.
        "PRECISION": "ieee" if dtype == jnp.float32 else "tf32",
    }


def _ceil(n: int, block: int) -> int:
    return -(-n // block)
