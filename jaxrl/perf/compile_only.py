"""Compile for GPUs that this machine does not have, and read what the program would need there.

XLA's GPU compiler needs a description of the GPU, not the GPU. Everything here that leans on
private JAX API or on compiler flags is in this one file; tests/perf/test_compile_only.py holds it
to what the rest of the project relies on. A wrong kernel can abort the process, so callers compile
each program in a subprocess of its own.

    prepare_environment()
    mesh = Mesh(np.array(topology("H100", 8)), ("fsdp",), axis_types=(AxisType.Auto,))
    with as_device(mesh), cudnn_assumed():
        lowered = jax.jit(step).lower(...)  # ShapeDtypeStructs with shardings over `mesh`
    print(memory(compile_for(lowered)).peak)
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import pathlib
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
from jax.sharding import Mesh

from jaxrl.perf.hardware import GiB, gpu

PACKAGES = (
    "jax-cuda13-plugin",
    "jax-cuda13-pjrt",
    "nvidia-cuda-nvcc",
    "nvidia-nvvm",
    "nvidia-cuda-runtime",
)

# Every value is a Python bool, int or string; an unknown name makes the compiler raise.
COMPILER_OPTIONS: dict[str, bool | int | str] = {
    # Nothing can be autotuned without the GPU, and untuned Triton GEMMs are not what a GPU run
    # picks: cuBLASLt calls are.
    "xla_gpu_enable_triton_gemm": False,
    # CUB's radix sort makes the compiler ask the CUDA runtime about a device (there is none), or
    # warn that it lacks data about one.
    "xla_gpu_enable_cub_radix_sort": False,
}

ASSUMED_CUDNN = 92300  # 9.23.0, as `cudnnGetVersion` counts


def prepare_environment() -> None:
    """Set this process up to compile for GPUs; call it before the first JAX computation.

    Nothing will run on a GPU: the CPU is the only platform. Idempotent. Raises ModuleNotFoundError
    where the packages of `jaxrl[plan]` are not installed, RuntimeError where JAX already runs on
    another platform.
    """
    missing = [p for p in PACKAGES if not _installed(p)]
    if missing:
        raise ModuleNotFoundError(
            f"planning for a GPU needs {', '.join(missing)} (Linux x86-64): "
            "pip install 'jaxrl[plan]'"
        )
    from jax._src import xla_bridge

    if xla_bridge.backends_are_initialized() and jax.default_backend() != "cpu":
        raise RuntimeError(
            f"JAX already runs on {jax.default_backend()!r} here; plan in a process of its own"
        )
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
    # Or the plugin asks the CUDA driver, which is not there, for its version.
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    # The installed ptxas before any older one: Triton's PTX is newer than a system ptxas may know.
    ptxas, path = str(_ptxas().parent), os.environ.get("PATH", "")
    if path.split(os.pathsep)[0] != ptxas:
        os.environ["PATH"] = ptxas + os.pathsep + path


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _ptxas() -> pathlib.Path:
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec and spec.submodule_search_locations) or ():
        for found in sorted(pathlib.Path(folder).glob("cu*/bin/ptxas"), reverse=True):
            return found
    raise ModuleNotFoundError("no ptxas in nvidia-cuda-nvcc: pip install 'jaxrl[plan]'")


def topology(gpu_name: str, num_gpus: int, num_hosts: int = 1) -> list[Any]:
    """`num_gpus` compile-only devices, spread evenly over `num_hosts`.

    Raises ValueError for an unknown GPU or a count that the hosts do not share evenly.
    """
    from jax.experimental import topologies

    target = gpu(gpu_name).target()
    if num_gpus < 1 or num_hosts < 1 or num_gpus % num_hosts:
        raise ValueError(
            f"{num_gpus} GPUs do not spread evenly over {num_hosts} hosts; use a multiple"
        )
    prepare_environment()
    return topologies.get_topology_desc(
        "",
        platform="cuda",
        target_config=target,
        topology=f"1x{num_hosts}x{num_gpus // num_hosts}",  # partitions x hosts x GPUs per host
    ).devices


@contextlib.contextmanager
def as_device(mesh: Mesh) -> Iterator[None]:
    """Trace and lower for the GPUs of `mesh`: kernels that ask which GPU they are for are told it.

    The abstract mesh answers Pallas. A GPU that is not in Pallas' table (A6000) is also looked up
    through the default device, as tokamax and JAX's Mosaic kernels look up theirs; only those
    look-ups are answered with the GPU, because JAX itself puts constants on the default device.
    """
    from jax._src.pallas.triton import gpu_info
    from jax.extend import backend

    device = mesh.devices.flat[0]

    def default_device():
        return device

    pxla = types.SimpleNamespace(get_default_device=default_device)
    with (
        jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
        mock.patch.object(gpu_info, "pxla", pxla),
        mock.patch.object(backend, "get_default_device", default_device),
    ):
        yield


@contextlib.contextmanager
def cudnn_assumed() -> Iterator[None]:
    """Lower cuDNN attention where cuDNN is not installed, as if version `ASSUMED_CUDNN` were.

    XLA then plans the call and its buffers; that cuDNN takes the graph is not proved by it.
    """
    from jax._src.cudnn import fused_attention_stablehlo as fused

    with mock.patch.object(fused, "check_cudnn_version", lambda: ASSUMED_CUDNN):
        yield


def compile_for(lowered: jax.stages.Lowered, **options: bool | int | str) -> jax.stages.Compiled:
    """Compile a program lowered for `topology` devices; `options` add to `COMPILER_OPTIONS`."""
    return lowered.compile(compiler_options=COMPILER_OPTIONS | options)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that one device needs for one run of a program, by XLA's buffer assignment.

    `alias` is the part of `output` that reuses donated arguments. The host's are pinned memory:
    `host_temp` of offloaded activations, the others of offloaded optimizer state. Code, the CUDA
    context and NCCL's buffers are not in it.
    """

    argument: int
    output: int
    alias: int
    temp: int
    host_temp: int
    host_argument: int = 0
    host_output: int = 0
    host_alias: int = 0

    @property
    def peak(self) -> int:
        return self.argument + self.output - self.alias + self.temp

    @property
    def peak_gib(self) -> float:
        return self.peak / GiB

    @property
    def host(self) -> int:
        return self.host_argument + self.host_output - self.host_alias + self.host_temp

    @property
    def host_gib(self) -> float:
        return self.host / GiB


def memory(compiled: jax.stages.Compiled) -> Memory:
    """What `compiled` needs per device.

    An argument counts as the host's only where its sharding kept `pinned_host`: over compile-only
    devices `NamedSharding` drops it silently, over an abstract mesh it does not.
    """
    m = compiled.memory_analysis()
    if m is None:
        raise ValueError("the compiler gave no memory analysis for this program")
    return Memory(
        argument=m.argument_size_in_bytes,
        output=m.output_size_in_bytes,
        alias=m.alias_size_in_bytes,
        temp=m.temp_size_in_bytes,
        host_temp=m.host_temp_size_in_bytes,
        host_argument=m.host_argument_size_in_bytes,
        host_output=m.host_output_size_in_bytes,
        host_alias=m.host_alias_size_in_bytes,
    )
