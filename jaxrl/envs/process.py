"""A process that replies and scores, from both of its ends.

It says when it has made the environment, when it has taken up what it was asked, and what came of
it: so one that ends between two rollouts is told from one that a rollout ends.
"""

import contextlib
import dataclasses
import json
import math
import multiprocessing
import numbers
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

from jaxrl.envs.messages import checked_messages, json_bytes, line_of
from jaxrl.envs.protocol import Environment, make_environment

# A fork of a process with JAX's threads may hang.
_CONTEXT = multiprocessing.get_context("spawn")
_LOOK_S = 0.1  # between two looks at whether it is still there
_END_S = 3.0  # to end when told to


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a call gave: a reply's messages, or a score's {"reward": ..., ...}; else why it failed:
    "timeout", "crash", or what was raised, in a line."""

    value: Any = None
    failure: str | None = None


class EnvironmentProcess:
    """Started when there is something to ask, and again where it has ended. For one thread.

    make_s, timeout_s: seconds for making the environment, and for each answer. closing: when it is
    set, nothing is waited for any more.
    """

    def __init__(
        self,
        name: str,
        options: str,
        *,
        make_s: float,
        timeout_s: float,
        closing: threading.Event,
    ):
        self._made_by, self._closing = (name, options), closing
        self._make_s, self._timeout_s = make_s, timeout_s
        self._open: tuple[Any, Connection] | None = None  # the process, and the pipe to it

    def ask(self, asked: bytes) -> Outcome:
        """`asked`: what `packed` gives."""
        try:
            if not self._takes(asked):
                # It ended while it had nothing to do: for that no rollout is to blame.
                self.end()
                if not self._takes(asked):
                    raise EOFError
            return Outcome(**self._hear(self._timeout_s))
        except _NotMade as error:
            failure = f"making the environment: {error}"
        except TimeoutError:
            failure = "timeout"
        except EOFError:
            failure = "crash"
        self.end(just_ended=True)
        return Outcome(failure=failure)

    def end(self, *, just_ended: bool = False) -> None:
        """End the process, and all that it has started; what is asked next has another one.
        just_ended: it may have, now; of one that did long ago the number may be another's."""
        if self._open is not None:
            (process, pipe), self._open = self._open, None
            pipe.close()
            with_others = just_ended or process.is_alive()
            process.terminate()
            process.join(_END_S)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if with_others:
                    os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join(_END_S)

    def _takes(self, asked: bytes) -> bool:
        """Whether it has taken that up; it is started first if need be."""
        pipe = self._start() if self._open is None else self._open[1]
        try:
            pipe.send_bytes(asked)
            self._hear(self._timeout_s)
        except TimeoutError:
            raise
        except (EOFError, OSError):
            return False
        return True

    def _start(self) -> Connection:
        pipe, theirs = _CONTEXT.Pipe()
        process = _CONTEXT.Process(target=_serve, args=(theirs, *self._made_by), name="environment")
        process.start()
        theirs.close()
        self._open = process, pipe
        try:
            failure = self._hear(self._make_s)
        except TimeoutError:
            failure = f"timeout after {self._make_s:g} s"
        except EOFError:
            failure = "crash"
        if failure:
            raise _NotMade(failure)
        return pipe

    def _hear(self, seconds: float) -> Any:
        """What it says next. Raises TimeoutError, or EOFError where it ends first."""
        assert self._open is not None
        process, pipe = self._open
        end = time.monotonic() + seconds
        # Not until the pipe ends alone: processes that it has started may hold that open.
        while not pipe.poll(max(0.0, min(_LOOK_S, end - time.monotonic()))):
            if self._closing.is_set() or not (process.is_alive() or pipe.poll()):
                raise EOFError
            if time.monotonic() >= end:
                raise TimeoutError
        try:
            return json.loads(pipe.recv_bytes())
        except OSError:
            raise EOFError from None


class _NotMade(Exception):
    """The environment; why, in a line."""


def packed(what: str, task: Any, messages: Any) -> bytes:
    """A call of the method `what`. Raises what pickle does."""
    return pickle.dumps((what, task, list(messages)))


def _serve(pipe: Connection, name: str, options: str) -> None:
    """What the process does, until the other end of the pipe is closed."""
    os.setsid()  # it ends with all that it starts, and with who started it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer's to take
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    failure = environment = None
    try:
        environment = make_environment(name, json.loads(options))
    except BaseException as error:  # sys.exit, too, is to be told
        failure = line_of(error)
    with contextlib.suppress(EOFError, OSError):
        pipe.send_bytes(json_bytes(failure))
        while environment is not None:
            asked = pipe.recv_bytes()
            pipe.send_bytes(json_bytes("taken up"))
            pipe.send_bytes(_answer(environment, asked))


def _end_with_parent() -> None:
    """What ends the trainer's processes does not reach this one's session."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os.killpg(0, signal.SIGKILL)


def _answer(environment: Environment, asked: bytes) -> bytes:
    """The fields of an `Outcome`."""
    try:
        what, task, messages = pickle.loads(asked)
        if what == "reply":
            return json_bytes({"value": checked_messages(environment.reply(task, messages))})
        return json_bytes({"value": _figures(environment.score(task, messages))})
    except BaseException as error:  # sys.exit, too, is no reason to end the process
        return json_bytes({"failure": line_of(error)})


def _figures(score: Any) -> dict[str, float]:
    """A score as {"reward": ..., ...}. Raises ValueError for anything but finite numbers."""
    found = dict(score) if isinstance(score, Mapping) else {"reward": score}
    if "reward" not in found:
        raise ValueError(f"the score has no reward, only {', '.join(map(str, found))}")
    for key, value in found.items():
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise ValueError(f"{key} is {value!r}, no finite number")
    return {str(key): float(value) for key, value in found.items()}
