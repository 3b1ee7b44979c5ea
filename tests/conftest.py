"""Every test runs on CPU, split into eight virtual devices; `pytest -m gpu` runs on the GPU here.

On a GPU, a kernel all of whose tests (`@pytest.mark.validates(KERNEL)`) pass is written into
`jaxrl_kernels/validated.json`, which lets "auto" take it, and a table to send back is printed:
tests/validation.py.
"""

import datetime
import os
import pathlib
import shutil
import tempfile

# Tests compile far more than they compute: leave LLVM's expensive passes out.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_prefer_vector_width=128 "
    # As the step is compiled (train/step.py): collectives in one order on all virtual devices.
    "--xla_cpu_enable_concurrency_optimized_scheduler=false " + os.environ.get("XLA_FLAGS", "")
)
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jaxrl  # noqa: F401, I001  (before jax: it keeps a CUDA plugin without GPU quiet)

import jax
import pytest
from jaxrl._platform import has_nvidia_gpu

from validation import Validation, holds_gpu_tests

VALIDATION = Validation()
COMPILED: list[str] = []  # the folder of compiled programs, in the process that made it


def on_gpu(config: pytest.Config) -> bool:
    return config.getoption("markexpr") == "gpu" and has_nvidia_gpu()


def pytest_configure(config: pytest.Config) -> None:
    if on_gpu(config):
        os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0"  # only the kernels matter here
        config.pluginmanager.register(VALIDATION)
        return
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    # Many tests run the same programs: compiled by one, they are read by the others, and by the
    # processes that those start.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        COMPILED.append(tempfile.mkdtemp(prefix="jaxrl_compiled_"))
        os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED[0]
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def pytest_unconfigure(config: pytest.Config) -> None:
    for folder in COMPILED:
        shutil.rmtree(folder, ignore_errors=True)


def pytest_ignore_collect(collection_path: pathlib.Path, config: pytest.Config) -> bool | None:
    """`pytest -m gpu` imports the kernels' tests only: the others take a minute, and packages that
    it needs not."""
    if config.getoption("markexpr") != "gpu" or holds_gpu_tests(collection_path):
        return None
    return True


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    return 0 if config.getoption("markexpr") == "gpu" else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if on_gpu(config):
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="for `pytest -m gpu` on a host with a GPU"))


def pytest_terminal_summary(terminalreporter, exitstatus: int, config: pytest.Config) -> None:
    if not VALIDATION.expected or hasattr(config, "workerinput"):
        return
    from jaxrl_kernels import validated

    from jaxrl.perf.provenance import versions

    gpu = jax.devices()[0].device_kind
    names = ("jax", "jaxlib", "jax-triton", "triton", "tokamax", "nvidia-cudnn-cu13")
    facts = {name: v for name, v in versions().items() if name in names}
    facts["date"] = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    terminalreporter.section(f"kernels on {gpu}")
    terminalreporter.line(", ".join(f"{k} {v}" for k, v in facts.items()))
    for kernel, tests in sorted(VALIDATION.expected.items()):
        why_not = VALIDATION.why_not(config, exitstatus, kernel)
        failed = len(VALIDATION.failed[kernel])
        if why_not is None or failed:
            validated.record(kernel, gpu, facts, failed)
        said = f"not validated: {why_not}" if why_not else "validated"
        passed, cannot = len(VALIDATION.passed[kernel]), len(VALIDATION.cannot[kernel])
        beside = f", {cannot} are of what it cannot do here" if cannot else ""
        terminalreporter.line(f"{kernel}: {passed} of {len(tests)} tests passed{beside}; {said}")
