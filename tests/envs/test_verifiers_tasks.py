"""Tasksets of `verifiers`: tasks, rewards by weight, and what is refused."""

import json

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


def call(name, **arguments):
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def test_tools_are_called_as_turns_ask_for_them_and_keep_the_rollouts_state():
    env = make_environment("verifiers", {"taskset": "tiny-taskset", "config": {"needs": "tools"}})
    task = env.task(3)
    add, peek = (tool["function"] for tool in task.tools)
    assert add["name"] == "sum_tools_add" and add["description"] == "The sum of two numbers."
    assert add["parameters"]["required"] == ["a"] and peek["name"] == "sum_tools_peek"

    first = said(task, "So " + call("sum_tools_add", a=3) + call("sum_tools_peek"))
    replies = env.reply(task, first)
    assert replies == [
        {"role": "tool", "name": "sum_tools_add", "content": "4, use 1"},
        {"role": "tool", "name": "sum_tools_peek", "content": "4"},
    ]
    again = [*first, *replies, {"role": "assistant", "content": call("sum_tools_add", a=1, b=5)}]
    (reply,) = env.reply(task, again)
    assert reply["content"] == "6, use 2"
    ended = [*again, reply, {"role": "assistant", "content": "4"}]
    assert env.reply(task, ended) == ()
    figures = env.score(task, ended)
    assert figures == {"reward": 1.0, "reward/right": 1.0, "uses": 2.0, "answers": 3.0}
    # A call that nobody answered any more has not happened.
    assert env.score(task, again)["uses"] == 1.0

    wrong = said(task, call("sum_tools_add", a="x"))
    assert "valid integer" in env.reply(task, wrong)[0]["content"]
    assert env.reply(task, said(task, call("other_add", a=1))) == ()


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
        ({"taskset": "tiny-taskset", "config": {"needs": "server"}}, "needs a server of tools; ja"),
        ({"taskset": "tiny-taskset", "config": {"needs": "broken"}}, "cannot be set up: no index"),
    ],
)
def test_what_cannot_be_answered_is_refused(options, problem):
    with pytest.raises(ConfigError, match=problem) as error:
        make_environment("verifiers", options)
    assert "\n" not in str(error.value)
