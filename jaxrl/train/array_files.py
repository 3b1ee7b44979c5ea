"""Arrays of a pytree in a folder, written and read by Orbax, each process its own shards."""

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxrl.options import ConfigError

# For all processes to have written their part: 500 GB to a slow network disk.
_TIMEOUT_S = 2 * 3600

Shapes = Mapping[str, tuple[tuple[int, ...], np.dtype]]


class ArrayFiles:
    """Writes and reads arrays by path, "params/layers/mlp/gate/kernel"; one write at a time.

    Orbax's own CheckpointManager deletes by its own idea of what is complete, and its "v1" API is
    still called experimental, so this is its AsyncCheckpointer. OCDBT: a few files however many
    arrays and shards. Uncompressed: fp32 weights hardly shrink, and it would take most of a save's
    time.
    """

    def __init__(self):
        self._quiet = contextlib.ExitStack()
        self._quiet.enter_context(_quiet())
        self._orbax = ocp.AsyncCheckpointer(
            ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_compression=False),
            async_options=ocp.AsyncOptions(timeout_secs=_TIMEOUT_S),
        )

    def write(self, folder: Path, arrays: Mapping[str, Any]) -> None:
        """Begin to write; returns when the arrays may be donated."""
        with jax.transfer_guard("allow"):
            self._orbax.save(folder, args=ocp.args.PyTreeSave(dict(arrays)))

    def wait(self) -> None:
        """Until all processes have written. Raises what went wrong in this one."""
        self._orbax.wait_until_finished()

    def read(self, folder: Path, wanted: Mapping[str, Any], *, some: bool) -> dict[str, jax.Array]:
        """Arrays as `wanted`: ShapeDtypeStructs with shardings. some: the folder has others too."""
        args = {
            path: ocp.ArrayRestoreArgs(sharding=a.sharding, global_shape=a.shape, dtype=a.dtype)
            for path, a in wanted.items()
        }
        restore = ocp.args.PyTreeRestore(item=dict(wanted), restore_args=args, partial_restore=some)
        with jax.transfer_guard("allow"):
            return self._orbax.restore(folder, args=restore)

    def close(self) -> None:
        self._orbax.close()
        self._quiet.close()


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves by path, "params/layers/mlp/gate/kernel"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(flat) < len(leaves):
        raise ValueError("two arrays of the state have the same path; leave '/' out of its keys")
    return flat


def check_same(wanted: Mapping[str, Any], stored: Shapes, folder: Path) -> None:
    """Raise ConfigError, naming the first difference; floats may be of another dtype."""
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


def os_reason(error: BaseException | None) -> str | None:
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
def _quiet() -> Iterator[None]:
    """Leaves out what Orbax and tensorstore print of errors that are raised, too: traces of each
    thread that met one, and of each later one, which finds nobody waiting."""
    # For good: asyncio speaks when the task is deleted, which may be after the last checkpoint.
    logging.getLogger("asyncio").addFilter(_keep_task)

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


def _keep_task(record: logging.LogRecord) -> bool:
    """False: of several writes of Orbax's that failed, one that it did not look at."""
    said = record.getMessage()
    return not ("exception was never retrieved" in said and "orbax" in said)
