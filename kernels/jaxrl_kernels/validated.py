"""On which GPUs each kernel's tests have passed: `validated.json`, written by `pytest -m gpu`."""

import functools
import hashlib
import json
import pathlib

FOLDER = pathlib.Path(__file__).parent
FILE = FOLDER / "validated.json"

# The Triton code behind each kernel of ours: a change of it takes its validations back. Tiles are
# not part of it; the tests in the interpreter show that results do not depend on them.
SOURCES = {
    "attention triton": "flash_attention/kernels.py",
    "grouped_matmul triton": "grouped_matmul/kernels.py",
}


@functools.cache
def validated() -> dict[str, dict[str, dict[str, str]]]:
    """{"attention triton": {"NVIDIA H200": {"date": ..., "source": ..., "triton": ...}}}."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


@functools.cache
def source(kernel: str) -> str | None:
    """A hash of the kernel's code; None for a kernel that is not ours."""
    if kernel not in SOURCES:
        return None
    return hashlib.sha256((FOLDER / SOURCES[kernel]).read_bytes()).hexdigest()[:16]


def is_validated(kernel: str, gpu: str | None) -> bool:
    """Whether the tests of `kernel`, as it is now, have passed on the GPU of that name."""
    facts = validated().get(kernel, {}).get(gpu or "")
    return facts is not None and facts.get("source") == source(kernel)


def record(kernel: str, gpu: str, facts: dict[str, str]) -> None:
    """Add a GPU to a kernel's list; `facts`: date and versions."""
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    if code := source(kernel):
        facts = facts | {"source": code}
    known.setdefault(kernel, {})[gpu] = facts
    FILE.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")
    validated.cache_clear()
