"""From samples to global batches: shuffled, tokenized, packed; a stream that can be gone on with.

Every host makes the same global batches and moves its own rows to its devices: a run's batches are
the same on any number of hosts. A place in the stream is a window of samples and a row of it, so
that it does not depend on how many workers there were.
"""

import collections
import dataclasses
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from jaxrl.data.chat import SampleError, parse_sample
from jaxrl.data.packing import bins_of, fill_rows
from jaxrl.data.sources import Samples, check_fingerprint
from jaxrl.data.template import ChatTemplate, Encoded
from jaxrl.data.tokenizer import Tokenizer
from jaxrl.options import ConfigError
from jaxrl.sft_config import DataConfig

ESTIMATE_WINDOWS = 4


@dataclasses.dataclass(frozen=True)
class GlobalBatch:
    """[batch_size, T] int32 arrays as `packing.Rows` has them, of all hosts.

    doc_lengths: of all its documents, row by row. counts: of its documents, their tokens and those
    of them that are trained, and, with the first of a window's rows, of the window's samples: how
    many there were, were truncated or dropped for their length, or were skipped, by reason. epoch:
    how much of the data the stream has gone through, 1.5 for half of the second pass.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    doc_lengths: tuple[int, ...]
    counts: Mapping[str, int]
    epoch: float


@dataclasses.dataclass(frozen=True)
class Window:
    """Some samples' documents, which of them each row takes, and what became of the samples. Rows
    are filled when they are needed: a window of long ones would take gigabytes."""

    documents: Sequence[Encoded]
    bins: Sequence[Sequence[int]]
    counts: collections.Counter


@dataclasses.dataclass(frozen=True)
class PackWindow:
    """Numbers of samples to a window of rows; runs in workers."""

    config: DataConfig
    samples: Samples
    template: ChatTemplate
    seed: int

    def __call__(self, number: int, chosen: np.ndarray) -> Window:
        documents, counts = [], collections.Counter(samples=len(chosen))
        for index in map(int, np.sort(chosen)):  # of a Parquet file, each group of rows once
            try:
                document = self._fitted(self.encode(index), counts)
            except SampleError as error:
                if self.config.bad_samples == "refuse":
                    raise
                counts[f"skipped: {error.reason}"] += 1
                continue
            if document is not None:
                documents.append(document)
        bins = bins_of(documents, self.config.seq_len, several=self.config.pack)
        if self.config.shuffle:
            order = np.random.default_rng((self.seed, number)).permutation(len(bins))
            bins = [bins[i] for i in order]
        return Window(documents, bins, counts)

    def encode(self, index: int) -> Encoded:
        where = self.samples.where(index)
        return self.template.encode(parse_sample(self.samples[index], where), where)

    def _fitted(self, document: Encoded, counts: collections.Counter) -> Encoded | None:
        """The document in `seq_len` tokens, None where it is left out; either is counted."""
        if len(document.tokens) <= self.config.seq_len:
            return document
        if self.config.overlong == "drop":
            counts["dropped"] += 1
            return None
        kept = slice(self.config.seq_len)
        if not document.mask[kept].any():
            counts["skipped: trained beyond seq_len"] += 1
            return None
        counts["truncated"] += 1
        return Encoded(document.tokens[kept], document.mask[kept])


class Batches(Iterator[GlobalBatch]):
    """The stream of `batches`."""

    def __init__(self, config: DataConfig, pack: PackWindow, batch_size: int, epochs: int):
        self.config, self.pack, self.batch_size, self.epochs = config, pack, batch_size, epochs
        count = len(pack.samples)
        self.per_epoch = math.ceil(count / config.window)
        numbers = grain.MapDataset.range(count)
        if config.shuffle:
            numbers = numbers.shuffle(seed=pack.seed % 2**32)
        windows = numbers.batch(config.window, batch_fn=np.array).repeat(epochs or None)
        self._windows = windows.map_with_index(pack)
        self._number, self._row = 0, 0  # the next row's window, and which of its rows it is
        self._iterator: Any = None
        self._window: Window | None = None
        self._barren = 0  # windows in a row without a row

    def __next__(self) -> GlobalBatch:
        documents, bins, counts = [], [], collections.Counter()
        while len(bins) < self.batch_size and (window := self._current()) is not None:
            if self._row == 0:
                counts.update(window.counts)
            for chosen in window.bins[self._row : self._row + self.batch_size - len(bins)]:
                bins.append(range(len(documents), len(documents) + len(chosen)))
                documents += [window.documents[i] for i in chosen]
                self._row += 1
            if self._row >= len(window.bins):
                self._leave(window)
        if not bins:
            raise StopIteration
        bins += [()] * (self.batch_size - len(bins))  # the last batch
        pad_id = self.pack.template.tokenizer.pad_id
        rows = fill_rows(documents, bins, self.config.seq_len, pad_id)
        lengths = [len(document.tokens) for document in documents]
        counts.update(documents=len(documents), tokens=sum(lengths))
        counts.update(trained_tokens=int(rows.loss_mask.sum()))
        return GlobalBatch(
            tokens=rows.tokens,
            loss_mask=rows.loss_mask,
            positions=rows.positions,
            segment_ids=rows.segment_ids,
            doc_lengths=tuple(lengths),
            counts=counts,
            epoch=self._epoch(),
        )

    def _current(self) -> Window | None:
        """The window that the next row is in; None behind the last."""
        if self._window is None:
            if self._iterator is None:
                self._iterator = self._read(self._number)
            self._window = next(self._iterator, None)
        return self._window

    def _leave(self, window: Window) -> None:
        self._window, self._row = None, 0
        self._number += 1
        self._barren = 0 if window.bins else self._barren + 1
        if self._number % self.per_epoch == 0 and self._barren >= self.per_epoch:
            told = ", ".join(f"{n} {what}" for what, n in window.counts.items())
            raise ConfigError(
                f"none of the {len(self.pack.samples)} samples can be used (the last: {told}); see "
                "config.data.seq_len, .overlong and .bad_samples"
            )

    def _read(self, first: int) -> Any:
        ahead = 1 if self.config.workers else 2
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=ahead)
        windows = self._windows[first:].to_iter_dataset(options)
        if self.config.workers:
            if not flags.FLAGS.is_parsed():  # grain reads its own, and jaxrl has none of absl's
                flags.FLAGS.mark_as_parsed()
            workers = grain.MultiprocessingOptions(num_workers=self.config.workers)
            windows = windows.mp_prefetch(workers, worker_init_fn=_begin_worker)
        return iter(windows)

    def _epoch(self) -> float:
        part = self._row / len(self._window.bins) if self._window is not None else 0.0
        return (self._number + part) / self.per_epoch

    def get_state(self) -> dict[str, Any]:
        """The place behind the last batch, and what data it is a place in: a JSON value."""
        place = {"window": self._number, "row": self._row}
        return place | {"fingerprint": self.pack.samples.fingerprint}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a place. Raises ConfigError where the data is not what it was."""
        self.check(state)
        self.close()
        self._number, self._row = state["window"], state["row"]

    def close(self) -> None:
        """End the workers; the stream can be read on."""
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = self._window = None

    def check(self, state: Mapping[str, Any]) -> None:
        """Raise ConfigError where the data is not what it was when `state` was taken."""
        check_fingerprint(self.pack.samples.fingerprint, state["fingerprint"])

    def estimated_steps(self) -> int | None:
        """Batches of all epochs, by the rows of some windows (exact, but for the order of later
        epochs, where those are all); None without end."""
        if not self.epochs:
            return None
        chosen = np.unique(np.linspace(0, self.per_epoch - 1, ESTIMATE_WINDOWS).astype(int))
        windows: list[Any] = [self._windows[int(i)] for i in chosen]
        rows = sum(len(window.bins) for window in windows)
        samples = sum(window.counts["samples"] for window in windows)
        rows_of_all = rows / samples * len(self.pack.samples) * self.epochs
        return max(1, math.ceil(rows_of_all / self.batch_size))


def batches(
    config: DataConfig,
    samples: Samples,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    seed: int,
    epochs: int,
) -> Batches:
    """Global batches of `batch_size` rows for so many passes over the data (0: without end), each
    in an order of its own; the last batch is filled up with empty rows.

    A sample that cannot be used raises SampleError when its turn comes, or is counted
    (`bad_samples`).
    """
    template = ChatTemplate(tokenizer, roles=config.train_roles, turns=config.train_turns)
    return Batches(config, PackWindow(config, samples, template, seed), batch_size, epochs)


def validation_batches(
    config: DataConfig, samples: Samples, tokenizer: Tokenizer, *, batch_size: int
) -> Batches:
    """One pass in the data's order."""
    config = dataclasses.replace(config, shuffle=False)
    return batches(config, samples, tokenizer, batch_size=batch_size, seed=0, epochs=1)


def _begin_worker(number: int, count: int) -> None:
    """Signals to stop are the trainer's: workers go when it says so, or when it is no more."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    threading.Thread(target=lambda: (trainer.join(), os._exit(1)), daemon=True).start()
