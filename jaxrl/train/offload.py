"""Optimizer state in the host's pinned memory, brought to the device one layer at a time.

The moments of Adam are 8 bytes per parameter that only the update reads. Kept in pinned host
memory, they cross PCIe once in each direction per step, and the device holds one layer's (or a
block of rows of the embedding's or the head's) at a time.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

HOST = "pinned_host"
STACKS = ("layers", "dense_layers")  # arrays stacked [L, ...], whose first axis is not sharded
BLOCK_BYTES = 32 * 2**20  # of a block of rows of one moment


def on_host(sharding: NamedSharding) -> NamedSharding:
    """`sharding` in pinned host memory. Raises ValueError where the devices have none."""
    try:
        host = sharding.with_memory_kind(HOST)
    except ValueError as error:
        device = next(iter(sharding.device_set))
        raise ValueError(
            f"offload_optimizer needs pinned host memory, which {device.platform} devices "
            f"({device.device_kind}) do not have; turn it off"
        ) from error
    if host.memory_kind != HOST:
        # Compile-only devices describe no memories, so JAX drops the kind without a word; an
        # abstract mesh keeps it, and the devices of the other arguments are the program's.
        host = NamedSharding(sharding.mesh.abstract_mesh, sharding.spec, memory_kind=HOST)
    return host


def streamed(
    whole: optax.GradientTransformation,
    by_layer: optax.GradientTransformationExtraArgs,
    devices: int,
) -> optax.GradientTransformationExtraArgs:
    """`optax.chain(whole, *by_layer)`, whose state, laid out the same, may be in host memory.

    whole: sees all gradients at once, as clipping by their global norm must; has no state to speak
    of. by_layer: a chain of elementwise transformations, run on one layer's arrays at a time.
    devices: of the mesh; matrices of no layer may be divided over them by rows.
    """

    def init(params):
        by_layers: Any = by_layer.init(params)
        return (whole.init(params), *by_layers)

    def update(updates: Any, state: Any, params: Any = None, **keep: Any):
        first, state = state[0], state[1:]
        structure = jax.tree.structure(updates)

        def is_moment(node) -> bool:  # a tree like the parameters', and no counter
            return jax.tree.structure(node) == structure

        def part(key):
            return jax.tree.map(lambda s: s[key] if is_moment(s) else s, state, is_leaf=is_moment)

        def nothing(node):
            return {} if is_moment(node) else node

        step = functools.partial(by_layer.update, **keep)
        updates, first = whole.update(updates, first, params)
        # Counters advance once, whatever the number of layers: by an update of no arrays at all.
        empty = jax.tree.map(nothing, state, is_leaf=is_moment)
        _, counted = by_layer.update({}, empty, {}, **keep)
        done, states = {}, {}
        for key in updates:
            # No moments on the device before their gradients, nor beside the ones before them.
            args = (updates[key], part(key), params[key])
            args, done = jax.lax.optimization_barrier((args, done))
            if key in STACKS:
                done[key], states[key] = _in_slices(step, *args, axis=0, size=1)
            else:
                done[key], states[key] = _by_rows(step, *args, devices=devices)
        state = jax.tree.map(
            lambda old, new, *parts: (
                dict(zip(states, parts, strict=True)) if is_moment(old) else new
            ),
            state,
            counted,
            *states.values(),
            is_leaf=is_moment,
        )
        return done, (first, *state)

    return optax.GradientTransformationExtraArgs(init, update)


def _to_device(tree):
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), tree)


def _back(tree, like):
    """`tree` in the memories of `like`."""
    return jax.tree.map(lambda x, old: jax.device_put(x, jax.typeof(old).memory_space), tree, like)


def _reshape(tree, shape) -> Any:
    """Arrays, not counters, in the shape that `shape` makes of theirs."""
    return jax.tree.map(lambda a: a.reshape(shape(a.shape)) if jnp.ndim(a) else a, tree)


def _by_rows(step: Callable, updates, state, params, devices: int):
    """The update of unstacked arrays: a large matrix in blocks of rows, others at once."""
    matrix = jax.tree.leaves(params)[0]
    if matrix.ndim < 2 or matrix.shape[0] % devices:
        updates, new = step(updates, _to_device(state), params)
        return updates, _back(new, state)
    here = matrix.shape[0] // devices
    limit = max(1, BLOCK_BYTES // (4 * math.prod(matrix.shape[1:])))
    rows = next(n for n in range(min(here, limit), 0, -1) if here % n == 0)
    # Every device's own rows behind an axis of devices, so that each takes a block of its own.
    args = _reshape((updates, state, params), lambda shape: (devices, here, *shape[1:]))
    done = _in_slices(step, *args, axis=1, size=rows)
    return _reshape(done, lambda shape: (devices * here, *shape[2:]))


def _in_slices(step: Callable, updates, state, params, *, axis: int, size: int):
    """The update of `size` along `axis` at a time, in place; counters of `state` are scalars."""
    length = jax.tree.leaves(params)[0].shape[axis]

    def at(tree, i) -> Any:
        return jax.tree.map(
            lambda a: jax.lax.dynamic_slice_in_dim(a, i, size, axis) if jnp.ndim(a) else a, tree
        )

    def put(whole, part, i) -> Any:
        return jax.tree.map(
            lambda a, x: jax.lax.dynamic_update_slice_in_dim(a, x, i, axis) if jnp.ndim(a) else a,
            whole,
            part,
        )

    def body(i, carry):
        updates, state = carry
        here = at(state, i * size)
        part, new = step(at(updates, i * size), _to_device(here), at(params, i * size))
        return put(updates, part, i * size), put(state, _back(new, here), i * size)

    return jax.lax.fori_loop(0, length // size, body, (updates, state))
