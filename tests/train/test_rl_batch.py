"""Rollouts in rows: each whole, once, apart from the others, with its own advantage."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.envs.protocol import Task
from jaxrl.rollout.rollouts import Rollout
from jaxrl.train.rl_batch import pack_rollouts

PAD = 7


def rollout(length: int, number: int) -> Rollout:
    """A prompt of a third, a turn of the rest but one, and a reply of one token."""
    made = Rollout(Task(f"{number}", ()))
    prompt, turn = length // 3, length - length // 3 - 1
    made.say([1000 * number + i for i in range(prompt)])
    made.draw(
        [1000 * number + i for i in range(prompt, prompt + turn)],
        [-0.5 - number] * turn,
        [3] * turn,
    )
    made.say([1000 * number + length - 1])
    return made


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(2, 64), min_size=1, max_size=30), st.integers(1, 4))
def test_every_rollout_once_whole_and_apart(lengths, rows):
    rollouts = [rollout(n, i + 1) for i, n in enumerate(lengths)]
    advantages = [0.25 * (i + 1) for i in range(len(lengths))]
    packed = pack_rollouts(
        rollouts, advantages, seq_len=64, rows=rows, micro_batches=30, pad_id=PAD
    )
    seen, costs = [], []
    for m in range(30):
        for row in range(rows):
            ids = packed.segment_ids[m, row]
            found = [np.flatnonzero(ids == s) for s in range(1, ids.max() + 1)]
            assert (m < packed.used) or not found
            costs.append(sum(len(at) ** 2 for at in found))
            for at in found:
                assert (np.diff(at) == 1).all()
                number = packed.tokens[m, row, at[0]] // 1000
                one = rollouts[number - 1]
                here = (m, row, at)
                np.testing.assert_array_equal(packed.tokens[here], one.tokens)
                np.testing.assert_array_equal(packed.loss_mask[here], one.drawn)
                np.testing.assert_array_equal(packed.positions[here], np.arange(len(at)))
                np.testing.assert_allclose(packed.sampler_logprobs[here], one.logprobs)
                assert (packed.advantages[here] == advantages[number - 1]).all()
                seen.append(number)
    assert sorted(seen) == list(range(1, len(lengths) + 1))
    assert sorted(packed.lengths) == sorted(lengths) and costs == sorted(costs, reverse=True)
    padding = packed.segment_ids == 0
    assert (packed.tokens[padding] == PAD).all() and not packed.loss_mask[padding].any()
    assert not packed.advantages[padding].any() and not packed.sampler_logprobs[padding].any()


def test_rows_that_do_not_fit_are_refused():
    rollouts = [rollout(40, i) for i in range(5)]
    with pytest.raises(ValueError, match="5 rows, and 2 micro-batches hold 2 each"):
        pack_rollouts(rollouts, [1.0] * 5, seq_len=64, rows=2, micro_batches=2, pad_id=PAD)
