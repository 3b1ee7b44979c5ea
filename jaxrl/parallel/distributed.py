"""One program over the GPUs of many hosts: who takes part, how they meet, what each one loads.

One process per host drives all of the host's GPUs. Who takes part is read from the environment:

| variable | meaning | without it |
|---|---|---|
| `JAX_COORDINATOR_ADDRESS` | host:port of process 0, free there | SLURM: the step's first host |
| `JAX_NUM_PROCESSES` | how many processes | SLURM: the step's tasks |
| `JAX_PROCESS_ID` | this one, 0 .. n-1 | SLURM: the task; Kubernetes: the Job's completion index |

With none of them, and not under `srun`, a process is alone. JAX's own detection is not asked: under
SLURM it gives a process one GPU of its host, under Kubernetes it needs a client library and the
right to read pods.
"""

import contextlib
import dataclasses
import os
import re
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxrl.options import ConfigError

ADDRESS, COUNT, INDEX = VARIABLES = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
)
LOOPBACK = ("localhost", "127.0.0.1", "::1")
# Above the ports that Linux hands out by itself (up to 60999).
FIRST_PORT, PORTS = 61440, 4096


@dataclasses.dataclass(frozen=True)
class Processes:
    """Process `index` of `count`; `coordinator` is process 0's "host:port", "" where alone."""

    coordinator: str = ""
    count: int = 1
    index: int = 0

    @property
    def address(self) -> tuple[str, int]:
        """The coordinator's host, without an IPv6 address's brackets, and port."""
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)

    @property
    def bind_host(self) -> str:
        """Where process 0 listens: every address of its host, unless all processes are on it."""
        host, _ = self.address
        return host if host in LOOPBACK else ""


def from_environment(environ: Mapping[str, str] = os.environ) -> Processes:
    """Who takes part, according to the environment. Imports no JAX.

    Raises ConfigError, naming variable, value and way out, for settings that are half there,
    wrong, or ask for several processes per host.
    """
    given = {name: environ[name] for name in VARIABLES if environ.get(name)}
    known = _slurm(environ) | given
    if not known or (int_of(COUNT, known[COUNT], at_least=1) if COUNT in known else 0) == 1:
        return Processes()
    if INDEX not in known and environ.get("JOB_COMPLETION_INDEX"):
        known[INDEX] = environ["JOB_COMPLETION_INDEX"]
    missing = [name for name in VARIABLES if name not in known]
    if missing:
        has = ", ".join(f"{name}={value}" for name, value in given.items())
        raise ConfigError(
            f"{has}, but no {' and no '.join(missing)}; set all of {', '.join(VARIABLES)}, or none "
            "to run on this host alone"
        )
    if not re.fullmatch(r".+:\d+", known[ADDRESS]) or not 0 < int(_port(known[ADDRESS])) < 65536:
        raise ConfigError(
            f"{ADDRESS} is {known[ADDRESS]!r}; write process 0's host:port, e.g. node0:{FIRST_PORT}"
        )
    count = int_of(COUNT, known[COUNT], at_least=1)
    index = int_of(INDEX, known[INDEX], at_least=0)
    if index >= count:
        raise ConfigError(
            f"{INDEX} is {index}, and {COUNT} {count}; processes are numbered 0 to {count - 1}"
        )
    return Processes(known[ADDRESS], count, index)


def _port(address: str) -> str:
    return address.rpartition(":")[2]


def int_of(name: str, text: str, *, at_least: int) -> int:
    """The whole number that variable `name` holds; ConfigError for anything else."""
    if not re.fullmatch(r"\d+", text) or int(text) < at_least:
        raise ConfigError(f"{name} is {text!r}; it takes a whole number from {at_least}")
    return int(text)


def _slurm(environ: Mapping[str, str]) -> dict[str, str]:
    """What `srun` says of its tasks; {} outside it (a batch script itself is no task of a step)."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")
    if not all(environ.get(name) for name in names):
        return {}
    job, nodes, tasks, task = (environ[name] for name in names)
    hosts = environ.get("SLURM_STEP_NUM_NODES") or tasks
    count = int_of("SLURM_STEP_NUM_TASKS", tasks, at_least=1)
    if count == 1:
        return {}
    if count != int_of("SLURM_STEP_NUM_NODES", hosts, at_least=1):
        raise ConfigError(
            f"srun started {count} tasks on {hosts} nodes; one process drives all GPUs of its "
            "node: use srun --ntasks-per-node=1"
        )
    # Steps of one job that run side by side meet at different ports.
    step = environ.get("SLURM_STEP_ID", "")
    number = int_of("SLURM_JOB_ID", job, at_least=0) + (int(step) if step.isdigit() else 0)
    return {
        ADDRESS: f"{first_host(nodes)}:{FIRST_PORT + number % PORTS}",
        COUNT: tasks,
        INDEX: task,
    }


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list: "gpu[07-09,12]-ib,login1" -> "gpu07-ib"."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def initialize(
    processes: Processes | None = None, *, timeout_s: float = 300, heartbeat_s: float = 100
) -> Processes:
    """Join the other processes (default: those of the environment); nothing to do where alone.

    Call before JAX makes its first array. Afterwards `jax.devices()` are those of all processes.
    Without an answer from all of them within `timeout_s`, JAX ends the process; a process that
    is silent for `heartbeat_s` ends all others.
    """
    processes = from_environment() if processes is None else processes
    if processes.count > 1:
        import jax

        jax.config.update("jax_cpu_collectives_implementation", "gloo")  # MPI needs a launcher
        host, port = processes.address
        # gRPC would ask a web proxy for the way to a host of this cluster.
        name = "no_grpc_proxy"
        direct = os.environ.get(name) or os.environ.get("no_proxy")
        os.environ[name] = f"{direct},{host}" if direct else host
        jax.config.update("jax_check_proxy_envs", False)  # it would warn of just that variable
        bind = processes.bind_host or "[::]"
        jax.distributed.initialize(
            processes.coordinator,
            processes.count,
            processes.index,
            cluster_detection_method="deactivate",
            initialization_timeout=max(1, round(timeout_s)),
            heartbeat_timeout_seconds=max(1, round(heartbeat_s)),
            coordinator_bind_address=f"[{bind}]:{port}" if bind == "::1" else f"{bind}:{port}",
        )
    return processes


def is_reporter() -> bool:
    """Whether this process prints and writes what all of them found: process 0."""
    import jax

    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """Whether any process says so; all of them are to ask at the same place."""
    import jax

    if jax.process_count() == 1:
        return flag
    import numpy as np
    from jax.experimental import multihost_utils

    with jax.transfer_guard("allow"):
        return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def in_order(devices: Iterable) -> list:
    """Devices host by host, as `make_mesh` wants them.

    The mesh's last axes are neighbours first: `context` and `expert` stay inside a host (NVLink)
    as long as they fit there, and `fsdp` is the axis that spans hosts.
    """
    return sorted(devices, key=lambda d: (d.process_index, d.id))


def local_rows(shape: Sequence[int], sharding) -> slice:
    """Rows (dimension 1 of a batch [M, B, T]) that this process's devices hold some of.

    Raises ValueError where they are not one run of rows.
    """
    indices = sharding.addressable_devices_indices_map(tuple(shape)).values()
    pieces = sorted({index[1].indices(shape[1])[:2] for index in indices})
    end = pieces[0][0]
    for start, stop in pieces:
        if start > end:
            raise ValueError(
                f"this process's devices hold rows {pieces} of {shape[1]}, not one run of them; "
                "order the mesh's devices host by host"
            )
        end = max(end, stop)
    return slice(pieces[0][0], end)


def global_batch[B](abstract: B, make: Callable[[slice], B]) -> B:
    """A batch over all processes' devices, of which this one makes only its own rows.

    abstract: ShapeDtypeStructs [M, B, T] with their shardings. `make(rows)` returns numpy arrays
    [M, b, T], the same tree, for b rows of B; what it returns for a row must not depend on who
    asks, as hosts that split a sequence make the same rows.
    """
    import jax

    first: Any = jax.tree.leaves(abstract)[0]
    rows = local_rows(first.shape, first.sharding)

    def assemble(whole, local):
        if local.shape != (whole.shape[0], rows.stop - rows.start, *whole.shape[2:]):
            raise ValueError(
                f"rows {rows.start} to {rows.stop} of a batch of shape {whole.shape} were asked "
                f"for, and an array of shape {local.shape} was made"
            )

        def piece(index):
            start, stop, _ = index[1].indices(whole.shape[1])
            return local[index[0], start - rows.start : stop - rows.start, *index[2:]]

        return jax.make_array_from_callback(whole.shape, whole.sharding, piece, dtype=whole.dtype)

    with jax.transfer_guard_host_to_device("allow"):  # the one that is meant
        return jax.tree.map(assemble, abstract, make(rows))


@contextlib.contextmanager
def reserved_port(bind_host: str = ""):
    """A port that stays this program's until the block ends, for JAX's coordinator to listen at.

    It is bound but never listens: gRPC may bind beside it, as both set SO_REUSEPORT; no other
    program can.
    """
    with contextlib.closing(_bound(bind_host)) as held:
        yield held.getsockname()[1]


def _bound(bind_host: str) -> socket.socket:
    families = [socket.AF_INET] if "." in bind_host else [socket.AF_INET6, socket.AF_INET]
    for family in families:
        with contextlib.suppress(OSError):  # a host without IPv6
            held = socket.socket(family)
            try:
                held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                if family == socket.AF_INET6:
                    held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
                held.bind((bind_host, 0))
            except OSError:
                held.close()
                raise
            return held
    raise OSError(f"no port can be bound at {bind_host or 'this host'!r}")
