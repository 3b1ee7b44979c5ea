"""What process 0 finds out for all: a folder on a network disk looks later elsewhere."""

import itertools
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxrl.cli import HostLostError, OutputError
from jaxrl.options import ConfigError

# For process 0 to read a checkpoint of 500 GB, or to have rollouts drawn.
_TIMEOUT_S = 2 * 3600
_ERRORS = {kind.__name__: kind for kind in (ConfigError, OutputError, HostLostError)}
_asked = itertools.count()


def from_first[T](ask: Callable[[], T]) -> T:
    """What `ask` returns in process 0, JSON, in all of them. Where it raises, so do all: for an
    error that is the user's the same one, for any other those beside process 0 a RuntimeError.

    All processes are to ask at the same place.
    """
    if jax.process_count() == 1:
        return ask()
    from jax.experimental import multihost_utils

    said, failed = "", None
    if jax.process_index() == 0:
        try:
            said = json.dumps({"value": ask()})
        except Exception as error:  # whichever it is, nobody is left waiting
            failed = error
            said = json.dumps(_told(error))
    # The others wait here: a collective gives up after a minute or so.
    wait = ocp.multihost.get_barrier_sync_fn()
    wait(key=f"jaxrl_from_first_{next(_asked)}", timeout_ms=1000 * _TIMEOUT_S)
    text = np.frombuffer(said.encode(), np.uint8)
    with jax.transfer_guard("allow"):
        size = int(multihost_utils.broadcast_one_to_all(np.array(text.size, np.int32)))
        text = multihost_utils.broadcast_one_to_all(
            text if jax.process_index() == 0 else np.zeros(size, np.uint8)
        )
    if failed is not None:
        raise failed
    found = json.loads(bytes(np.asarray(text)))
    if "error" in found:
        raise _ERRORS.get(found["kind"], RuntimeError)(found["error"])
    return found["value"]


def _told(error: Exception) -> dict[str, str]:
    for kind, known in _ERRORS.items():
        if isinstance(error, known):
            return {"kind": kind, "error": str(error)}
    line = " ".join(f"process 0 has failed: {type(error).__name__}: {error}".split())
    return {"kind": "", "error": line}


def on_first(tree: Any) -> Any:
    """Arrays that lie over the devices of all processes, whole and in the memory of process 0's
    host; None in the others. All processes are to call it at the same place."""
    from jax.experimental import multihost_utils

    def whole(array: jax.Array) -> np.ndarray | None:
        found = multihost_utils.process_allgather(array, tiled=True)
        return np.asarray(found) if jax.process_index() == 0 else None

    with jax.transfer_guard("allow"):
        gathered = jax.tree.map(whole, tree)
    return gathered if jax.process_index() == 0 else None
