"""Launch Triton kernels from JAX: the only file that imports jax-triton.

A kernel is launched with everything static as a keyword. Under `interpreted()` the same launch runs
in Triton's numpy interpreter on the CPU instead, so the JAX code around a kernel is tested as is.
"""

import collections
import contextlib
import contextvars
import dataclasses
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import jax

# The oldest PTX that knows the GPU: sm_100a came with 8.6, sm_103a and sm_120a by 8.8. Triton would
# write the newest its own ptxas knows, which the ptxas that XLA calls, of an older CUDA, refuses.
PTX_VERSION, NEWER_PTX_VERSION = 86, 88

_interpreted = contextvars.ContextVar("interpreted", default=False)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Kernels traced inside run in Triton's interpreter, on the CPU and slowly: for tests."""
    token = _interpreted.set(True)
    try:
        yield
    finally:
        _interpreted.reset(token)


def launch(
    kernel: Any,
    *inputs: jax.Array,
    out: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, int] | tuple[int, int, int],
    name: str,
    capability: int | None,
    flops: int,
    bytes_accessed: int,
    num_warps: int,
    num_stages: int,
    **static: Any,
) -> list[jax.Array]:
    """Call a `triton.jit` kernel with pointers to `inputs`, then to the arrays of `out`.

    capability: of the GPU to compile for, e.g. 90; None asks the GPU that is here. `name`, `flops`
    and `bytes_accessed` stand in the compiled program, for profilers and for whoever adds up FLOPs.
    `static`: the kernel's constexpr parameters.
    """
    if _interpreted.get():
        from jaxrl_kernels.interpreter import interpret

        return interpret(kernel, inputs, out, grid, static)
    import jax_triton

    newer = capability is not None and capability > 100
    ptx_version = NEWER_PTX_VERSION if newer else PTX_VERSION
    with jax.named_scope(name):  # the program's text names calls by their scope only
        return jax_triton.triton_call(
            *inputs,
            kernel=kernel,
            out_type=list(out),
            grid=grid,
            name=name,
            compute_capability=capability,
            num_warps=num_warps,
            num_stages=num_stages,
            backend_options={"ptx_version": ptx_version, "enable_fp_fusion": True},
            cost_estimate={"flops": flops, "bytes_accessed": bytes_accessed},
            **static,
        )


@contextlib.contextmanager
def collect() -> Iterator[list["Compiled"]]:
    """The kernels of programs that are lowered inside, in order, each once, and also those that
    this process compiled before: jax-triton's cache, kept for the process, is not looked into.
    Nor are those listed whose results nothing uses, which jax-triton compiles and XLA drops."""
    from jax_triton import triton_lib

    original, compiled = triton_lib.compile_ttir_inplace, []
    caches: dict[Any, dict] = collections.defaultdict(dict)  # of each Triton function

    def collecting(ttir, backend, options, gpu_target):
        result = original(ttir, backend, options, gpu_target)
        compiled.append(
            Compiled(
                name=result.name,
                ptx=result.binary,
                smem_bytes=result.shared_mem_bytes,
                capability=gpu_target.arch,
                num_warps=options.num_warps,
            )
        )
        return result

    cache = property(lambda self: caches[self.fn])
    with (
        mock.patch.object(triton_lib, "compile_ttir_inplace", collecting),
        mock.patch.object(triton_lib.TritonFunction, "_kernel_cache", cache),
        mock.patch.dict(triton_lib.pe.dce_rules),
    ):
        triton_lib.pe.dce_rules.pop(triton_lib.triton_kernel_call_p, None)
        yield compiled


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A kernel compiled for a GPU: its PTX, and its shared memory per program in bytes."""

    name: str
    ptx: str
    smem_bytes: int
    capability: int
    num_warps: int


def why_not_triton(capability: int) -> str | None:
    """Why these kernels cannot run on a GPU of this compute capability (80: A100), or None."""
    if capability < 80:
        return f"needs sm_80 or newer, and this is sm_{capability}"
    if not all(importlib.util.find_spec(name) for name in ("triton", "jax_triton")):
        return "is not installed: pip install 'jaxrl[kernels]'"
    return None
