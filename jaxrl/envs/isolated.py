"""An environment's replies and rewards, in processes of their own.

What is run there is the user's: it may raise, hang, or take the process with it. Each of these is
an `Outcome` with a reason, and the next call finds another process.
"""

import atexit
import contextlib
import json
import queue
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Literal

from jaxrl.envs.messages import line_of
from jaxrl.envs.process import EnvironmentProcess, Outcome, packed
from jaxrl.envs.protocol import Message, Task


class Isolated:
    """`reply` and `score` of the environment `name` with `options`, run by `workers` processes, at
    most `timeout_s` seconds each. Use as a context manager.

    make_s: seconds for making the environment, which each process does before its first call: it
    may load data, or a model.
    """

    def __init__(
        self,
        name: str,
        options: Mapping[str, Any],
        *,
        workers: int = 1,
        timeout_s: float = 30.0,
        make_s: float = 600.0,
    ):
        self._calls: queue.SimpleQueue[tuple[bytes, Future[Outcome]] | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        made_by = (name, json.dumps(dict(options)))
        limits: Any = {"make_s": make_s, "timeout_s": timeout_s, "closing": self._closing}
        self._threads = [
            threading.Thread(
                target=self._work,
                args=(EnvironmentProcess(*made_by, **limits),),
                name="environment",
                daemon=True,
            )
            for _ in range(workers)
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)  # or Python would wait for the processes

    def __enter__(self) -> "Isolated":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End the processes; what nobody has answered yet nobody will."""
        atexit.unregister(self.close)
        self._closing.set()
        with contextlib.suppress(queue.Empty):
            while True:
                self._calls.get_nowait()
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join()

    def reply(self, task: Task, messages: Sequence[Message]) -> "Future[Outcome]":
        """The future of an `Outcome`; it never raises."""
        return self._call("reply", task, messages)

    def score(self, task: Task, messages: Sequence[Message]) -> "Future[Outcome]":
        return self._call("score", task, messages)

    def _call(self, what: Literal["reply", "score"], task: Task, messages) -> "Future[Outcome]":
        told: Future[Outcome] = Future()
        try:
            self._calls.put((packed(what, task, messages), told))
        except Exception as error:  # of any kind: what a task has in `info` is the user's
            told.set_result(Outcome(failure=f"the task cannot be sent: {line_of(error)}"))
        return told

    def _work(self, process: EnvironmentProcess) -> None:
        while (call := self._calls.get()) is not None:
            asked, told = call
            try:
                told.set_result(process.ask(asked))
            except Exception as error:  # such as no memory for another process
                told.set_result(Outcome(failure=line_of(error)))
        process.end()
