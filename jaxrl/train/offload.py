"""Optimizer state in the host's pinned memory, brought to the device one layer at a time.

The moments of Adam are 8 bytes per parameter that only the update reads. Kept in pinned host
memory, they cross PCIe once in each direction per step, and the device holds one layer's (or one
unstacked array's: the embedding's, the head's) at a time.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

HOST = "pinned_host"
STACKS = ("layers", "dense_layers")  # arrays stacked [L, ...], whose first axis is not sharded


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
    whole: optax.GradientTransformation, by_layer: optax.GradientTransformation
) -> optax.GradientTransformation:
    """`optax.chain(whole, *by_layer)`, whose state, laid out the same, may be in host memory.

    whole: sees all gradients at once, as clipping by their global norm must; has no state to speak
    of. by_layer: a chain of elementwise transformations, run on one layer's arrays at a time.
    """

    def init(params):
        by_layers: Any = by_layer.init(params)
        return (whole.init(params), *by_layers)

    def update(updates: Any, state: Any, params: Any = None):
        first, state = state[0], state[1:]
        structure = jax.tree.structure(updates)

        def is_moment(node) -> bool:  # a tree like the parameters', and no counter
            return jax.tree.structure(node) == structure

        def part(key):
            return jax.tree.map(lambda s: s[key] if is_moment(s) else s, state, is_leaf=is_moment)

        def nothing(node):
            return {} if is_moment(node) else node

        updates, first = whole.update(updates, first, params)
        # Counters advance once, whatever the number of layers: by an update of no arrays at all.
        empty = jax.tree.map(nothing, state, is_leaf=is_moment)
        _, counted = by_layer.update({}, empty, {})
        done, states = {}, {}
        for key in updates:
            run = _layer_by_layer if key in STACKS else _at_once
            # No moments on the device before their gradients, nor beside the ones before them.
            args = (updates[key], part(key), params[key])
            args, done = jax.lax.optimization_barrier((args, done))
            done[key], states[key] = run(by_layer, *args)
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

    return optax.GradientTransformation(init, update)


def _to_device(tree):
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), tree)


def _back(tree, like):
    """`tree` in the memories of `like`."""
    return jax.tree.map(lambda x, old: jax.device_put(x, jax.typeof(old).memory_space), tree, like)


def _at_once(optimizer: optax.GradientTransformation, updates, state, params):
    updates, new = optimizer.update(updates, _to_device(state), params)
    return updates, _back(new, state)


def _layer_by_layer(optimizer: optax.GradientTransformation, updates, state, params):
    """The update of arrays stacked [L, ...], in place; counters of `state` are scalars."""
    length = jax.tree.leaves(params)[0].shape[0]

    def at(tree, i) -> Any:
        return jax.tree.map(
            lambda a: jax.lax.dynamic_slice_in_dim(a, i, 1) if jnp.ndim(a) else a, tree
        )

    def put(whole, layer, i) -> Any:
        return jax.tree.map(
            lambda a, x: jax.lax.dynamic_update_slice_in_dim(a, x, i, 0) if jnp.ndim(a) else a,
            whole,
            layer,
        )

    def body(i, carry):
        updates, state = carry
        here = at(state, i)
        layer, new = optimizer.update(at(updates, i), _to_device(here), at(params, i))
        return put(updates, layer, i), put(state, _back(new, here), i)

    return jax.lax.fori_loop(0, length, body, (updates, state))
