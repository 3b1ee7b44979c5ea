"""What a compiled Triton kernel needs of a GPU: registers, spills, shared memory, instructions.

Read from ptxas and the disassembler that come with Triton; no GPU is needed.
"""

import contextlib
import dataclasses
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any
from unittest import mock

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


@contextlib.contextmanager
def collect() -> Iterator[list[Any]]:
    """jax-triton's compilation results of the kernels lowered inside, in order, each once."""
    from jax_triton import triton_lib

    original, results = triton_lib.compile_ttir_inplace, []

    def collecting(ttir, backend, options, gpu_target):
        result = original(ttir, backend, options, gpu_target)
        results.append((result, gpu_target.arch, options.num_warps))
        return result

    with mock.patch.object(triton_lib, "compile_ttir_inplace", collecting):
        yield results


def resources(collected: tuple[Any, int, int]) -> Resources:
    """Assemble one of `collect`'s results and read what it needs."""
    result, capability, _ = collected
    arch = f"sm_{capability}{'a' if capability >= 90 else ''}"
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = pathlib.Path(folder, "k.ptx"), pathlib.Path(folder, "k.cubin")
        ptx.write_text(result.binary)
        said = _run(_tool("ptxas-blackwell"), "-v", f"-arch={arch}", str(ptx), "-o", str(cubin))
        sass = _run(_tool("nvdisasm"), "-c", str(cubin))
    return Resources(
        name=result.name,
        registers=int(_find(r"Used (\d+) registers", said)),
        spill_bytes=int(_find(r"(\d+) bytes spill stores", said))
        + int(_find(r"(\d+) bytes spill loads", said)),
        smem_bytes=result.shared_mem_bytes,
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
