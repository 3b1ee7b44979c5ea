"""The optimizer against AdamW written out in numpy, and the schedules at their corners."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl.config import OptimizerConfig
from jaxrl.train.optimizer import (
    make_optimizer,
    muon_or_adam,
    orthogonalized,
    schedule,
    updates_made,
)


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
        ("wsd", 0, {0: 1.0, 90: 1.0, 95: 0.5, 100: 0.0, 200: 0.0}),
        ("wsd", 20, {0: 0.0, 10: 0.5, 20: 1.0, 90: 1.0, 95: 0.5, 100: 0.0}),
        ("wsd", 95, {0: 0.0, 95: 1.0, 98: 0.4, 100: 0.0}),  # no room for a tenth
    ],
)
def test_schedule(name, warmup, expected):
    config = OptimizerConfig(
        learning_rate=0.25, schedule=name, warmup_steps=warmup, total_steps=100
    )
    check_schedule(config, expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("linear", {0: 0.0, 10: 1.0, 60: 0.6, 110: 0.2, 200: 0.2}),
        ("cosine", {0: 0.0, 10: 1.0, 60: 0.6, 110: 0.2, 200: 0.2}),
        ("wsd", {0: 0.0, 10: 1.0, 70: 1.0, 90: 0.6, 110: 0.2, 200: 0.2}),
        ("constant", {0: 0.0, 10: 1.0, 200: 1.0}),
    ],
)
def test_schedule_ends_at_a_fraction(name, expected):
    config = OptimizerConfig(
        learning_rate=0.25,
        schedule=name,
        warmup_steps=10,
        total_steps=110,
        decay_steps=40,
        final_fraction=0.2,
    )
    check_schedule(config, expected)


def check_schedule(config, expected):
    rate = schedule(config)
    for step, fraction in expected.items():
        np.testing.assert_allclose(rate(step), 0.25 * fraction, atol=1e-7, err_msg=str(step))


def test_a_schedule_that_ends_needs_to_know_when():
    with pytest.raises(ValueError, match="schedule cosine needs total_steps"):
        schedule(OptimizerConfig(schedule="cosine"))


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
    params, *gradients = drawn({"w": (3, 4), "b": (4,)}, 5)
    gradients[1] = {k: 0.01 * g for k, g in gradients[1].items()}  # one below the norm
    rates = [0.0, 0.05, 0.1, 0.05] if "schedule" in changes else [0.1] * 4
    got, _ = trained(config, params, gradients)
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


def trained(config, params, gradients):
    """Parameters after updates by `make_optimizer`, and the state."""
    tx = make_optimizer(config)
    update = jax.jit(tx.update)
    state, got = tx.init(params), jax.tree.map(jnp.asarray, params)
    for g in gradients:
        updates, state = update(g, state, got)
        got = optax.apply_updates(got, updates)
    return got, state


def drawn(shapes, count, seed=0):
    rng = np.random.default_rng(seed)

    def one(tree):
        return {
            k: one(s) if isinstance(s, dict) else rng.standard_normal(s).astype(np.float32)
            for k, s in tree.items()
        }

    return [one(shapes) for _ in range(count)]


def clipped(g, limit):
    norm = np.sqrt(sum(np.sum(np.square(a, dtype=np.float64)) for a in jax.tree.leaves(g)))
    return jax.tree.map(lambda a: a.astype(np.float64) * min(1.0, limit / norm), g)


def test_is_sgd_with_nesterovs_momentum():
    """Sutskever et al. 2013, as later written: m = b m + g; p -= lr (g + b m + wd p)."""
    config = OptimizerConfig(name="sgd", learning_rate=0.1, weight_decay=0.2, momentum=0.7)
    params, *gradients = drawn({"w": (3, 4)}, 4)
    got, state = trained(config, params, gradients)
    p, m = params["w"].astype(np.float64), 0.0
    for g in gradients:
        g = clipped(g, config.max_grad_norm)["w"]
        m = 0.7 * m + g
        p = p - 0.1 * (g + 0.7 * m + 0.2 * p)
    np.testing.assert_allclose(got["w"], p, rtol=1e-5)
    assert updates_made(state) == 3


def test_is_adafactor():
    """Shazeer and Stern's algorithm 4, row and column means of the squared gradient, decay
    1 - t^-0.8, each layer clipped to a root mean square of 1; fp64."""
    config = OptimizerConfig(name="adafactor", learning_rate=0.1, weight_decay=0.2)
    params, *gradients = drawn({"layers": {"w": (2, 128, 130)}, "embed": (5,)}, 4)
    got, state = trained(config, params, gradients)
    factored = next(s for s in state if hasattr(s, "v_row"))
    assert factored.v_row["layers"]["w"].shape == (2, 128)
    assert factored.v_col["layers"]["w"].shape == (2, 130)
    for name, keys in (("layers", ("layers", "w")), ("embed", ("embed",))):

        def at(tree, keys=keys):
            for key in keys:
                tree = tree[key]
            return tree

        p, r, c, v = at(params).astype(np.float64), 0.0, 0.0, 0.0
        for t, g in enumerate(gradients, 1):
            g = at(clipped(g, config.max_grad_norm))
            decay, square = 1 - t**-0.8, g**2 + 1e-30
            if name == "layers":
                r = decay * r + (1 - decay) * square.mean(axis=2)
                c = decay * c + (1 - decay) * square.mean(axis=1)
                v = r[:, :, None] * c[:, None, :] / r.mean(axis=1)[:, None, None]
                u = g / np.sqrt(v)
                rms = np.sqrt((u**2).mean(axis=(1, 2), keepdims=True))
            else:
                v = decay * v + (1 - decay) * square
                u = g / np.sqrt(v)
                rms = np.sqrt((u**2).mean())
            p = p - 0.1 * (u / np.maximum(1, rms) + 0.2 * p)
        np.testing.assert_allclose(at(got), p, rtol=2e-4, atol=1e-5, err_msg=name)


MUON_SHAPES = {
    "embed": (16, 6),
    "layers": {
        "norm": {"scale": (2, 6)},
        "attn": {"q": {"kernel": (2, 6, 9)}},
        "mlp": {"router": {"kernel": (2, 6, 4)}, "experts": {"up": {"kernel": (2, 4, 6, 5)}}},
    },
}


def test_muon_takes_the_layers_matrices():
    (params,) = drawn(MUON_SHAPES, 1)
    labels = muon_or_adam(params)
    assert labels["embed"] == labels["layers"]["norm"]["scale"] == "adam"
    assert labels["layers"]["mlp"]["router"]["kernel"] == "adam"
    assert labels["layers"]["attn"]["q"]["kernel"] == "muon"
    assert labels["layers"]["mlp"]["experts"]["up"]["kernel"] == "muon"


def test_is_muon():
    """Jordan's algorithm: Nesterov's momentum, made nearly orthogonal, 0.2 sqrt(max(in, out)) as
    large; every layer's and expert's matrix on its own. Adam for the others."""
    config = OptimizerConfig(name="muon", learning_rate=0.1, weight_decay=0.2, momentum=0.9)
    params, *gradients = drawn(MUON_SHAPES, 3)
    got, state = trained(config, params, gradients)
    assert updates_made(state) == 2

    def newton_schulz(x):
        x = x / np.linalg.norm(x)
        x, turned = (x.T, True) if x.shape[0] > x.shape[1] else (x, False)
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
        return x.T if turned else x

    for keys in (("attn", "q", "kernel"), ("mlp", "experts", "up", "kernel")):

        def at(tree, keys=keys):
            for key in ("layers", *keys):
                tree = tree[key]
            return tree

        p, m = at(params).astype(np.float64), 0.0
        size = max(p.shape[-2:])
        for g in gradients:
            g = at(clipped(g, config.max_grad_norm))
            m = 0.9 * m + g
            flat = (g + 0.9 * m).reshape(-1, *p.shape[-2:])
            turned = np.stack([newton_schulz(x) for x in flat]).reshape(p.shape)
            p = p - 0.1 * (0.2 * size**0.5 * turned + 0.2 * p)
        np.testing.assert_allclose(at(got), p, rtol=1e-4, atol=1e-5, err_msg=str(keys))
    rates = [0.1, 0.1]
    flat = [{"embed": clipped(g, config.max_grad_norm)["embed"]} for g in gradients]
    no_clip = dataclasses.replace(config, max_grad_norm=1e9)
    wanted = adamw(no_clip, {"embed": params["embed"]}, flat, rates)
    np.testing.assert_allclose(got["embed"], wanted["embed"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor", "sgd"])
def test_an_update_that_is_not_kept_changes_nothing(name):
    config = OptimizerConfig(name=name, learning_rate=0.1, schedule="linear", total_steps=9)
    params, *gradients = drawn(MUON_SHAPES, 3)
    tx = make_optimizer(config)
    update = jax.jit(tx.update)
    _, before = update(gradients[0], tx.init(params), params, keep=True)
    bad = jax.tree.map(lambda g: np.full_like(g, np.nan), gradients[1])
    updates, after = update(bad, before, params, keep=False)
    assert not any(np.any(u) for u in jax.tree.leaves(updates))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert updates_made(after) == 1
    again, _ = update(gradients[1], after, params, keep=True)
    wanted, _ = update(gradients[1], before, params)
    jax.tree.map(np.testing.assert_array_equal, again, wanted)


def test_orthogonalized_in_bf16_is_nearly_so():
    """The iteration's singular values lie about 1, as in higher precision."""
    (x,) = drawn({"layers": (3, 64, 96)}, 1)
    (found,) = orthogonalized(jnp.bfloat16).update(x, optax.EmptyState())[0].values()
    values = np.linalg.svd(np.asarray(found, np.float64) / (0.2 * 96**0.5), compute_uv=False)
    assert found.dtype == jnp.float32
    assert values.min() > 0.6 and values.max() < 1.3


def test_unknown_optimizer_and_host_memory_for_what_cannot_use_it():
    with pytest.raises(ValueError, match="unknown optimizer 'lion'; one of adamw, muon"):
        make_optimizer(dataclasses.replace(OptimizerConfig(), name="lion"))
    with pytest.raises(ValueError, match="streams adamw and sgd layer by layer, and not muon"):
        make_optimizer(OptimizerConfig(name="muon"), devices=8)
