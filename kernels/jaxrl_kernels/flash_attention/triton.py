"""Flash attention through the Triton kernels: sm_80 and later, packed documents, any T."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_kernels import tiles
from jaxrl_kernels.documents import document_bounds
from jaxrl_kernels.flash_attention import arguments, cost
from jaxrl_kernels.launch import launch

DTYPES = ("bfloat16", "float16", "float32")
MAX_HEAD_DIM = 256


@dataclasses.dataclass(frozen=True)
class Static:
    """What a call is compiled for. `packed`: with starts and ends. `gpu`: a name in the tiles'
    file, or None."""

    scale: float
    causal: bool
    packed: bool
    gpu: str | None
    capability: int | None


def flash_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    segment_ids: Array | None = None,
    scale: float | None = None,
    causal: bool = True,
    return_lse: bool = False,
    gpu: str | None = None,
    capability: int | None = None,
) -> Array | tuple[Array, Array]:
    """softmax(scale q k^T) v within documents: [B, T, N, H], and with `return_lse` also the
    log-sum-exp of each query's scores, fp32 [B, N, T]; both differentiable.

    q [B, T, N, H], k and v [B, T, K, H] in bf16, fp16 or fp32, K a divisor of N; sums in fp32.
    segment_ids int [B, T]: runs of equal ids are documents; blocks of keys and queries that share
    none are not visited, forward or backward. scale: default 1 / sqrt(H); above 0. gpu: whose
    tuned tiles to use; capability: what to compile for, e.g. 90 (None: the GPU that is here).

    Backward is deterministic: every sum has a fixed order. In fp16 it rounds p (dp - delta) before
    `scale` is applied: above 65504 that overflows. Raises ValueError for shapes, dtypes and scales
    it cannot take.
    """
    _check(q, k, v, segment_ids, scale)
    starts = ends = None
    if segment_ids is not None:
        starts, ends = document_bounds(segment_ids)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    attend: Any = _attention
    static = Static(scale, causal, segment_ids is not None, gpu, capability)
    out, lse = attend(static, q, k, v, starts, ends)
    return (out, lse) if return_lse else out


def _check(q, k, v, segment_ids, scale) -> None:
    arguments.check(q, k, v, segment_ids)
    if q.dtype.name not in DTYPES:
        raise ValueError(f"q is {q.dtype}: want one of {', '.join(DTYPES)}")
    if q.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(f"head_dim {q.shape[-1]} is above {MAX_HEAD_DIM}")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale {scale} is not above 0")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: Static, q, k, v, starts, ends) -> tuple[Array, Array]:
    return forward(static, q, k, v, starts, ends)


def _attention_forward(static, q, k, v, starts, ends):
    # Or XLA, where a loop over layers stores them, runs the kernel once more for the stored ones.
    out, lse = jax.lax.optimization_barrier(forward(static, q, k, v, starts, ends))
    return (out, lse), (q, k, v, starts, ends, out, lse)


def _attention_backward(static, residuals, cotangents):
    dout, dlse = cotangents
    q, k, v, starts, ends, out, lse = residuals
    # d lse / d score is the probability, as in the softmax's own gradient: it joins delta.
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    delta = jnp.swapaxes(delta, 1, 2) - dlse  # [B, T, N] -> [B, N, T]
    inputs = (static, q, k, v, starts, ends, dout, lse, delta)
    return backward_dq(*inputs), *backward_dkv(*inputs), None, None


_attention.defvjp(_attention_forward, _attention_backward)


# The three kernels one by one. What queries see is not bound to be documents: starts and ends,
# int32 [B, T], are per query the range of its keys (forward, dq), per key the range of its queries
# (dkv), within the causal mask if there is one. They must not fall along T. With a causal mask, a
# range of keys must not end before its query, nor a range of queries begin after its key: the
# kernels read the other end only. A query with an empty range gets lse -inf and an out that is not
# a number. `dtype`: of the results, default q's.


def forward(static: Static, q, k, v, starts, ends, dtype=None) -> tuple[Array, Array]:
    """(out [B, T, N, H], lse fp32 [B, N, T])."""
    from jaxrl_kernels.flash_attention.kernels import forward_kernel

    B, T, N, _ = q.shape
    tile = _tile("forward", static, q)
    bounds = _bounds(static, starts, ends)
    out, lse = launch(
        forward_kernel,
        *(q, k, v, *bounds),
        out=[
            jax.ShapeDtypeStruct(q.shape, dtype or q.dtype),
            jax.ShapeDtypeStruct((B, N, T), jnp.float32),
        ],
        grid=(math.ceil(T / tile.block_q), N, B),
        name="jaxrl_flash_attention_forward",
        **_cost(static, "forward", q, k),
        **_shared(static, q, k, tile),
    )
    return out, lse


def backward_dq(static: Static, q, k, v, starts, ends, dout, lse, delta, dtype=None) -> Array:
    """dq, given the log-sum-exp and delta = sum(dout * out), fp32 [B, N, T]."""
    from jaxrl_kernels.flash_attention.kernels import dq_kernel

    B, T, N, _ = q.shape
    tile = _tile("dq", static, q)
    (dq,) = launch(
        dq_kernel,
        *(q, k, v, dout.astype(q.dtype), lse, delta, *_bounds(static, starts, ends)),
        out=[jax.ShapeDtypeStruct(q.shape, dtype or q.dtype)],
        grid=(math.ceil(T / tile.block_q), N, B),
        name="jaxrl_flash_attention_dq",
        **_cost(static, "dq", q, k),
        **_shared(static, q, k, tile),
    )
    return dq


def backward_dkv(
    static: Static, q, k, v, starts, ends, dout, lse, delta, dtype=None
) -> tuple[Array, Array]:
    """(dk, dv), as `backward_dq`."""
    from jaxrl_kernels.flash_attention.kernels import dkv_kernel

    B, T, K, _ = k.shape
    tile = _tile("dkv", static, q)
    dk, dv = launch(
        dkv_kernel,
        *(q, k, v, dout.astype(q.dtype), lse, delta, *_bounds(static, starts, ends)),
        out=[jax.ShapeDtypeStruct(k.shape, dtype or k.dtype)] * 2,
        grid=(math.ceil(T / tile.block_k), K, B),
        name="jaxrl_flash_attention_dkv",
        **_cost(static, "dkv", q, k),
        **_shared(static, q, k, tile),
    )
    return dk, dv


def _tile(which: str, static: Static, q) -> tiles.Tile:
    _, T, N, H = q.shape
    return tiles.attention(which, static.gpu, static.capability, q.dtype, H, T, N)


def _bounds(static: Static, starts, ends):
    # Unpacked calls read no bounds; the kernel's arguments are filled with a single number.
    return (starts, ends) if static.packed else (jnp.zeros(1, jnp.int32),) * 2


def _cost(static: Static, which: str, q, k) -> dict[str, int]:
    """FLOPs and bytes of a row that is one document: the most a call can take."""
    (B, T, N, H), K = q.shape, k.shape[2]
    return {
        "flops": cost.flops(which, B, N, H, [T], causal=static.causal),
        "bytes_accessed": cost.bytes_accessed(which, B, T, N, K, H, q.dtype.itemsize),
    }


def _shared(static: Static, q, k, tile: tiles.Tile) -> dict:
    _, T, N, H = q.shape
    return {
        "capability": static.capability,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "SCALE": static.scale,
        "T": T,
        "N": N,
        "K": k.shape[2],
        "H": H,
        "BLOCK_Q": tile.block_q,
        "BLOCK_K": tile.block_k,
        "BLOCK_H": tiles.power_of_two(H),
        "CAUSAL": static.causal,
        "PACKED": static.packed,
        # Three TF32 products per fp32 one would still round; these are exact.
        "PRECISION": "ieee" if q.dtype == jnp.float32 else "tf32",
    }
