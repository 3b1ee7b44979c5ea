"""Rollouts drawn by other processes, some of which may die."""

import asyncio
import contextlib
import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, Protocol

from jaxrl.cli import HostLostError
from jaxrl.options import ConfigError
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
    is to be asked later, and ConfigError where it refuses what it is asked."""

    name: str

    async def complete(self, prompt: Sequence[int], sampling: Sampling) -> list[Drawn]:
        """`sampling.n` completions."""
        ...

    async def update(self, folder: Path, version: int) -> None:
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
    """An engine (`collector.Generates`) made of workers. Use as a context manager: what is in
    flight at its end is given up.

    A request goes to the worker with the fewest open completions. What a lost worker was asked is
    asked of another one; a worker that answers again is given the newest weights first. Where none
    answers for `patience_s` seconds, `step` raises HostLostError.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        handover: Handover,
        *,
        say: Callable[[str], None],
        patience_s: float = 300.0,
    ):
        self.handover, self.patience_s, self._say = handover, patience_s, say
        self.version = 0
        self._folder = Path()
        self._places = [_Place(worker) for worker in workers]
        self._ids = itertools.count()
        self._open: dict[futures.Future, Request] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="workers", daemon=True)
        self._watch: futures.Future | None = None

    def __enter__(self) -> "WorkerPool":
        self._thread.start()
        self._watch = self._run(self._look_after_lost())
        return self

    def __exit__(self, *_) -> None:
        self._run(self._end()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def busy(self) -> bool:
        return bool(self._open)

    def prepare(self, weights: Any, version: int) -> Path:
        """The weights in a folder, for `set_weights`."""
        return self.handover.write(weights, version)

    def set_weights(self, weights: Any, version: int) -> None:
        """Of parameters, or of a folder; returns when all workers have them, lost ones aside."""
        folder = weights if isinstance(weights, Path) else self.prepare(weights, version)
        self._run(self._update_all(folder, version)).result()

    def submit(self, prompt: Sequence[int], sampling: Sampling | None = None) -> Request:
        sampling = sampling or Sampling()
        completions = [Completion(index) for index in range(sampling.n)]
        request = Request(next(self._ids), tuple(prompt), sampling, completions)
        self._open[self._run(self._draw(request))] = request
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

    def _run[T](self, what: Coroutine[Any, Any, T]) -> "futures.Future[T]":
        return asyncio.run_coroutine_threadsafe(what, self._loop)

    # In the loop's thread.

    async def _draw(self, request: Request) -> tuple[int, list[Drawn]]:
        """(the version of the oldest weights that may have drawn them, completions)."""
        while True:
            place = await self._least_busy()
            version = place.version
            place.open += request.sampling.n
            try:
                return version, await place.worker.complete(request.prompt, request.sampling)
            except WorkerBusy:
                await asyncio.sleep(0.1)
            except WorkerLost as error:
                self._lose(place, error)
            finally:
                place.open -= request.sampling.n

    async def _least_busy(self) -> _Place:
        """Of the workers that are there; waits for one where there is none."""
        deadline = time.monotonic() + self.patience_s
        while not (there := [place for place in self._places if place.lost_at is None]):
            if time.monotonic() > deadline:
                names = ", ".join(place.worker.name for place in self._places)
                raise HostLostError(f"none of the rollout workers answers: {names}")
            await asyncio.sleep(0.05)
        return min(there, key=lambda place: place.open)

    def _lose(self, place: _Place, error: Exception) -> None:
        if place.lost_at is None:
            self._say(
                f"rollout worker {place.worker.name} is lost: {error}; its tasks go to others"
            )
        place.lost_at = time.monotonic()

    async def _look_after_lost(self) -> None:
        """Ask lost workers, now and then, whether they take weights again."""
        while True:
            await asyncio.sleep(min(PROBE_S, 0.5))
            due = time.monotonic() - PROBE_S
            lost = [p for p in self._places if p.lost_at is not None and p.lost_at <= due]
            await asyncio.gather(*map(self._update, lost))

    async def _update_all(self, folder: Path, version: int) -> None:
        self._folder, self.version = folder, version
        await asyncio.gather(*(self._update(p) for p in self._places if p.lost_at is None))

    async def _update(self, place: _Place) -> None:
        folder, version = self._folder, self.version
        try:
            await place.worker.update(folder, version)
        except (WorkerLost, WorkerBusy, ConfigError) as error:
            if isinstance(error, ConfigError) and place.lost_at is None:
                raise  # one that has come back as another model's server stays lost
            self._lose(place, error)
            return
        if place.lost_at is not None:
            self._say(f"rollout worker {place.worker.name} is back")
        place.version, place.lost_at = version, None

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        for task in others:
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task
