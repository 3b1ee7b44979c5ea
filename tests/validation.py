"""Which kernels a test run has validated: those all of whose tests were run, and passed."""

import collections
import pathlib

import pytest

CANNOT = "cannot here: "


def skip(why_not: str) -> None:
    """End the test of a kernel that cannot run a case on this GPU (one not installed could)."""
    pytest.skip(why_not if "installed" in why_not else f"{CANNOT}{why_not}")


def holds_gpu_tests(path: pathlib.Path) -> bool:
    """Whether a file of tests, or one in this folder, has a test for `pytest -m gpu`."""
    files = path.rglob("test_*.py") if path.is_dir() else [path]
    return any(b"mark.gpu" in file.read_bytes() for file in files)


class Validation:
    """A pytest plugin that follows tests marked `validates(KERNEL)`.

    A kernel is validated by a run of the whole suite, in one process, in which every test of it
    that was collected, before any was deselected, has passed, but for those of what it cannot do
    there (`skip`).
    """

    def __init__(self):
        self.expected: dict[str, set[str]] = collections.defaultdict(set)
        self.passed: dict[str, set[str]] = collections.defaultdict(set)
        self.failed: dict[str, set[str]] = collections.defaultdict(set)
        self.cannot: dict[str, set[str]] = collections.defaultdict(set)
        self.kernel_of: dict[str, str] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            if mark := item.get_closest_marker("validates"):
                self.kernel_of[item.nodeid] = mark.args[0]
                if item.get_closest_marker("gpu"):
                    self.expected[mark.args[0]].add(item.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        kernel = self.kernel_of.get(report.nodeid)
        if kernel and report.failed:
            self.failed[kernel].add(report.nodeid)
        elif kernel and report.when == "call" and report.passed:
            self.passed[kernel].add(report.nodeid)
        elif kernel and report.skipped and f"Skipped: {CANNOT}" in str(report.longrepr):
            self.cannot[kernel].add(report.nodeid)

    def why_not(self, config: pytest.Config, exitstatus: int, kernel: str) -> str | None:
        """Why this run does not validate `kernel`, or None."""
        if config.args_source is pytest.Config.ArgsSource.ARGS:
            return "only a part of the tests was asked for"
        if config.getoption("lf", False) or config.getoption("numprocesses", None):
            return "run without --lf and without worker processes"
        if exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            return "the run was interrupted"
        if self.failed[kernel]:
            return f"{len(self.failed[kernel])} tests failed"
        if left := self.expected[kernel] - self.passed[kernel] - self.cannot[kernel]:
            return f"{len(left)} tests did not run"
        if not self.passed[kernel]:
            return "it cannot run here"
        return None
