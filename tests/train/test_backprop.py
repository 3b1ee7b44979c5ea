"""Backward through the stacked layers against `jax.grad` of the same scan."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from jaxrl.train.backprop import LayerStack
from jaxrl.train.remat import POLICIES

L, T, D, R = 3, 5, 6, 2


def layer(trainable, constants, x):
    """With a frozen part, shared constants, and the names that the policies know."""
    frozen, shift = constants
    x = checkpoint_name(x, "layer_input")
    h = checkpoint_name(jnp.tanh(x @ frozen["base"] + shift), "attention_out")
    h = checkpoint_name(x + h, "mlp_input")
    if trainable:
        h = h + jnp.sin(h @ trainable["a"]) @ trainable["b"]
    return h * frozen["scale"], jnp.sum(x > 0, axis=1)


@functools.cache
def arrays():
    """trainable, frozen (stacked), the constant, x, dy, and accumulators."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    trainable = {"a": normal(L, D, R), "b": normal(L, R, D)}
    frozen = {"base": normal(L, D, D), "scale": normal(L, D)}
    grads = {"a": normal(L, D, R), "b": normal(L, R, D)}
    return trainable, frozen, normal(D), normal(T, D), normal(T, D), grads


def stack(ac="recompute", fetch=lambda tr, fr: (tr, fr), reduce=lambda g: g):
    return LayerStack(layer, ac=ac, fetch=fetch, reduce=reduce)


@functools.partial(jax.jit, static_argnums=0)
def run(layers, trainable, frozen, shift, x, dy, grads):
    """(y, grads, dx)"""
    y, saved, _ = layers.forward(trainable, frozen, shift, x)
    return y, *layers.backward(trainable, frozen, shift, saved, dy, grads)


@functools.cache
def expected(learning: bool = True):
    trainable, frozen, shift, x, dy, grads = arrays()
    if not learning:
        trainable, grads = {}, {}

    @jax.jit
    def plain(trainable, x):
        def forward(trainable, x):
            body = lambda x, i: layer(i[0], (i[1], shift), x)  # noqa: E731
            return jax.lax.scan(body, x, (trainable, frozen))[0]

        y, vjp = jax.vjp(forward, trainable, x)
        return y, *vjp(dy)

    y, dtrainable, dx = plain(trainable, x)
    return y, jax.tree.map(jnp.add, grads, dtrainable), dx


def close(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), a, b)


@pytest.mark.parametrize("ac", POLICIES)
def test_adds_the_gradient_of_the_scan(ac):
    close(run(stack(ac), *arrays()), expected())


def test_without_trainable_layers_only_x_gets_a_gradient():
    _, frozen, shift, x, dy, _ = arrays()
    close(run(stack(), {}, frozen, shift, x, dy, {}), expected(learning=False))


def test_everything_may_learn():
    trainable, frozen, shift, x, dy, grads = arrays()
    tree = {"a": trainable["a"], "b": trainable["b"], **frozen}

    def all_learn(params, constants, x):
        return layer({k: params[k] for k in "ab"}, (params, constants[1]), x)

    layers = LayerStack(
        all_learn, ac="selective", fetch=lambda tr, fr: (tr, fr), reduce=lambda g: g
    )
    zeros = jax.tree.map(jnp.zeros_like, tree)
    y, got, dx = run(layers, tree, {}, shift, x, dy, zeros)
    y_expected, added, dx_expected = expected()
    close((y, dx), (y_expected, dx_expected))
    close({k: got[k] + grads[k] for k in "ab"}, added)
    assert np.any(got["base"]) and np.any(got["scale"])


def test_fetch_and_reduce_stand_between_shards_and_layers():
    """Here a shard is half a layer's parameters' value, and the sum over devices a factor of 2."""
    trainable, frozen, shift, x, dy, grads = arrays()
    half = lambda tree: jax.tree.map(lambda a: a / 2, tree)  # noqa: E731
    double = lambda tree: jax.tree.map(lambda a: a * 2, tree)  # noqa: E731
    layers = stack(fetch=lambda tr, fr: (double(tr), double(fr)), reduce=double)
    y, got, dx = run(layers, half(trainable), half(frozen), shift, x, dy, grads)
    y_expected, added, dx_expected = expected()
    close((y, dx), (y_expected, dx_expected))
    close(got, jax.tree.map(lambda a, g: 2 * a - g, added, grads))


def test_the_accumulator_is_the_only_gradient_buffer():
    """No second [L, ...] gradient: donated accumulators come back, and little is allocated."""
    big = 64
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.standard_normal((8, big, big)), jnp.float32)}
    layers = LayerStack(
        lambda p, _, x: (x + x @ p["w"], None),
        ac="recompute",
        fetch=lambda tr, fr: (tr, fr),
        reduce=lambda g: g,
    )
    x = jnp.ones((2, big))

    def step(grads, params, x):
        y, saved, _ = layers.forward(params, {}, None, x)
        return layers.backward(params, {}, None, saved, y, grads)

    compiled = jax.jit(step, donate_argnums=0).lower(params, params, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < params["w"].nbytes / 2
