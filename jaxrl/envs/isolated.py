"""An environment's replies and rewards, in processes of their own.

What is run there is the user's: it may raise, hang, or take the process with it. Each of these is
an `Outcome` with a reason, and the next call finds another process.
"""

import dataclasses
import functools
import json
import math
import multiprocessing
import numbers
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Literal

import pebble

from jaxrl.envs.protocol import Environment, Message, Task, make_environment


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a call gave: a reply's messages, or a score's {"reward": ..., ...}; else why it failed:
    "timeout", "crash", or what was raised, in a line."""

    value: Any = None
    failure: str | None = None


class Isolated:
    """`reply` and `score` of the environment `name` with `options`, run by `workers` processes, at
    most `timeout_s` seconds each. Use as a context manager."""

    def __init__(
        self, name: str, options: Mapping[str, Any], *, workers: int = 1, timeout_s: float = 30.0
    ):
        self._made_by = (name, json.dumps(dict(options)))
        self._timeout = timeout_s
        # A fork of a process with JAX's threads may hang.
        context: Any = multiprocessing.get_context("spawn")
        self._pool = pebble.ProcessPool(max_workers=workers, context=context)

    def __enter__(self) -> "Isolated":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._pool.stop()
        self._pool.join()

    def reply(self, task: Task, messages: Sequence[Message]) -> "Future[Outcome]":
        """The future of an `Outcome`; it never raises."""
        return self._call("reply", task, messages)

    def score(self, task: Task, messages: Sequence[Message]) -> "Future[Outcome]":
        return self._call("score", task, messages)

    def _call(self, what: Literal["reply", "score"], task: Task, messages) -> "Future[Outcome]":
        asked: Future = self._pool.schedule(
            _run, args=(*self._made_by, what, task, list(messages)), timeout=self._timeout
        )
        told: Future[Outcome] = Future()

        def tell(done: Future) -> None:
            try:
                told.set_result(done.result())
            except TimeoutError:
                told.set_result(Outcome(failure="timeout"))
            except Exception:  # the process ended, or what it gave could not be sent back
                told.set_result(Outcome(failure="crash"))

        asked.add_done_callback(tell)
        return told


@functools.cache
def _environment(name: str, options: str) -> Environment:
    return make_environment(name, json.loads(options))


def _run(name: str, options: str, what: str, task: Task, messages: list) -> Outcome:
    try:
        environment = _environment(name, options)
        if what == "reply":
            return Outcome([dict(message) for message in environment.reply(task, messages)])
        return Outcome(_figures(environment.score(task, messages)))
    except BaseException as error:  # sys.exit, too, is no reason to end the process
        line = " ".join(str(error).split())[:200]
        return Outcome(failure=f"{type(error).__name__}: {line}")


def _figures(score: Any) -> dict[str, float]:
    """A score as {"reward": ..., ...}. Raises ValueError for anything but finite numbers."""
    found = dict(score) if isinstance(score, Mapping) else {"reward": score}
    if "reward" not in found:
        raise ValueError(f"the score has no reward, only {', '.join(map(str, found))}")
    for key, value in found.items():
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise ValueError(f"{key} is {value!r}, no finite number")
    return {str(key): float(value) for key, value in found.items()}
