"""Continuous batching: requests come and go while the others' tokens are drawn.

Waiting sequences are let in as slots and pages are free; all running ones then draw a few tokens
in one program. Of a prompt's keys all but the last token's are prefilled, once for all of its
completions, which share those pages; the last token is each completion's first to be decoded. Where
pages run out, the sequence that came last gives up its own and waits; its tokens stay.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxrl.options import ConfigError, at_least
from jaxrl.rl_config import RolloutConfig
from jaxrl.rollout.cache import NOBODYS, Pages
from jaxrl.rollout.programs import ROWS, Decoding, Programs
from jaxrl.rollout.requests import Completion, Request, Sampling
from jaxrl.rollout.sampling import Choice
from jaxrl.rollout.text import TextStream
from jaxrl.serve_config import EngineConfig

STOPS = 8  # stop tokens that the device ends a sequence at; the host sees the others a round later


@dataclasses.dataclass(frozen=True)
class EngineLimits:
    """Sizes of an engine; all are of one device.

    slots: sequences that are decoded at once. max_len: tokens of a prompt and its completion.
    cache_tokens: what the cache holds (0: slots x max_len). page: tokens to a page. steps: tokens
    that a sequence draws between two looks at what is waiting. prefill_tokens: prompt tokens that
    are prefilled together, at least one prompt.
    """

    slots: int = 16
    max_len: int = 2048
    cache_tokens: int = 0
    page: int = 32
    steps: int = 8
    prefill_tokens: int = 2048

    def __post_init__(self):
        at_least(self, 1, "slots", "max_len", "page", "steps", "prefill_tokens")
        at_least(self, 0, "cache_tokens")
        if 0 < self.cache_tokens < self.max_len:
            raise ConfigError(
                f"cache_tokens {self.cache_tokens} hold no sequence of max_len {self.max_len}"
            )

    @classmethod
    def of(cls, options: "RolloutConfig | EngineConfig", max_len: int) -> "EngineLimits":
        """Those that a run's or a server's options ask for."""
        return cls(
            slots=options.slots,
            max_len=max_len,
            cache_tokens=options.cache_tokens,
            page=options.page,
            steps=options.decode_steps,
            prefill_tokens=options.prefill_tokens,
        )

    @property
    def pages(self) -> int:
        """Pages of the cache, the one that is nobody's among them."""
        return -(-(self.cache_tokens or self.slots * self.max_len) // self.page) + 1

    # Programs are compiled for few shapes: sequences in steps of four, lengths in steps of two.

    @property
    def rows(self) -> list[int]:
        """Numbers of sequences that are decoded together, rising."""
        return _falling(self.slots, 4)

    @property
    def widths(self) -> list[int]:
        """Numbers of pages that sequences are given room for, rising."""
        return _falling(-(-self.max_len // self.page), 2)

    def prefill_rows(self, width: int) -> list[int]:
        """Numbers of prompts of so many pages that are prefilled together, rising."""
        most = max(1, self.prefill_tokens // (width * self.page))
        return _falling(min(most, self.slots), 4)


@dataclasses.dataclass
class _Sequence:
    """A completion that runs, or waits to."""

    request: Request
    completion: Completion
    seed: int
    top_k: int
    stop: frozenset[int]
    stop_first: Sequence[int]  # those that the device ends it at
    limit: int  # of drawn tokens
    text: TextStream | None
    pages: list[int] = dataclasses.field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return [*self.request.prompt, *self.completion.tokens]

    @property
    def length(self) -> int:
        return len(self.request.prompt) + len(self.completion.tokens)

    @property
    def left(self) -> int:
        return self.limit - len(self.completion.tokens)


class Engine:
    """`submit` requests, and `step` until they are finished; or `generate`.

    stop_tokens: those that end a completion (the model's end of sequence). tokenizer: a fast one of
    transformers, for texts and stop texts; None: tokens only.
    """

    def __init__(
        self,
        programs: Programs,
        limits: EngineLimits | None = None,
        *,
        stop_tokens: Sequence[int] = (),
        tokenizer: Any = None,
    ):
        self.programs, self.limits = programs, limits or EngineLimits()
        self.devices = programs.mesh.size
        self.stop_tokens, self.tokenizer = frozenset(stop_tokens), tokenizer
        self._vocab_size = programs.model.config.vocab_size
        self.version = 0
        self.weights: Any = None  # what is drawn with
        self._cache = programs.make_cache(self.limits.pages, self.limits.page)
        self._pages = [Pages(self.limits.pages) for _ in range(self.devices)]
        self._waiting: collections.deque[_Sequence] = collections.deque()
        self._running: list[list[_Sequence]] = [[] for _ in range(self.devices)]
        self._ids = itertools.count()
        self._seeds = np.random.SeedSequence()
        self._rows = NamedSharding(programs.mesh, ROWS)

    @property
    def busy(self) -> bool:
        return bool(self._waiting) or any(self._running)

    @property
    def counts(self) -> Mapping[str, int]:
        """Sequences that run and that wait, pages that are free, of all devices."""
        return {
            "running": sum(map(len, self._running)),
            "waiting": len(self._waiting),
            "free_pages": sum(pages.free for pages in self._pages),
        }

    def prepare(self, weights: Any, version: int) -> Any:
        """A copy for `set_weights`, of parameters that are about to be given away."""
        del version
        return self.programs.copy_weights(weights)

    def set_weights(self, weights: Any, version: int) -> None:
        """Draw with these from now on (`Programs`); what is half drawn goes on with them, on keys
        and values of the old ones."""
        self.weights = None  # where they are a copy, there is no room for two
        self.weights, self.version = self.programs.own(weights), version

    def submit(self, prompt: Sequence[int], sampling: Sampling | None = None) -> Request:
        """Take a request, whose completions fill up while the engine steps.

        Raises ConfigError for a prompt that is empty, or too long to draw one token behind it, and
        for tokens that the model has not: what is in the arrays of a step is checked here, so that
        no request ends those of others.
        """
        sampling = sampling or Sampling()
        room = self.limits.max_len - len(prompt)
        if not prompt:
            raise ConfigError("the prompt is empty; it takes one token at least")
        if room < 1:
            raise ConfigError(
                f"the prompt has {len(prompt)} tokens, and prompt and completion together take at "
                f"most {self.limits.max_len}; shorten it, or use a larger max_len"
            )
        if sampling.stop and self.tokenizer is None:
            raise ConfigError("stop needs a tokenizer, which this engine has not; use stop_tokens")
        self._check_tokens("the prompt has token", prompt)
        self._check_tokens("stop_tokens has", sampling.stop_tokens)
        limit = min(sampling.max_tokens or room, room)
        completions = [Completion(index) for index in range(sampling.n)]
        request = Request(next(self._ids), tuple(prompt), sampling, completions)
        stop = frozenset(sampling.stop_tokens)
        stop |= frozenset() if sampling.ignore_eos else self.stop_tokens
        # A top_k above the vocabulary's size takes all, as 0 does.
        top_k = sampling.top_k if sampling.top_k < self._vocab_size else 0
        seeds, stop_first = _seeds(sampling, self._seeds), sorted(stop)[:STOPS]
        for completion, seed in zip(completions, seeds, strict=True):
            text = TextStream(self.tokenizer, sampling.stop, prompt) if self.tokenizer else None
            self._waiting.append(
                _Sequence(request, completion, seed, top_k, stop, stop_first, limit, text)
            )
        return request

    def abort(self, request: Request) -> None:
        """End what is not finished of a request."""
        self._waiting = collections.deque(s for s in self._waiting if s.request is not request)
        for device in range(self.devices):
            for sequence in [s for s in self._running[device] if s.request is request]:
                self._leave(device, sequence)
        for completion in request.completions:
            completion.finish = completion.finish or "abort"

    def step(self) -> list[Completion]:
        """Let sequences in, and draw up to `steps` tokens of each; returns the completions that
        have grown."""
        if self.weights is None:
            raise ValueError("the engine has no weights; call set_weights")
        self._admit()
        for device in range(self.devices):
            self._make_room(device)
        if not any(self._running):
            return []
        tokens, logprobs = self._draw()
        return self._take(tokens, logprobs)

    def warm_up(self) -> None:
        """Compile for every shape there is, so that no request waits for it. Needs weights."""
        limits = self.limits
        for width in limits.widths:
            for rows in limits.prefill_rows(width):
                self._prefill_batch([[]] * self.devices, width, rows)
            for rows in limits.rows:
                self._decode(rows, width)
        self._copy([(0, NOBODYS, NOBODYS)])

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling | None = None
    ) -> list[Request]:
        """Completions of these prompts, finished."""
        requests = [self.submit(prompt, sampling) for prompt in prompts]
        while not all(request.finished for request in requests):
            self.step()
        return requests

    def _check_tokens(self, what: str, tokens: Sequence[int]) -> None:
        for token in (t for t in tokens if not 0 <= t < self._vocab_size):
            raise ConfigError(f"{what} {token}; the model's are 0 to {self._vocab_size - 1}")

    # Who runs.

    def _admit(self) -> None:
        """Let waiting sequences in, those of one request together where they begin alike."""
        chosen: list[tuple[int, list[_Sequence]]] = []
        while self._waiting:
            first = self._waiting[0]
            device = min(range(self.devices), key=lambda d: len(self._running[d]))
            free = self.limits.slots - len(self._running[device])
            front = itertools.islice(self._waiting, free)
            alike = list(itertools.takewhile(lambda s, first=first: _alike(s, first), front))
            # Those that run may each need a page next, and would take it from the last let in.
            spare = self._pages[device].free - len(self._running[device])
            while alike and self._needed(alike) > spare:
                alike.pop()
            if not alike:
                break
            for _ in alike:
                self._waiting.popleft()
            self._give_pages(device, alike)
            self._running[device] += alike
            chosen.append((device, alike))
        self._prefill(chosen)

    def _needed(self, alike: Sequence[_Sequence]) -> int:
        """Pages for sequences that begin alike, and for their next tokens."""
        whole, size = self._known(alike[0]) // self.limits.page, self.limits.page
        return whole + sum(-(-self._reach(s) // size) - whole for s in alike)

    def _known(self, sequence: _Sequence) -> int:
        """Tokens that are prefilled: all but the last."""
        return sequence.length - 1

    def _reach(self, sequence: _Sequence) -> int:
        """Tokens whose keys are in the cache after the next call: the last drawn one's is not."""
        return self._known(sequence) + min(self.limits.steps, sequence.left)

    def _give_pages(self, device: int, alike: Sequence[_Sequence]) -> None:
        pages, size = self._pages[device], self.limits.page
        shared = pages.take(self._known(alike[0]) // size)
        for i, sequence in enumerate(alike):
            if i:
                pages.share(shared)
            own = -(-self._reach(sequence) // size) - len(shared)
            sequence.pages = shared + pages.take(own)

    def _make_room(self, device: int) -> None:
        """Pages for every running sequence's next tokens, the last ones giving way."""
        running, pages = self._running[device], self._pages[device]
        for sequence in list(running):
            if sequence not in running:
                continue
            missing = -(-self._reach(sequence) // self.limits.page) - len(sequence.pages)
            while missing > pages.free and len(running) > 1:
                last = running[-1]
                self._leave(device, last)
                self._waiting.appendleft(last)
                if last is sequence:
                    break
            else:
                sequence.pages += pages.take(missing)

    def _leave(self, device: int, sequence: _Sequence) -> None:
        self._running[device].remove(sequence)
        self._pages[device].give_back(sequence.pages)
        sequence.pages = []

    # What the devices do.

    def _prefill(self, chosen: Sequence[tuple[int, list[_Sequence]]]) -> None:
        """Keys and values of what groups of sequences have in common, of equal lengths together."""
        size = self.limits.page
        by_length = collections.defaultdict(list)
        copies: list[tuple[int, int, int]] = []  # device, from, to
        for device, alike in chosen:
            first = alike[0]
            count = self._known(first)
            if not count:
                continue
            by_length[_least(self.limits.widths, -(-count // size))].append((device, first))
            if count % size:
                begun = count // size
                copies += [(device, first.pages[begun], s.pages[begun]) for s in alike[1:]]
        for width, sequences in by_length.items():
            rows = self.limits.prefill_rows(width)
            for part in self._batches(sequences, rows[-1]):
                self._prefill_batch(part, width, _least(rows, max(map(len, part))))
        self._copy(copies)

    def _batches(self, sequences, rows: int) -> Iterator[list[list[_Sequence]]]:
        """By device, at most so many sequences each."""
        queues = [collections.deque() for _ in range(self.devices)]
        for device, sequence in sequences:
            queues[device].append(sequence)
        while any(queues):
            yield [[q.popleft() for _ in range(min(rows, len(q)))] for q in queues]

    def _prefill_batch(self, parts: Sequence[Sequence[_Sequence]], width: int, rows: int) -> None:
        """Of each device's sequences, up to `rows` of up to `width` pages."""
        tokens = np.zeros((self.devices, rows, width * self.limits.page), np.int32)
        table = np.full((self.devices, rows, width), NOBODYS, np.int32)
        for device, part in enumerate(parts):
            for i, sequence in enumerate(part):
                known = self._known(sequence)
                tokens[device, i, :known] = sequence.tokens[:known]
                used = -(-known // self.limits.page)
                table[device, i, :used] = sequence.pages[:used]
        self._cache = self.programs.prefill(
            self.weights, self._cache, self._put(tokens), self._put(table)
        )

    def _copy(self, copies: Sequence[tuple[int, int, int]]) -> None:
        slots = self.limits.slots
        by_device = [[(a, b) for d, a, b in copies if d == i] for i in range(self.devices)]
        for first in range(0, max(map(len, by_device)), slots):
            pairs = np.full((2, self.devices, slots), NOBODYS, np.int32)
            for device, found in enumerate(by_device):
                for i, pair in enumerate(found[first : first + slots]):
                    pairs[:, device, i] = pair
            self._cache = self.programs.copy_pages(self._cache, *map(self._put, pairs))

    def _draw(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and log-probs [steps, devices, rows] of the running sequences."""
        used = max(len(s.pages) for running in self._running for s in running)
        rows = _least(self.limits.rows, max(map(len, self._running)))
        return self._decode(rows, _least(self.limits.widths, used))

    def _decode(self, rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        def each(value, dtype, *more: int, empty=0):
            array = np.full((self.devices, rows, *more), empty, dtype)
            for device, running in enumerate(self._running):
                for i, sequence in enumerate(running):
                    found = value(sequence)
                    array[(device, i, slice(len(found))) if more else (device, i)] = found
            return self._put(array)

        i32, f32 = np.int32, np.float32
        decoding = Decoding(
            token=each(lambda s: s.tokens[-1], i32),
            position=each(lambda s: s.length - 1, i32),
            table=each(lambda s: s.pages, i32, width, empty=NOBODYS),
            drawn=each(lambda s: len(s.completion.tokens), i32),
            left=each(lambda s: min(s.left, self.limits.steps), i32),
            stop=each(lambda s: s.stop_first, i32, STOPS, empty=-1),
            choice=Choice(
                temperature=each(lambda s: s.request.sampling.temperature, f32, empty=1),
                top_k=each(lambda s: s.top_k, i32),
                top_p=each(lambda s: s.request.sampling.top_p, f32, empty=1),
                min_p=each(lambda s: s.request.sampling.min_p, f32),
                seed=each(lambda s: s.seed, i32),
            ),
        )
        self._cache, *found = self.programs.decode(
            self.weights, self._cache, decoding, self.limits.steps
        )
        tokens, logprobs = (np.asarray(a).reshape(-1, self.devices, rows) for a in found)
        return tokens, logprobs

    def _put(self, array: np.ndarray) -> jax.Array:
        """[devices, n, ...] as [devices x n, ...], each device its own."""
        flat = array.reshape(-1, *array.shape[2:])
        return jax.make_array_from_callback(flat.shape, self._rows, lambda index: flat[index])

    def _take(self, tokens: np.ndarray, logprobs: np.ndarray) -> list[Completion]:
        grown = []
        for device, running in enumerate(self._running):
            for i, sequence in enumerate(list(running)):
                completion = sequence.completion
                for token, logprob in zip(
                    tokens[:, device, i].tolist(), logprobs[:, device, i].tolist(), strict=True
                ):
                    completion.tokens.append(token)
                    completion.logprobs.append(logprob)
                    completion.versions.append(self.version)
                    if token in sequence.stop or (sequence.text and sequence.text.add(token)):
                        completion.finish = "stop"
                    elif not sequence.left:
                        completion.finish = "length"
                    if completion.finish:
                        break
                if sequence.text is not None:
                    completion.text, completion.safe = sequence.text.text, sequence.text.safe
                grown.append(completion)
                if completion.finish:
                    self._leave(device, sequence)
        return grown


def lower_decode(programs: Programs, limits: EngineLimits, weights: Any) -> jax.stages.Lowered:
    """The largest decode program of an engine, lowered for its mesh; nothing is allocated.

    weights: abstract arrays with shardings, as `Programs` takes them.
    """
    devices, rows = programs.mesh.size, limits.rows[-1]
    sharding = NamedSharding(programs.mesh, ROWS)

    def each(dtype, *more: int) -> Any:
        return jax.ShapeDtypeStruct((devices * rows, *more), dtype, sharding=sharding)

    i32, f32 = np.int32, np.float32
    choice = Choice(
        temperature=each(f32), top_k=each(i32), top_p=each(f32), min_p=each(f32), seed=each(i32)
    )
    decoding = Decoding(
        token=each(i32),
        position=each(i32),
        table=each(i32, limits.widths[-1]),
        drawn=each(i32),
        left=each(i32),
        stop=each(i32, STOPS),
        choice=choice,
    )
    cache = programs.abstract_cache(limits.pages, limits.page)
    return programs.jitted_decode.lower(weights, cache, decoding, limits.steps)


def _alike(a: _Sequence, b: _Sequence) -> bool:
    """They are one prompt's, and nothing of them is drawn yet."""
    return a is b or (
        a.request is b.request and not a.completion.tokens and not b.completion.tokens
    )


def _falling(most: int, factor: int) -> list[int]:
    """`most`, and what is left of it in steps of `factor`, down to 1, rising."""
    found = [most]
    while found[-1] > 1:
        found.append(-(-found[-1] // factor))
    return found[::-1]


def _least(choices: Sequence[int], count: int) -> int:
    """The least of the rising choices that is enough."""
    return next(choice for choice in choices if choice >= count)


def _seeds(sampling: Sampling, entropy: np.random.SeedSequence) -> list[int]:
    """One for each completion, in 31 bits."""
    source = entropy.spawn(1)[0]
    if sampling.seed is not None:
        source = np.random.SeedSequence(sampling.seed)
    return [int(word) for word in source.generate_state(sampling.n) >> 1]
