"""`results.jsonl`: one JSON object per row, replaced atomically after each finished row."""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jaxrl.cli import OutputError
from jaxrl.options import ConfigError
from jaxrl.perf.rows import Row
from jaxrl.perf.runner import Job

ROW_KEYS = tuple(f.name for f in dataclasses.fields(Row))
NUMBER_KEYS = (
    "mfu_pct",
    "mfu_primerl_pct",
    "hfu_pct",
    "tps",
    "step_time_s",
    "peak_mem_gib",
    "floor_mem_gib",
    "host_mem_gib",
    "model_flops_per_token",
    "hardware_flops_per_step",
    "compile_s",
)
KEYS = (
    *("model", "type", "lora_rank", "seq_len", "ac", "attn", "attn_compiled"),
    *("ep", "cp", "cp_method", "num_gpus", "gpu", "mode", "status", "error", *NUMBER_KEYS),
)

type Result = dict[str, Any]


def make_result(job: Job, measured: dict[str, Any] | None, error: str | None, **more) -> Result:
    """The object for one row: `KEYS` first, null where unknown, then what else is known."""
    known = dataclasses.asdict(job.row) | {"mode": job.mode, "attn_compiled": None}
    known |= {"status": "failed" if error else "ok", "error": error}
    known |= {k: v for k, v in (measured or {}).items() if k not in known or known[k] is None}
    known |= more
    result = {k: known.pop(k, None) for k in KEYS} | known
    return {k: _finite(v) for k, v in result.items()}


def _finite(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value


def job_of(result: Result) -> Job:
    """The job that gave `result`; older results lack the keys that have defaults."""
    return Job(Row(**{k: result[k] for k in ROW_KEYS if k in result}), result["mode"])


class Store:
    """The results in a folder, in file order. Use as a context manager: it locks the folder."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = pathlib.Path(folder)
        self.path = self.folder / "results.jsonl"
        self.results: dict[Job, Result] = {}
        self._order: dict[Job, int] = {}

    def __enter__(self) -> "Store":
        """Read what is there, and show that the folder can be written.

        Raises ConfigError for a path that is no folder, or unreadable results; OutputError where
        nothing can be written.
        """
        for path in (self.folder, *self.folder.parents):
            if path.exists() and not path.is_dir():
                raise ConfigError(f"config.output {self.folder}: {path} is a file; name a folder")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / ".lock").open("w")
        except OSError as error:
            raise _cannot_write(self.folder, error) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise ConfigError(
                f"config.output {self.folder}: another bench is writing there; wait, or name "
                "another folder"
            ) from None
        try:
            self.results = {job_of(r): r for r in self._read()}
            self.write()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._lock.close()

    def arrange(self, jobs: Sequence[Job]) -> None:
        """Keep these jobs' results in this order, after those of other jobs."""
        self._order = {job: i for i, job in enumerate(jobs)}

    def add(self, result: Result) -> None:
        """Put `result` in its row's place, and write the file."""
        results = self.results | {job_of(result): result}
        rank = sorted(results, key=lambda job: self._order.get(job, -1))
        self.results = {job: results[job] for job in rank}
        self.write()

    def write(self) -> None:
        write_atomic(self.path, "".join(json.dumps(r) + "\n" for r in self.results.values()))

    def reusable(self, jobs: Iterable[Job], fingerprint: Callable[[Job], str]) -> dict[Job, Result]:
        """Of `jobs`, those that are finished with the same fingerprint."""
        found = {}
        for job in jobs:
            old = self.results.get(job)
            if old and old["status"] == "ok" and old.get("fingerprint") == fingerprint(job):
                found[job] = old
        return found

    def _read(self) -> list[Result]:
        try:
            lines = self.path.read_text().splitlines()
        except FileNotFoundError:
            return []
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read {self.path}: {error}; move it away") from error
        results = []
        for number, line in enumerate(lines, 1):
            try:
                result = json.loads(line)
                if job_of(result).mode and result["status"]:
                    results.append(result)
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"{self.path} line {number} is no result of a bench "
                    f"({type(error).__name__}); move the file away or name another config.output"
                ) from error
        return results


def write_atomic(path: pathlib.Path, text: str) -> None:
    """Replace `path` by `text`, whole or not at all; OutputError if the disk refuses."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise _cannot_write(path, error) from error


def _cannot_write(path: pathlib.Path, error: OSError) -> OutputError:
    reason = error.strerror or str(error)
    return OutputError(
        f"cannot write {path}: {reason}; earlier results are intact: make room or name another "
        "config.output, and run again to go on"
    )
