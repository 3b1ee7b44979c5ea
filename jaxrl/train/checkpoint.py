"""Checkpoints of a run: written by Orbax beside the training, used again only where complete.

    FOLDER/00000100/state/         the arrays, as Orbax writes them
    FOLDER/00000100/manifest.json  step, extra, arrays' shapes, every file's size and CRC-32

The manifest is written last, under another name first: a checkpoint without it is not complete,
whatever killed its writer, and is no checkpoint. Older ones are deleted when a newer one has its
manifest, their own manifest first. So at every moment after the first one there is a good one.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxrl.cli import OutputError
from jaxrl.options import ConfigError

MANIFEST = "manifest.json"
_BLOCK = 2**22


@dataclasses.dataclass(frozen=True)
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
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        keep_last: int = 2,
        keep_every: int = 0,
        read_only: bool = False,
    ):
        self.folder = Path(folder).absolute()
        self.keep_last, self.keep_every = keep_last, keep_every
        self._first = jax.process_index() == 0
        self._saving: tuple[int, Mapping[str, Any], Mapping[str, Any]] | None = None
        if self._first and not read_only:
            with self._told(None):
                self.folder.mkdir(parents=True, exist_ok=True)
                self._clean()
        # Uncompressed: fp32 weights hardly shrink, and compression takes most of a save's time.
        self._writer = ocp.AsyncCheckpointer(
            ocp.PyTreeCheckpointHandler(use_compression=False),
            async_options=ocp.AsyncOptions(post_finalization_callback=self._complete),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Wait for a save that is under way, whatever became of it."""
        with contextlib.suppress(OutputError):
            self.wait()
        self._writer.close()

    def save(self, step: int, state: Any, extra: Mapping[str, Any]) -> None:
        """Begin to write the pytree `state` and the JSON value `extra`; returns when the arrays are
        copied and may be donated. Waits for the save before it, and raises what went wrong there:
        OutputError."""
        self.wait()
        arrays = _flat(state)
        shapes = {path: [list(a.shape), str(a.dtype)] for path, a in arrays.items()}
        json.dumps(extra)  # what cannot be written is to be found out here
        self._saving = (step, shapes, extra)
        with self._told(step):
            self._writer.save(self._path(step) / "state", ocp.args.PyTreeSave(arrays), force=True)

    def wait(self) -> None:
        """Until the last save is complete. Raises OutputError where it could not be written."""
        if self._saving is not None:
            step = self._saving[0]
            try:
                with self._told(step):
                    self._writer.wait_until_finished()
            finally:
                self._saving = None

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, rising."""
        if not self.folder.is_dir():
            return []
        found = (path for path in self.folder.iterdir() if (path / MANIFEST).is_file())
        return sorted(int(path.name) for path in found if path.name.isdigit())

    def restore(self, abstract: Any, step: int | None = None) -> Restored | None:
        """The checkpoint of `step`, or the newest that is not corrupted (None without any), as a
        pytree like `abstract`, each array with the shape, dtype and sharding there.

        Raises ConfigError for a step that there is not, a corrupted one that was asked for or is
        the last one left, and arrays other than those of `abstract`.
        """
        steps, skipped = self.steps(), []
        if step is not None and step not in steps:
            there = f"there are {', '.join(map(str, steps))}" if steps else "there are none"
            raise ConfigError(f"no checkpoint of step {step} in {self.folder}; {there}")
        for candidate in [step] if step is not None else reversed(steps):
            manifest, problem = self._verified(candidate)
            if problem:
                skipped.append((candidate, problem))
                continue
            return self._read(candidate, abstract, manifest, skipped)
        if skipped:
            what = "; ".join(f"step {step}: {problem}" for step, problem in skipped)
            raise ConfigError(f"no checkpoint in {self.folder} can be used: {what}")
        return None

    def _read(self, step: int, abstract: Any, manifest, skipped) -> Restored:
        wanted = _flat(abstract)
        _compare(wanted, manifest["arrays"], self._path(step))
        args = {
            path: ocp.ArrayRestoreArgs(sharding=a.sharding, global_shape=a.shape, dtype=a.dtype)
            for path, a in wanted.items()
        }
        arrays = self._writer.restore(
            self._path(step) / "state",
            ocp.args.PyTreeRestore(
                item=dict(wanted),
                restore_args=args,
                partial_restore=len(wanted) < len(manifest["arrays"]),
            ),
        )
        state = jax.tree.unflatten(jax.tree.structure(abstract), [arrays[p] for p in wanted])
        return Restored(step, state, manifest["extra"], tuple(skipped))

    def extra(self, step: int | None = None) -> tuple[int, Mapping[str, Any]]:
        """(step, extra) of a checkpoint, default the newest. ConfigError where there is none."""
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            wish = "" if step is None else f" of step {step}"
            there = f"; there are {', '.join(map(str, steps))}" if steps else ""
            raise ConfigError(f"no checkpoint{wish} in {self.folder}{there}")
        step = steps[-1] if step is None else step
        manifest, problem = self._manifest(step)
        if problem:
            raise ConfigError(f"checkpoint of step {step} in {self.folder}: {problem}")
        return step, manifest["extra"]

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:08d}"

    def _complete(self) -> None:
        """Orbax's thread, when the arrays are in their place."""
        if not self._first or self._saving is None:
            return
        step, shapes, extra = self._saving
        folder = self._path(step)
        files = {str(f.relative_to(folder)): _fingerprint(f) for f in _files(folder / "state")}
        manifest = {"step": step, "extra": extra, "arrays": shapes, "files": files}
        partial = folder / f".{MANIFEST}"
        with partial.open("w", encoding="utf-8") as f:
            json.dump(manifest, f)
            f.flush()
            os.fsync(f.fileno())
        partial.replace(folder / MANIFEST)
        for old in self.steps()[: -self.keep_last]:
            if not (self.keep_every and old % self.keep_every == 0):
                _delete(self._path(old))

    def _clean(self) -> None:
        """Remove what killed runs left unfinished."""
        for path in self.folder.iterdir():
            if re.fullmatch(r"\d{8,}.*", path.name) and not (path / MANIFEST).is_file():
                shutil.rmtree(path, ignore_errors=True)

    def _manifest(self, step: int) -> tuple[Any, str]:
        """(manifest, "") or (None, what is wrong with it)."""
        file = self._path(step) / MANIFEST
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
            if {"extra", "arrays", "files"} <= manifest.keys() and manifest["step"] == step:
                return manifest, ""
        except (OSError, ValueError, AttributeError):
            pass
        return None, f"{MANIFEST} is corrupted"

    def _verified(self, step: int) -> tuple[Any, str]:
        """(manifest, "") of a checkpoint whose files are as they were written, or (.., what is
        wrong). Process 0 reads the files for all."""
        manifest, problem = self._manifest(step)
        if not problem and self._first:
            problem = _damage(self._path(step), manifest["files"])
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            with jax.transfer_guard("allow"):
                bad = multihost_utils.broadcast_one_to_all(np.array(bool(problem)))
            problem = problem or ("corrupted, process 0 says" if bad else "")
        return manifest, problem

    @contextlib.contextmanager
    def _told(self, step: int | None) -> Iterator[None]:
        """Errors of writing as one line."""
        try:
            yield
        except Exception as error:
            what = "checkpoints" if step is None else f"the checkpoint of step {step}"
            cause = _os_error(error)
            if cause is None and not isinstance(error, (OSError, ValueError)):
                raise
            line = " ".join(str(cause or error).split())[:200]
            steps = self.steps()
            left = f"the last good one is of step {steps[-1]}" if steps else "there is none before"
            raise OutputError(
                f"{what} cannot be written to {self.folder}: {line}; {left}"
            ) from error


def _os_error(error: BaseException | None) -> BaseException | None:
    """The failure of the operating system behind an error, if it is one."""
    while error is not None:
        if isinstance(error, OSError) or "errno" in str(error).lower() or "No space" in str(error):
            return error
        error = error.__cause__ or error.__context__
    return None


def _flat(tree: Any) -> dict[str, Any]:
    """The leaves by path, "params/layers/mlp/gate/kernel"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _compare(wanted: Mapping[str, Any], stored: Mapping[str, Any], folder: Path) -> None:
    """Raise ConfigError, naming the first difference."""
    for path, a in wanted.items():
        if path not in stored:
            raise ConfigError(
                f"checkpoint {folder} has no {path}: it is of another model, optimizer or LoRA"
            )
        shape = tuple(stored[path][0])
        if shape != tuple(a.shape):
            raise ConfigError(
                f"checkpoint {folder} has {path} of shape {shape}, and the run {tuple(a.shape)}"
            )


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _fingerprint(file: Path) -> list[int]:
    """[size, CRC-32]."""
    crc = size = 0
    with file.open("rb") as f:
        while block := f.read(_BLOCK):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return [size, crc]


def _damage(folder: Path, files: Mapping[str, Sequence[int]]) -> str:
    """What is wrong with a checkpoint's files, or ""."""
    for name, (size, crc) in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size:,} bytes, not {size:,}"
        if _fingerprint(file) != [size, crc]:
            return f"{name} is corrupted"
    return ""


def _delete(folder: Path) -> None:
    (folder / MANIFEST).unlink()  # first: half of a checkpoint is none
    shutil.rmtree(folder, ignore_errors=True)
