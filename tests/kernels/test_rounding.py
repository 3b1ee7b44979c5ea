"""Gradients in bf16 are those in fp32, rounded once."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxrl_kernels.grouped_matmul import triton
from jaxrl_kernels.permute import route, unpermute


def test_gradients_of_unpermute():
    rng = np.random.default_rng(0)
    routing = route(jnp.asarray(rng.integers(0, 5, (23, 3)), jnp.int32), 5)
    rows, dout = (jnp.asarray(rng.standard_normal((n, 64)), jnp.bfloat16) for n in (69, 23))
    weights = jnp.asarray(rng.random((23, 3)), jnp.float32)

    def gradients(rows, weights, dout):
        return jax.vjp(lambda r, w: unpermute(r, w, routing), rows, weights)[1](dout)

    got = gradients(rows, weights, dout)
    want = gradients(rows.astype(jnp.float32), weights, dout.astype(jnp.float32))
    np.testing.assert_array_equal(got[0], want[0].astype(jnp.bfloat16))
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-5)
    assert gradients(rows, weights.astype(jnp.bfloat16), dout)[1].dtype == jnp.bfloat16


def test_gradients_of_swiglu():
    rng = np.random.default_rng(0)
    gate, up = (jnp.asarray(rng.standard_normal((32, 32)), jnp.bfloat16) for _ in range(2))
    dh = jnp.asarray(rng.standard_normal((32, 32)), jnp.float32)
    got = jax.vjp(triton._silu_times, gate, up)[1](dh)
    want = jax.vjp(triton._silu_times, gate.astype(jnp.float32), up.astype(jnp.float32))[1](dh)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b.astype(jnp.bfloat16))
