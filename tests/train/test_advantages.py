"""Advantages of a group by hand and by their sums."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl.train.advantages import group_advantages, is_flat, length_penalty

KINDS = ("mean", "grpo", "leave_one_out", "max_rl")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("mean", [-0.5, 0.5, -0.5, 0.5]),
        ("grpo", [-(0.75**0.5), 0.75**0.5] * 2),  # the deviation is sqrt(1/3)
        ("leave_one_out", [-2 / 3, 2 / 3] * 2),
        ("max_rl", [-1.0, 1.0, -1.0, 1.0]),
    ],
)
def test_by_hand(kind, expected):
    np.testing.assert_allclose(group_advantages(np.array([0, 1, 0, 1]), kind), expected, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@given(st.lists(st.floats(0, 10), min_size=1, max_size=16))
def test_advantages_sum_to_nothing_and_keep_the_order(kind, rewards):
    found = group_advantages(np.array(rewards), kind)
    assert found.dtype == np.float32 and np.isfinite(found).all()
    assert abs(found.sum()) <= 1e-5 * max(1, np.abs(found).sum())
    order = np.argsort(rewards, kind="stable")
    assert (np.diff(found[order]) >= -1e-6).all()
    if len(rewards) > 1 and kind == "leave_one_out":
        others = (sum(rewards) - rewards[0]) / (len(rewards) - 1)
        np.testing.assert_allclose(found[0], rewards[0] - others, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rewards", [[0.0] * 4, [0.3] * 7, [1.0], [1e6 + 0.1] * 3])
def test_equal_rewards_teach_nothing(kind, rewards):
    assert is_flat(rewards)
    np.testing.assert_allclose(group_advantages(np.array(rewards), kind), 0, atol=1e-9)


def test_unequal_rewards_are_not_flat():
    assert not is_flat([0.0, 0.0, 0.001])


def test_length_penalty():
    found = length_penalty([0, 80, 85, 90, 100, 120], [100] * 6, margin=20)
    np.testing.assert_allclose(found, [0, 0, 0.25, 0.5, 1, 1])
    np.testing.assert_allclose(length_penalty([5, 10, 0], [100, 10, 8], margin=20), [0, 1, 0])
