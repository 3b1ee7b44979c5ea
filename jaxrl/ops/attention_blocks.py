"""Attention of a chunk of queries and a chunk of keys of equal length: what a ring is made of, and
attention over shared prompts.

A query may see keys of several chunks. So forward also returns the log-sum-exp, by which results of
several chunks are merged, and backward is given the log-sum-exp and delta over *all* keys that the
query sees: the gradients of the chunks then simply add up (arXiv:2310.01889).
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxrl_kernels.flash_attention import triton
from jaxtyping import Array, Int

from jaxrl.ops import attention_xla
from jaxrl.ops.attention import ATTENTION
from jaxrl.ops.registry import Target


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Who sees whom, as ranges [first, end) of positions in the other chunk; no range may fall
    along T, and a range may be empty. keys: of each query; queries: of each key.
    """

    keys: tuple[Int[Array, "B T"], Int[Array, "B T"]]
    queries: tuple[Int[Array, "B T"], Int[Array, "B T"]]


@dataclasses.dataclass(frozen=True)
class BlockAttention:
    """Scores scaled by 1 / sqrt(H); all results fp32.

    forward(q, k, v, bounds, causal) -> (out [B, T, N, H], lse [B, N, T]). A query that sees no key
    has an lse of -1e30 or less, and anything, also not-a-number, for its out.
    backward(q, k, v, bounds, causal, dout, lse, delta) -> (dq, dk, dv).

    q and dout [B, T, N, H], k and v [B, T, K, H]; lse and delta = sum(dout * out) [B, N, T].
    bounds: None for all keys; causal: of those, only keys at or before the query's own position.
    With causal, a range of keys must not end before its query, nor a range of queries begin after
    its key: not all implementations read those ends.
    """

    forward: Callable
    backward: Callable


def resolve_blocks(
    name: str, *, target: Target, dtype, head_dim: int, packed: bool, seq_len: int
) -> tuple[str, BlockAttention]:
    """(implementation, its blocks): of the names of `ATTENTION`, those that can do this.

    Raises ValueError as `Op.resolve` does.
    """
    case = {"dtype": dtype, "head_dim": head_dim, "packed": packed, "seq_len": seq_len}
    name, _ = ATTENTION.resolve(name, target, blocks=True, **case)
    return name, {"triton": _triton, "xla": _xla, "reference": _reference}[name](target)


def _triton(target: Target) -> BlockAttention:
    def static(q, bounds, causal):
        scale = q.shape[-1] ** -0.5
        return triton.Static(scale, causal, bounds is not None, target.gpu, target.capability)

    def forward(q, k, v, bounds, causal):
        starts, ends = bounds.keys if bounds else (None, None)
        return triton.forward(static(q, bounds, causal), q, k, v, starts, ends, jnp.float32)

    def backward(q, k, v, bounds, causal, dout, lse, delta):
        def run(kernel, ranges):
            starts, ends = ranges or (None, None)
            rows = (dout, lse, delta, jnp.float32)
            return kernel(static(q, bounds, causal), q, k, v, starts, ends, *rows)

        dq = run(triton.backward_dq, bounds and bounds.keys)
        return dq, *run(triton.backward_dkv, bounds and bounds.queries)

    return BlockAttention(forward, backward)


def _xla(target: Target) -> BlockAttention:
    del target

    pad = attention_xla.pad_tokens

    def seen(q, bounds, causal, block):
        keys = bounds.keys if bounds else None
        return attention_xla.key_bounds(q.shape[:2], keys, causal=causal, block=block)

    def forward(q, k, v, bounds, causal):
        T, scale = q.shape[1], q.shape[-1] ** -0.5
        block = attention_xla.block_size(T)
        bounds = seen(q, bounds, causal, block)
        q, k, v = (pad(a, block) for a in (q, k, v))
        out, lse = attention_xla.forward(q, k, v, bounds, block, scale, jnp.float32)
        return out[:, :T], lse[:, :, :T]

    def backward(q, k, v, bounds, causal, dout, lse, delta):
        T, scale = q.shape[1], q.shape[-1] ** -0.5
        block = attention_xla.block_size(T)
        bounds = seen(q, bounds, causal, block)
        q, k, v, dout = (pad(a, block) for a in (q, k, v, dout))
        lse, delta = (pad(a, block, axis=2) for a in (lse, delta))
        grads = attention_xla.backward(q, k, v, bounds, dout, lse, delta, block, scale, jnp.float32)
        return tuple(g[:, :T] for g in grads)

    return BlockAttention(forward, backward)


def _reference(target: Target) -> BlockAttention:
    """All scores at once: what the others are tested against."""
    del target
    einsum = functools.partial(jnp.einsum, precision="highest")

    def grouped(x, K):
        """[B, T, N, H] -> [B, T, K, G, H], fp32."""
        B, T, N, H = x.shape
        return x.reshape(B, T, K, N // K, H).astype(jnp.float32)

    def scores(q, k, bounds, causal):
        """[B, K, G, T, S], -inf where a key is not seen."""
        T, S = q.shape[1], k.shape[1]
        seen = jnp.ones((1, T, S), bool)
        if causal:
            seen = jnp.tril(seen)
        if bounds is not None:
            first, end = (a[:, :, None] for a in bounds.keys)
            seen = seen & (jnp.arange(S) >= first) & (jnp.arange(S) < end)
        s = einsum("BTKGH,BSKH->BKGTS", grouped(q, k.shape[2]), k.astype(jnp.float32))
        return jnp.where(seen[:, None, None], s * q.shape[-1] ** -0.5, -jnp.inf)

    def forward(q, k, v, bounds, causal):
        B, T, N, _ = q.shape
        s = scores(q, k, bounds, causal)
        lse = jax.nn.logsumexp(s, axis=-1)
        out = einsum("BKGTS,BSKH->BTKGH", jnp.exp(s - lse[..., None]), v.astype(jnp.float32))
        return out.reshape(q.shape), lse.reshape(B, N, T)

    def backward(q, k, v, bounds, causal, dout, lse, delta):
        (B, T, N, H), K = q.shape, k.shape[2]
        rows = (B, K, N // K, T, 1)
        p = jnp.exp(scores(q, k, bounds, causal) - lse.reshape(rows))
        dout = grouped(dout, K)
        dp = einsum("BTKGH,BSKH->BKGTS", dout, v.astype(jnp.float32))
        ds = p * (dp - delta.reshape(rows)) * H**-0.5
        dq = einsum("BKGTS,BSKH->BTKGH", ds, k.astype(jnp.float32)).reshape(q.shape)
        dk = einsum("BKGTS,BTKGH->BSKH", ds, grouped(q, K))
        return dq, dk, einsum("BKGTS,BTKGH->BSKH", p, dout)

    return BlockAttention(forward, backward)
