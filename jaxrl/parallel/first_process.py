"""What process 0 finds out for all: a folder on a network disk looks later elsewhere."""

import itertools
import json
from collections.abc import Callable

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxrl.cli import OutputError
from jaxrl.options import ConfigError

# For process 0 to read a checkpoint of 500 GB.
_TIMEOUT_S = 2 * 3600
_asked = itertools.count()


def from_first[T](ask: Callable[[], T]) -> T:
    """What `ask` returns in process 0, JSON, in all of them; so are its errors for the user.

    All processes are to ask at the same place.
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
    # The others wait here: a collective gives up after a minute or so.
    wait = ocp.multihost.get_barrier_sync_fn()
    wait(key=f"jaxrl_from_first_{next(_asked)}", timeout_ms=1000 * _TIMEOUT_S)
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
