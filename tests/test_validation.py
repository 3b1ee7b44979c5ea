"""A run that has not shown that a kernel works must not say so: every way to run a part of it."""

import ast
import pathlib
import sys

import pytest
from validation import Validation, holds_gpu_tests

pytest_plugins = ["pytester"]

TESTS = """
import pytest

@pytest.mark.gpu
@pytest.mark.validates("other")
def test_other():
    assert {other}

@pytest.mark.gpu
@pytest.mark.validates("mine")
@pytest.mark.parametrize("n", [1, 2])
def test_mine(n):
    assert {mine}

def cannot(why):
    from validation import skip
    skip(why)
"""


class Verdict:
    """Asks for the verdict at the end of the run, as the conftest does."""

    def __init__(self, validation):
        self.validation, self.said = validation, "never asked"

    def pytest_terminal_summary(self, terminalreporter, exitstatus, config):
        self.said = self.validation.why_not(config, exitstatus, "mine")


@pytest.fixture
def run(pytester):
    pytester.makeini("[pytest]\nmarkers =\n gpu: x\n validates(kernel): x\ntestpaths = .\n")

    def run(*args, mine="True", other="True"):
        pytester.makepyfile(test_kernels=TESTS.format(mine=mine, other=other))
        validation = Validation()
        verdict = Verdict(validation)
        pytester.inline_run(*args, plugins=[validation, verdict])
        return verdict.said

    return run


def test_a_whole_run_validates(run):
    assert run() is None
    assert run("-m", "gpu") is None
    assert run(other="False") is None  # another kernel's failure is not this one's


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("-k", "other or test_mine[1]"), "1 tests did not run"),
        (("--deselect", "test_kernels.py::test_mine[2]"), "1 tests did not run"),
        (("-m", "not gpu"), "the run was interrupted"),  # none ran
        (("test_kernels.py",), "only a part of the tests was asked for"),
        (("test_kernels.py::test_mine[1]",), "only a part of the tests was asked for"),
        (("--lf",), "run without --lf and without worker processes"),
    ],
)
def test_a_part_of_a_run_does_not(run, args, said):
    assert run(*args) == said


def test_nor_does_a_run_that_failed_or_stopped(run):
    assert run(mine="n == 1") == "1 tests failed"
    assert run("-x", other="False") == "2 tests did not run"
    assert run(mine="pytest.skip()") == "2 tests did not run"
    assert run(mine="pytest.exit('stopped')") is not None


def test_what_a_kernel_cannot_do_here_is_left_out(run):
    assert run(mine="n == 1 or cannot('needs Hopper or Blackwell')") is None
    assert run(mine="cannot('needs Hopper or Blackwell')") == "it cannot run here"
    assert run(mine="n == 1 or cannot('is not installed')") == "1 tests did not run"


def test_what_a_gpu_run_imports_is_what_its_command_installs():
    """README: pip install -e ".[cuda]" pytest pytest-xdist hypothesis."""
    folder = pathlib.Path(__file__).parent
    files = [file for file in folder.rglob("test_*.py") if holds_gpu_tests(file)]
    assert holds_gpu_tests(folder / "ops")
    assert not holds_gpu_tests(folder / "serving")
    ours = {"jaxrl", "jaxrl_kernels"} | {file.stem for file in folder.glob("*.py")}
    installed = {"jax", "numpy", "pytest", "hypothesis", "tokamax", "triton", "jax_triton"}
    known = installed | ours | set(sys.stdlib_module_names)
    beside = ("conftest.py", "scripts.py", "validation.py", "interpreted_tokamax.py")
    for file in (*files, *(folder / name for name in beside)):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else names
            assert {name.partition(".")[0] for name in names} <= known, file
