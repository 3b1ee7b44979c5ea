"""Keep JAX quiet and on the CPU where there is no NVIDIA GPU; imported before anything else."""

import os
import pathlib
import sys


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
