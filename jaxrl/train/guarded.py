"""Optimizers whose update can be left out, at no cost in memory.

`update(gradients, state, params, keep=flag)`: where the flag is false, state stays as it is bit for
bit, and updates are such that parameters do, whatever the gradients are.

A choice between old and new becomes part of the elementwise update that a compiler makes in place,
provided that nothing needs both: the direction has to come from the moments that were chosen. From
new ones beside old ones, it would keep copies of the old.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

type Keep = bool | jax.Array


def chosen(keep: Keep, new: Any, old: Any) -> Any:
    """The tree `new` where `keep` is true, `old` where not."""
    if keep is True:
        return new
    return jax.tree.map(lambda a, b: jnp.where(keep, a, b), new, old)


def guarded(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`inner`, whose state advances where `keep` is true. For small states: see above."""

    def update(updates, state, params=None, *, keep: Keep = True):
        updates, new = inner.update(updates, state, params)
        return updates, chosen(keep, new, state)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def nothing_unless_kept(
    inner: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """`inner`, whose updates leave parameters as they are where `keep` is false."""

    def update(updates, state, params=None, *, keep: Keep = True):
        updates, state = inner.update(updates, state, params, keep=keep)
        # Minus zero leaves 0 and -0 what they are. And zeros would be one array with those that the
        # gradients' accumulator begins as, in memory until here.
        nothing = jax.tree.map(lambda u: jnp.asarray(-0.0, u.dtype), updates)
        return chosen(keep, updates, nothing), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def adam(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam`, to the bit."""
    plain = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)

    def update(updates, state, params=None, *, keep: Keep = True):
        del params
        mu = chosen(keep, optax.tree.update_moment(updates, state.mu, b1, 1), state.mu)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
        nu = chosen(keep, nu, state.nu)
        count = optax.safe_increment(state.count)
        corrected = (
            optax.tree.bias_correction(moment, decay, count)
            for moment, decay in ((mu, b1), (nu, b2))
        )
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), *corrected)
        return updates, optax.ScaleByAdamState(chosen(keep, count, state.count), mu, nu)

    return optax.GradientTransformationExtraArgs(plain.init, update)


def momentum(decay: float) -> optax.GradientTransformationExtraArgs:
    """`optax.trace` with Nesterov's direction, to the bit."""
    plain = optax.trace(decay, nesterov=True)

    def update(updates, state, params=None, *, keep: Keep = True):
        del params

        def ahead(trace):
            return jax.tree.map(lambda g, t: g + decay * t, updates, trace)

        trace = chosen(keep, ahead(state.trace), state.trace)
        return ahead(trace), optax.TraceState(trace)

    return optax.GradientTransformationExtraArgs(plain.init, update)
