"""What a compiled Triton kernel needs of a GPU, and whether its sums have a fixed order.

Read from ptxas and the disassembler that come with Triton; no GPU is needed.
"""

import dataclasses
import pathlib
import re
import subprocess
import tempfile

from jaxrl_kernels.launch import Compiled

# Tensor-core instructions in SASS: a warp's (Ampere's), a warpgroup's (Hopper's), and those that
# keep the sum in tensor memory (Blackwell's UTCHMMA and its kin).
MMA = re.compile(r"\b(HMMA|QMMA|HGMMA|QGMMA|UTC[A-Z]?MMA)\b")
# Atomics and reductions in PTX, with where they work: an address space that is not named may be
# global memory. TMA's reductions name first where they go, then whence they come.
ATOMIC = re.compile(r"(?<![\w.])(?:atom|red|multimem\.red|cp\.reduce\.async)(?:\.[\w:]+)+")


@dataclasses.dataclass(frozen=True)
class Resources:
    """Of one kernel: registers per thread, bytes spilled per thread, shared memory per program in
    bytes, how many tensor-core instructions its machine code holds, of which kinds ("HGMMA"), and
    the atomics of its PTX on global memory: with one, a sum's order is that of a race."""

    name: str
    registers: int
    spill_bytes: int
    smem_bytes: int
    mma_instructions: int
    mma_kinds: tuple[str, ...]
    global_atomics: tuple[str, ...]


def resources(kernel: Compiled) -> Resources:
    """Assemble one of `launch.collect`'s kernels and read what it needs."""
    arch = f"sm_{kernel.capability}{'a' if kernel.capability >= 90 else ''}"
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = pathlib.Path(folder, "k.ptx"), pathlib.Path(folder, "k.cubin")
        ptx.write_text(kernel.ptx)
        said = _run(_tool("ptxas-blackwell"), "-v", f"-arch={arch}", str(ptx), "-o", str(cubin))
        sass = _run(_tool("nvdisasm"), "-c", str(cubin))
    mma = MMA.findall(sass)
    spilled = [_find(rf"(\d+) bytes spill {way}", said) for way in ("stores", "loads")]
    return Resources(
        name=kernel.name,
        registers=int(_find(r"Used (\d+) registers", said)),
        spill_bytes=sum(map(int, spilled)),
        smem_bytes=kernel.smem_bytes,
        mma_instructions=len(mma),
        mma_kinds=tuple(sorted(set(mma))),
        global_atomics=global_atomics(kernel.ptx),
    )


def global_atomics(ptx: str) -> tuple[str, ...]:
    """The kinds of atomic instruction in `ptx` that may work on global memory, as in
    "red.global.add.f32". Those on shared memory, barriers among them, are not: one program's own
    sums, or none."""
    found = set(ATOMIC.findall(ptx))
    return tuple(sorted(f for f in found if ".global" in f or ".shared" not in f))


def _find(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if not found:
        raise RuntimeError(f"ptxas said nothing like {pattern!r}: {text[:200]}")
    return found[1]


def _tool(name: str) -> str:
    import triton

    return str(pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{pathlib.Path(command[0]).name}: {done.stderr.strip()[:300]}")
    return done.stdout + done.stderr
