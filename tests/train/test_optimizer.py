"""The optimizer against AdamW written out in numpy, and the schedules at their corners."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl.config import OptimizerConfig
from jaxrl.train.optimizer import make_optimizer, schedule


@pytest.mark.parametrize(
    ("name", "warmup", "expected"),
    [
        ("constant", 0, {0: 1.0, 50: 1.0, 200: 1.0}),
        ("constant", 10, {0: 0.0, 5: 0.5, 10: 1.0, 200: 1.0}),
        ("linear", 0, {0: 1.0, 50: 0.5, 100: 0.0, 200: 0.0}),
        ("linear", 20, {0: 0.0, 10: 0.5, 20: 1.0, 60: 0.5, 100: 0.0, 200: 0.0}),
        ("cosine", 0, {0: 1.0, 25: (1 + 0.5**0.5) / 2, 50: 0.5, 100: 0.0, 200: 0.0}),
        ("cosine", 20, {0: 0.0, 19: 0.95, 20: 1.0, 60: 0.5, 100: 0.0, 200: 0.0}),
        ("linear", 100, {0: 0.0, 50: 0.5, 100: 1.0, 101: 0.0}),  # nothing left to decay over
    ],
)
def test_schedule(name, warmup, expected):
    config = OptimizerConfig(
        learning_rate=0.25, schedule=name, warmup_steps=warmup, total_steps=100
    )
    rate = schedule(config)
    for step, fraction in expected.items():
        np.testing.assert_allclose(rate(step), 0.25 * fraction, atol=1e-7, err_msg=str(step))


def test_unknown_schedule_raises():
    config = dataclasses.replace(OptimizerConfig(), schedule="step")
    with pytest.raises(ValueError, match="unknown schedule 'step'; one of constant, linear"):
        schedule(config)


def adamw(config, params, gradients, rates):
    """Loshchilov and Hutter's algorithm 2 after clipping by the global norm, in fp64."""
    params = {k: np.asarray(p, np.float64) for k, p in params.items()}
    m, v = ({k: np.zeros(p.shape) for k, p in params.items()} for _ in range(2))
    for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        norm = np.sqrt(sum(np.sum(np.square(a, dtype=np.float64)) for a in g.values()))
        for k, p in params.items():
            clipped = g[k] * min(1.0, config.max_grad_norm / norm)
            m[k] = config.b1 * m[k] + (1 - config.b1) * clipped
            v[k] = config.b2 * v[k] + (1 - config.b2) * clipped**2
            step = (m[k] / (1 - config.b1**t)) / (np.sqrt(v[k] / (1 - config.b2**t)) + config.eps)
            params[k] = p - rate * (step + config.weight_decay * p)
    return params


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_grad_norm": 0.3},
        {"weight_decay": 0.0},
        {"b1": 0.5, "b2": 0.7, "eps": 1e-2},
        {"schedule": "linear", "warmup_steps": 2, "total_steps": 4},
    ],
    ids=lambda c: "-".join(c) or "default",
)
def test_is_adamw(changes):
    config = OptimizerConfig(**{"learning_rate": 0.1, "weight_decay": 0.2} | changes)
    rng = np.random.default_rng(0)
    shapes = {"w": (3, 4), "b": (4,)}
    params, *gradients = (
        {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()} for _ in range(5)
    )
    gradients[1] = {k: 0.01 * g for k, g in gradients[1].items()}  # one below the norm
    rates = [0.0, 0.05, 0.1, 0.05] if "schedule" in changes else [0.1] * 4
    tx = make_optimizer(config)
    update = jax.jit(tx.update)
    state, got = tx.init(params), jax.tree.map(jnp.asarray, params)
    for g in gradients:
        updates, state = update(g, state, got)
        got = optax.apply_updates(got, updates)
    for key, value in adamw(config, params, gradients, rates).items():
        np.testing.assert_allclose(got[key], value, rtol=1e-4, atol=1e-6)


def test_the_direction_of_a_clipped_gradient_stays():
    """Adam hides a gradient's scale; the first moment shows what reached it."""
    tx = make_optimizer(OptimizerConfig(max_grad_norm=1.0, b1=0.0))
    params = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    for scale, expected in ((10.0, 1.0), (0.01, 0.05)):
        g = {"a": scale * jnp.array([3.0, 0.0]), "b": scale * jnp.array([4.0])}
        _, state = tx.update(g, tx.init(params), params)
        (adam,) = (s for s in state if hasattr(s, "mu"))
        np.testing.assert_allclose(adam.mu["a"], [0.6 * expected, 0.0], rtol=1e-5)
        np.testing.assert_allclose(adam.mu["b"], [0.8 * expected], rtol=1e-5)
