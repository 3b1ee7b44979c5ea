"""A run that is told to stop finishes its step first."""

import signal
from types import FrameType
from typing import Any


class StopSignals:
    """While the block runs, SIGTERM and SIGINT set `requested`, the first time; the second time
    they do what they did before (Ctrl-C raises KeyboardInterrupt). For the main thread."""

    def __init__(self):
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *_) -> None:
        self._restore()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            # None: a handler that was not installed from Python, and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
