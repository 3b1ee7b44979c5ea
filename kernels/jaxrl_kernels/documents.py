"""Documents of packed rows as ranges of positions."""

import jax
import jax.numpy as jnp
from jax import Array


def document_bounds(segment_ids: Array) -> tuple[Array, Array]:
    """(starts, ends), int32 [B, T]: first position of each token's document, and the one after
    its last.

    segment_ids: int [B, T]; runs of equal ids are documents, an id used twice is two of them.
    """
    T = segment_ids.shape[1]
    position = jnp.arange(T, dtype=jnp.int32)
    new = jnp.diff(segment_ids, axis=1) != 0
    first = jnp.pad(new, ((0, 0), (1, 0)), constant_values=True)
    last = jnp.pad(new, ((0, 0), (0, 1)), constant_values=True)
    starts = jax.lax.cummax(jnp.where(first, position, 0), axis=1)
    ends = jax.lax.cummin(jnp.where(last, position + 1, T), axis=1, reverse=True)
    return starts, ends
