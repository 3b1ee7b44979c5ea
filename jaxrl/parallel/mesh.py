"""The one device mesh: axes `fsdp`, `expert`, `context`."""

from collections.abc import Sequence

import numpy as np
from jax.sharding import AxisType, Mesh

from jaxrl.options import ConfigError

AXES = ("fsdp", "expert", "context")

# For XLA's compiler of programs over several devices of a CPU: in the order of the schedule, or
# devices that begin collectives over different groups in orders of their own wait for each other
# forever.
CPU_OPTIONS: dict[str, bool | int | str] = {"xla_cpu_enable_concurrency_optimized_scheduler": False}


def mesh_shape(num_devices: int, expert: int = 1, context: int = 1) -> tuple[int, int, int]:
    """Axis sizes (fsdp, expert, context) over `num_devices`; fsdp takes what the others leave.

    Raises ConfigError, naming divisors that would do, where the axes do not divide the devices.
    """
    for name, size in (("expert", expert), ("context", context)):
        if size < 1 or num_devices % size:
            fits = [d for d in range(1, num_devices + 1) if num_devices % d == 0]
            raise ConfigError(
                f"{name} axis {size} does not divide {num_devices} devices; use one of {fits}"
            )
    if num_devices % (expert * context):
        raise ConfigError(
            f"expert axis {expert} x context axis {context} does not divide {num_devices} devices"
        )
    return num_devices // (expert * context), expert, context


def make_mesh(devices: Sequence, expert: int = 1, context: int = 1) -> Mesh:
    """The mesh over `devices`, neighbours along `context` first, then `expert`, then `fsdp`."""
    shape = mesh_shape(len(devices), expert, context)
    return Mesh(np.array(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))
