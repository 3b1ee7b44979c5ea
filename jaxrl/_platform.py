"""Keep JAX quiet and on the CPU where there is no NVIDIA GPU; imported before anything else."""

import os
import pathlib
import sys

# Of a GPU's memory, what JAX's pool takes; the rest is for CUDA's context, NCCL and cuDNN.
MEMORY_FRACTION = 0.92
FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # the old name, too


def has_nvidia_gpu() -> bool:
    """Whether the NVIDIA driver shows a GPU on this host (asks no CUDA library)."""
    return pathlib.Path("/proc/driver/nvidia/version").exists() or any(
        pathlib.Path("/dev").glob("nvidia[0-9]*")
    )


def use_cpu_without_gpu() -> None:
    """Without a GPU: run on CPU, and keep JAX's CUDA plugin from probing for a driver.

    Also keeps Triton from warning of a default to come, with a GPU and without.

    The plugin is installed on such hosts to compile for GPUs (the `plan` extra); probing would
    print a traceback. Leaves a platform that the user chose alone.
    """
    # Triton warns of a default to come; our kernels say what they want, tokamax's want the old one.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    if has_nvidia_gpu():
        return
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    if "JAX_PLATFORMS" not in os.environ:
        os.environ["JAX_PLATFORMS"] = "cpu"
        if "jax" in sys.modules:  # already imported: its config has read the environment
            sys.modules["jax"].config.update("jax_platforms", "cpu")


def whole_gpus() -> dict[str, str]:
    """Environment variables for a process that has its GPUs to itself, to be set before JAX makes
    an array: JAX's pool gets `MEMORY_FRACTION` of their memory (by itself it takes 0.75), and where
    a platform is chosen the CPU is one, too, as FLOPs are counted for it. Fractions that the user
    chose stay.
    """
    found = {}
    if not any(os.environ.get(name) for name in FRACTIONS):
        found[FRACTIONS[0]] = str(MEMORY_FRACTION)
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and "cpu" not in platforms.split(","):
        found["JAX_PLATFORMS"] = f"{platforms},cpu"
    return found


def take_whole_gpus() -> None:
    """Set `whole_gpus` in this process."""
    os.environ.update(found := whole_gpus())
    if "JAX_PLATFORMS" in found and "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_platforms", found["JAX_PLATFORMS"])
