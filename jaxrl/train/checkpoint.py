"""Checkpoints of a run: written by Orbax beside the training, used again only where complete.

    FOLDER/00000100/state/         the arrays, as Orbax writes them
    FOLDER/00000100/manifest.json  step, extra, arrays' shapes, every file's size and CRC-32
    FOLDER/.00000150.partial/      a save that is under way, or was when its process was killed

A save becomes a checkpoint by one rename, when its files are on the disk and their manifest is
written: what has a step's number for a name is complete, or was damaged later. A killed save
without a manifest cannot be told from a complete one by its files alone, so it counts as nothing
and goes at the next start; one with a manifest only lacks the rename, and gets it then. Others are
deleted after that rename, renamed themselves first. So from the first complete save on there is a
good checkpoint at every moment.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrl.cli import OutputError
from jaxrl.options import ConfigError
from jaxrl.parallel.first_process import from_first
from jaxrl.train.array_files import ArrayFiles, by_path, check_same, os_reason
from jaxrl.train.manifest import (
    MANIFEST,
    Damaged,
    check_files,
    read_manifest,
    sync_folder,
    write_manifest,
)
from jaxrl.train.state import TrainState

_OPTIMIZER = "opt_state/"


@dataclass(frozen=True)
class Restored:
    """A checkpoint: its step, state and extra; and newer ones that could not be used, with why."""

    step: int
    state: Any
    extra: Mapping[str, Any]
    skipped: Sequence[tuple[int, str]] = ()


class Checkpoints:
    """The checkpoints in a folder. Use as a context manager; with several processes all of them
    call the same methods, and the folder is on a file system that all see.

    keep_last: so many of the newest are kept; keep_every: and steps that are its multiples, for
    good (0: none). read_only: the folder of another run, in which nothing is changed.

    Raises ConfigError where another process writes to the folder, OutputError where nobody can.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        keep_last: int = 2,
        keep_every: int = 0,
        read_only: bool = False,
    ):
        if keep_last < 1 or keep_every < 0:
            raise ValueError(f"keep_last {keep_last} must be at least 1, keep_every {keep_every} 0")
        self.folder = Path(folder).absolute()
        self.keep_last, self.keep_every, self.read_only = keep_last, keep_every, read_only
        self._saving: _Saving | None = None
        self._good: int | None = None  # the newest that this process has written or read
        self._held = contextlib.ExitStack()
        if not read_only:
            from_first(self._open)
        self._arrays = ArrayFiles()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, *_) -> None:
        # Behind an error that ends the run, that one is the one to tell.
        with contextlib.suppress(OutputError) if kind else contextlib.nullcontext():
            self.close()

    def close(self) -> None:
        """Wait for a save that is under way, as `wait`, and let go of the folder."""
        try:
            self.wait()
        finally:
            self._arrays.close()
            self._held.close()

    def save(self, step: int, state: Any, extra: Mapping[str, Any]) -> None:
        """Begin to write the pytree `state` and the JSON value `extra`; returns when the arrays are
        copied and may be donated.

        Complete, it takes the place of checkpoints of this and later steps: the run went back
        behind them. Waits for the save before it, and raises what went wrong there: OutputError.
        """
        if self.read_only:
            raise ValueError(f"{self.folder} was opened to be read only")
        self.wait()
        arrays = by_path(state)
        content = {
            "step": step,
            "extra": json.loads(json.dumps(extra)),  # as it is now, and as it will come back
            "arrays": {path: [list(a.shape), str(a.dtype)] for path, a in arrays.items()},
        }

        def begin() -> None:
            with self._told(step):
                shutil.rmtree(self._partial(step), ignore_errors=True)
                self._partial(step).mkdir()

        from_first(begin)
        with self._told(step):
            self._arrays.write(self._partial(step) / "state", arrays)
        self._saving = _Saving(step, self._arrays, lambda: self._complete(step, content))

    def wait(self) -> None:
        """Until the last save is complete. Raises OutputError where it could not be written."""
        if self._saving is None:
            return
        saving = self._saving
        saving.join()  # Ctrl-C here, and `close` waits again
        self._saving = None
        # What one of several processes cannot write ends it; JAX ends the others, which wait for it
        # in Orbax.
        with self._told(saving.step):
            saving.result()

        def end() -> None:
            with self._told(saving.step):
                saving.completion()

        from_first(end)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, rising; damage that came later is not looked for."""
        return from_first(self._steps)

    def restore(self, abstract: Any, step: int | None = None) -> Restored | None:
        """The checkpoint of `step`, or the newest that is not damaged (None without any), as a
        pytree like `abstract`, each array with the shape, dtype and sharding there.

        Raises ConfigError for a step that there is not, a damaged one that was asked for, only
        damaged ones, and arrays other than those of `abstract` (floats may be of another dtype).
        """
        self.wait()
        return self._restore(abstract, step, left_out=())

    def restore_params(self, abstract: TrainState, step: int | None = None) -> Restored | None:
        """`restore` without the optimizer's state, which is neither read nor compared: the restored
        state's `opt_state` is None."""
        self.wait()
        return self._restore(replace(abstract, opt_state=None), step, left_out=_OPTIMIZER)

    def extra(self, step: int | None = None) -> tuple[int, Mapping[str, Any]]:
        """(step, extra) of a checkpoint, default the newest whose manifest can be read; its arrays
        are not looked at. Raises ConfigError where there is none."""
        self.wait()
        found = from_first(lambda: self._choose(step, lambda *_: None))
        if found is None:
            raise ConfigError(f"{self.folder} holds no checkpoint")
        return found["manifest"]["step"], found["manifest"]["extra"]

    def _restore(self, abstract: Any, step: int | None, left_out: str | tuple) -> Restored | None:
        found = from_first(lambda: self._choose(step, check_files))
        if found is None:
            return None
        manifest, wanted = found["manifest"], by_path(abstract)
        stored = {
            path: (tuple(shape), np.dtype(dtype))
            for path, (shape, dtype) in manifest["arrays"].items()
            if not path.startswith(left_out)
        }
        self._good = manifest["step"]
        folder = self._path(manifest["step"])
        check_same(wanted, stored, folder)
        arrays = self._arrays.read(folder / "state", wanted, some=bool(left_out))
        state = jax.tree.unflatten(jax.tree.structure(abstract), [arrays[p] for p in wanted])
        skipped = tuple((step, reason) for step, reason in found["skipped"])
        return Restored(manifest["step"], state, manifest["extra"], skipped)

    def _choose(self, step: int | None, check: Callable[[Path, Any], None]) -> Any:
        """{manifest, skipped} of the checkpoint to use, None where there is none."""
        steps, skipped = self._steps(), []
        if step is not None and step not in steps:
            there = f"there are {', '.join(map(str, steps))}" if steps else "there are none"
            raise ConfigError(f"no checkpoint of step {step} in {self.folder}; {there}")
        for candidate in [step] if step is not None else reversed(steps):
            folder = self._path(candidate)
            try:
                manifest = read_manifest(folder)
                if manifest["step"] != candidate:
                    raise Damaged(f"{MANIFEST} is of step {manifest['step']}")
                check(folder, manifest)
                return {"manifest": manifest, "skipped": skipped}
            except Damaged as problem:
                skipped.append((candidate, str(problem)))
        if not steps:
            return None
        what = "; ".join(f"step {step}: {problem}" for step, problem in skipped)
        others = [str(s) for s in steps if s != step]
        if step is None:
            raise ConfigError(f"no checkpoint in {self.folder} can be used: {what}")
        way_out = f"others there: {', '.join(others)}" if others else "there is no other"
        raise ConfigError(f"a checkpoint in {self.folder} cannot be used: {what}; {way_out}")

    def _steps(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        names = [path.name for path in self.folder.iterdir() if path.is_dir()]
        return sorted(int(name) for name in names if re.fullmatch(r"\d{8,}", name))

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:08d}"

    def _partial(self, step: int) -> Path:
        return self.folder / f".{step:08d}.partial"

    def _open(self) -> None:
        """Make the folder and clear away, or complete, what killed runs left of their saves."""
        with self._told(None):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._held.enter_context(_locked(self.folder))
            for path in sorted(self.folder.iterdir()):
                match = re.fullmatch(r"\.(\d{8,})\.(partial|deleted)", path.name)
                if match and match[2] == "partial" and _is_good(path):
                    self._publish(int(match[1]))
                elif match:
                    shutil.rmtree(path, ignore_errors=True)

    def _complete(self, step: int, content: Mapping[str, Any]) -> None:
        """Make a checkpoint of what Orbax has written, and delete those that it replaces."""
        write_manifest(self._partial(step), content)
        self._publish(step)
        self._good = step

    def _publish(self, step: int) -> None:
        if self._path(step).exists():  # the same step, saved again: there are two of it now
            self._delete(step)
        self._partial(step).rename(self._path(step))
        sync_folder(self.folder)
        steps = self._steps()
        kept = [s for s in steps if s <= step]
        for old in kept[: -self.keep_last]:
            if not (self.keep_every and old % self.keep_every == 0):
                self._delete(old)
        for later in steps[len(kept) :]:
            self._delete(later)

    def _delete(self, step: int) -> None:
        gone = self.folder / f".{step:08d}.deleted"  # by one rename: half a checkpoint is none
        shutil.rmtree(gone, ignore_errors=True)
        self._path(step).rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    @contextlib.contextmanager
    def _told(self, step: int | None) -> Iterator[None]:
        """Failures of the operating system as one OutputError; what they left behind is removed."""
        try:
            yield
        except Exception as error:
            reason = os_reason(error)
            if reason is None:
                raise
            if step is not None and jax.process_index() == 0:
                shutil.rmtree(self._partial(step), ignore_errors=True)
            what = "checkpoints" if step is None else f"the checkpoint of step {step}"
            good = self._good
            left = f"; the checkpoint of step {good} is intact" if good is not None else ""
            raise OutputError(
                f"{what} cannot be written to {self.folder}: {reason}{left}"
            ) from error


class _Saving:
    """A save under way: waits in a thread for Orbax, then, in process 0, makes it complete."""

    def __init__(self, step: int, arrays: ArrayFiles, complete: Callable[[], None]):
        self.step = step
        self._arrays, self._complete = arrays, complete
        self._failed: Exception | None = None
        self._not_completed: Exception | None = None
        # Not a daemon: a run that ends by an error still completes its last checkpoint.
        self._thread = threading.Thread(target=self._work, name="checkpoint")
        self._thread.start()

    def join(self) -> None:
        self._thread.join()

    def result(self) -> None:
        """Raises what this process could not write."""
        if self._failed is not None:
            raise self._failed

    def completion(self) -> None:
        """In process 0: raises what went wrong in completing it."""
        if self._not_completed is not None:
            raise self._not_completed

    def _work(self) -> None:
        try:
            self._arrays.wait()
        except Exception as error:
            self._failed = error
            return
        if jax.process_index() == 0:
            try:
                self._complete()
            except Exception as error:
                self._not_completed = error


def _is_good(folder: Path) -> bool:
    try:
        check_files(folder, read_manifest(folder))
        return True
    except Damaged:
        return False


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """A lock that the operating system takes back when this process ends, however it ends."""
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ConfigError(
                f"another process writes checkpoints to {folder}; wait for its end, or name "
                "another output folder"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)
