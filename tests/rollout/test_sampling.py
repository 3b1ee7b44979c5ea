"""Sampling against filters and frequencies written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jaxrl.rollout.sampling import Choice, _threshold, sample

V = 700  # no multiple of a block
jitted = jax.jit(sample)


def choice(B, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=None):
    def each(value, dtype):
        return jnp.asarray(np.broadcast_to(np.asarray(value, dtype), (B,)))

    return Choice(
        each(temperature, np.float32),
        each(top_k, np.int32),
        each(top_p, np.float32),
        each(min_p, np.float32),
        each(np.arange(B) if seed is None else seed, np.int32),
    )


def kept(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> set[int]:
    """The tokens that may be drawn, as the filters are described, by sorting."""
    z = np.asarray(logits, np.float64) / temperature
    p = np.exp(z - z.max())
    order = np.argsort(-p, kind="stable")
    if top_k:
        order = order[:top_k]
    mass = np.cumsum(p[order]) / p[order].sum()
    order = order[: int(np.searchsorted(mass, top_p)) + 1]
    return {int(i) for i in order if p[i] >= min_p * p.max()}


def drawn(logits, count, **options):
    """`count` tokens and log-probs of the same logits, each with a seed of its own."""
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
    tokens, logprobs = jitted(rows, choice(count, **options), jnp.zeros(count, jnp.int32))
    return np.asarray(tokens), np.asarray(logprobs)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax(temperature):
    logits = np.random.default_rng(0).normal(size=V) * 3
    tokens, logprobs = drawn(logits, 20000, temperature=temperature)
    z = logits / temperature
    expected = np.exp(z - np.logaddexp.reduce(z))
    np.testing.assert_allclose(logprobs, np.log(expected)[tokens], atol=1e-5)
    common = expected > 1e-3
    observed = np.bincount(tokens, minlength=V)
    found = np.append(observed[common], observed[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum()) * len(tokens)
    assert stats.chisquare(found, wanted).pvalue > 1e-3


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.floats(0.3, 2.0),
    st.integers(0, 30),
    st.floats(0.05, 1.0),
    st.floats(0.0, 0.5),
)
def test_what_may_be_drawn(seed, temperature, top_k, top_p, min_p):
    logits = np.random.default_rng(seed).normal(size=V).astype(np.float32) * 4
    one = choice(1, top_k=top_k, top_p=top_p, min_p=min_p)
    z = jnp.asarray(logits / np.float32(temperature))[None]
    z = z - z.max()
    found = set(np.flatnonzero(z[0] >= _threshold(z, one)[0]).tolist())
    wanted = kept(logits, temperature, top_k, top_p, min_p)
    # A token that a sum's rounding decides may be in or out.
    assert len(found ^ wanted) <= (top_p < 1)
    tokens, _ = drawn(logits, 64, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    assert set(tokens.tolist()) <= found


def test_equal_logits_at_a_threshold_are_all_kept():
    tokens, _ = drawn([5.0, 5.0, 5.0, 0.0], 200, top_k=2)
    assert set(tokens.tolist()) == {0, 1, 2}


def test_the_most_likely_token_at_temperature_zero():
    logits = np.random.default_rng(1).normal(size=(5, V)).astype(np.float32)
    tokens, logprobs = sample(
        jnp.asarray(logits), choice(5, temperature=0), jnp.zeros(5, jnp.int32)
    )
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    expected = logits.max(-1) - np.logaddexp.reduce(logits, axis=-1)
    np.testing.assert_allclose(logprobs, expected, atol=1e-5)


def test_log_probs_are_of_the_whole_vocabulary_whatever_is_left_out():
    logits = np.random.default_rng(2).normal(size=V).astype(np.float32)
    tokens, logprobs = drawn(logits, 50, top_k=3)
    np.testing.assert_allclose(logprobs, (logits - np.logaddexp.reduce(logits))[tokens], atol=1e-5)


def test_a_row_is_drawn_alike_among_any_others_and_anew_at_every_index():
    rng = np.random.default_rng(3)
    logits = jnp.asarray(rng.normal(size=(6, V)), jnp.float32)
    index = jnp.arange(6, dtype=jnp.int32)
    mixed = choice(6, temperature=[0, 1, 1, 0.5, 1, 2], top_k=[0, 0, 5, 0, 0, 9], seed=7)
    tokens, _ = sample(logits, mixed, index)
    for i in range(6):
        alone = jax.tree.map(lambda a, i=i: a[i : i + 1], mixed)
        assert sample(logits[i : i + 1], alone, index[i : i + 1])[0][0] == tokens[i]
    same = jnp.broadcast_to(logits[0], (50, V))
    tokens, _ = sample(same, choice(50, seed=7), jnp.arange(50, dtype=jnp.int32))
    assert len(set(tokens.tolist())) > 20


@pytest.mark.parametrize("peak", [0, 255, 256, V - 1])
def test_a_certain_token_is_drawn_wherever_it_is(peak):
    logits = np.full(V, -np.inf, np.float32)
    logits[peak] = 3.0
    tokens, logprobs = drawn(logits, 100)
    assert set(tokens.tolist()) == {peak} and (logprobs == 0).all()
