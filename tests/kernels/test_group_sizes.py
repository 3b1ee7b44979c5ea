"""Sizes of groups: of few bits, more than there are rows, and 0; and sides of 0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxrl_kernels import launch
from jaxrl_kernels.grouped_matmul import reference, schedule, triton

from jaxrl.ops import grouped_matmul_xla

PRODUCTS = {
    "triton": triton.grouped_matmul,
    "xla": grouped_matmul_xla.grouped_matmul,
    "xla swiglu": lambda x, w, sizes: grouped_matmul_xla.grouped_swiglu(x, w, w, sizes),
    "reference": reference.grouped_matmul,
}


def value_and_gradients(name, x, w, sizes):
    @jax.jit
    def run(x, w, sizes):
        y, vjp = jax.vjp(lambda x, w: PRODUCTS[name](x, w, sizes), x, w)
        return y, *vjp(jnp.ones_like(y))

    with launch.interpreted():
        return run(x, w, sizes)


def arrays(M, E, K, N):
    rng = np.random.default_rng(0)
    return (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((M, K), (E, K, N)))


@pytest.mark.parametrize("name", PRODUCTS)
def test_small_integers_are_counted(name, monkeypatch):
    """Their sum is beyond what int8 holds."""
    monkeypatch.setattr(grouped_matmul_xla, "SMALLER", (16,))  # fewer loops to compile
    x, w = arrays(240, 3, 8, 16)
    sizes = jnp.array([100, 100, 30])
    want = value_and_gradients(name, x, w, sizes)
    for dtype in ("int8", "uint8"):
        for a, b in zip(value_and_gradients(name, x, w, sizes.astype(dtype)), want, strict=True):
            np.testing.assert_array_equal(a, b)


def test_rows_of_the_schedule():
    assert list(schedule.offsets(jnp.array([200, 100], jnp.uint8), 340)) == [0, 200, 300]
    assert schedule.blocks_visited([20, 100, 7], 64, 16) == 2 + 3  # there are 64 rows, not 127


def test_weights_of_an_expert_without_rows_are_not_read():
    x, w = arrays(50, 4, 24, 32)
    sizes = jnp.array([20, 5, 0, 12])
    clean = value_and_gradients("triton", x, w, sizes)
    dirty = value_and_gradients("triton", x, w.at[2].set(jnp.nan), sizes)
    for a, b in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("shape", [(0, 2, 8, 16), (4, 0, 8, 16), (4, 2, 0, 16), (4, 2, 8, 0)])
@pytest.mark.parametrize("name", ["triton", "xla", "xla swiglu"])
def test_sides_of_0_are_refused(name, shape):
    x, w = arrays(*shape)
    with pytest.raises(ValueError, match="no side may be 0"):
        value_and_gradients(name, x, w, jnp.zeros(shape[1], jnp.int32))
