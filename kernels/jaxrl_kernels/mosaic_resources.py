"""What compiled Mosaic GPU kernels need of a GPU: their compilation says it. No GPU is needed.

The dump's variables and file names are Mosaic's own affair and have no promise behind them:
tests/bench/test_kernels.py holds jaxrl to what is read here.
"""

import contextlib
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator

from jaxrl_kernels.resources import MMA, Resources, global_atomics

# "Barrier(arrival_count=1, num_barriers=2, orders_tensor_core=False): 3" is three times two.
_BARRIERS = re.compile(r"num_barriers=(\d+)[^()]*\): (\d+)")
_BARRIER_BYTES, _TENSOR_MEMORY_POINTER_BYTES = 8, 4


@contextlib.contextmanager
def collect() -> Iterator[list[Resources]]:
    """The Mosaic kernels that are lowered and compiled inside; they are listed when it ends.

    A kernel says what it needs where the dump is on when it is lowered. It is on for the process,
    so only one may collect at a time.
    """
    import jax.experimental.mosaic.gpu  # noqa: F401  (sets the second variable when imported)
    import triton

    tools = pathlib.Path(triton.__file__).parent / "backends" / "nvidia"  # bin/nvdisasm
    found: list[Resources] = []
    with tempfile.TemporaryDirectory() as folder:  # 80 MB of compiler passes for one kernel
        wanted = {"MOSAIC_GPU_DUMP_TO": folder, "MOSAIC_GPU_CUDA_ROOT": str(tools)}
        before = {name: os.environ.get(name) for name in wanted}
        os.environ |= wanted
        try:
            yield found
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value
        found += [resources(said) for said in sorted(pathlib.Path(folder).glob("*.ptxas"))]


def resources(ptxas: pathlib.Path) -> Resources:
    """Of the kernel that `ptxas`, a file of the dump, is about; its other files lie beside it."""
    said = ptxas.read_text()
    needs = ptxas.with_suffix(".resources.txt").read_text()
    sass = next((f.read_text() for f in ptxas.parent.glob(f"{ptxas.stem}.sass*")), None)
    used = re.search(r"Used (\d+) registers", said)
    scratch = re.search(r"smem_scratch_bytes=(\d+)", needs)
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    if not used or not spilled or not scratch or sass is None:
        raise RuntimeError(
            f"Mosaic's dump of {ptxas.stem} lacks registers, spills, shared memory or SASS"
        )
    barriers = sum(int(size) * int(times) for size, times in _BARRIERS.findall(needs))
    mma = MMA.findall(sass)
    tensor_memory = re.search(r"tmem_\w*cols=[1-9]", needs) is not None
    return Resources(
        name=ptxas.stem,
        registers=int(used[1]),
        spill_bytes=sum(map(int, spilled.groups())),
        smem_bytes=int(scratch[1])
        + _BARRIER_BYTES * barriers
        + _TENSOR_MEMORY_POINTER_BYTES * tensor_memory,
        mma_instructions=len(mma),
        mma_kinds=tuple(sorted(set(mma))),
        global_atomics=global_atomics(ptxas.with_suffix(".ptx").read_text()),
    )
