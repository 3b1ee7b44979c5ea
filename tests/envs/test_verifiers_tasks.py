"""Tasksets of `verifiers`: tasks, rewards by weight, and what is refused."""

import pytest

from jaxrl.envs.isolated import Isolated
from jaxrl.envs.protocol import make_environment
from jaxrl.options import ConfigError

pytest.importorskip("verifiers")
OPTIONS = {"taskset": "tiny-taskset", "config": {"high": 6}}


def said(task, text):
    return [*task.messages, {"role": "assistant", "content": text}]


def test_tasks_and_rewards_are_the_tasksets():
    env = make_environment("verifiers", OPTIONS)
    assert len(env) == 6 and len(make_environment("verifiers", OPTIONS | {"count": 2})) == 2
    task = env.task(3)
    assert task.messages == (
        {"role": "system", "content": "Add."},
        {"role": "user", "content": "3 + 1?"},
    )
    assert task.id == "tiny-taskset/3" and env.reply(task, said(task, "4")) == ()
    figures = env.score(task, said(task, "4"))
    assert figures == {"reward": 3.0, "reward/right": 2.0, "reward/short": 1.0, "letters": 1.0}
    assert env.score(task, said(task, "It is 4."))["reward"] == 0.0
    assert env.score(env.task(2), said(env.task(2), "4"))["reward"] == 1.0


def test_they_are_scored_in_another_process():
    env = make_environment("verifiers", OPTIONS)
    with Isolated("verifiers", OPTIONS) as isolated:
        outcome = isolated.score(env.task(1), said(env.task(1), "2")).result()
    assert outcome.value["reward"] == 3.0 and outcome.failure is None


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"taskset": "nothing-there"}, "taskset 'nothing-there' cannot be loaded: .*not found"),
        ({"taskset": "tiny-taskset", "config": {"hgih": 1}}, "cannot be loaded: .*hgih"),
        ({"taskset": "tiny-taskset", "config": {"needs": "runtime"}}, "needs a runtime to be sc"),
        ({"taskset": "tiny-taskset", "config": {"needs": "container"}}, "needs a container; jax"),
    ],
)
def test_what_cannot_be_answered_in_a_turn_is_refused(options, problem):
    with pytest.raises(ConfigError, match=problem) as error:
        make_environment("verifiers", options)
    assert "\n" not in str(error.value)
