"""Chunks of tokens give what the whole gives: values, gradients, accumulators, precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.ops.linear import matmul
from jaxrl.ops.tokenwise import pull_back, tokenwise

T = 11
CHUNKS = [0, 1, 4, T, 100]


def fn(trainable, frozen, x):
    """Two matrix products and an embedding look-up; one result an array per token, one a number."""
    h = jnp.tanh(matmul(x["h"], trainable["w"])) * frozen["scale"][x["ids"]][:, None]
    return {"y": matmul(h, trainable["v"]), "norm": jnp.sum(h * h, axis=-1)}


def arrays(dtype=np.float32):
    """trainable, frozen, x, dy and the accumulators to add to."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    trainable = {"w": normal(6, 8), "v": normal(8, 5)}
    x = {"h": normal(T, 6).astype(dtype), "ids": rng.integers(0, 3, T)}
    dy = {"y": normal(T, 5).astype(dtype), "norm": normal(T).astype(dtype)}
    grads = {"w": normal(6, 8), "v": normal(8, 5)}
    return jax.tree.map(jnp.asarray, (trainable, {"scale": normal(3)}, x, dy, grads))


@functools.cache
def expected():
    """y, d trainable, dx by plain `jax.vjp`."""
    trainable, frozen, x, dy, _ = arrays()
    y, vjp = jax.vjp(lambda tr, h: fn(tr, frozen, {"h": h, "ids": x["ids"]}), trainable, x["h"])
    return y, *vjp(dy)


def close(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), a, b)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_tokenwise_is_the_function(chunk):
    trainable, frozen, x, dy, _ = arrays()

    @jax.jit
    def run(trainable, frozen, h):
        def apply(trainable, frozen, h):
            return tokenwise(fn, trainable, frozen, {"h": h, "ids": x["ids"]}, chunk=chunk)

        y, vjp = jax.vjp(apply, trainable, frozen, h)
        return y, *vjp(dy)

    y, dtrainable, dfrozen, dh = run(trainable, frozen, x["h"])
    close((y, dtrainable, dh), expected())
    assert not np.any(dfrozen["scale"])


@pytest.mark.parametrize("chunk", CHUNKS)
def test_pull_back_adds_to_the_accumulators(chunk):
    trainable, frozen, x, dy, before = arrays()
    run = jax.jit(functools.partial(pull_back, fn, chunk=chunk))
    grads, dx, y = run(trainable, frozen, x, dy, before)
    expected_y, dtrainable, dh = expected()
    close((y, dx["h"]), (expected_y, dh))
    close(grads, jax.tree.map(jnp.add, before, dtrainable))
    assert dx["ids"] is None


@pytest.mark.parametrize("through", ["tokenwise", "pull_back"])
def test_a_bf16_model_gets_a_gradient_finer_than_bf16(through):
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.standard_normal((64, n)), jnp.bfloat16) for n in (6, 5))
    w = jnp.asarray(rng.standard_normal((6, 5)), jnp.float32)

    def linear(trainable, frozen, x):
        return matmul(x, trainable)

    # Operation by operation: a compiler may leave out the rounding this is about.
    with jax.disable_jit():
        if through == "pull_back":
            dw, dx, y = pull_back(linear, w, {}, x, dy, jnp.zeros_like(w), chunk=24)
        else:
            y, vjp = jax.vjp(lambda w, x: tokenwise(linear, w, {}, x, chunk=24), w, x)
            dw, dx = vjp(dy)
    truth = np.asarray(x, np.float64).T @ np.asarray(dy, np.float64)
    rounded = truth.astype(jnp.bfloat16).astype(np.float64)
    assert dw.dtype == jnp.float32 and dx.dtype == y.dtype == jnp.bfloat16
    assert np.max(np.abs(dw - truth)) < 1e-5 < 1e-3 < np.max(np.abs(rounded - truth))


def test_a_chunk_bounds_what_is_alive():
    """The compiled backward holds no array of all tokens that is wider than its results."""

    def wide(trainable, frozen, x):
        return matmul(jnp.tanh(matmul(x, trainable["up"])), trainable["down"])

    weights = {"up": jnp.ones((4, 512)), "down": jnp.ones((512, 4))}
    x = jnp.ones((256, 4))

    def temporaries(chunk):
        loss = lambda w, x: jnp.sum(tokenwise(wide, w, {}, x, chunk=chunk) ** 2)  # noqa: E731
        compiled = jax.jit(jax.grad(loss)).lower(weights, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole = 256 * 512 * 4
    assert temporaries(16) < whole / 4 and temporaries(0) >= whole
