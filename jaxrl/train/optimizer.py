"""Optimizers and learning-rate schedules, as optax transformations.

All: gradients clipped by their global norm -> the optimizer's own direction -> decoupled weight
decay -> times -lr. They differ in the direction alone.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.experimental.layout import Layout, with_layout_constraint

from jaxrl.config import OptimizerConfig
from jaxrl.train.guarded import adam, guarded, momentum, nothing_unless_kept
from jaxrl.train.offload import STACKS, streamed

# Adafactor keeps a row and a column instead of a matrix with at least so many of both.
FACTORED_FROM = 128


def schedule(config: OptimizerConfig) -> optax.Schedule:
    """Learning rate by the number of updates made, which steps without one do not count: linear
    warm-up, then constant, or a linear or cosine decay to `final_fraction` of it, or constant with
    a linear decay over the last `decay_steps`."""
    lr, warmup, total = config.learning_rate, config.warmup_steps, config.total_steps
    if config.schedule in ("linear", "cosine", "wsd") and not total:
        raise ValueError(f"schedule {config.schedule} needs total_steps, the step at which it ends")
    decay, last = max(total - warmup, 1), lr * config.final_fraction
    match config.schedule:
        case "constant":
            after = optax.constant_schedule(lr)
        case "linear":
            after = optax.linear_schedule(lr, last, decay)
        case "cosine":
            after = optax.cosine_decay_schedule(lr, decay, alpha=config.final_fraction)
        case "wsd":  # arXiv:2404.06395
            falls = min(config.decay_steps or -(-total // 10), decay)
            parts = optax.constant_schedule(lr), optax.linear_schedule(lr, last, falls)
            after = optax.join_schedules(parts, [decay - falls])
        case other:
            raise ValueError(f"unknown schedule {other!r}; one of constant, linear, cosine, wsd")
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, lr, warmup), after], [warmup])


def make_optimizer(
    config: OptimizerConfig, *, devices: int = 0, dtype: Any = jnp.float32
) -> optax.GradientTransformationExtraArgs:
    """The optimizer that `config.name` names.

    adamw: arXiv:1711.05101. muon: momentum made orthogonal (`orthogonalized`) for the layers'
    matrices, adapters' among them, Adam for the rest. adafactor: arXiv:1804.04235, with the
    learning rate as it is given. sgd: Nesterov's momentum.

    devices: of a mesh on which moments are in host memory, for adamw and sgd, whose arithmetic is
    elementwise; 0 where they are not. Same results. dtype: of Muon's iteration.

    `update(gradients, state, params, keep=flag)`: where the flag is false, state and parameters
    stay as they are, whatever the gradients are (`jaxrl.train.guarded`).
    """
    adaptive = adam(config.b1, config.b2, config.eps)
    match config.name:
        case "adamw":
            direction = [adaptive]
        case "muon":
            matrices = optax.chain(momentum(config.momentum), orthogonalized(dtype))
            direction = [optax.partition({"muon": matrices, "adam": adaptive}, muon_or_adam)]
        case "adafactor":
            factored = optax.scale_by_factored_rms(min_dim_size_to_factor=FACTORED_FROM)
            direction = [guarded(factored), clipped_by_layer(1.0)]
        case "sgd":
            direction = [momentum(config.momentum)]
        case other:
            raise ValueError(f"unknown optimizer {other!r}; one of adamw, muon, adafactor, sgd")
    if devices and config.name not in ("adamw", "sgd"):
        raise ValueError(
            f"offload_optimizer streams adamw and sgd layer by layer, and not {config.name}; turn "
            "it off"
        )
    clip = optax.clip_by_global_norm(config.max_grad_norm)
    by_layer = (
        *direction,
        optax.add_decayed_weights(config.weight_decay),
        guarded(optax.scale_by_learning_rate(schedule(config))),
    )
    if devices:
        return streamed(clip, nothing_unless_kept(optax.chain(*by_layer)), devices)
    return nothing_unless_kept(optax.chain(clip, *by_layer))


def updates_made(opt_state: Any) -> Any:
    """How many updates an optimizer state of `make_optimizer` has seen: its schedule's count."""
    (count,) = (s.count for s in _states(opt_state) if isinstance(s, optax.ScaleByScheduleState))
    return count


def _states(tree: Any) -> list[Any]:
    def is_schedule(node) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    return jax.tree.leaves(tree, is_leaf=is_schedule)


def muon_or_adam(params: Any) -> Any:
    """Of each parameter "muon", for matrices of layers (stacked [L, ..., in, out]), or "adam", for
    embedding, head, norms, biases and routers."""

    def label(path, p) -> str:
        keys = [key.key for key in path]
        matrix = keys[0] in STACKS and p.ndim >= 3 and "router" not in keys
        return "muon" if matrix else "adam"

    return jax.tree_util.tree_map_with_path(label, params)


def orthogonalized(dtype: Any) -> optax.GradientTransformation:
    """Each matrix of the stacked layers, [..., in, out], to the nearest (semi-)orthogonal one, by
    Newton and Schulz' iteration in `dtype`, times 0.2 sqrt(max(in, out)), so that an update is as
    large as AdamW's (arXiv:2502.16982).

    A layer at a time: of matrices that are divided over devices, one layer's is gathered at once.
    """
    # Without momentum of its own, it is the iteration alone.
    newton_schulz = optax.contrib.scale_by_muon(beta=0.0, nesterov=False)

    def one(matrix: jax.Array) -> jax.Array:
        low = matrix.astype(dtype)
        turned: Any = newton_schulz.update(low, newton_schulz.init(low))[0]
        return 0.2 * max(matrix.shape) ** 0.5 * turned.astype(matrix.dtype)

    def layer(matrices: jax.Array) -> jax.Array:
        if matrices.ndim == 2:
            return one(matrices)
        flat = matrices.reshape(-1, *matrices.shape[-2:])  # [E, in, out]
        return jax.vmap(one)(flat).reshape(matrices.shape)

    def layers(stack: jax.Array) -> jax.Array:
        # In place: what `jax.lax.map` would write its results to begins as zeros, which would be
        # one array with the gradients' accumulator's, in memory from the step's beginning.
        def body(i, stack):
            # As they lie: or the layout that products would like turns the stacks, all layers.
            rows = Layout(tuple(range(stack.ndim - 1)))
            here = jax.lax.dynamic_index_in_dim(stack, i, keepdims=False)
            turned = with_layout_constraint(layer(with_layout_constraint(here, rows)), rows)
            return jax.lax.dynamic_update_index_in_dim(stack, turned, i, 0)

        return jax.lax.fori_loop(0, stack.shape[0], body, stack)

    return optax.stateless(lambda updates, params: jax.tree.map(layers, updates))


def clipped_by_layer(limit: float) -> optax.GradientTransformation:
    """Each layer's array scaled down to a root mean square of at most `limit`."""

    def clip(path, u: jax.Array) -> jax.Array:
        stacked = path[0].key in STACKS
        axes = tuple(range(1 if stacked else 0, u.ndim))
        rms = jnp.sqrt(jnp.mean(jnp.square(u), axis=axes, keepdims=True))
        return u / jnp.maximum(1.0, rms / limit)

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(clip, updates))
