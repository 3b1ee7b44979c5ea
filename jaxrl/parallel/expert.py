"""Tokens to the devices that hold their experts, and back, over the mesh axis `expert`.

All functions run inside `shard_map`. Devices of one expert group hold different tokens and
different experts. Every row travels, none is dropped and none padded: the receiver has room for
the case in which all rows of all devices come to it.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

AXIS = "expert"


class Plan(NamedTuple):
    """Which rows go where. Slices are numbered as `jax.lax.ragged_all_to_all` numbers them: those
    for the first device first, of each device one per expert it holds.

    Sent: `sent_from` (first row here), `sent_to` (first row at the receiver), `sent` (rows).
    Received: the same of what comes in, by sender; `came_from` is the first row at the sender.
    All int32 [E].
    """

    sent_from: Array
    sent_to: Array
    sent: Array
    came_from: Array
    came_to: Array
    came: Array


def make_exchange(size: int, backend: str) -> Callable:
    """The `exchange` of `models.moe.ExpertOps` over an expert axis of `size` devices.

    On GPU rows travel by ragged_all_to_all; elsewhere, where that does not exist, every device
    gets all rows and picks its own.
    """
    move = _ragged if backend == "gpu" else _gathered

    def exchange(rows: Float[Array, "M D"], group_sizes: Int[Array, " E"]):
        plan, sizes = _plan(group_sizes, size)
        M = rows.shape[0]
        back = functools.partial(_back, move, (size * M, M), plan=plan)
        return _forth(move, (M, size * M), rows, plan), sizes, back

    return exchange


def _plan(group_sizes, devices: int) -> tuple[Plan, Array]:
    """(the plan, rows of each of this device's experts [E / devices]).

    At the receiver rows lie sorted by expert, and those of one expert by sender.
    """
    E = group_sizes.shape[0]
    here = jax.lax.axis_index(AXIS)
    sizes = jax.lax.all_gather(group_sizes.astype(jnp.int32), AXIS)  # [senders, E]
    first_row = jnp.cumsum(sizes, axis=1) - sizes  # of each expert, at each sender
    of_expert = jnp.sum(sizes, axis=0).reshape(devices, -1)  # [receivers, experts of each]
    first_of_expert = (jnp.cumsum(of_expert, axis=1) - of_expert).reshape(E)
    place = first_of_expert + jnp.cumsum(sizes, axis=0) - sizes  # [senders, E], at the receiver

    def mine(table):  # [senders, E] -> [senders x experts of this device]
        own = table.reshape(devices, devices, -1)
        return jax.lax.dynamic_index_in_dim(own, here, axis=1, keepdims=False).reshape(-1)

    def from_here(table):
        return jax.lax.dynamic_index_in_dim(table, here, axis=0, keepdims=False)

    plan = Plan(
        sent_from=from_here(first_row),
        sent_to=from_here(place),
        sent=from_here(sizes),
        came_from=mine(first_row),
        came_to=mine(place),
        came=mine(sizes),
    )
    own = jax.lax.dynamic_index_in_dim(of_expert, here, axis=0, keepdims=False)
    return plan, own


def _reversed(plan: Plan) -> Plan:
    """What is sent back the way it came."""
    return Plan(plan.came_to, plan.came_from, plan.came, plan.sent_to, plan.sent_from, plan.sent)


# Each is the other's transpose: a row goes to one place, and its cotangent comes back from there.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _forth(move, shape, rows, plan):
    return move(rows, plan, shape[1])


def _forth_forward(move, shape, rows, plan):
    return _forth(move, shape, rows, plan), plan


def _forth_backward(move, shape, plan, dout):
    return move(dout, _reversed(plan), shape[0]), None


_forth.defvjp(_forth_forward, _forth_backward)


def _back(move, shape, rows, *, plan):
    return _forth(move, shape, rows, _reversed(plan))


def _ragged(rows, plan: Plan, capacity: int):
    return jax.lax.ragged_all_to_all(
        rows,
        jnp.zeros((capacity, rows.shape[1]), rows.dtype),
        plan.sent_from,
        plan.sent,
        plan.sent_to,
        plan.came,
        axis_name=AXIS,
    )


def _gathered(rows, plan: Plan, capacity: int):
    """As `_ragged`, by an all-gather: for devices that have no ragged exchange."""
    M, slices = rows.shape[0], plan.came.shape[0]
    devices = jax.lax.axis_size(AXIS)
    everything = jax.lax.all_gather(rows, AXIS, tiled=True)  # [devices M, D]
    # Slices in the order in which they lie here. Of those that begin at one place all but one are
    # empty, and that one comes last.
    order = jnp.lexsort((plan.came, plan.came_to))
    place, size = plan.came_to[order], plan.came[order]
    row = jnp.arange(capacity)
    slice_ = jnp.searchsorted(place, row, side="right", method="compare_all") - 1
    inside = row - place[slice_]
    sender = order[slice_] // (slices // devices)
    source = sender * M + plan.came_from[order][slice_] + inside
    here = (inside < size[slice_])[:, None]
    return jnp.where(here, everything[jnp.where(here[:, 0], source, 0)], 0)
