"""What a compiled Triton kernel needs of a GPU: registers, spills, shared memory, instructions.

Read from ptxas and the disassembler that come with Triton; no GPU is needed.
"""

import dataclasses
import pathlib
import re
import subprocess
import tempfile

from jaxrl_kernels.launch import Compiled

# Tensor-core instructions in SASS: Ampere's, Hopper's warpgroup ones, Blackwell's.
MMA = re.compile(r"\b(HMMA|HGMMA|UTCHMMA|UTCQMMA|QGMMA)\b")


@dataclasses.dataclass(frozen=True)
class Resources:
    """Of one kernel: registers per thread, bytes spilled per thread, shared memory per program in
    bytes, and how many tensor-core instructions its machine code holds."""

    name: str
    registers: int
    spill_bytes: int
    smem_bytes: int
    mma_instructions: int


def resources(kernel: Compiled) -> Resources:
    """Assemble one of `launch.collect`'s kernels and read what it needs."""
    arch = f"sm_{kernel.capability}{'a' if kernel.capability >= 90 else ''}"
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = pathlib.Path(folder, "k.ptx"), pathlib.Path(folder, "k.cubin")
        ptx.write_text(kernel.ptx)
        said = _run(_tool("ptxas-blackwell"), "-v", f"-arch={arch}", str(ptx), "-o", str(cubin))
        sass = _run(_tool("nvdisasm"), "-c", str(cubin))
    spilled = [_find(rf"(\d+) bytes spill {way}", said) for way in ("stores", "loads")]
    return Resources(
        name=kernel.name,
        registers=int(_find(r"Used (\d+) registers", said)),
        spill_bytes=sum(map(int, spilled)),
        smem_bytes=kernel.smem_bytes,
        mma_instructions=len(MMA.findall(sass)),
    )


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
