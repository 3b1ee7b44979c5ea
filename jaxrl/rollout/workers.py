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
ATTEMPTS = 4  # at a request: it may be what workers are lost by


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
    """What is known of a worker. version: of the weights it was told to draw with; loading: of
    those that it is being told of. failed: whether it has since any worker answered."""

    worker: Worker
    open: int = 0
    version: int = -1
    loading: int | None = None
    lost_at: float | None = None
    failed: bool = False


class Silence:
    """How long requests have failed, none of them answered. Time without requests counts not."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._asked = clock, 0
        self._since: float | None = None  # the first failure
        self._idle_since = 0.0

    def begin(self) -> None:
        """A request begins."""
        if not self._asked and self._since is not None:
            self._since += self._clock() - self._idle_since
        self._asked += 1

    def end(self) -> None:
        self._asked -= 1
        self._idle_since = self._clock()

    def answered(self) -> None:
        self._since = None

    def failed(self) -> float:
        """Seconds since the first of the failures in a row, of which this is one."""
        now = self._clock()
        self._since = now if self._since is None else self._since
        return now - self._since


class WorkerPool:
    """An engine (`collector.Generates`) made of workers. Use as a context manager: what is in
    flight at its end is given up.

    A request goes to the worker with the fewest open completions. What a lost worker was asked is
    asked of another one, `ATTEMPTS` times: then its completions end as "abort", with a failure. A
    worker that takes weights again is given the newest first. Where none answers a request for
    `patience_s` seconds, `step` raises HostLostError, whatever weights they take.
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
        self._folder, self._problem = Path(), "all are busy"
        self._places = [_Place(worker) for worker in workers]
        self._silence, self._ids = Silence(), itertools.count()
        self._open: dict[futures.Future[tuple[int, list[Drawn]] | str], Request] = {}
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
        """The weights in a folder, for `set_weights`. May be called while workers read others, and
        before those of earlier calls are set: all of these folders stay."""
        reading = [n for place in self._places if (n := place.loading) is not None]
        return self.handover.write(weights, version, min([self.version, *reading]))

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
            found = future.result()
            if isinstance(found, str):
                for completion in request.completions:
                    completion.finish, completion.failure = "abort", found
                grown += request.completions
                continue
            version, drawn = found
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

    async def _draw(self, request: Request) -> tuple[int, list[Drawn]] | str:
        """(the version of the oldest weights that may have drawn them, completions), or why there
        are none."""
        self._silence.begin()
        try:
            failures = []
            while len(failures) < ATTEMPTS:
                place = await self._least_busy()
                try:
                    return await self._draw_at(place, request)
                except WorkerBusy:
                    self._count_failure(place)
                    await asyncio.sleep(0.1)
                except WorkerLost as error:
                    self._lose(place, error)
                    self._count_failure(place)
                    failures.append(f"{place.worker.name}: {error}")
            return f"given up after {ATTEMPTS} attempts, the last at {failures[-1]}"
        finally:
            self._silence.end()

    async def _draw_at(self, place: _Place, request: Request) -> tuple[int, list[Drawn]]:
        version = place.version
        place.open += request.sampling.n
        try:
            drawn = await place.worker.complete(request.prompt, request.sampling)
        finally:
            place.open -= request.sampling.n
        self._silence.answered()
        for other in self._places:
            other.failed = False
        return version, drawn

    async def _least_busy(self) -> _Place:
        """Of the workers that are there; waits for one where there is none."""
        while not (there := [place for place in self._places if place.lost_at is None]):
            self._count_failure()
            await asyncio.sleep(0.05)
        return min(there, key=lambda place: place.open)

    def _count_failure(self, place: _Place | None = None) -> None:
        """Raises HostLostError where all have failed for long: one that has not may still draw."""
        if place is not None:
            place.failed = True
        late = self._silence.failed() > self.patience_s
        if late and all(p.failed or p.lost_at is not None for p in self._places):
            names = ", ".join(p.worker.name for p in self._places)
            raise HostLostError(
                f"none of the rollout workers answers: {names}; the last problem: {self._problem}"
            )

    def _lose(self, place: _Place, error: Exception) -> None:
        self._problem = f"{place.worker.name}: {error}"
        if place.lost_at is None:
            self._say(
                f"rollout worker {place.worker.name} is lost: {error}; its tasks go to others"
            )
        place.lost_at = time.monotonic()

    async def _look_after_lost(self) -> None:
        """Ask lost workers, now and then, whether they take weights again; each by itself, as one
        that hangs is long about it."""
        asking: dict[int, asyncio.Task[None]] = {}
        while True:
            await asyncio.sleep(min(PROBE_S, 0.5))
            due = time.monotonic() - PROBE_S
            for number, place in enumerate(self._places):
                lost = place.lost_at is not None and place.lost_at <= due
                if (
                    lost
                    and place.loading is None
                    and (number not in asking or asking[number].done())
                ):
                    asking[number] = asyncio.create_task(self._update(place))

    async def _update_all(self, folder: Path, version: int) -> None:
        self._folder, self.version = folder, version
        await asyncio.gather(*(self._update(p) for p in self._places if p.lost_at is None))

    async def _update(self, place: _Place) -> None:
        """Until it has the newest: others may come while it loads."""
        version = None
        while version != self.version:
            folder, version = self._folder, self.version
            place.loading = version
            try:
                await place.worker.update(folder, version)
            except (WorkerLost, WorkerBusy, ConfigError) as error:
                if isinstance(error, ConfigError) and place.lost_at is None:
                    raise  # one that has come back as another model's server stays lost
                return self._lose(place, error)
            finally:
                place.loading = None
            place.version = version
        if place.lost_at is not None:
            self._say(f"rollout worker {place.worker.name} is back")
            place.lost_at = None

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        for task in others:
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task
