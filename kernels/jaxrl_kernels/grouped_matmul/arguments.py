"""What grouped products are given, the same for every implementation."""

import jax.numpy as jnp


def check(x, group_sizes, **weights) -> None:
    """x [M, K], group_sizes integers [E], and by name weights [E, K, N] of floating dtypes; no side
    0. Raises ValueError else, with the shapes or dtypes."""
    if x.ndim != 2:
        raise ValueError(f"x {x.shape}: want [M, K]")
    if group_sizes.ndim != 1 or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(f"group_sizes {group_sizes.dtype} {group_sizes.shape}: want integers [E]")
    for name, w in weights.items():
        if w.ndim != 3 or w.shape[:2] != (group_sizes.shape[0], x.shape[1]):
            raise ValueError(
                f"{name} {w.shape}: want [E, K, N] with E {group_sizes.shape[0]}, K {x.shape[1]}"
            )
        if 0 in (*x.shape, *w.shape):
            raise ValueError(f"x {x.shape} and {name} {w.shape}: no side may be 0")
        if not jnp.issubdtype(w.dtype, jnp.floating):
            raise ValueError(f"{name} is {w.dtype}: want a floating dtype")
