"""Attention with the sequence split over the `context` axis, inside `shard_map`.

- ulysses (arXiv:2309.14509): an all-to-all trades the sequence for heads before attention, another
  trades back after it. Any attention implementation runs in the middle, on whole rows of N/c query
  heads: c divides the heads. Device i holds the i-th part of the sequence.
- ring (arXiv:2310.01889): keys and values travel around the devices while each computes its own
  queries against those it holds; any number of heads. The sequence lies in a zig-zag: of 2c chunks,
  device i holds chunks i and 2c-1-i, so that the causal mask leaves every device the same work
  (arXiv:2311.09431 balances by stripes; chunks keep blocks of scores whole).

Both are exact: what one device computes with the whole row, up to the order of sums.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxrl_kernels.documents import document_bounds
from jaxtyping import Array, Int

from jaxrl.ops.attention import Attend, keepable, resolve_attention
from jaxrl.ops.attention_blocks import BlockAttention, Bounds, resolve_blocks
from jaxrl.ops.partial_attention import delta, merge
from jaxrl.ops.registry import Target
from jaxrl.ops.shared_prefix import family_attention
from jaxrl.options import ConfigError

METHODS = ("ring", "ulysses")
AXIS = "context"


def sequence_order(method: str, seq_len: int, size: int) -> np.ndarray | None:
    """The permutation int [T] of a row's positions under which contiguous shards are what each
    device holds (`x[:, order]`); None: the row as it is.

    Raises ConfigError for an unknown method and a length that does not split.
    """
    _check_lengths(method, size, seq_len)
    if method == "ulysses" or size == 1:
        return None
    chunks = np.arange(seq_len).reshape(2 * size, -1)
    return np.stack([chunks[:size], chunks[: size - 1 : -1]], axis=1).reshape(-1)


def check_context(
    method: str, *, size: int, seq_len: int, num_heads: int, num_kv_heads: int
) -> None:
    """Refuse (ConfigError) an axis size that does not split the row, or for ulysses the heads."""
    _check_lengths(method, size, seq_len)
    if method == "ring":
        return
    N, K = num_heads, num_kv_heads

    def fits(n: int) -> bool:
        return N % n == 0 and (K % n == 0 or n % K == 0) and seq_len % n == 0

    if not fits(size):
        sizes = [n for n in range(1, N + 1) if fits(n)]
        raise ConfigError(
            f"context axis {size} (ulysses) does not split num_heads {N} with num_kv_heads {K}; "
            f"use one of {sizes}, or the context method 'ring'"
        )


def _check_lengths(method: str, size: int, seq_len: int) -> None:
    if method not in METHODS:
        raise ConfigError(f"unknown context method {method!r}; one of {', '.join(METHODS)}")
    parts = 2 if method == "ring" and size > 1 else 1  # of each device
    if size < 1 or seq_len % (parts * size):
        sizes = [n for n in range(1, max(size, 1) + 1) if n == 1 or seq_len % (parts * n) == 0]
        raise ConfigError(
            f"context axis {size} ({method}) does not split seq_len {seq_len} into {parts} equal "
            f"parts per device; use one of {sizes}, or a multiple of {parts * max(size, 1)} tokens"
        )


def context_attention(
    method: str,
    *,
    size: int,
    attention: str,
    target: Target,
    dtype,
    head_dim: int,
    num_heads: int,
    num_kv_heads: int,
    packed: bool,
    seq_len: int,
    shared_prefix: bool = False,
) -> Attend:
    """Causal attention over a row of `seq_len` tokens that `size` devices share.

    `fn(q, k, v, documents)` takes and gives this device's shards [B, T/c, ...], in the order of
    `sequence_order`; rotary embeddings are the caller's. documents: segment ids, or None; with
    `shared_prefix` `Families`. attention: an implementation's name, as for `resolve_attention`; its
    `jax.checkpoint` names are those of `keepable`.

    Raises ValueError as `check_context` and `Op.resolve` do.
    """
    check_context(
        method, size=size, seq_len=seq_len, num_heads=num_heads, num_kv_heads=num_kv_heads
    )
    case = {"dtype": dtype, "head_dim": head_dim, "packed": packed, "seq_len": seq_len}
    if shared_prefix and size > 1 and method == "ring":
        raise ConfigError(
            f"context axis {size} (ring) has no documents that go on from others; use the context "
            "method 'ulysses', or share no prompts"
        )
    if size > 1 and method == "ring":
        name, blocks = resolve_blocks(attention, target=target, **case)
        return Attend(name, keepable(_ring(blocks, size)))
    if shared_prefix:
        name, blocks = resolve_blocks(attention, target=target, **case)
        inner = Attend(name, keepable(family_attention(blocks)))
    else:
        inner = resolve_attention(attention, target=target, **case)
    if size == 1:
        return inner
    return Attend(inner.name, functools.partial(_ulysses, inner.fn, size))


def _ulysses(attend: Callable, size: int, q, k, v, documents):
    """q [B, T/c, N, H] -> [B, T, N/c, H] and back; k and v likewise.

    `attend` names its residuals itself (`keepable`), so backward repeats exchanges but not it.
    """
    exchange = functools.partial(
        jax.lax.all_to_all, axis_name=AXIS, split_axis=2, concat_axis=1, tiled=True
    )
    with jax.named_scope("ulysses"):
        # c > K: the c/K devices that share a kv head get a copy each.
        copy: Any = functools.partial(_copy_heads, max(1, size // k.shape[2]))
        q, k, v = exchange(q), exchange(copy(k)), exchange(copy(v))
        whole = functools.partial(jax.lax.all_gather, axis_name=AXIS, axis=1, tiled=True)
        out = attend(q, k, v, jax.tree.map(whole, documents))
        return jax.lax.all_to_all(out, AXIS, split_axis=1, concat_axis=2, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _copy_heads(copies: int, x):
    """[B, T, K, H] -> [B, T, K * copies, H], copies of a head side by side."""
    return jnp.repeat(x, copies, axis=2) if copies > 1 else x


def _sum_copies(copies, _, dx):
    """The copies' gradients, summed in fp32 whatever their type."""
    B, T, heads, H = dx.shape
    if copies == 1:
        return (dx,)
    dx = dx.reshape(B, T, heads // copies, copies, H)
    return (jnp.sum(dx, axis=3, dtype=jnp.float32).astype(dx.dtype),)


_copy_heads.defvjp(lambda copies, x: (_copy_heads(copies, x), None), _sum_copies)


@dataclasses.dataclass(frozen=True)
class _Block:
    """A chunk of this device's queries against a chunk of the keys it holds: which half of its
    arrays each is (0 or 1, maybe traced), and who sees whom (None: every query every key).
    """

    queries: Any
    keys: Any
    bounds: Bounds | None


class _Documents:
    """Who sees whom in a packed row that lies in a zig-zag; None bounds without segment ids."""

    def __init__(self, segment_ids: Int[Array, "B t"] | None, size: int):
        self.size, self.rank = size, jax.lax.axis_index(AXIS)
        self.packed = segment_ids is not None
        if segment_ids is None:
            return
        B, t = segment_ids.shape
        self.chunk = t // 2
        ids = jax.lax.all_gather(segment_ids, AXIS, axis=1).reshape(B, size, 2, self.chunk)
        # [B, c, 2, chunk] -> in the order of the row: first halves, then second halves backwards.
        ids = jnp.concatenate([ids[:, :, 0], ids[:, ::-1, 1]], axis=1).reshape(B, -1)
        # Positions in the whole row: each token's document begins and ends there.
        self.starts, self.ends = document_bounds(ids)

    def _at(self, bounds, chunk):
        return jax.lax.dynamic_slice_in_dim(bounds, chunk * self.chunk, self.chunk, 1)

    def _chunk(self, rank, half):
        """Which chunk of the row the half of that device is."""
        return jnp.where(half == 0, rank, 2 * self.size - 1 - rank)

    def own(self) -> Bounds | None:
        """This device's tokens among themselves: their order is that of the row."""
        if not self.packed:
            return None
        halves = [self._at(self.starts, self._chunk(self.rank, half)) for half in (0, 1)]
        # A document's start tells it from all others, also if an id comes back.
        bounds = document_bounds(jnp.concatenate(halves, axis=1))
        return Bounds(bounds, bounds)

    def blocks(self, step) -> Iterator[_Block]:
        """What to compute while this device holds the keys that started `step` devices before it.

        Keys of an earlier device: its first half comes before all queries here, its second half
        after them. Of a later one: both halves come before the second half of the queries, and
        after the first. Two blocks either way, and one of them the same.
        """
        owner, half = (self.rank - step) % self.size, jnp.where(self.rank >= step, 0, 1)
        for queries, keys in ((1, 0), (half, half)):
            bounds = None
            if self.packed:
                bounds = self._between(self._chunk(self.rank, queries), self._chunk(owner, keys))
            yield _Block(queries, keys, bounds)

    def _between(self, queries, keys) -> Bounds:
        """A chunk of queries and an earlier chunk of keys: of the latter a query sees those from
        its document's start on; a key is seen by the former up to its document's end.
        """
        C = self.chunk
        first = jnp.clip(self._at(self.starts, queries) - keys * C, 0, C)
        end = jnp.clip(self._at(self.ends, keys) - queries * C, 0, C)
        return Bounds((first, jnp.full_like(first, C)), (jnp.zeros_like(end), end))


def _ring(blocks: BlockAttention, size: int) -> Callable:
    """attend(q, k, v, segment_ids) over a ring of `size` devices, with a backward that is one, too.

    Each visit sends its keys on before it computes with them. Results and gradients add up in fp32
    in a fixed order; memory is that of a few arrays like q, k and v, whatever `size`.
    """

    def shift(x):
        return jax.lax.ppermute(x, AXIS, [(i, (i + 1) % size) for i in range(size)])

    def around(visit, carry):
        """carry after the visits 1..c-1; the last one has no one to send its keys to.

        A loop: unrolled, the keys of all visits could arrive, and lie in memory, at once.
        """
        body = functools.partial(visit, last=False)
        carry, _ = jax.lax.scan(lambda c, s: (body(c, s), None), carry, jnp.arange(1, size - 1))
        return visit(carry, size - 1, last=True)

    @jax.custom_vjp
    def ring(q, k, v, segment_ids):
        return forward(q, k, v, segment_ids)[0]

    def forward(q, k, v, segment_ids):
        documents = _Documents(segment_ids, size)
        kv = shift(jnp.stack([k, v]))
        out, lse = blocks.forward(q, k, v, documents.own(), True)

        def visit(carry, step, *, last):
            kv, out, lse = carry
            following = kv if last else shift(kv)
            for block in documents.blocks(step):
                half = block.queries
                keys, values = _half(kv, block.keys, axis=2)
                new = blocks.forward(_half(q, half), keys, values, block.bounds, False)
                merged, total = merge(_half(out, half), _half(lse, half, axis=2), *new)
                out = _put_half(out, half, merged)
                lse = _put_half(lse, half, total, axis=2)
            return following, out, lse

        with jax.named_scope("ring"):
            _, out, lse = around(visit, (kv, out, lse))
        # Or XLA, where a loop over layers stores them, computes them once more for the stored ones.
        out, lse = jax.lax.optimization_barrier((out.astype(q.dtype), lse))
        return out, (q, k, v, segment_ids, out, lse)

    def backward(residuals, dout):
        q, k, v, segment_ids, out, lse = residuals
        documents = _Documents(segment_ids, size)
        kv = shift(jnp.stack([k, v]))
        dout = dout.astype(q.dtype)
        deltas = delta(dout, out)
        dq, *dkv = blocks.backward(q, k, v, documents.own(), True, dout, lse, deltas)

        def add(block, kv, dq, dkv):
            half = block.queries
            keys, values = _half(kv, block.keys, axis=2)
            rows = (_half(dout, half), _half(lse, half, axis=2), _half(deltas, half, axis=2))
            new = blocks.backward(_half(q, half), keys, values, block.bounds, False, *rows)
            dq = _put_half(dq, half, _half(dq, half) + new[0])
            new_dkv = _half(dkv, block.keys, axis=2) + jnp.stack(new[1:])
            return dq, _put_half(dkv, block.keys, new_dkv, axis=2)

        def visit(carry, step, *, last):
            kv, dq, dkv = carry
            first, second = documents.blocks(step)
            # What was sent on is of the keys before these. What comes is of these keys, and is
            # needed only once there is something to add to it.
            dq, dkv = add(first, kv, dq, shift(dkv))
            # XLA has one collective under way at a time: each beside one of the blocks.
            kv, dkv = jax.lax.optimization_barrier((kv, dkv))
            following = kv if last else shift(kv)
            return following, *add(second, kv, dq, dkv)

        with jax.named_scope("ring"):
            _, dq, dkv = around(visit, (kv, dq, jnp.stack(dkv)))
            dk, dv = shift(dkv)
        return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None

    ring.defvjp(forward, backward)
    return ring


def _half(x, which, axis: int = 1):
    half = x.shape[axis] // 2
    return jax.lax.dynamic_slice_in_dim(x, which * half, half, axis)


def _put_half(x, which, value, axis: int = 1):
    return jax.lax.dynamic_update_slice_in_dim(x, value, which * value.shape[axis], axis)
