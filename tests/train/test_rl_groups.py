"""What rollouts are worth, which groups are learned from, and what is done with the others."""

import collections
import dataclasses
import json
import types

import numpy as np
import pytest

from jaxrl.config import default_config
from jaxrl.envs.protocol import Task
from jaxrl.options import ConfigError, from_config
from jaxrl.rl_config import AlgorithmConfig, RlConfig, RolloutConfig
from jaxrl.rollout.rollouts import Group, Rollout
from jaxrl.train import rl
from jaxrl.train.rl_groups import training_rollouts, verdict, worth

CONFIG = dataclasses.replace(
    from_config(RlConfig, default_config(RlConfig, model="m", output="o")),
    seq_len=128,
    rollout=RolloutConfig(max_tokens=40),
    tasks_per_step=2,
)


def rollout(reward, *turns, version=3, prompt=10, failure=None) -> Rollout:
    """With turns of so many tokens, each behind a prompt or a reply of ten."""
    made = Rollout(Task("t", ()), reward=reward, failure=failure)
    for length in turns or (4,):
        made.say([1] * prompt)
        made.draw([2] * length, [-1.0] * length, [version] * length)
    return made


def group(number, *rewards, **given) -> Group:
    return Group(number, [rollout(reward, **given) for reward in rewards])


def penalised(penalty=0.5, margin=10, **algorithm):
    options = AlgorithmConfig(length_penalty=penalty, length_margin=margin, **algorithm)
    return dataclasses.replace(CONFIG, algorithm=options)


def test_the_longest_turn_pays_for_its_length():
    made = Group(0, [rollout(1.0, 30), rollout(1.0, 35), rollout(1.0, 40), rollout(1.0, 5, 40, 5)])
    np.testing.assert_allclose(worth(penalised(), made), [1.0, 0.75, 0.5, 0.5])
    np.testing.assert_allclose(worth(CONFIG, made), 1.0)


def test_without_max_tokens_the_limit_is_what_the_context_leaves():
    config = dataclasses.replace(penalised(), rollout=RolloutConfig(max_tokens=0))
    made = Group(0, [rollout(1.0, 118), rollout(1.0, 113), rollout(1.0, 40)])
    np.testing.assert_allclose(worth(config, made), [0.5, 0.75, 1.0])
    late = Group(0, [rollout(1.0, 8, prompt=120), rollout(1.0, 4, prompt=120)])  # room for 8
    np.testing.assert_allclose(worth(config, late), [0.5, 0.75])


def test_equal_rewards_of_unequal_length_teach():
    made = Group(0, [rollout(1.0, 40), rollout(1.0, 20)])
    assert verdict(CONFIG, made, 3) == "flat"
    assert verdict(penalised(), made, 3) == "good"
    _, advantages = training_rollouts(penalised(), [made])
    assert advantages == [-0.25, 0.25]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"margin": 0}, "length_margin, over which it rises, is 0; give tokens"),
        ({"advantage": "max_rl"}, "max_rl is for rewards that are not negative"),
    ],
)
def test_penalties_that_make_no_sense(options, problem):
    with pytest.raises(ConfigError, match=problem):
        penalised(**options)


@pytest.mark.parametrize("late", [0, 1, 2])
def test_how_old_a_group_may_be(late):
    config = dataclasses.replace(CONFIG, rollout=RolloutConfig(max_staleness=late))
    for age in range(4):
        made = group(0, 0.0, 1.0, version=7 - age)
        made.rollouts[1].draw([2], [-1.0], [7])  # the oldest token counts
        assert verdict(config, made, 7) == ("good" if age <= late else "stale")


def test_what_has_no_two_rewards_has_failed():
    assert verdict(CONFIG, Group(0, [rollout(1.0), rollout(None, failure="reward: x")]), 3)
    assert verdict(CONFIG, group(0, 1.0), 3) == verdict(CONFIG, Group(0, []), 3) == "failed"


class Generation:
    """Hands out these groups, one at a time."""

    def __init__(self, groups):
        self.groups, self.recorded = list(groups), {}
        self.order = types.SimpleNamespace(count=100)

    def take(self, wanted):
        assert wanted >= 1
        return [self.groups.pop(0)]

    def record(self, number, mean):
        self.recorded[number] = mean


def drawing(groups, tmp_path, **config):
    """A run that draws these groups."""
    said = []
    return types.SimpleNamespace(
        config=dataclasses.replace(CONFIG, output=str(tmp_path), **config),
        drawing=Generation(groups),
        drawn=[],
        flat=0,
        counts=collections.Counter(),
        console=types.SimpleNamespace(say=lambda text, style: said.append(text)),
        said=said,
    )


def gather(groups, tmp_path, step=3, **config):
    """(run, what `gather` finds) of a run that draws these groups."""
    run = drawing(groups, tmp_path, **config)
    return run, rl.gather(run, step, types.SimpleNamespace(requested=False))


def test_all_processes_train_on_groups_in_one_order(tmp_path, monkeypatch):
    said = []

    def from_first(ask):
        if rl.is_reporter():
            said.append(json.dumps(ask()))
        return json.loads(said[0])

    monkeypatch.setattr(rl.jax, "process_count", lambda: 2)
    monkeypatch.setattr(rl, "from_first", from_first)
    found = []
    arrived = [group(9, 0.0, 1.0), group(2, 0.0, 1.0), group(5, 1.0, 1.0), group(4, 1.0, 0.0)]
    for first, groups in ((True, arrived), (False, [])):
        monkeypatch.setattr(rl, "is_reporter", lambda first=first: first)
        run = drawing(groups, tmp_path, tasks_per_step=3)
        good = rl.gather_for_all(run, 3, types.SimpleNamespace(requested=False))
        found.append([(g.number, [r.tokens for r in g.rollouts]) for g in good])
    assert found[0] == found[1] and [number for number, _ in found[0]] == [2, 4, 9]


def test_waits_for_groups_that_teach_and_counts_the_others(tmp_path):
    failed = Group(4, [rollout(1.0), rollout(None, failure="reward: boom")])
    groups = [
        group(9, 0.0, 1.0),
        group(2, 1.0, 1.0),
        group(3, 0.0, 1.0, version=2),
        failed,
        group(5, 0.5, 0.25),
        group(6, 0.0, 1.0),
    ]
    run, found = gather(groups, tmp_path)
    assert [g.number for g in found] == [5, 9] and len(run.drawing.groups) == 1
    assert run.flat == 1
    assert run.counts == {
        "groups": 5, "rollouts": 10, "groups_flat": 1, "groups_stale": 1, "groups_failed": 1,
        "failed": 1, "failed_reward": 1,
    }  # fmt: skip
    assert run.drawing.recorded == {9: 0.5, 2: 1.0, 3: 0.5, 4: 1.0, 5: 0.375}
    assert not run.said
    lines = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").open()]
    assert [line["group"] for line in lines] == [9, 9, 2, 2, 3, 3, 4, 4, 5, 5]
    assert all(line["step"] == 4 for line in lines)
    # Of what is not trained on, neither tokens nor words are kept; its figures are.
    for one in run.drawn:
        for r in one.rollouts:
            assert bool(r.tokens) == (one.number in (5, 9)) and r.length == 4


def test_equal_rewards_are_trained_on_where_that_is_asked(tmp_path):
    both = [group(2, 1.0, 1.0), group(1, 0.0, 1.0)]
    run, found = gather(both, tmp_path, algorithm=AlgorithmConfig(keep_flat=True))
    assert [g.number for g in found] == [1, 2] and run.flat == 1
    assert all(r.tokens for g in found for r in g.rollouts)


def test_says_that_it_waits_ever_more_rarely(tmp_path):
    flat = [group(i, 1.0, 1.0) for i in range(45)]
    good = [group(100, 0.0, 1.0), group(101, 0.0, 1.0)]
    run, found = gather([good[0], *flat, good[1]], tmp_path)
    assert [g.number for g in found] == [100, 101]
    assert run.said == [
        f"1 of {n} groups have rewards that differ; waiting for more" for n in (10, 20, 40)
    ]


def test_where_all_fail_as_often_as_there_are_tasks_the_run_ends(tmp_path):
    failed = [Group(i, [rollout(None, failure="reward: boom")] * 2) for i in range(200)]
    with pytest.raises(ConfigError, match=r"all rollouts of 160 groups .*; 320 x reward: boom"):
        gather(failed, tmp_path)


def test_a_rollout_that_drew_nothing_is_not_old():
    made = Group(0, [Rollout(Task("t", ()), reward=0.0), Rollout(Task("t", ()), reward=1.0)])
    assert verdict(CONFIG, made, 3) == "good"
