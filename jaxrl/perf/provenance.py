"""Where a result comes from: versions, flags, commit, host; and whether it can be used again."""

import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Mapping
from typing import Any

import jaxrl
from jaxrl._platform import FRACTIONS
from jaxrl.config import BenchConfig
from jaxrl.parallel import distributed
from jaxrl.perf.runner import Job

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "numpy",
    "jax-cuda13-plugin",
    "nvidia-cuda-nvcc",
    "nvidia-cudnn-cu13",
    "jax-triton",
    "triton",
    "tokamax",
)
# Options that say where results go or which rows run, not what a row's numbers are.
_NOT_SETTINGS = (
    *("model", "table", "rows", "mode", "output", "resume", "baseline", "jobs", "time_limit_s"),
    "join_timeout_s",
)
_ONLY_MEASURED = ("warmup_steps", "steps", "profile", "profile_steps", "seed")


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def flags() -> dict[str, str]:
    """Environment variables that change what JAX and XLA do; those the runner sets aside."""
    names = ("XLA_FLAGS", "NVIDIA_TF32_OVERRIDE", *FRACTIONS)
    ours = ("JAX_PLATFORMS", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK", *distributed.VARIABLES)
    known = sorted(os.environ.items())
    return {k: v for k, v in known if k in names or (k.startswith("JAX_") and k not in ours)}


@functools.cache
def commit() -> str | None:
    """The checkout's commit, "-dirty" with uncommitted changes; None outside a checkout."""
    root = pathlib.Path(jaxrl.__file__).parents[1]

    def git(*args: str) -> str:
        command = ["git", "-C", str(root), *args]
        run = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return run.stdout.strip()

    try:
        if pathlib.Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return None  # installed into some other project's checkout
        dirty = "-dirty" if git("status", "--porcelain", "--", "jaxrl", "configs") else ""
        return git("rev-parse", "--short=12", "HEAD") + dirty
    except (OSError, subprocess.SubprocessError):
        return None


@functools.cache
def source_hash() -> str:
    """A hash of the package's source files."""
    root = pathlib.Path(jaxrl.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".txtpb")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@functools.cache
def host_device() -> str:
    """This host in words: CPU model, cores this process may use, memory."""
    model = platform.processor() or platform.machine()
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{model}, {len(os.sched_getaffinity(0))} cores, {pages / 2**30:.0f} GiB"


def fingerprint(job: Job, config: BenchConfig, hosts: int = 1) -> str:
    """Equal for two runs that would give the same numbers: row, mode, settings, code, versions.

    hosts: how many run the row together.
    """
    settings: dict[str, Any] = dataclasses.asdict(config)
    skip = _NOT_SETTINGS + (_ONLY_MEASURED if job.mode == "planned" else ())
    settings = {k: v for k, v in settings.items() if k not in skip and k != "tensorboard"}
    if job.mode != "proxy":
        settings.pop("proxy")
    host = None if job.mode == "planned" else host_device()
    parts = [job.row.key, job.mode, settings, versions(), flags(), source_hash(), host]
    parts += [hosts] if hosts > 1 else []
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def provenance() -> Mapping[str, Any]:
    """The keys that tell a result's origin; date is that of the call, UTC."""
    now = datetime.datetime.now(datetime.UTC)
    return {
        "versions": versions(),
        "flags": flags(),
        "commit": commit(),
        "source": source_hash(),
        "host": host_device(),
        "date": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _read(path: str) -> str:
    try:
        return pathlib.Path(path).read_text()
    except OSError:
        return ""
