"""On which GPUs each kernel's tests have passed, or failed: `validated.json`, written by
`pytest -m gpu`."""

import functools
import hashlib
import importlib.metadata
import json
import pathlib

FOLDER = pathlib.Path(__file__).parent
FILE = FOLDER / "validated.json"

# The Triton code behind each kernel of ours: a change of it takes its validations back. Tiles are
# not part of it, nor is the JAX code around a kernel: tests in the interpreter, which run that code
# as it is, show that results do not depend on the ones, and that the other is right.
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


# What each kernel is compiled or brought by: of another version, what was found says nothing.
PACKAGES = {"triton": "triton", "tokamax": "tokamax", "cudnn": "nvidia-cudnn-cu13"}


def is_validated(kernel: str, gpu: str | None) -> bool:
    """Whether the tests of `kernel`, as it is now, have passed on the GPU of that name."""
    facts = _facts(kernel, gpu)
    return facts is not None and "failed" not in facts


def has_failed(kernel: str, gpu: str | None) -> bool:
    """Whether tests of `kernel`, as it is now, have failed on the GPU of that name."""
    facts = _facts(kernel, gpu)
    return facts is not None and "failed" in facts


def _facts(kernel: str, gpu: str | None) -> dict[str, str] | None:
    """What is known of the kernel with its present code and package (triton 3.9 is not 3.10)."""
    facts = validated().get(kernel, {}).get(gpu or "")
    if facts is None or facts.get("source") != source(kernel):
        return None
    package = PACKAGES[kernel.split()[1]]
    installed = _version(package)
    if installed and _minor(facts.get(package, "")) != _minor(installed):
        return None
    return facts


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def record(kernel: str, gpu: str, facts: dict[str, str], failed: int = 0) -> None:
    """Put a GPU onto a kernel's list, or with `failed` tests as one that it fails on; `facts`: date
    and versions."""
    if failed:
        facts = facts | {"failed": f"{failed} tests"}
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    if code := source(kernel):
        facts = facts | {"source": code}
    known.setdefault(kernel, {})[gpu] = facts
    FILE.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")
    validated.cache_clear()
