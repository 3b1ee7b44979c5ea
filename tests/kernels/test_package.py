"""`jaxrl_kernels` depends on JAX and Triton only, and never on jaxrl."""

import ast
import pathlib
import sys

import jaxrl_kernels
import pytest

ROOT = pathlib.Path(jaxrl_kernels.__file__).parent
MODULES = sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py"))
ALLOWED = {"jaxrl_kernels", "jax", "jax_triton", "triton"}
# JAX's own dependencies; the interpreter is for tests.
MORE = {"interpreter.py": {"numpy", "ml_dtypes"}}


def imported(source: str) -> set[str]:
    """Packages that a module imports, wherever in it, and by whatever statement."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("jaxrl_kernels" if node.level else node.module)
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names


@pytest.mark.parametrize("module", MODULES)
def test_imports(module):
    assert imported((ROOT / module).read_text()) <= ALLOWED | MORE.get(module, set())


def test_what_counts_as_an_import():
    source = (
        "import json, jaxrl.ops as o\ndef f():\n    from numpy.linalg import norm\nimport jax.numpy"
    )
    assert imported(source) == {"jaxrl", "numpy", "jax"}
    assert "flash_attention/kernels.py" in MODULES
