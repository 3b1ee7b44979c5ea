"""Tokens to experts and back: against one-hot products, and with a whole layer of experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxrl_kernels.permute import permute, route, unpermute

from jaxrl.ops.grouped_matmul_xla import grouped_matmul

T, K, E, D = 23, 3, 5, 8


def draw(seed=0, low=0, high=E):
    """(x [T, D], experts [T, k], weights [T, k]); ids low..high - 1."""
    rng = np.random.default_rng(seed)
    experts = np.stack([rng.permutation(np.arange(low, high))[:K] for _ in range(T)])
    x, weights = rng.standard_normal((T, D)), rng.random((T, K))
    return (
        jnp.asarray(x, jnp.float32),
        jnp.asarray(experts, jnp.int32),
        jnp.asarray(weights, jnp.float32),
    )


def check_routing(experts, num_experts):
    experts = np.asarray(experts)
    routing = route(jnp.asarray(experts), num_experts)
    flat = experts.reshape(-1)
    kept = np.where((flat < 0) | (flat >= num_experts), num_experts, flat)
    slot = np.argsort(kept, kind="stable")
    np.testing.assert_array_equal(routing.slot, slot)
    np.testing.assert_array_equal(routing.token, slot // experts.shape[1])
    np.testing.assert_array_equal(np.asarray(routing.row).reshape(-1)[slot], np.arange(flat.size))
    sizes = np.bincount(kept, minlength=num_experts + 1)[:num_experts]
    np.testing.assert_array_equal(routing.group_sizes, sizes)
    assert all(a.dtype == jnp.int32 for a in routing)


def test_route():
    check_routing(draw()[1], E)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(-2, 5), min_size=12, max_size=12), st.sampled_from((1, 3)))
def test_route_on_drawn_ids_some_out_of_range(ids, k):
    check_routing(np.array(ids).reshape(-1, k), 4)


def test_permute_and_its_gradient():
    x, experts, _ = draw()
    routing = route(experts, E)
    rows, vjp = jax.vjp(lambda x: permute(x, routing), x)
    np.testing.assert_array_equal(rows, np.repeat(np.asarray(x), K, axis=0)[routing.slot])
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(rows.shape), jnp.float32)
    want = jax.vjp(lambda x: x[routing.token], x)[1](cotangent)[0]
    np.testing.assert_allclose(vjp(cotangent)[0], want, rtol=1e-6, atol=1e-6)


def test_unpermute_and_its_gradients():
    x, experts, weights = draw()
    weights = weights.at[3, 1].set(0.0)
    routing = route(experts, E)
    rows = jnp.asarray(np.random.default_rng(1).standard_normal((T * K, D)), jnp.float32)

    def plain(rows, weights):
        terms = rows * weights.reshape(-1)[routing.slot, None]
        return jnp.zeros_like(x).at[routing.token].add(terms)

    out, vjp = jax.vjp(lambda r, w: unpermute(r, w, routing), rows, weights)
    want, plain_vjp = jax.vjp(plain, rows, weights)
    np.testing.assert_allclose(out, want, rtol=1e-6, atol=1e-6)
    for a, b in zip(vjp(x), plain_vjp(x), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_sums_of_bf16_rows_are_rounded_once():
    _, experts, weights = draw()
    routing = route(experts, E)
    rows = jnp.asarray(np.random.default_rng(1).standard_normal((T * K, D)), jnp.bfloat16)
    exact = unpermute(rows.astype(jnp.float32), weights, routing)
    np.testing.assert_array_equal(unpermute(rows, weights, routing), exact.astype(jnp.bfloat16))
    dx = jax.vjp(lambda x: permute(x, routing), jnp.zeros((T, D), jnp.bfloat16))[1](rows)[0]
    exact = jax.vjp(lambda x: permute(x, routing), jnp.zeros((T, D)))[1](rows.astype(jnp.float32))
    np.testing.assert_array_equal(dx, exact[0].astype(jnp.bfloat16))


def layer(x, w, experts, weights):
    routing = route(experts, E)
    rows = grouped_matmul(permute(x, routing), w, routing.group_sizes)
    return unpermute(rows, weights, routing)


@pytest.mark.parametrize("low", [0, -2])
def test_a_layer_of_experts_and_dropped_tokens(low):
    """Each token's own sum over its experts; ids below 0 and above E - 1 add nothing."""
    x, experts, weights = draw(low=low, high=E - low)
    w = jnp.asarray(np.random.default_rng(2).standard_normal((E, D, D)), jnp.float32)

    def plain(x, w, weights):
        chosen = jax.nn.one_hot(experts, E)  # zeros for ids out of range
        return jnp.einsum("TD,EDF,TkE,Tk->TF", x, w, chosen, weights, precision="highest")

    got, vjp = jax.vjp(lambda *a: layer(a[0], a[1], experts, a[2]), x, w, weights)
    want, plain_vjp = jax.vjp(plain, x, w, weights)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    for a, b in zip(vjp(x), plain_vjp(x), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_nothing_is_scattered_but_the_inverse_of_the_order():
    x, experts, weights = draw()
    w = jnp.ones((E, D, D))

    def loss(x, w, weights):
        return jnp.sum(layer(x, w, experts, weights) ** 2)

    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(x, w, weights))
    assert text.count("scatter[") == 1 and "scatter-add" not in text and "scatter_add" not in text


def test_refuses_ids_without_a_dimension_of_choices():
    with pytest.raises(ValueError, match=r"want \[T, k\]"):
        route(jnp.zeros(4, jnp.int32), 2)
