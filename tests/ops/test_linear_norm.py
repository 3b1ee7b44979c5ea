"""The hand-written backward passes of the matrix product and of RMS normalisation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.ops.linear import cast_params, matmul
from jaxrl.ops.norm import rms_norm


def normal(*shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(fn, *args_dy):
    """(fn(*args), its cotangent dy pulled back to each of args)."""
    *args, dy = args_dy
    y, vjp = jax.vjp(fn, *args)
    return y, *vjp(dy)


def norm(x, scale):
    return rms_norm(x, scale, 0.1)


def plain_norm(x, scale):
    h = x.astype(jnp.float32)
    h = h / jnp.sqrt(jnp.mean(h**2, axis=-1, keepdims=True) + 0.1)
    return h * scale.astype(jnp.float32)


@pytest.mark.parametrize("lead", [(), (7,), (2, 3)])
def test_matmul_is_the_plain_product(lead):
    x, w, dy = normal(*lead, 6), normal(6, 5, seed=1), normal(*lead, 5, seed=2)
    expected = value_and_gradients(jnp.matmul, x, w, dy)
    for a, b in zip(value_and_gradients(matmul, x, w, dy), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wide", [jnp.float32, jnp.bfloat16])
def test_matmul_of_bf16_has_a_weight_gradient_in_the_weights_type(wide):
    x, w, dy = normal(64, 6, dtype=jnp.bfloat16), normal(6, 5, dtype=wide), normal(64, 5, seed=2)
    dy = dy.astype(jnp.bfloat16)
    with jax.disable_jit():  # a compiler may leave out the rounding this is about
        y, dx, dw = value_and_gradients(matmul, x, w, dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, wide)
    truth = np.asarray(x, np.float64).T @ np.asarray(dy, np.float64)
    error = np.max(np.abs(np.asarray(dw, np.float64) - truth))
    assert error < 1e-5 if wide == jnp.float32 else 1e-3 < error < 0.1
    product = np.asarray(x, np.float64) @ np.asarray(w.astype(jnp.bfloat16), np.float64)
    np.testing.assert_allclose(y, product, rtol=2**-7, atol=2**-7)


def test_cast_params_casts_every_leaf():
    tree = cast_params({"a": jnp.ones(2), "b": {"c": jnp.ones(3, jnp.bfloat16)}}, jnp.float16)
    assert [a.dtype.name for a in jax.tree.leaves(tree)] == ["float16", "float16"]


@pytest.mark.parametrize("lead", [(), (7,), (2, 3)])
def test_rms_norm_and_its_gradients(lead):
    x, scale, dy = 3.0 * normal(*lead, 8), normal(8, seed=1), normal(*lead, 8, seed=2)
    expected = value_and_gradients(plain_norm, x, scale, dy)
    for a, b in zip(value_and_gradients(norm, x, scale, dy), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_rms_norm_of_bf16_rounds_once():
    x, dy = normal(16, 64, dtype=jnp.bfloat16), normal(16, 64, dtype=jnp.bfloat16, seed=2)
    scale = normal(64, seed=1)
    y, dx, dscale = value_and_gradients(norm, x, scale, dy)
    exact = value_and_gradients(plain_norm, x.astype(jnp.float32), scale, dy.astype(jnp.float32))
    assert (y.dtype, dx.dtype, dscale.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(dscale, exact[2], rtol=1e-5, atol=1e-5)
    for a, b in ((y, exact[0]), (dx, exact[1])):
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=2**-8, atol=1e-5)


def test_rms_norm_keeps_only_its_inputs():
    x, scale = normal(16, 64, dtype=jnp.bfloat16), normal(64)
    residuals = jax.tree.leaves(jax.eval_shape(lambda *a: jax.vjp(norm, *a)[1], x, scale))
    assert {(r.shape, r.dtype.name) for r in residuals} == {
        ((16, 64), "bfloat16"),
        ((64,), "float32"),
    }


def test_rms_norm_of_zeros_is_finite():
    y, dx, _ = value_and_gradients(
        lambda x, s: rms_norm(x, s, 1e-6), jnp.zeros((2, 4)), jnp.ones(4), jnp.ones((2, 4))
    )
    assert not np.any(y) and np.all(np.isfinite(dx))
