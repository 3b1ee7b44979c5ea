"""The CPU's expert layer against the sum over all experts: value and every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxrl_kernels.permute import route

from jaxrl.ops import experts_xla

CASES = {  # T, k, chosen experts (of 4; 4 and above: dropped), dtype of x, dtype of the weights
    "even": (24, 2, lambda t, j: (t + j) % 4, "float32", "float32"),
    "one_giant": (70, 1, lambda t, j: 0 * t + 2, "float32", "float32"),
    "uneven": (61, 2, lambda t, j: (t % 7 // 4 + 2 * j) % 4, "float32", "float32"),
    "dropped": (33, 3, lambda t, j: t % 3 + 2 * j, "float32", "float32"),
    "all_dropped": (9, 2, lambda t, j: 0 * t + 7, "float32", "float32"),
    "one_row": (1, 1, lambda t, j: 0 * t + 3, "float32", "float32"),
    "bfloat16": (40, 2, lambda t, j: (t * t + j) % 4, "bfloat16", "float32"),
}


def written_down(x, weights, chosen, w_gate, w_up, w_down):
    """Every expert for every token, in fp32."""
    gate, up = (jnp.einsum("td,edf->tef", x, w) for w in (w_gate, w_up))
    all_of_them = jnp.einsum("tef,efd->ted", jax.nn.silu(gate) * up, w_down)
    share = jnp.sum(jax.nn.one_hot(chosen, w_gate.shape[0]) * weights[..., None], axis=1)
    return jnp.einsum("te,ted->td", share, all_of_them)


def check(T, k, choose, dtype, w_dtype, D=24, F=16, E=4):
    rng = np.random.default_rng(0)

    def draw(*shape, of):
        return jnp.asarray(rng.standard_normal(shape), of)

    x, dy = draw(T, D, of=dtype), draw(T, D, of=dtype)
    weights = draw(T, k, of="float32").at[0, 0].set(0.0)
    w = draw(E, D, F, of=w_dtype), draw(E, D, F, of=w_dtype), draw(E, F, D, of=w_dtype)
    t, j = np.indices((T, k))
    chosen = jnp.asarray(choose(t, j), jnp.int32)

    def ours(x, weights, *w):
        return experts_xla.experts(x, weights, route(chosen, E), *w)

    def want(x, weights, *w):
        return written_down(x, weights, chosen, *w)

    y, pull_back = jax.vjp(jax.jit(ours), x, weights, *w)
    exact = [jnp.asarray(a, jnp.float32) for a in (x, weights, *w)]
    right, pull_right = jax.vjp(want, *exact)
    got = (y, *pull_back(dy))
    rights = (right, *pull_right(jnp.asarray(dy, jnp.float32)))
    for a, b, like in zip(got, rights, (x, x, weights, *w), strict=True):
        assert a.shape == b.shape
        assert a.dtype == like.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        tolerance = 1e-5 if dtype == "float32" else 3e-2
        assert np.max(np.abs(a - b)) <= tolerance * np.max(np.abs(b), initial=0.0)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_sum_over_experts(case):
    check(*CASES[case])


@pytest.mark.parametrize("case", ["one_giant", "uneven", "dropped", "bfloat16"])
@pytest.mark.parametrize("many", [1, 10**6])
def test_whole_blocks_and_a_last_one(case, many, monkeypatch):
    """Blocks so small that an expert has several, and steps that do not divide them."""
    monkeypatch.setattr(experts_xla, "BLOCK", 8)
    monkeypatch.setattr(experts_xla, "STEP", 3)
    monkeypatch.setattr(experts_xla, "MANY", many)
    check(*CASES[case])


def test_not_a_numbers_stay_with_their_token_and_expert():
    rng = np.random.default_rng(0)
    T, D, F, E = 12, 8, 8, 3
    chosen = jnp.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 7, 7])[:, None]  # 7: dropped
    x, dy = (jnp.asarray(rng.standard_normal((T, D)), jnp.float32) for _ in range(2))
    shapes = (E, D, F), (E, D, F), (E, F, D)
    w = [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes]

    @jax.jit
    def run(x, dy):
        def layer(x, *w):
            return experts_xla.experts(x, jnp.ones((T, 1)), route(chosen, E), *w)

        y, pull_back = jax.vjp(layer, x, *w)
        return y, *pull_back(dy)

    def spoilt(x, dy):
        """Rows of y and of dx, and experts whose gradients are not numbers."""
        y, dx, *dws = (np.isnan(a).any(axis=(*range(1, a.ndim),)) for a in run(x, dy))
        return *(np.flatnonzero(a).tolist() for a in (y, dx)), np.flatnonzero(sum(dws)).tolist()

    assert spoilt(x.at[10].set(jnp.nan), dy) == ([], [], [])
    assert spoilt(x.at[4].set(jnp.nan), dy) == ([4], [4], [1])
    assert spoilt(x, dy.at[4].set(jnp.nan)) == ([], [4], [1])


@pytest.mark.parametrize(("T", "k", "E"), [(0, 2, 3), (4, 0, 3), (4, 2, 0)])
def test_sides_of_0_are_refused(T, k, E):
    routing = route(jnp.zeros((T, k), jnp.int32), E)
    x, weights, w = jnp.zeros((T, 8)), jnp.zeros((T, k)), jnp.zeros((E, 8, 8))
    with pytest.raises(ValueError, match="no side may be 0"):
        experts_xla.experts(x, weights, routing, w, w, w)


def test_memory_is_linear_in_tokens():
    """Temporaries: gate and up, results and their gradients; no [T, E] of features."""

    def temporaries(T, k=2, D=32, F=32, E=16):
        w = [jnp.zeros(s) for s in ((E, D, F), (E, D, F), (E, F, D))]

        def both_ways(x, weights, chosen, *w):
            y, pull_back = jax.vjp(
                lambda *a: experts_xla.experts(*a[:2], route(chosen, E), *a[2:]), x, weights, *w
            )
            return pull_back(y)

        chosen = jnp.zeros((T, k), jnp.int32)
        compiled = jax.jit(both_ways).lower(jnp.zeros((T, D)), jnp.zeros((T, k)), chosen, *w)
        return compiled.compile().memory_analysis().temp_size_in_bytes

    few, many = temporaries(2048), temporaries(4096)
    rows = 2048 * 2 * 4
    assert many - few < rows * (2 * 32 + 2 * 32 + 32) + rows * 32
