"""Which program of a grouped product works on which rows, from the sizes of the groups."""

import math

import jax.numpy as jnp
from jax import Array


def num_tiles(M: int, E: int, block_m: int) -> int:
    """Most tiles of up to `block_m` rows that E groups, and the rows behind them, can take.

    Groups start a tile of their own: n parts of M rows take at most M / block_m tiles, and one more
    each. Parts without rows take none.
    """
    return M // block_m + min(E + 1, M)


def offsets(group_sizes: Array, M: int) -> Array:
    """[E + 1]: first row of each group, and the one after the last group's. At most M."""
    ends = jnp.minimum(jnp.cumsum(group_sizes.astype(jnp.int32)), M)
    return jnp.pad(ends, (1, 0))


def schedule(group_sizes: Array, M: int, block_m: int) -> Array:
    """int32 [3, `num_tiles`]: each tile's group, its first row, and the one after its last.

    Tiles are in the order of the rows. Those of group E hold the rows beyond all groups, which are
    to be zeros. Tiles that are not needed come last; they end before they begin.
    """
    E = group_sizes.shape[0]
    bounds = jnp.append(offsets(group_sizes, M), M)
    starts, ends = bounds[:-1], bounds[1:]
    tiles = (ends - starts + block_m - 1) // block_m
    last = jnp.cumsum(tiles)
    tile = jnp.arange(num_tiles(M, E, block_m), dtype=jnp.int32)
    # Not searchsorted, which is a loop on the GPU: the comparisons are few and make one kernel.
    group = jnp.minimum(jnp.sum(last <= tile[:, None], axis=1, dtype=jnp.int32), E)
    first = starts[group] + (tile - (last - tiles)[group]) * block_m
    return jnp.stack([group, first, jnp.minimum(first + block_m, ends[group])])


def blocks_visited(group_sizes: list[int], M: int, block_m: int) -> int:
    """Tiles of rows that have a product to make: what a kernel does per column of tiles."""
    left, total = M, 0
    for size in group_sizes:
        size = min(size, left)
        left, total = left - size, total + math.ceil(size / block_m)
    return total
