"""Blocked causal attention in plain XLA operations: memory linear in T, masked blocks skipped.

FlashAttention-2's algorithm (arXiv:2307.08691) as loops over blocks: forward keeps a running
maximum and sum per query, backward recomputes the probabilities from the log-sum-exp. Blocks above
the diagonal, and blocks in which no query and key share a document, are not visited, in either
pass: the work of a packed row is that of its documents.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BLOCK = 256
_NEVER = -1e30  # finite: a fully masked row must not turn into NaN


def blocked_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None = None,
    *,
    block: int = BLOCK,
) -> Float[Array, "B T N H"]:
    """Causal softmax(q k^T / sqrt(H)) v, within documents; scores and sums in fp32.

    segment_ids: runs of equal ids are documents. N is a multiple of K (grouped queries).
    """
    T = q.shape[1]
    block = min(block, T)
    pad = -T % block
    if pad:
        # Padded keys lie after every real query; padded queries' results are cut off.
        q, k, v = (jnp.pad(a, ((0, 0), (0, pad), (0, 0), (0, 0))) for a in (q, k, v))
        if segment_ids is not None:
            segment_ids = jnp.pad(segment_ids, ((0, 0), (0, pad)), mode="edge")
    if segment_ids is not None:
        # Number the runs, so that ids grow along the row and an id used twice is two documents.
        new = jnp.diff(segment_ids, axis=1) != 0
        segment_ids = jnp.pad(jnp.cumsum(new, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
    out: Any = _attention(q, k, v, segment_ids, block)
    return out[:, :T] if pad else out


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q, k, v, ids, block) -> Any:
    return _forward(q, k, v, ids, block)[0]


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


def _first_block(ids, block):
    """[T/block]: the first key block that any query of a query block may see."""
    if ids is None:
        return None
    T = ids.shape[1]
    position = jnp.arange(T)
    starts = jnp.where(
        jnp.pad(jnp.diff(ids, axis=1), ((0, 0), (1, 0)), constant_values=1), position, 0
    )
    start_of_document = jax.lax.cummax(starts, axis=1)
    return jnp.min(start_of_document[:, ::block], axis=0) // block


def _scores(q, k, i, j, ids, block):
    """Masked scores [B, K, G*block, block] (fp32) of query block i and key block j."""
    s = jnp.einsum("BKRH,BKSH->BKRS", q, k, preferred_element_type=jnp.float32)
    s = s * (1.0 / q.shape[-1] ** 0.5)
    return jnp.where(_visible(q.shape[2], i, j, ids, block), s, _NEVER)


def _visible(num_rows, i, j, ids, block):
    """[num_rows, block], or [B, 1, num_rows, block]: which keys of block j queries of i may see."""
    rows = jnp.arange(num_rows) % block
    visible = (i * block + rows)[:, None] >= (j * block + jnp.arange(block))[None, :]
    if ids is not None:
        mine = jax.lax.dynamic_slice_in_dim(ids, i * block, block, 1)
        theirs = jax.lax.dynamic_slice_in_dim(ids, j * block, block, 1)
        mine = jnp.tile(mine, (1, num_rows // block))
        visible = visible & (mine[:, :, None] == theirs[:, None, :])[:, None]
    return visible


def _forward(q, k, v, ids, block):
    groups = q.shape[2] // k.shape[2]
    qs, ks, vs = _blocks(q, block, groups), _blocks(k, block), _blocks(v, block)
    first = _first_block(ids, block)

    def row(i):
        qi = qs[i]
        shape = qi.shape[:-1]

        def column(j, carry):
            top, total, out = carry
            s = _scores(qi, ks[j], i, j, ids, block)
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
        top, total, out = jax.lax.fori_loop(0 if first is None else first[i], i + 1, column, start)
        return (out / total[..., None]).astype(q.dtype), top + jnp.log(total)

    out, lse = jax.lax.map(row, jnp.arange(qs.shape[0]))
    out = _unblock(out, groups)
    return out, (q, k, v, ids, out, lse)


def _backward(block, residuals, dout):
    q, k, v, ids, out, lse = residuals
    groups = q.shape[2] // k.shape[2]
    qs, ks, vs = _blocks(q, block, groups), _blocks(k, block), _blocks(v, block)
    dos, outs = _blocks(dout, block, groups), _blocks(out, block, groups)
    delta = jnp.sum(dos.astype(jnp.float32) * outs.astype(jnp.float32), axis=-1)
    first = _first_block(ids, block)
    scale = 1.0 / q.shape[-1] ** 0.5
    # Scores are keys by queries here: so no product contracts the first dimension of both sides,
    # which XLA's CPU matmul does at half speed. dq is carried transposed, [B, K, H, G*block].
    kts = jnp.swapaxes(ks, -1, -2)
    f32 = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def row(carry, i):
        qi, doi, lse_i, delta_i = qs[i], dos[i], lse[i][..., None, :], delta[i][..., None, :]

        def column(j, carry):
            dqt, dk, dv = carry
            s = f32("BKSH,BKRH->BKSR", ks[j], qi) * scale
            visible = jnp.swapaxes(_visible(qi.shape[2], i, j, ids, block), -1, -2)
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
            0 if first is None else first[i],
            i + 1,
            column,
            (jnp.zeros((B, K, H, R), jnp.float32), *carry),
        )
        return (dk, dv), jnp.swapaxes(dqt, -1, -2).astype(q.dtype)

    zeros = jnp.zeros(ks.shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(row, (zeros, zeros), jnp.arange(qs.shape[0]))
    dk, dv = _unblock(dk, 1).astype(k.dtype), _unblock(dv, 1).astype(v.dtype)
    return _unblock(dq, groups), dk, dv, None


_attention.defvjp(_forward, _backward)
