"""What a training step takes: micro-batches of rows of tokens."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """M micro-batches of B rows of T tokens, all [M, B, T]; B is split over the mesh.

    loss_mask: 1 where the token, as a target, is trained. positions: default 0..T-1.
    segment_ids: documents of a packed row (runs of equal ids); default one document per row.
    family_ids: runs of equal ids are documents that go on from the first of them and see it, and
    which, if there are any, trains nothing itself; default none do.
    advantages, sampler_logprobs: of each token; RL only. ref_logprobs: for `loss.ref_kl_coef`.
    """

    tokens: Int[Array, "M B T"]
    loss_mask: Int[Array, "M B T"]
    positions: Int[Array, "M B T"] | None = None
    segment_ids: Int[Array, "M B T"] | None = None
    family_ids: Int[Array, "M B T"] | None = None
    advantages: Float[Array, "M B T"] | None = None
    sampler_logprobs: Float[Array, "M B T"] | None = None
    ref_logprobs: Float[Array, "M B T"] | None = None


# Expert groups, too, are of devices with rows of their own; sequences are divided over context.
BATCH_SPEC = PartitionSpec(None, ("fsdp", "expert"), "context")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Predictions:
    """A batch as seen from the predicting position: everything but `tokens` is the next token's."""

    tokens: jax.Array
    targets: jax.Array
    mask: jax.Array
    positions: jax.Array
    segment_ids: jax.Array | None
    family_ids: jax.Array | None
    advantages: jax.Array | None
    sampler_logprobs: jax.Array | None
    ref_logprobs: jax.Array | None


def predictions(batch: Batch) -> Predictions:
    def following(a: jax.Array) -> jax.Array:
        return jnp.pad(a[..., 1:], [(0, 0)] * (a.ndim - 1) + [(0, 1)])

    mask = following(batch.loss_mask).astype(bool)
    segment_ids = batch.segment_ids
    if segment_ids is not None:  # a document's first token follows nothing
        new = segment_ids[..., 1:] != segment_ids[..., :-1]
        pad = [(0, 0)] * (new.ndim - 1)
        mask = mask & jnp.pad(~new, [*pad, (0, 1)])
        # Numbered anew, so that no two documents of a row share an id, in whatever order they lie.
        segment_ids = jnp.cumsum(jnp.pad(new, [*pad, (1, 0)]), axis=-1, dtype=jnp.int32)
    positions = batch.positions
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(mask.shape[-1], dtype=jnp.int32), mask.shape)
    rl = (batch.advantages, batch.sampler_logprobs, batch.ref_logprobs)
    return Predictions(
        batch.tokens,
        following(batch.tokens),
        mask,
        positions,
        segment_ids,
        batch.family_ids,
        *(None if a is None else following(a) for a in rl),
    )
