"""Replies and rewards that fail in every way there is, each of them counted and none felt."""

import json
import multiprocessing
import os
import pathlib
import select
import subprocess
import sys
import threading
import time

import pytest

from jaxrl.envs.isolated import Isolated
from jaxrl.envs.process import EnvironmentProcess, packed
from jaxrl.envs.protocol import Task, last_turn

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
    "half a character": ("sys.exit(chr(0xd800))", "SystemExit: ?"),
    "bad name": ("{'reward': 1, chr(0xd800): 1}", "UnicodeEncodeError: 'utf-8' codec can't encode"),
    "hangs": ("time.sleep(3600)", "timeout"),
}


# What a reply is, and what is to be known of it.
REPLIES = {
    "none": ("[]", []),
    "one": ("({'role': 'user', 'content': 'why?', 'n': 1},)", "why?"),
    "calls": ("[{'role': 'assistant', 'tool_calls': [{'name': 'now'}]}]", None),
    "nothing": ("None", "TypeError: 'NoneType' object is not iterable"),
    "text": ("['why?']", "TypeError: message 0 is 'why?', no mapping"),
    "no role": ("[{}]", "ValueError: message 0 has the role None, no text"),
    "no content": ("[{'role': 'user'}]", "ValueError: message 0 has the content None, no text"),
    "parts": ("[{'role': 'user', 'content': []}]", "ValueError: message 0 has the content [], no"),
    "nan": ("[{'role': 'user', 'content': '', 'n': float('nan')}]", "ValueError: Out of range"),
    "object": ("[{'role': 'user', 'content': '', 'n': Shut()}]", "TypeError: Object of type Shut"),
    "half": ("[{'role': 'user', 'content': chr(0xd800)}]", "UnicodeEncodeError: 'utf-8' codec"),
}


class Shut:
    """Can be pickled, but not be read again."""

    def __reduce__(self):
        return int, ("x",)


SCOPE = {m.__name__: m for m in (os, pathlib, subprocess, sys, threading, time)} | {"Shut": Shut}


class Evaluating:
    """Its replies and rewards are what the model's turn evaluates to. made: a statement for when it
    is made."""

    def __init__(self, made: str = ""):
        exec(made, SCOPE)

    def __len__(self):
        return 1

    def reply(self, task, messages):
        return eval(last_turn(messages), SCOPE)

    def score(self, task, messages):
        return eval(last_turn(messages), SCOPE)


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
        if isinstance(wanted, str):
            assert outcome.failure and outcome.failure.startswith(wanted), way
        else:
            assert outcome.value == wanted, way
    assert after.result(timeout=60).value == {"reward": 0.25}


def test_replies_are_messages_that_can_be_written_down(isolated):
    asked = {way: isolated.reply(TASK, turn(text)) for way, (text, _) in REPLIES.items()}
    found = {way: future.result(timeout=60) for way, future in asked.items()}
    values = {way: found.pop(way).value for way in ("none", "one", "calls")}
    assert values["none"] == [] and values["one"][0] == {"role": "user", "content": "why?", "n": 1}
    assert values["calls"][0]["content"] is None  # which templates look for
    for way, outcome in found.items():
        assert outcome.failure and outcome.failure.startswith(REPLIES[way][1]), way


def test_a_task_that_cannot_be_sent_is_a_failure(isolated):
    task = Task("a", TASK.messages, {"check": lambda: 1})
    assert isolated.score(task, turn("1")).result().failure.startswith("the task cannot be sent: ")


def kill_all():
    """The processes, while they have nothing to do."""
    for process in (found := multiprocessing.active_children()):
        process.kill()
        process.join()
    return len(found)


def test_one_that_ends_while_it_is_idle_is_no_failure(isolated):
    assert isolated.score(TASK, turn("1")).result(timeout=60).value
    assert kill_all()
    asked = [isolated.score(TASK, turn("0.5")) for _ in range(4)]
    assert [one.result(timeout=60).value for one in asked] == [{"reward": 0.5}] * 4


@pytest.mark.parametrize(
    ("made", "failure"),
    [
        ("raise OSError('no such data')", "OSError: no such data"),
        ("os._exit(1)", "crash"),
        ("sys.exit(1)", "SystemExit: 1"),
        ("time.sleep(3600)", "timeout after 0.1 s"),
    ],
)
def test_an_environment_that_cannot_be_made_there_is_a_failure(made, failure):
    limit = 0.1 if "sleep" in made else 600.0
    with Isolated("test_isolated:Evaluating", {"made": made}, make_s=limit) as isolated:
        found = isolated.score(TASK, turn("1")).result(timeout=60).failure
    assert found == f"making the environment: {failure}"


class Waited(EnvironmentProcess):
    """Notes how long it would wait."""

    def _hear(self, seconds):
        self.waits = [*getattr(self, "waits", ()), seconds]
        return super()._hear(seconds)


def test_making_it_has_its_own_time_and_happens_once_in_a_process(tmp_path):
    file = tmp_path / "made"
    options = {"made": f"pathlib.Path({str(file)!r}).open('a').write('made ')"}
    process = Waited(
        "test_isolated:Evaluating",
        json.dumps(options),
        make_s=50.0,
        timeout_s=20.0,
        closing=threading.Event(),
    )
    try:
        for _ in range(2):
            assert process.ask(packed("score", TASK, turn("1"))).value == {"reward": 1.0}
    finally:
        process.end()
    assert process.waits == [50.0, 20.0, 20.0, 20.0, 20.0]
    assert pathlib.Path(file).read_text() == "made "


def test_closing_ends_what_still_runs(tmp_path):
    os.mkfifo(tmp_path / "begun")
    begun = f"open({str(tmp_path / 'begun')!r}, 'w').close()"
    with Isolated("test_isolated:Evaluating", {}, timeout_s=3600) as made:
        before = set(multiprocessing.active_children())
        hangs = made.score(TASK, turn(f"{begun} or time.sleep(3600)"))
        waits = made.score(TASK, turn("1"))
        (tmp_path / "begun").read_text()  # until it runs
        (process,) = set(multiprocessing.active_children()) - before
    assert hangs.result(timeout=0).failure == "crash" and waits.cancel()
    assert not process.is_alive()


def fifo(path) -> int:
    """The end to read of a new one; nobody writes yet."""
    os.mkfifo(path)
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK)


def next_of(end: int) -> bytes:
    """A byte, or nothing once all who may write are gone."""
    assert select.select([end], [], [], 60)[0], "nobody writes, and somebody still may"
    return os.read(end, 1)


def holds(path) -> str:
    """A program that writes a byte there, and goes on with nothing."""
    return f"import os, time; os.write(os.open({str(path)!r}, os.O_WRONLY), b'x'); time.sleep(3600)"


@pytest.mark.parametrize("hangs", [True, False])
def test_what_a_reward_has_started_ends_with_it(tmp_path, hangs):
    held = fifo(tmp_path / "held")
    os.mkfifo(tmp_path / "go")
    started = f"subprocess.Popen([sys.executable, '-c', {holds(tmp_path / 'held')!r}])"
    text = f"({started}, open({str(tmp_path / 'go')!r}).read(), os._exit(1))"
    if hangs:
        text = f"{started}.wait()"
    with Isolated("test_isolated:Evaluating", {}, timeout_s=6.0 if hangs else 60.0) as isolated:
        asked = isolated.score(TASK, turn(text))
        assert next_of(held) == b"x"
        if not hangs:
            os.close(os.open(tmp_path / "go", os.O_WRONLY))
        assert asked.result(timeout=60).failure == ("timeout" if hangs else "crash")
        assert next_of(held) == b""
    os.close(held)


TRAINER = """
import sys
from jaxrl.envs.isolated import Isolated
from test_isolated import TASK, turn
if __name__ == "__main__":
    with Isolated("test_isolated:Evaluating", {}, timeout_s=3600) as isolated:
        isolated.score(TASK, turn(sys.argv[1])).result()
"""


def test_a_reward_that_hangs_ends_with_the_trainer(tmp_path):
    held = fifo(tmp_path / "held")
    (tmp_path / "trainer.py").write_text(TRAINER)
    path = os.pathsep.join([str(pathlib.Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    trainer = subprocess.Popen(
        [sys.executable, str(tmp_path / "trainer.py"), f"exec({holds(tmp_path / 'held')!r})"],
        env=os.environ | {"PYTHONPATH": path},
    )
    assert next_of(held) == b"x"
    trainer.kill()
    trainer.wait()
    assert next_of(held) == b""
    os.close(held)
