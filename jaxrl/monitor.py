"""Scalars of a run: to TensorBoard event files, and to a JSONL file that any tool can read."""

import contextlib
import json
import logging
import math
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from jaxrl.cli import writing
from jaxrl.trackers import Tracker

_log = logging.getLogger(__name__)


class Monitor:
    """Appends scalars to `FOLDER/metrics.jsonl`, TensorBoard files in `FOLDER`, and `trackers`.

    resumed_at: of a run that goes on from a checkpoint, its step, or -1 of a new one: what was
    written of later steps, which will be trained again, is dropped, also from `rollouts.jsonl`.
    None: nothing is.
    A tracker that fails gets no more, which is logged once.
    Use as a context manager. Raises OutputError where the folder cannot be written.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        tensorboard: bool = True,
        trackers: Sequence[Tracker] = (),
        resumed_at: int | None = None,
    ):
        self.folder = pathlib.Path(folder)
        file = self.folder / "metrics.jsonl"
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for written in (file, self.folder / "rollouts.jsonl"):
                if resumed_at is not None and written.is_file():
                    _drop_later(written, resumed_at)
            self._jsonl = file.open("a", encoding="utf-8")
        self._trackers = list(trackers)
        self._writer = None
        if tensorboard:
            from tensorboardX import SummaryWriter  # slow to import, and not always wanted

            purge: Any = None if resumed_at is None else resumed_at + 1
            # Its files' names tell seconds apart, not more: one would take another's place.
            suffix = f".{time.time_ns()}"
            self._writer = SummaryWriter(str(self.folder), purge_step=purge, filename_suffix=suffix)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write `scalars` of one step; one that is not finite is null in the JSONL file."""
        known = {k: float(v) for k, v in scalars.items()}
        line = {"step": step} | {k: v if math.isfinite(v) else None for k, v in known.items()}
        with writing(self._jsonl.name):
            self._jsonl.write(json.dumps(line) + "\n")
            self._jsonl.flush()
        if self._writer:
            for name, value in known.items():
                self._writer.add_scalar(name, value, step)
        for tracker in list(self._trackers):
            try:
                tracker.log(step, known)
            except Exception as error:  # a server that is down is no reason to end a run
                self._trackers.remove(tracker)
                kind = type(tracker).__name__
                _log.warning("%s gets nothing from step %d on: %s", kind, step, error)

    def lines(self, step: int) -> list[dict[str, Any]]:
        """What the JSONL file has of one step."""
        with (self.folder / "metrics.jsonl").open(encoding="utf-8") as file:
            return [line for line in map(json.loads, file) if line["step"] == step]

    def text(self, name: str, text: str, step: int = 0) -> None:
        """Show `text` (markdown) under `name` in TensorBoard."""
        if self._writer:
            self._writer.add_text(name, text, step)

    def options(self, options: Mapping[str, Any]) -> None:
        """Show the run's options, by dotted key, as a table in TensorBoard."""
        rows = [f"| {key} | {value} |" for key, value in options.items()]
        self.text("options", "\n".join(["| option | value |", "|---|---|", *rows]))

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what is left is what `log` has failed to write
            self._jsonl.close()
        if self._writer:
            self._writer.close()
        for tracker in self._trackers:
            tracker.close()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *_) -> None:
        self.close()


class Silent(Monitor):
    """Writes nothing: of processes other than the first."""

    def __init__(self):
        self._writer, self._trackers = None, []

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        pass

    def close(self) -> None:
        pass


def _drop_later(file: pathlib.Path, step: int) -> None:
    """Keep the lines of `file` up to `step`; a last line that a killed run left unfinished goes."""
    partial = file.with_name(f".{file.name}.partial")
    with (
        file.open(encoding="utf-8", errors="replace") as lines,
        partial.open("w", encoding="utf-8") as kept,
    ):
        for line in lines:
            try:
                known = json.loads(line)["step"] <= step
            except (ValueError, KeyError, TypeError):
                known = False
            if known:
                kept.write(line.rstrip("\n") + "\n")
    partial.replace(file)
