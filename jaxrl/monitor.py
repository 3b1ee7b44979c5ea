"""Scalars of a run: to TensorBoard event files, and to a JSONL file that any tool can read."""

import json
import math
import os
import pathlib
from collections.abc import Mapping


class Monitor:
    """Appends scalars to `FOLDER/metrics.jsonl` and TensorBoard files in `FOLDER`.

    Use as a context manager. Raises OSError where the folder cannot be written.
    """

    def __init__(self, folder: str | os.PathLike, *, tensorboard: bool = True):
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._jsonl = (self.folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._writer = None
        if tensorboard:
            from tensorboardX import SummaryWriter  # slow to import, and not always wanted

            self._writer = SummaryWriter(str(self.folder))

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write `scalars` of one step; one that is not finite is null in the JSONL file."""
        known = {k: float(v) for k, v in scalars.items()}
        line = {"step": step} | {k: v if math.isfinite(v) else None for k, v in known.items()}
        self._jsonl.write(json.dumps(line) + "\n")
        self._jsonl.flush()
        if self._writer:
            for name, value in known.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._jsonl.close()
        if self._writer:
            self._writer.close()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *_) -> None:
        self.close()
