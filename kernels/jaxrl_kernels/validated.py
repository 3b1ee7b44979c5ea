"""On which GPUs each kernel's tests have passed: `validated.json`, written by `pytest -m gpu`."""

import functools
import json
import pathlib

FILE = pathlib.Path(__file__).with_name("validated.json")


@functools.cache
def validated() -> dict[str, dict[str, dict[str, str]]]:
    """{"attention triton": {"NVIDIA H200": {"date": ..., "jax": ..., "triton": ...}}}."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def is_validated(kernel: str, gpu: str | None) -> bool:
    """Whether the tests of `kernel` have passed on the GPU of that name."""
    return gpu in validated().get(kernel, {})


def record(kernel: str, gpu: str, facts: dict[str, str]) -> None:
    """Add a GPU to a kernel's list; `facts`: date and versions."""
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    known.setdefault(kernel, {})[gpu] = facts
    FILE.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")
    validated.cache_clear()
