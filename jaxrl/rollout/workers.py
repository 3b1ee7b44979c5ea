"""Rollouts drawn by other processes, some of which may die."""

import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, Protocol

from jaxrl.cli import HostLostError
from jaxrl.rollout.handover import Handover
from jaxrl.rollout.requests import Completion, Request, Sampling

PROBE_S = 5.0  # between two looks at whether a worker has come back


class WorkerLost(Exception):
    """A worker does not answer, or answers that it cannot: another one may."""


class WorkerBusy(Exception):
    """A worker has as much to do as it takes."""


@dataclasses.dataclass(frozen=True)
class Drawn:
    """One completion: tokens (with the one that ended it), log-probs, text, and why it ended."""

    tokens: list[int]
    logprobs: list[float]
    text: str
    finish: str


class Worker(Protocol):
    """One process that draws. Both methods raise WorkerLost where it is lost, WorkerBusy where it
    is to be asked later, and ConfigError where it refuses what it is asked; they are called from
    several threads at once."""

    name: str

    def complete(self, prompt: Sequence[int], sampling: Sampling) -> list[Drawn]:
        """`sampling.n` completions."""
        ...

    def update(self, folder: Path, version: int) -> None:
        """Draw with the weights in this folder from now on."""
        ...


@dataclasses.dataclass
class _Place:
    """What is known of a worker. version: of the weights it was told to draw with."""

    worker: Worker
    open: int = 0
    version: int = -1
    lost_at: float | None = None


class WorkerPool:
    """An engine (`collector.Generates`) made of workers.

    A request goes to the worker with the fewest open completions. What a lost worker was asked is
    asked of another one; a worker that answers again is given the newest weights first. Where none
    answers for `patience_s` seconds, `step` raises HostLostError. concurrency: requests in flight.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        handover: Handover,
        *,
        say: Callable[[str], None],
        concurrency: int = 256,
        patience_s: float = 300.0,
    ):
        self.handover, self.patience_s, self._say = handover, patience_s, say
        self.version = 0
        self._folder: Path | None = None
        self._places = [_Place(worker) for worker in workers]
        self._changed = threading.Condition()
        self._pool = futures.ThreadPoolExecutor(concurrency, "rollouts")
        self._ids = itertools.count()
        self._open: dict[futures.Future, Request] = {}
        self._ended = False

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *_) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._pool.shutdown(wait=False, cancel_futures=True)

    @property
    def busy(self) -> bool:
        return bool(self._open)

    def prepare(self, weights: Any, version: int) -> Path:
        """The weights in a folder, for `set_weights`."""
        return self.handover.write(weights, version)

    def set_weights(self, weights: Any, version: int) -> None:
        """Of parameters, or of a folder; returns when all workers have them, lost ones aside."""
        folder = weights if isinstance(weights, Path) else self.prepare(weights, version)
        with self._changed:
            self._folder, self.version = folder, version
            there = [place for place in self._places if place.lost_at is None]
        with futures.ThreadPoolExecutor(len(self._places)) as pool:
            list(pool.map(self._update, there))

    def submit(self, prompt: Sequence[int], sampling: Sampling | None = None) -> Request:
        sampling = sampling or Sampling()
        completions = [Completion(index) for index in range(sampling.n)]
        request = Request(next(self._ids), tuple(prompt), sampling, completions)
        self._open[self._pool.submit(self._draw, request)] = request
        return request

    def step(self) -> list[Completion]:
        """Wait a moment for completions, and take up those that are finished."""
        done, _ = futures.wait(self._open, 0.2, futures.FIRST_COMPLETED)
        grown = []
        for future in done:
            request = self._open.pop(future)
            version, drawn = future.result()
            for completion, one in zip(request.completions, drawn, strict=True):
                completion.tokens += one.tokens
                completion.logprobs += one.logprobs
                completion.versions += [version] * len(one.tokens)
                completion.text, completion.safe = one.text, len(one.text)
                completion.finish = one.finish
                grown.append(completion)
        return grown

    # In the threads of requests.

    def _draw(self, request: Request) -> tuple[int, list[Drawn]]:
        """(the version of the oldest weights that may have drawn them, completions)."""
        while True:
            place = self._take(request.sampling.n)
            version = place.version
            try:
                return version, place.worker.complete(request.prompt, request.sampling)
            except WorkerBusy:
                time.sleep(0.1)
            except WorkerLost as error:
                self._lose(place, error)
            finally:
                with self._changed:
                    place.open -= request.sampling.n
                    self._changed.notify_all()

    def _take(self, count: int) -> _Place:
        """The least busy worker that is there, waiting for one where there is none."""
        deadline = time.monotonic() + self.patience_s
        while True:
            with self._changed:
                there = [place for place in self._places if place.lost_at is None]
                if there:
                    place = min(there, key=lambda place: place.open)
                    place.open += count
                    return place
                if self._ended or time.monotonic() > deadline:
                    names = ", ".join(place.worker.name for place in self._places)
                    raise HostLostError(f"none of the rollout workers answers: {names}")
                self._changed.wait(0.5)
            self._revive()

    def _lose(self, place: _Place, error: WorkerLost) -> None:
        with self._changed:
            known = place.lost_at is not None
            place.lost_at = time.monotonic()
        if not known:
            self._say(
                f"rollout worker {place.worker.name} is lost: {error}; its tasks go to others"
            )

    def _revive(self) -> None:
        """Look whether lost workers have come back."""
        now = time.monotonic()
        with self._changed:
            due = [p for p in self._places if p.lost_at is not None and now > p.lost_at + PROBE_S]
            for place in due:
                place.lost_at = now  # nobody else looks meanwhile
        for place in due:
            self._update(place)

    def _update(self, place: _Place) -> None:
        folder, version = self._folder, self.version
        assert folder is not None
        try:
            place.worker.update(folder, version)
        except WorkerLost as error:
            self._lose(place, error)
            return
        with self._changed:
            if place.lost_at is not None:
                self._say(f"rollout worker {place.worker.name} is back")
            place.version, place.lost_at = version, None
            self._changed.notify_all()
