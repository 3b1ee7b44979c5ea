"""The statistics of made-up choices of experts."""

import jax
import numpy as np
import pytest

from jaxrl.data.routing import expert_choices

T, E, K = 4096, 32, 4


def choices(mode, seed=0):
    return np.asarray(expert_choices(mode, T, E, K, jax.random.key(seed)))


@pytest.mark.parametrize("mode", ["balanced", "zipf"])
def test_a_tokens_experts_are_distinct_and_depend_on_the_key(mode):
    chosen = choices(mode)
    assert chosen.shape == (T, K) and chosen.dtype == np.int32
    assert chosen.min() == 0 and chosen.max() == E - 1
    assert all(len(set(row)) == K for row in chosen)
    assert np.array_equal(chosen, choices(mode))
    assert not np.array_equal(chosen, choices(mode, seed=1))


def test_balanced_gives_every_expert_the_same():
    assert set(np.bincount(choices("balanced").ravel())) == {T * K // E}
    uneven = np.asarray(expert_choices("balanced", 100, 7, 3, jax.random.key(0)))
    counts = np.bincount(uneven.ravel())
    assert counts.max() - counts.min() == 1


def test_zipf_follows_one_over_rank():
    chosen = np.asarray(expert_choices("zipf", 8 * T, E, K, jax.random.key(0)))
    # A token's first choice is a plain draw; later ones are without the experts chosen before.
    first = np.sort(np.bincount(chosen[:, 0], minlength=E))[::-1] / (8 * T)
    share = 1 / np.arange(1, E + 1)
    np.testing.assert_allclose(first, share / share.sum(), rtol=0.15)


def test_the_rank_of_an_expert_is_random():
    first = {int(np.bincount(choices("zipf", seed).ravel()).argmax()) for seed in range(8)}
    assert len(first) > 4


def test_an_unknown_mode_raises():
    with pytest.raises(ValueError, match="unknown routing 'even'; one of balanced, zipf"):
        expert_choices("even", T, E, K, jax.random.key(0))
