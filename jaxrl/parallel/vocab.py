"""Embedding and log-probabilities over a vocabulary that is split across all devices.

Neither the whole table nor the whole gradient of the table ever exists on one device: tokens
travel to the vocabulary shards, not the other way. All functions run inside `shard_map`; with
`axis_size` 1 they are the plain computations.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl.parallel.sharding import EVERYWHERE as AXIS


def _chunks(tokens: int, target: int) -> int:
    """Number of equal chunks of at most about `target` tokens."""
    n = max(1, tokens // target)
    while tokens % n:
        n += 1
    return n


def _local_rows(ids, rows: int):
    """(row in this device's shard, whether it is there) for global token ids."""
    local = ids - jax.lax.axis_index(AXIS) * rows
    return local, (local >= 0) & (local < rows)


def embed(
    table: Float[Array, "v D"],
    tokens: Int[Array, " T"],
    *,
    axis_size: int,
    dtype,
    chunk: int = 1024,
) -> Float[Array, "T D"]:
    """Rows of the embedding table for this device's tokens; table: this device's V/n rows."""
    if axis_size == 1:
        return table[tokens].astype(dtype)

    def lookup(ids):
        ids = jax.lax.all_gather(ids, AXIS, tiled=True)
        local, here = _local_rows(ids, table.shape[0])
        rows = jnp.where(here[:, None], table[jnp.where(here, local, 0)].astype(dtype), 0)
        return jax.lax.psum_scatter(rows, AXIS, scatter_dimension=0, tiled=True)

    n = _chunks(tokens.shape[0], chunk)
    return jax.lax.map(lookup, tokens.reshape(n, -1)).reshape(tokens.shape[0], -1)


def add_embed_gradient(
    grad: Float[Array, "v D"],
    tokens: Int[Array, " T"],
    dx: Float[Array, "T D"],
    *,
    axis_size: int,
    chunk: int = 1024,
) -> Float[Array, "v D"]:
    """grad + the embedding's gradient, summed over devices; grad: fp32, updated in place."""
    if axis_size == 1:
        return grad.at[tokens].add(dx.astype(grad.dtype))

    def add(grad, ids_dx):
        ids, dx = (jax.lax.all_gather(a, AXIS, tiled=True) for a in ids_dx)
        local, here = _local_rows(ids, grad.shape[0])
        local = jnp.where(here, local, grad.shape[0])  # out of range: dropped
        return grad.at[local].add(dx.astype(grad.dtype), mode="drop"), None

    n = _chunks(tokens.shape[0], chunk)
    return jax.lax.scan(add, grad, (tokens.reshape(n, -1), dx.reshape(n, -1, dx.shape[-1])))[0]
