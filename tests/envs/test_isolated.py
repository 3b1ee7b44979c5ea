"""Replies and rewards that fail in every way there is, each of them counted and none felt."""

import os
import sys
import time

import pytest

from jaxrl.envs.isolated import Isolated
from jaxrl.envs.protocol import Task

WAYS = {
    "good": ("0.5", {"reward": 0.5}),
    "figures": ('{"reward": 1, "length": 3}', {"reward": 1.0, "length": 3.0}),
    "yes": ("True", {"reward": 1.0}),
    "raises": ("1 / 0", "ZeroDivisionError: division by zero"),
    "nan": ("float('nan')", "ValueError: reward is nan, no finite number"),
    "none": ("None", "ValueError: reward is None, no finite number"),
    "text": ("'much'", "ValueError: reward is 'much', no finite number"),
    "no reward": ("{'length': 3}", "ValueError: the score has no reward, only length"),
    "bad figure": ("{'reward': 1, 'x': None}", "ValueError: x is None, no finite number"),
    "exits": ("os._exit(3)", "crash"),
    "leaves": ("sys.exit(0)", "SystemExit: 0"),
    "hangs": ("time.sleep(3600)", "timeout"),
}


class Evaluating:
    """Its reward is what the model's turn evaluates to."""

    def __init__(self, broken: bool = False):
        if broken:
            raise OSError("no such data")

    def __len__(self):
        return 1

    def reply(self, task, messages):
        return [{"role": "user", "content": messages[-1]["content"] + "?"}]

    def score(self, task, messages):
        return eval(messages[-1]["content"], {"os": os, "sys": sys, "time": time})


TASK = Task("a", ({"role": "user", "content": "say"},))


def turn(text):
    return [*TASK.messages, {"role": "assistant", "content": text}]


@pytest.fixture(scope="module")
def isolated():
    with Isolated("test_isolated:Evaluating", {}, workers=2, timeout_s=3.0) as made:
        yield made


def test_every_failure_has_its_reason_and_the_others_their_reward(isolated):
    asked = {way: isolated.score(TASK, turn(text)) for way, (text, _) in WAYS.items()}
    after = isolated.score(TASK, turn("0.25"))
    for way, (_, wanted) in WAYS.items():
        outcome = asked[way].result(timeout=60)
        found = outcome.failure if isinstance(wanted, str) else outcome.value
        assert found == wanted, way
    assert after.result(timeout=60).value == {"reward": 0.25}


def test_replies(isolated):
    replied = isolated.reply(TASK, turn("well")).result(timeout=60)
    assert replied.value == [{"role": "user", "content": "well?"}]


def test_an_environment_that_cannot_be_made_there_is_a_failure():
    with Isolated("test_isolated:Evaluating", {"broken": True}) as made:
        assert made.score(TASK, turn("1")).result(timeout=60).failure == "OSError: no such data"
