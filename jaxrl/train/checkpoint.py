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
import logging
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxrl.cli import OutputError
from jaxrl.options import ConfigError
from jaxrl.train.manifest import (
    MANIFEST,
    Damaged,
    check_files,
    read_manifest,
    sync_folder,
    write_manifest,
)
from jaxrl.train.state import TrainState

# For all processes to have written their part: 500 GB to a slow network disk.
_TIMEOUT_S = 2 * 3600
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
        self._held = contextlib.ExitStack()
        if not read_only:
            _from_first(self._open)
        self._held.enter_context(_quiet())
        # Orbax's own CheckpointManager deletes by its own idea of what is complete, and its "v1"
        # API is still called experimental. OCDBT: a few files however many arrays and shards.
        # Uncompressed: fp32 weights hardly shrink, and it would take most of a save's time.
        self._writer = ocp.AsyncCheckpointer(
            ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_compression=False),
            async_options=ocp.AsyncOptions(timeout_secs=_TIMEOUT_S),
        )

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
            self._writer.close()
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
        arrays = _flat(state)
        content = {
            "step": step,
            "extra": json.loads(json.dumps(extra)),  # as it is now, and as it will come back
            "arrays": {path: [list(a.shape), str(a.dtype)] for path, a in arrays.items()},
        }

        def begin() -> None:
            with self._told(step):
                shutil.rmtree(self._partial(step), ignore_errors=True)
                self._partial(step).mkdir()

        _from_first(begin)
        with self._told(step), jax.transfer_guard("allow"):
            self._writer.save(self._partial(step) / "state", args=ocp.args.PyTreeSave(arrays))
        self._saving = _Saving(step, self._writer, lambda: self._complete(step, content))

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

        _from_first(end)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, rising; damage that came later is not looked for."""
        return _from_first(self._steps)

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
        found = _from_first(lambda: self._choose(step, lambda *_: None))
        if found is None:
            raise ConfigError(f"{self.folder} holds no checkpoint")
        return found["manifest"]["step"], found["manifest"]["extra"]

    def _restore(self, abstract: Any, step: int | None, left_out: str | tuple) -> Restored | None:
        found = _from_first(lambda: self._choose(step, check_files))
        if found is None:
            return None
        manifest, wanted = found["manifest"], _flat(abstract)
        stored = {
            path: (tuple(shape), np.dtype(dtype))
            for path, (shape, dtype) in manifest["arrays"].items()
            if not path.startswith(left_out)
        }
        folder = self._path(manifest["step"])
        _compare(wanted, stored, folder)
        args = {
            path: ocp.ArrayRestoreArgs(sharding=a.sharding, global_shape=a.shape, dtype=a.dtype)
            for path, a in wanted.items()
        }
        with jax.transfer_guard("allow"):
            arrays = self._writer.restore(
                folder / "state",
                args=ocp.args.PyTreeRestore(
                    item=dict(wanted), restore_args=args, partial_restore=bool(left_out)
                ),
            )
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
                if match and match[2] == "partial" and (path / MANIFEST).is_file():
                    self._publish(int(match[1]))
                elif match:
                    shutil.rmtree(path, ignore_errors=True)

    def _complete(self, step: int, content: Mapping[str, Any]) -> None:
        """Make a checkpoint of what Orbax has written, and delete those that it replaces."""
        write_manifest(self._partial(step), content)
        self._publish(step)

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
            reason = _os_reason(error)
            if reason is None:
                raise
            if step is not None and jax.process_index() == 0:
                shutil.rmtree(self._partial(step), ignore_errors=True)
            what = "checkpoints" if step is None else f"the checkpoint of step {step}"
            steps = self._steps() if step is not None else []
            left = f"; the checkpoint of step {steps[-1]} is intact" if steps else ""
            raise OutputError(
                f"{what} cannot be written to {self.folder}: {reason}{left}"
            ) from error


class _Saving:
    """A save under way: waits in a thread for Orbax, then, in process 0, makes it complete."""

    def __init__(self, step: int, writer: ocp.AsyncCheckpointer, complete: Callable[[], None]):
        self.step = step
        self._writer, self._complete = writer, complete
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
            self._writer.wait_until_finished()
        except Exception as error:
            self._failed = error
            return
        if jax.process_index() == 0:
            try:
                self._complete()
            except Exception as error:
                self._not_completed = error


def _flat(tree: Any) -> dict[str, Any]:
    """The leaves by path, "params/layers/mlp/gate/kernel"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(flat) < len(leaves):
        raise ValueError("two arrays of the state have the same path; leave '/' out of its keys")
    return flat


def _compare(wanted: Mapping[str, Any], stored: Mapping[str, Any], folder: Path) -> None:
    """Raise ConfigError, naming the first difference."""
    for path in [*wanted, *(path for path in stored if path not in wanted)]:
        there = _shown(*stored[path]) if path in stored else "not there"
        here = "nothing"
        if path in wanted:
            shape, dtype = tuple(wanted[path].shape), np.dtype(wanted[path].dtype)
            here = _shown(shape, dtype)
            if path in stored:
                floats = all(
                    jax.dtypes.issubdtype(t, np.floating) for t in (dtype, stored[path][1])
                )
                if shape == stored[path][0] and (floats or dtype == stored[path][1]):
                    continue
        raise ConfigError(
            f"checkpoint {folder} is of another model, optimizer or LoRA: {path} is {there}, and "
            f"this run has {here}; go on with the options it was written with"
        )


def _shown(shape: tuple[int, ...], dtype: Any) -> str:
    return f"{np.dtype(dtype).name}[{','.join(map(str, shape))}]"


def _os_reason(error: BaseException | None) -> str | None:
    """What the operating system said, if it is behind an error."""
    while error is not None:
        if isinstance(error, OSError):
            return error.strerror or str(error)
        # So tensorstore, whatever type its errors have.
        if code := re.search(r"os_error_code='(\d+)'", str(error)):
            return os.strerror(int(code[1]))
        error = error.__cause__
    return None


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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leaves out what Orbax and tensorstore print of errors that are raised, too: traces of each
    thread that met one, and of each later one, which finds nobody waiting."""

    def keep(record: logging.LogRecord) -> bool:
        return not (record.exc_info and "orbax" in record.pathname)

    def hook(unraisable) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    log, before = logging.getLogger("absl"), sys.unraisablehook
    log.addFilter(keep)
    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
        log.removeFilter(keep)


def _from_first[T](ask: Callable[[], T]) -> T:
    """What `ask` returns in process 0, JSON, in all of them; so are its errors for the user.

    File systems show processes on other hosts what was changed a little later.
    """
    if jax.process_count() == 1:
        return ask()
    from jax.experimental import multihost_utils

    said = {}
    if jax.process_index() == 0:
        try:
            said = {"value": ask()}
        except (ConfigError, OutputError) as error:
            said = {"error": str(error), "kind": type(error).__name__}
    text = np.frombuffer(json.dumps(said).encode(), np.uint8)
    with jax.transfer_guard("allow"):
        size = int(multihost_utils.broadcast_one_to_all(np.array(text.size, np.int32)))
        text = multihost_utils.broadcast_one_to_all(
            text if jax.process_index() == 0 else np.zeros(size, np.uint8)
        )
    said = json.loads(bytes(np.asarray(text)))
    if "error" in said:
        raise (ConfigError if said["kind"] == "ConfigError" else OutputError)(said["error"])
    return said["value"]
