"""Tokens to the rows of their experts, and back: no token is dropped, and nothing is scattered.

Every gradient here is a gather or a sum in a fixed order, so a step is deterministic. Plain XLA.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Routing(NamedTuple):
    """Where T tokens with k experts each go among T k rows, sorted by expert.

    token: int32 [T k], the token of each row; slot: int32 [T k], the row's place in [T, k]
    flattened; row: int32 [T, k], the inverse of slot; group_sizes: int32 [E], rows per expert.
    """

    token: Array
    slot: Array
    row: Array
    group_sizes: Array


def route(experts: Array, num_experts: int) -> Routing:
    """Sort the rows of `experts`, int [T, k], by expert; rows of one expert by token.

    Ids outside 0..num_experts - 1 are dropped: their rows come last, beyond all groups, where
    `grouped_matmul` yields zeros. Raises ValueError if `experts` is not of two dimensions.
    """
    if experts.ndim != 2:
        raise ValueError(f"experts {experts.shape}: want [T, k]")
    T, k = experts.shape
    ids = experts.reshape(-1).astype(jnp.int32)  # [T, k] -> [T k]
    ids = jnp.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    place = jnp.arange(T * k, dtype=jnp.int32)
    ids, slot = jax.lax.sort((ids, place), num_keys=1, is_stable=True)
    # Each place is written once: no order matters.
    row = jnp.zeros_like(slot).at[slot].set(place, unique_indices=True)
    # Unrolled, for a loop on the GPU is a kernel per step.
    bounds = jnp.searchsorted(ids, jnp.arange(num_experts + 1), method="scan_unrolled")
    return Routing(slot // k, slot, row.reshape(T, k), jnp.diff(bounds).astype(jnp.int32))


@jax.custom_vjp
def permute(x: Array, routing: Routing) -> Array:
    """Rows [T k, D] for the experts from tokens x [T, D], each k times."""
    return x[routing.token]


def _permute_forward(x, routing):
    return permute(x, routing), routing


def _permute_backward(routing, drows):
    # Not a scatter of rows, but a sum over each token's, in the order of its slots.
    dx = jnp.zeros((), jnp.float32)
    for j in range(routing.row.shape[1]):
        dx += drows[routing.row[:, j]].astype(jnp.float32)
    return dx.astype(drows.dtype), None


permute.defvjp(_permute_forward, _permute_backward)


@jax.custom_vjp
def unpermute(rows: Array, weights: Array, routing: Routing) -> Array:
    """[T, D]: each token's sum of its rows [T k, D] times weights [T, k]; sums in fp32.

    The gradient of `weights` is exact also where a weight is 0.
    """
    weights = weights.astype(jnp.float32)
    out = jnp.zeros((), jnp.float32)
    # Term after term: each is a gather that XLA fuses with the sum, and no [T, k, D] is made.
    for j in range(weights.shape[1]):
        out += rows[routing.row[:, j]].astype(jnp.float32) * weights[:, j, None]
    return out.astype(rows.dtype)


def _unpermute_forward(rows, weights, routing):
    return unpermute(rows, weights, routing), (rows, weights, routing)


def _unpermute_backward(residuals, dout):
    rows, weights, routing = residuals
    exact = dout.astype(jnp.float32)
    mine = weights.reshape(-1).astype(jnp.float32)[routing.slot, None]  # [T, k] -> [T k, 1]
    drows = (exact[routing.token] * mine).astype(rows.dtype)
    dweights = jnp.stack(
        [
            jnp.sum(rows[routing.row[:, j]].astype(jnp.float32) * exact, axis=-1)
            for j in range(weights.shape[1])
        ],
        axis=1,
    )
    return drows, dweights.astype(weights.dtype), None


unpermute.defvjp(_unpermute_forward, _unpermute_backward)
