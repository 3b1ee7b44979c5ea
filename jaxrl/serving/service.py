"""An engine in a thread of its own, asked from an event loop."""

import asyncio
import collections
import contextlib
import dataclasses
import queue
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from jaxrl.rollout.engine import Engine
from jaxrl.rollout.requests import Completion, Request, Sampling


class Busy(Exception):
    """As much waits as may."""


class EngineEnded(RuntimeError):
    """The engine draws no more, and why: one line."""


@dataclasses.dataclass(frozen=True)
class Delta:
    """What has come of one of a request's completions: new tokens, their log-probs, text that no
    stop text takes back any more, and at its end why it ended."""

    index: int
    tokens: Sequence[int]
    logprobs: Sequence[float]
    text: str
    finish: str | None


class Metrics:
    """What /metrics shows."""

    def __init__(self):
        self.registry = registry = CollectorRegistry()
        self.finished = Counter(
            "jaxrl_completions", "Completions by how they ended", ["finish"], registry=registry
        )
        self.prompt_tokens = Counter(
            "jaxrl_prompt_tokens", "Tokens of prompts taken", registry=registry
        )
        self.tokens = Counter("jaxrl_generated_tokens", "Tokens drawn", registry=registry)
        self.refused = Counter("jaxrl_refused_requests", "Told to come again", registry=registry)
        self.running = Gauge("jaxrl_running", "Completions being drawn", registry=registry)
        self.waiting = Gauge("jaxrl_waiting", "Completions that wait", registry=registry)
        self.free_pages = Gauge("jaxrl_free_cache_pages", "Pages of the cache", registry=registry)
        self.version = Gauge("jaxrl_weights_version", "Of the weights", registry=registry)
        self.first_token = Histogram(
            "jaxrl_first_token_seconds", "From request to first token", registry=registry
        )
        self.latency = Histogram(
            "jaxrl_request_seconds", "From request to its last token", registry=registry
        )


class Ticket:
    """A request that the engine works on. `deltas` until it is finished; `close` ends it early."""

    def __init__(self, service: "Service", request: Request, loop: asyncio.AbstractEventLoop):
        self.request, self.came = request, time.monotonic()
        self._service, self._loop = service, loop
        self._deltas: asyncio.Queue[Delta | BaseException] = asyncio.Queue()
        self.sent = [(0, 0)] * len(request.completions)  # (tokens, characters) of each, told
        self.open = len(request.completions)

    async def deltas(self) -> AsyncIterator[Delta]:
        """As they come. Raises EngineEnded where the engine ends before."""
        left = len(self.request.completions)
        while left:
            delta = await self._deltas.get()
            if isinstance(delta, BaseException):
                raise delta
            left -= delta.finish is not None
            yield delta

    @property
    def version(self) -> int:
        """Of the oldest weights that drew it, once it is finished."""
        versions = [version for c in self.request.completions for version in c.versions]
        return min(versions, default=self._service.engine.version)

    def close(self) -> None:
        """Nobody waits for it any more."""
        self._service.close_ticket(self)

    def tell(self, delta: Delta | BaseException) -> None:
        """From the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._deltas.put_nowait, delta)


class Service:
    """Requests to `engine`, which has weights, from any event loop. Use as a context manager.

    max_waiting: completions that wait for a place beyond which `submit` raises `Busy`. An engine
    that fails, and not by what one request asks, fails for good: all that is asked raises
    EngineEnded from then on, `failure` says why, and `on_failure` is called in its thread.
    """

    def __init__(self, engine: Engine, *, max_waiting: int):
        self.engine, self.max_waiting, self.metrics = engine, max_waiting, Metrics()
        self._asked: queue.Queue[Callable[[], None]] = queue.Queue()
        self._tickets: dict[int, Ticket] = {}  # by the id of each open completion
        self._waiting = 0  # completions that were asked for and are not taken yet
        self._lock = threading.Lock()
        self._ends = False
        self._ended: EngineEnded | None = None
        self.failure: str | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def __enter__(self) -> "Service":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._ends = True
        self._asked.put(lambda: None)
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self.failure is None

    async def submit(self, prompt: Sequence[int], sampling: Sampling) -> Ticket:
        """Raises `Busy`, EngineEnded, and ConfigError as `Engine.submit` does."""
        return (await self.submit_all([prompt], sampling))[0]

    async def submit_all(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[Ticket]:
        """All of them between two steps of the engine, or none; errors as of `submit`."""
        loop, count = asyncio.get_running_loop(), len(prompts) * sampling.n
        with self._lock:
            waiting = self.engine.counts["waiting"] + self._waiting
            if waiting + count > self.max_waiting:
                self.metrics.refused.inc()
                raise Busy
            self._waiting += count

        def taken(_: Future) -> None:
            with self._lock:
                self._waiting -= count

        def take() -> list[Ticket]:
            requests: list[Request] = []
            try:
                for prompt in prompts:
                    requests.append(self.engine.submit(prompt, sampling))
            except BaseException:
                for request in requests:
                    self.engine.abort(request)
                raise
            tickets = [Ticket(self, request, loop) for request in requests]
            for ticket in tickets:
                self._tickets |= {id(c): ticket for c in ticket.request.completions}
            self.metrics.prompt_tokens.inc(sum(map(len, prompts)))
            return tickets

        future = self._ask(take)
        future.add_done_callback(taken)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:  # nobody waits for it any more
            future.add_done_callback(_close)
            raise

    async def run[T](self, what: Callable[[], T]) -> T:
        """What `what` returns, called in the engine's thread between two steps. Raises EngineEnded
        where the engine ends before."""
        return await asyncio.wrap_future(self._ask(what))

    def _ask[T](self, what: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()

        def answer() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                if self._ended is not None:
                    raise self._ended
                future.set_result(what())
            except BaseException as error:  # a panic of tokenizers is no Exception
                future.set_exception(error)

        with self._lock:  # either before the engine ends, which answers it, or not at all
            if self._ended is None:
                self._asked.put(answer)
                return future
        answer()
        return future

    def close_ticket(self, ticket: Ticket) -> None:
        self._asked.put(lambda: self._end(ticket))

    # In the engine's thread.

    def _work(self) -> None:
        try:
            while not self._ends:
                self._answer(wait=not self.engine.busy)
                if self.engine.busy:
                    self._tell(self.engine.step())
                self._count()
        except BaseException as error:
            traceback.print_exception(error)
            line = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self.failure = f"the engine has failed, and the server ends: {line}"
            self._end_all(self.failure)
            self.on_failure()
        else:
            self._end_all("the server ends")

    def _end_all(self, why: str) -> None:
        """Answer what is asked and what is drawn, with no more to come."""
        ended = EngineEnded(why)
        with self._lock:
            self._ended = ended
        self._answer(wait=False)
        for ticket in set(self._tickets.values()):
            ticket.tell(ended)

    def _answer(self, *, wait: bool) -> None:
        if wait:
            self._asked.get()()
        while not self._asked.empty():
            self._asked.get()()

    def _count(self) -> None:
        counts, metrics = self.engine.counts, self.metrics
        metrics.running.set(counts["running"])
        metrics.waiting.set(counts["waiting"])
        metrics.free_pages.set(counts["free_pages"])
        metrics.version.set(self.engine.version)

    def _end(self, ticket: Ticket) -> None:
        if self._ended is None and not ticket.request.finished:
            self.engine.abort(ticket.request)
            self._tell(c for c in ticket.request.completions if id(c) in self._tickets)

    def _tell(self, grown) -> None:
        ended = collections.Counter()
        for completion in grown:
            ticket = self._tickets[id(completion)]
            tokens, characters = ticket.sent[completion.index]
            if not tokens and completion.tokens:
                self.metrics.first_token.observe(time.monotonic() - ticket.came)
            delta = _delta(completion, tokens, characters)
            ticket.sent[completion.index] = (
                tokens + len(delta.tokens),
                characters + len(delta.text),
            )
            self.metrics.tokens.inc(len(delta.tokens))
            if completion.finish:
                ended[completion.finish] += 1
                del self._tickets[id(completion)]
                ticket.open -= 1
                if not ticket.open and completion.finish != "abort":
                    self.metrics.latency.observe(time.monotonic() - ticket.came)
            ticket.tell(delta)
        for finish, count in ended.items():
            self.metrics.finished.labels(finish).inc(count)


def _close(future: Future[list[Ticket]]) -> None:
    if not future.cancelled() and future.exception() is None:
        for ticket in future.result():
            ticket.close()


def _delta(completion: Completion, tokens: int, characters: int) -> Delta:
    """What has come since so many tokens and characters."""
    end = len(completion.text) if completion.finish else completion.safe
    return Delta(
        completion.index,
        tuple(completion.tokens[tokens:]),
        tuple(completion.logprobs[tokens:]),
        completion.text[characters:end],
        completion.finish,
    )
