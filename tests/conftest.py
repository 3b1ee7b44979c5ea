"""Every test runs on CPU, split into eight virtual devices; `pytest -m gpu` runs on the GPU here.

On a GPU, a kernel all of whose tests (`@pytest.mark.validates(KERNEL)`) pass is written into
`jaxrl_kernels/validated.json`, which lets "auto" take it, and a table to send back is printed.
"""

import datetime
import os

# Tests compile far more than they compute: leave LLVM's expensive passes out.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_prefer_vector_width=128 " + os.environ.get("XLA_FLAGS", "")
)
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jaxrl  # noqa: F401, I001  (before jax: it keeps a CUDA plugin without GPU quiet)

import jax
import pytest
from jaxrl._platform import has_nvidia_gpu

OUTCOMES: dict[str, list[bool]] = {}  # of each kernel's tests on the GPU


def on_gpu(config: pytest.Config) -> bool:
    return config.getoption("markexpr") == "gpu" and has_nvidia_gpu()


def pytest_configure(config: pytest.Config) -> None:
    if on_gpu(config):
        os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0"  # only the kernels matter here
        return
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    return 0 if config.getoption("markexpr") == "gpu" else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not has_nvidia_gpu():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU on this host"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    mark = item.get_closest_marker("validates")
    if mark and item.get_closest_marker("gpu"):
        report.user_properties.append(("validates", mark.args[0]))
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    for name, kernel in report.user_properties:
        if name == "validates" and (report.when == "call" or report.failed):
            OUTCOMES.setdefault(str(kernel), []).append(report.passed)


def pytest_terminal_summary(terminalreporter, exitstatus: int, config: pytest.Config) -> None:
    if not OUTCOMES or not on_gpu(config) or hasattr(config, "workerinput"):
        return
    from jaxrl_kernels import validated

    from jaxrl.perf.provenance import versions

    gpu = jax.devices()[0].device_kind
    names = ("jax", "jaxlib", "jax-triton", "triton", "nvidia-cudnn-cu13")
    facts = {name: v for name, v in versions().items() if name in names}
    facts["date"] = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    terminalreporter.section(f"kernels on {gpu}")
    terminalreporter.line(", ".join(f"{k} {v}" for k, v in facts.items()))
    for kernel, passed in sorted(OUTCOMES.items()):
        whole = exitstatus in (0, 1) and not config.getoption("keyword")
        good = whole and all(passed) and not any("::" in arg for arg in config.args)
        if good:
            validated.record(kernel, gpu, facts)
        said = "validated" if good else "not validated"
        terminalreporter.line(f"{kernel}: {sum(passed)} of {len(passed)} tests passed, {said}")
