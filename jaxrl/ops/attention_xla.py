"""Blocked attention in plain XLA operations: memory linear in T, masked blocks skipped.

FlashAttention-2's algorithm (arXiv:2307.08691) as loops over blocks: forward keeps a running
maximum and sum per query, backward recomputes the probabilities from the log-sum-exp. Blocks above
the diagonal, and blocks in which no query and key share a document, are not visited, in either
pass: the work of a packed row is that of its documents.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxrl_kernels.documents import document_bounds
from jaxtyping import Array, Float, Int

BLOCK = 256
_NEVER = -1e30  # finite: a fully masked row must not turn into NaN


def blocked_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None = None,
    *,
    scale: float | None = None,
    causal: bool = True,
    return_lse: bool = False,
    block: int = BLOCK,
) -> Any:
    """softmax(scale q k^T) v within documents, [B, T, N, H]; scores and sums in fp32.

    segment_ids: runs of equal ids are documents. N is a multiple of K (grouped queries). scale:
    default 1 / sqrt(H). return_lse: also the log-sum-exp of the scores, fp32 [B, N, T].
    """
    T = q.shape[1]
    block = min(block, T)
    documents = None if segment_ids is None else document_bounds(segment_ids)
    bounds = key_bounds(q.shape[:2], documents, causal=causal, block=block)
    q, k, v = (pad_tokens(a, block) for a in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    attend: Any = _attention
    out, lse = attend(q, k, v, bounds, block, scale)
    out, lse = out[:, :T], lse[:, :, :T]
    return (out, lse) if return_lse else out


def key_bounds(shape, documents, *, causal: bool, block: int):
    """(starts, stops) int [B, T], padded to whole blocks: keys each query sees; None for [0,
    itself]. documents: (starts, ends) of what a query may see without the causal mask; default all.
    """
    if documents is None and causal:
        return None
    B, T = shape
    position = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    starts, ends = documents or (jnp.zeros_like(position), jnp.full_like(position, T))
    stops = position + 1 if causal else ends
    return tuple(jnp.pad(a, ((0, 0), (0, -T % block)), mode="edge") for a in (starts, stops))


def pad_tokens(x: Array, block: int, axis: int = 1) -> Array:
    """x with zeros up to whole blocks. Padded keys are no query's; padded queries' results are to
    be cut off, and give no gradient as long as their dout and delta are 0.
    """
    pad = -x.shape[axis] % block
    return jnp.pad(x, [(0, pad if i == axis else 0) for i in range(x.ndim)]) if pad else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(q, k, v, bounds, block, scale) -> Any:
    return forward(q, k, v, bounds, block, scale, q.dtype)


def _attention_forward(q, k, v, bounds, block, scale):
    out, lse = forward(q, k, v, bounds, block, scale, q.dtype)
    return (out, lse), (q, k, v, bounds, out, lse)


def _attention_backward(block, scale, residuals, cotangents):
    q, k, v, bounds, out, lse = residuals
    dout, dlse = cotangents
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    # d lse / d score is the probability, as in the softmax's own gradient: it joins delta.
    delta = jnp.swapaxes(delta, 1, 2) - dlse  # [B, T, N] -> [B, N, T]
    return *backward(q, k, v, bounds, dout, lse, delta, block, scale, q.dtype), None


_attention.defvjp(_attention_forward, _attention_backward)


def _blocks(x, block, groups=1):
    """[B, T, N, H] -> [T/block, B, K, G*block, H]: blocks first, grouped queries as rows."""
    B, T, N, H = x.shape
    x = x.reshape(B, T // block, block, N // groups, groups, H)
    return x.transpose(1, 0, 3, 4, 2, 5).reshape(T // block, B, N // groups, groups * block, H)


def _unblock(x, groups):
    """The inverse of `_blocks`."""
    n, B, K, rows, H = x.shape
    x = x.reshape(n, B, K, groups, rows // groups, H)
    return x.transpose(1, 0, 4, 2, 3, 5).reshape(B, n * rows // groups, K * groups, H)


def _rows(x, block, groups):
    """[B, N, T] -> [T/block, B, K, G*block], as `_blocks`."""
    B, N, T = x.shape
    x = x.reshape(B, N // groups, groups, T // block, block)
    return x.transpose(3, 0, 1, 2, 4).reshape(T // block, B, N // groups, groups * block)


def _unrow(x, groups):
    """The inverse of `_rows`."""
    n, B, K, rows = x.shape
    x = x.reshape(n, B, K, groups, rows // groups)
    return x.transpose(1, 2, 3, 0, 4).reshape(B, K * groups, n * rows // groups)


def _key_blocks(bounds, block, i):
    """(first, end) of the key blocks that queries of block i may see, in any row of the batch."""
    if bounds is None:
        return 0, i + 1
    starts, stops = (jax.lax.dynamic_slice_in_dim(a, i * block, block, 1) for a in bounds)
    return jnp.min(starts) // block, (jnp.max(stops) + block - 1) // block


def _scores(q, k, i, j, bounds, block, scale):
    """Masked scores [B, K, G*block, block] (fp32) of query block i and key block j."""
    s = jnp.einsum("BKRH,BKSH->BKRS", q, k, preferred_element_type=jnp.float32) * scale
    return jnp.where(_visible(q.shape[2], i, j, bounds, block), s, _NEVER)


def _visible(num_rows, i, j, bounds, block):
    """[num_rows, block], or [B, 1, num_rows, block]: which keys of block j queries of i may see."""
    keys = j * block + jnp.arange(block)
    if bounds is None:
        queries = i * block + jnp.arange(num_rows) % block
        return queries[:, None] >= keys[None, :]
    starts, stops = (jax.lax.dynamic_slice_in_dim(a, i * block, block, 1) for a in bounds)
    starts, stops = (jnp.tile(a, (1, num_rows // block))[:, :, None] for a in (starts, stops))
    return ((keys >= starts) & (keys < stops))[:, None]


def forward(q, k, v, bounds, block, scale, dtype) -> tuple[Array, Array]:
    """(out in `dtype` [B, T, N, H], lse [B, N, T]); T is a multiple of block.

    bounds: as `key_bounds` gives them. A query that sees no key has an lse of -1e30 or less, and
    anything for its out.
    """
    groups = q.shape[2] // k.shape[2]
    qs, ks, vs = _blocks(q, block, groups), _blocks(k, block), _blocks(v, block)

    def row(i):
        qi = qs[i]
        shape = qi.shape[:-1]

        def column(j, carry):
            top, total, out = carry
            s = _scores(qi, ks[j], i, j, bounds, block, scale)
            new_top = jnp.maximum(top, jnp.max(s, axis=-1))
            p = jnp.exp(s - new_top[..., None])
            fade = jnp.exp(top - new_top)
            total = total * fade + jnp.sum(p, axis=-1)
            pv = jnp.einsum(
                "BKRS,BKSH->BKRH", p.astype(v.dtype), vs[j], preferred_element_type=jnp.float32
            )
            return new_top, total, out * fade[..., None] + pv

        start = (
            jnp.full(shape, _NEVER, jnp.float32),
            jnp.zeros(shape, jnp.float32),
            jnp.zeros(qi.shape, jnp.float32),
        )
        top, total, out = jax.lax.fori_loop(*_key_blocks(bounds, block, i), column, start)
        return (out / total[..., None]).astype(dtype), top + jnp.log(total)

    out, lse = jax.lax.map(row, jnp.arange(qs.shape[0]))
    return _unblock(out, groups), _unrow(lse, groups)


def backward(q, k, v, bounds, dout, lse, delta, block, scale, dtype) -> tuple[Array, Array, Array]:
    """(dq, dk, dv) in `dtype`, given lse and delta = sum(dout * out), fp32 [B, N, T]."""
    groups = q.shape[2] // k.shape[2]
    qs, ks, vs = _blocks(q, block, groups), _blocks(k, block), _blocks(v, block)
    dos = _blocks(dout, block, groups)
    lse, delta = _rows(lse, block, groups), _rows(delta, block, groups)
    # Scores are keys by queries here: so no product contracts the first dimension of both sides,
    # which XLA's CPU matmul does at half speed. dq is carried transposed, [B, K, H, G*block].
    kts = jnp.swapaxes(ks, -1, -2)
    f32 = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def row(carry, i):
        qi, doi, lse_i, delta_i = qs[i], dos[i], lse[i][..., None, :], delta[i][..., None, :]

        def column(j, carry):
            dqt, dk, dv = carry
            s = f32("BKSH,BKRH->BKSR", ks[j], qi) * scale
            visible = jnp.swapaxes(_visible(qi.shape[2], i, j, bounds, block), -1, -2)
            p = jnp.exp(jnp.where(visible, s, _NEVER) - lse_i)
            dp = f32("BKSH,BKRH->BKSR", vs[j], doi)
            ds = (p * (dp - delta_i) * scale).astype(q.dtype)
            p = p.astype(q.dtype)
            dqt = dqt + f32("BKHS,BKSR->BKHR", kts[j], ds)
            dk = dk.at[j].add(f32("BKSR,BKRH->BKSH", ds, qi))
            dv = dv.at[j].add(f32("BKSR,BKRH->BKSH", p, doi))
            return dqt, dk, dv

        B, K, R, H = qi.shape
        dqt, dk, dv = jax.lax.fori_loop(
            *_key_blocks(bounds, block, i),
            column,
            (jnp.zeros((B, K, H, R), jnp.float32), *carry),
        )
        return (dk, dv), jnp.swapaxes(dqt, -1, -2).astype(dtype)

    zeros = jnp.zeros(ks.shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(row, (zeros, zeros), jnp.arange(qs.shape[0]))
    return _unblock(dq, groups), _unblock(dk, 1).astype(dtype), _unblock(dv, 1).astype(dtype)
