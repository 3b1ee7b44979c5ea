"""Attention of documents that begin alike: what they share lies, and is computed, once.

The rollouts of a task begin with the same prompt. In a packed row the prompt is a document, and the
rest of each rollout one that goes on from it: a query sees its own document, and all of the prompt.
Two passes of a block attention, over the one and over the other, are merged by their log-sum-exps,
as in a ring; gradients of the prompt add up over all that goes on from it. Exact: what whole
documents give, up to the order of sums.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxrl_kernels.documents import document_bounds
from jaxtyping import Array, Int

from jaxrl.ops.attention_blocks import BlockAttention, Bounds
from jaxrl.ops.partial_attention import delta, merge


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Families:
    """Documents of packed rows, some of which go on from another.

    segment_ids: runs of equal ids are documents. family_ids: runs of equal ids are families; all
    documents of a family go on from its first.
    """

    segment_ids: Int[Array, "B T"]
    family_ids: Int[Array, "B T"]

    def own(self) -> Bounds:
        """Of each document by itself."""
        documents = document_bounds(self.segment_ids)
        return Bounds(documents, documents)

    def prefix(self) -> Bounds:
        """Of what each document goes on from."""
        starts, ends = document_bounds(self.segment_ids)
        first, last = document_bounds(self.family_ids)
        prefix_end = jnp.take_along_axis(ends, first, axis=1)
        shared = starts == first  # tokens of a family's first document
        return Bounds(
            keys=(first, jnp.where(shared, first, prefix_end)),
            queries=(jnp.where(shared, prefix_end, last), last),
        )


def family_attention(blocks: BlockAttention) -> Callable:
    """attend(q, k, v, families) -> out: causal attention within documents and over prefixes.

    q [B, T, N, H], k and v [B, T, K, H]; out like q. Differentiable in q, k and v.
    """

    @jax.custom_vjp
    def attend(q, k, v, families: Families):
        return forward(q, k, v, families)[0]

    def forward(q, k, v, families: Families):
        out, lse = blocks.forward(q, k, v, families.own(), True)
        with jax.named_scope("shared_prefix"):
            out, lse = merge(out, lse, *blocks.forward(q, k, v, families.prefix(), False))
        # Or XLA, where a loop over layers stores them, computes them once more for the stored ones.
        out, lse = jax.lax.optimization_barrier((out.astype(q.dtype), lse))
        return out, (q, k, v, families, out, lse)

    def backward(residuals, dout):
        q, k, v, families, out, lse = residuals
        dout = dout.astype(q.dtype)
        rows = (dout, lse, delta(dout, out))
        grads = blocks.backward(q, k, v, families.own(), True, *rows)
        with jax.named_scope("shared_prefix"):
            more = blocks.backward(q, k, v, families.prefix(), False, *rows)
        summed = (a + b for a, b in zip(grads, more, strict=True))
        return *(g.astype(x.dtype) for g, x in zip(summed, (q, k, v), strict=True)), None

    attend.defvjp(forward, backward)
    return attend
