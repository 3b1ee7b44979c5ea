"""Blocked attention in plain XLA operations: memory linear in T, masked blocks skipped.

FlashAttention-2's algorithm (arXiv:2307.08691) over blocks: forward keeps a running maximum and sum
per query, backward recomputes the probabilities from the log-sum-exp. Which block of queries meets
which of keys is listed first, over all rows of the batch: blocks above the diagonal, and blocks in
which no query and key share a document, are not visited, in either pass, and the work of a packed
row is that of its documents. Several visits are computed at a time: products of short documents
alone would be too small for all cores.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxrl_kernels.documents import document_bounds
from jaxrl_kernels.flash_attention import arguments
from jaxtyping import Array, Float, Int

from jaxrl.ops.partial_attention import delta

_NEVER = -1e30  # finite: a fully masked row must not turn into NaN


# Scores that are computed together, at most, unless those of one visit are more.
_AT_ONCE = 600_000


def block_size(seq_len: int) -> int:
    """Queries and keys of a block, at most `seq_len`: smaller ones mask less, larger ones multiply
    faster (measured: bench/peers/NOTES.md)."""
    return min(64 if seq_len <= 1024 else 128, seq_len)


def visits_at_once(rows: int, seq_len: int, num_heads: int, block: int) -> int:
    """Pairs of a block of queries and a block of keys that are computed together: of at most all
    that so many rows have."""
    there_are = rows * (-(-seq_len // block)) ** 2
    return min(32, there_are, max(1, _AT_ONCE // (num_heads * block * block)))


def blocked_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None = None,
    *,
    scale: float | None = None,
    causal: bool = True,
    return_lse: bool = False,
    block: int | None = None,
) -> Any:
    """softmax(scale q k^T) v within documents, [B, T, N, H]; scores and sums in fp32.

    segment_ids: runs of equal ids are documents. N is a multiple of K (grouped queries). scale:
    default 1 / sqrt(H). return_lse: also the log-sum-exp of the scores, fp32 [B, N, T]. block:
    default `block_size`. Raises ValueError for shapes or dtypes that do not fit.
    """
    arguments.check(q, k, v, segment_ids)
    T = q.shape[1]
    block = min(block or block_size(T), T)
    documents = None if segment_ids is None else document_bounds(segment_ids)
    bounds = key_bounds(q.shape[:2], documents, causal=causal, block=block)
    q, k, v = (pad_tokens(a, block) for a in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    attend: Any = _attention
    out, lse = attend(q, k, v, bounds, block, scale)
    out, lse = out[:, :T], lse[:, :, :T]
    return (out, lse) if return_lse else out


def key_bounds(shape, documents, *, causal: bool, block: int):
    """(starts, stops) int [B, T], padded to whole blocks: keys each query sees. documents: (starts,
    ends) of what a query may see without the causal mask; default all.
    """
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
    # d lse / d score is the probability, as in the softmax's own gradient: it joins delta.
    return *backward(
        q, k, v, bounds, dout, lse, delta(dout, out) - dlse, block, scale, q.dtype
    ), None


_attention.defvjp(_attention_forward, _attention_backward)


def _blocks(x, block, groups=1):
    """[B, T, N, H] -> [B*T/block, K, G*block, H]: the blocks of all rows, grouped queries as rows
    of a product."""
    B, T, N, H = x.shape
    x = x.reshape(B, T // block, block, N // groups, groups, H)
    return x.transpose(0, 1, 3, 4, 2, 5).reshape(-1, N // groups, groups * block, H)


def _unblock(x, B, groups):
    """The inverse of `_blocks`."""
    _, K, rows, H = x.shape
    x = x.reshape(B, -1, K, groups, rows // groups, H)
    return x.transpose(0, 1, 4, 2, 3, 5).reshape(B, -1, K * groups, H)


def _rows(x, block, groups):
    """[B, N, T] -> [B*T/block, K, G*block], as `_blocks`."""
    B, N, T = x.shape
    x = x.reshape(B, N // groups, groups, T // block, block)
    return x.transpose(0, 3, 1, 2, 4).reshape(-1, N // groups, groups * block)


def _unrow(x, B, groups):
    """The inverse of `_rows`."""
    _, K, rows = x.shape
    x = x.reshape(B, -1, K, groups, rows // groups)
    return x.transpose(0, 2, 3, 1, 4).reshape(B, K * groups, -1)


@dataclasses.dataclass(frozen=True)
class _Visits:
    """The first `count` of these pairs of a block of queries and a block of keys, numbers of those
    of `_blocks`; `size` of them at a time. Every block of queries has one, and all of its are side
    by side."""

    queries: Int[Array, " V"]
    keys: Int[Array, " V"]
    count: Int[Array, ""]
    size: int
    bounds: tuple[Int[Array, "B T"], Int[Array, "B T"]]
    block: int

    @property
    def rounds(self) -> Int[Array, ""]:
        return (self.count + self.size - 1) // self.size

    def round(self, number, groups: int) -> tuple[Int[Array, " C"], Int[Array, " C"], Any]:
        """(blocks of queries, blocks of keys, which of their keys are visible [C, 1, R, S])."""
        at, block = number * self.size, self.block
        here = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=at, slice_size=self.size)
        queries, keys = here(self.queries), here(self.keys)
        # Visits behind the last one see nothing.
        counts = (at + jnp.arange(self.size) < self.count)[:, None]
        starts, stops = (a.reshape(-1, block)[queries] * counts for a in self.bounds)
        starts, stops = (jnp.tile(a, (1, groups))[:, None, :, None] for a in (starts, stops))
        blocks = self.bounds[0].shape[1] // block
        position = ((keys % blocks * block)[:, None] + jnp.arange(block))[:, None, None]
        return queries, keys, (position >= starts) & (position < stops)


def _visits(bounds, block, num_heads) -> _Visits:
    """Those of `bounds` as `key_bounds` gives them."""
    B, T = bounds[0].shape
    size = visits_at_once(B, T, num_heads, block)
    n = T // block
    starts, stops = (a.reshape(B, n, block) for a in bounds)
    own = jnp.arange(n)
    some = starts < stops
    first = jnp.min(jnp.where(some, starts, T), axis=-1) // block
    end = (jnp.max(jnp.where(some, stops, 0), axis=-1) + block - 1) // block
    none = first >= end
    first, end = jnp.where(none, own, first), jnp.where(none, own + 1, end)
    wanted = (own >= first[..., None]) & (own < end[..., None])  # [B, queries, keys]
    most = wanted.size + -wanted.size % size
    (pairs,) = jnp.nonzero(wanted.reshape(-1), size=most, fill_value=wanted.size - 1)
    queries = (pairs // n).astype(jnp.int32)
    keys = queries // n * n + pairs.astype(jnp.int32) % n
    return _Visits(queries, keys, jnp.sum(wanted, dtype=jnp.int32), size, bounds, block)


def forward(q, k, v, bounds, block, scale, dtype) -> tuple[Array, Array]:
    """(out in `dtype` [B, T, N, H], lse [B, N, T]); T is a multiple of block.

    bounds: as `key_bounds` gives them. A query that sees no key has an lse of -1e30, and zeros for
    its out.
    """
    B, groups = q.shape[0], q.shape[2] // k.shape[2]
    qs, ks, vs = _blocks(q, block, groups), _blocks(k, block), _blocks(v, block)
    visits = _visits(bounds, block, q.shape[2])
    f32 = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def visit(number, carry):
        queries, keys, visible = visits.round(number, groups)
        first, local = queries[0], queries - queries[0]
        top, total, out = (jax.lax.dynamic_slice_in_dim(a, first, visits.size) for a in carry)
        s = f32("CKRH,CKSH->CKRS", qs[queries], ks[keys]) * scale
        s = jnp.where(visible, s, _NEVER)
        new_top = top.at[local].max(jnp.max(s, axis=-1))
        p = jnp.where(visible, jnp.exp(s - new_top[local][..., None]), 0.0)
        pv = f32("CKRS,CKSH->CKRH", p.astype(v.dtype), vs[keys])
        fade = jnp.exp(top - new_top)
        total = (total * fade).at[local].add(jnp.sum(p, axis=-1))
        out = (out * fade[..., None]).at[local].add(pv)
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=first, axis=0)
        return tuple(put(a, b) for a, b in zip(carry, (new_top, total, out), strict=True))

    shape = (qs.shape[0] + visits.size, *qs.shape[1:])  # room behind the last block
    start = (
        jnp.full(shape[:-1], _NEVER, jnp.float32),
        jnp.zeros(shape[:-1], jnp.float32),
        jnp.zeros(shape, jnp.float32),
    )
    found = jax.lax.fori_loop(0, visits.rounds, visit, start)
    top, total, out = (a[: qs.shape[0]] for a in found)
    out = out / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]
    lse = jnp.where(total == 0, _NEVER, top + jnp.log(total))
    return _unblock(out, B, groups).astype(dtype), _unrow(lse, B, groups)


def backward(q, k, v, bounds, dout, lse, deltas, block, scale, dtype) -> tuple[Array, Array, Array]:
    """(dq, dk, dv) in `dtype`, given lse and deltas = sum(dout * out), fp32 [B, N, T]."""
    B, groups = q.shape[0], q.shape[2] // k.shape[2]
    qs, ks, vs = _blocks(q, block, groups), _blocks(k, block), _blocks(v, block)
    dos = _blocks(dout, block, groups)
    lse, deltas = _rows(lse, block, groups), _rows(deltas, block, groups)
    visits = _visits(bounds, block, q.shape[2])
    # Scores are keys by queries here: so no product contracts the first dimension of both sides,
    # which XLA's CPU matmul does at half speed. dq is carried transposed, [blocks, K, H, G*block].
    kts = jnp.swapaxes(ks, -1, -2)
    f32 = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def visit(number, carry):
        dqt, dk, dv = carry
        queries, keys, visible = visits.round(number, groups)
        visible = jnp.swapaxes(visible, -1, -2)
        qi, doi = qs[queries], dos[queries]
        s = f32("CKSH,CKRH->CKSR", ks[keys], qi) * scale
        p = jnp.where(visible, jnp.exp(s - lse[queries][..., None, :]), 0.0)
        dp = f32("CKSH,CKRH->CKSR", vs[keys], doi)
        ds = (p * (dp - deltas[queries][..., None, :]) * scale).astype(q.dtype)
        p = p.astype(q.dtype)
        dqt = dqt.at[queries].add(f32("CKHS,CKSR->CKHR", kts[keys], ds))
        dk = dk.at[keys].add(f32("CKSR,CKRH->CKSH", ds, qi))
        dv = dv.at[keys].add(f32("CKSR,CKRH->CKSH", p, doi))
        return dqt, dk, dv

    count, K, R, H = qs.shape
    zeros = jnp.zeros(ks.shape, jnp.float32)
    start = (jnp.zeros((count, K, H, R), jnp.float32), zeros, zeros)
    dqt, dk, dv = jax.lax.fori_loop(0, visits.rounds, visit, start)
    dq = _unblock(jnp.swapaxes(dqt, -1, -2), B, groups)
    return dq.astype(dtype), *(_unblock(g, B, 1).astype(dtype) for g in (dk, dv))
