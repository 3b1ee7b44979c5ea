"""A run that saves after every step, for tests that kill it, stop it, or let its disk be full.

    python checkpoint_worker.py FOLDER [few | full | rush | die PATTERN]

few: it ends after three steps. full: from its third step on no file may grow beyond 8 KiB. rush: it
does not wait for its saves. die: in its third save it kills itself before it opens, renames or
removes what PATTERN matches. Otherwise it goes on until it is told to stop.

Its state follows from the step, so that whatever is restored can be checked. Each event is a line:
`resumed N`, `skipped N`, `saving N`, `complete N`, `failed REASON`, `stopped N`.
"""

import os
import re
import resource
import signal
import sys
from multiprocessing.connection import Connection

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxrl  # noqa: F401  (before jax)
from jaxrl.cli import OutputError
from jaxrl.parallel import distributed
from jaxrl.train.checkpoint import Checkpoints, Restored
from jaxrl.train.signals import StopSignals
from jaxrl.train.state import TrainState


def state_of(step: int, make) -> TrainState:
    """The state of a step, `make` called with each array's values and PartitionSpec."""
    values = np.random.default_rng(step).standard_normal((64, 256), np.float32)
    return TrainState(
        step=make(np.array(step, np.int32), PartitionSpec()),
        params={"layers": {"w": make(values, PartitionSpec("fsdp"))}, "unused": None},
        frozen={},
        opt_state=(make(values[:, :3] + 1, PartitionSpec("fsdp")), ()),
    )


def sharded(step: int) -> TrainState:
    mesh = Mesh(np.array(distributed.in_order(jax.devices())), ("fsdp",))

    def make(values, spec):
        place = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(values.shape, place, lambda index: values[index])

    return state_of(step, make)


def abstract() -> TrainState:
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), sharded(0)
    )


def extra_of(step: int) -> dict:
    return {"position": [step, 0.1 * step]}


def check(restored: Restored) -> None:
    """Every array of it that is in this process is that of its step."""

    def equal(array, values):
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, values[shard.index])

    expected = state_of(restored.step, lambda values, spec: values)
    jax.tree.map(equal, restored.state, expected)
    assert restored.extra == extra_of(restored.step)


def die_before(pattern: str) -> None:
    def audit(event: str, args: tuple) -> None:
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            words = [event, *(str(arg) for arg in args if isinstance(arg, (str, os.PathLike)))]
            if re.search(pattern, " ".join(words)):
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)


def say(*words) -> None:
    print(*words, flush=True)


def forked(out: Connection, *args: str) -> None:
    """`main` in a fork of a process that has imported this, its output going to a pipe."""
    os.dup2(out.fileno(), sys.stdout.fileno())
    main(*args)


def main(folder: str, mode: str = "", pattern: str = "") -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    distributed.initialize()
    with Checkpoints(folder, keep_last=2) as checkpoints, StopSignals() as stop:
        restored, begin = checkpoints.restore(abstract()), 0
        if restored is not None:
            check(restored)
            begin = restored.step
            for step, reason in restored.skipped:
                say("skipped", step, reason)
        say("resumed", begin)
        step = begin
        while not stop.requested and not (mode == "few" and step == begin + 3):
            step += 1
            if mode == "die" and step == begin + 3:
                die_before(pattern)
            if mode == "full" and step == begin + 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
            say("saving", step)
            try:
                checkpoints.save(step, sharded(step), extra_of(step))
                if mode != "rush":
                    checkpoints.wait()
                    say("complete", step)
            except OutputError as error:
                say("failed", error)
                return
        checkpoints.wait()
        say("stopped", step)


if __name__ == "__main__":
    main(*sys.argv[1:])
