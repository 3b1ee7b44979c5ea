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


def group(prompt: list[int], turns: list[int], number: int) -> list[Rollout]:
    """Rollouts of one task: a turn of so many tokens each."""
    made = []
    for turn in turns:
        made.append(Rollout(Task(f"{number}", ())))
        made[-1].say(prompt)
        made[-1].draw([1000 + number + len(made)] * turn, [-0.5 - len(made)] * turn, [3] * turn)
        made[-1].say([number])
    return made


GROUPS = st.lists(
    st.tuples(st.integers(1, 20), st.lists(st.integers(1, 40), min_size=1, max_size=6)),
    min_size=1,
    max_size=6,
)


@settings(max_examples=100, deadline=None)
@given(GROUPS, st.integers(1, 3))
def test_a_prompt_lies_in_a_row_once(shapes, rows):
    groups = [
        group(list(range(10 * i, 10 * i + n)), turns, i) for i, (n, turns) in enumerate(shapes)
    ]
    rollouts = [rollout for one in groups for rollout in one]
    advantages = [0.25 * (i + 1) for i in range(len(rollouts))]
    options = {"seq_len": 64, "rows": rows, "micro_batches": 40, "pad_id": PAD}
    packed = pack_rollouts(rollouts, advantages, **options, share_prompts=True)
    seen, lengths, prefixes = [], [], []
    for at in np.ndindex(40, rows):
        row = {k: v[at] for k, v in vars(packed).items() if isinstance(v, np.ndarray)}
        segments, families = row["segment_ids"], row["family_ids"]
        starts = []
        for segment in range(1, segments.max() + 1):
            here = np.flatnonzero(segments == segment)
            family = np.flatnonzero(families == families[here[0]])
            assert (np.diff(here) == 1).all() and (np.diff(family) == 1).all()
            assert (families[here] == families[here[0]]).all()
            before = np.flatnonzero(segments == segments[family[0]])
            lengths.append(len(here))
            if here[0] == family[0]:  # goes on from nothing
                before, several = before[:0], len(family) > len(here)
                starts.append(tuple(row["tokens"][here]) if several else None)
            prefixes.append(len(before))
            whole = np.concatenate([before, here])
            np.testing.assert_array_equal(row["positions"][whole], np.arange(len(whole)))
            if not row["loss_mask"][here].any():
                assert here[0] == family[0] and not row["advantages"][here].any()
                continue
            number = round(row["advantages"][here[0]] / 0.25) - 1
            one = rollouts[number]
            np.testing.assert_array_equal(row["tokens"][whole], one.tokens)
            np.testing.assert_array_equal(row["loss_mask"][whole], one.drawn)
            np.testing.assert_allclose(row["sampler_logprobs"][whole], one.logprobs)
            assert (row["advantages"][here] == advantages[number]).all()
            # Its first token predicts the first drawn one, and is not drawn itself.
            assert not row["loss_mask"][here[0]]
            seen.append(number)
        shared = [start for start in starts if start]
        assert len(set(shared)) == len(shared)  # each prompt once
    assert sorted(seen) == list(range(len(rollouts)))
    assert tuple(lengths) == packed.lengths and tuple(prefixes) == packed.prefixes
    assert sum(lengths) <= sum(len(rollout.tokens) for rollout in rollouts)


@pytest.mark.parametrize(
    ("turns", "lengths"),
    [  # a document is the prompt's last token, the turn and a reply
        ([12] * 5, [19, 14, 14, 14, 19, 14, 14]),
        ([30, 30, 12, 12, 12], [51, 51, 19, 14, 14, 14]),  # alone: 20 + 30 + 1
    ],
)
def test_a_group_that_does_not_fit_repeats_its_prompt(turns, lengths):
    rollouts = group(list(range(20)), turns, 50)
    options = {"rows": 4, "micro_batches": 2, "pad_id": PAD}
    packed = pack_rollouts(rollouts, [1.0] * 5, seq_len=64, **options, share_prompts=True)
    assert list(packed.lengths) == lengths


def test_prompts_are_shared_where_that_saves_a_micro_batch():
    """Three rollouts of 23 tokens in two rows, or of 8 + 3 x 15 in one."""
    for rows, shared in ((1, True), (2, False)):
        options = {"rows": rows, "micro_batches": 2, "pad_id": PAD, "share_prompts": True}
        packed = pack_rollouts(group([0] * 9, [13] * 3, 5), [1.0] * 3, seq_len=64, **options)
        assert packed.used == 1 and packed.shared == shared
        assert packed.lengths == ((8, 15, 15, 15) if shared else (23, 23, 23))


def test_rows_that_do_not_fit_are_refused():
    rollouts = [rollout(40, i) for i in range(5)]
    with pytest.raises(ValueError, match="5 rows, and 2 micro-batches hold 2 each"):
        pack_rollouts(rollouts, [1.0] * 5, seq_len=64, rows=2, micro_batches=2, pad_id=PAD)
