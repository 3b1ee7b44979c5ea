"""What this project knows about GPUs (peaks, memory) and about the host it runs on."""

import dataclasses
import difflib
import importlib.resources
import os
import statistics
import subprocess
import time

from jaxrl._platform import MEMORY_FRACTION
from jaxrl.options import ConfigError

GiB = 2**30


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU. Peaks are FLOP/s of dense bf16 matrix products with fp32 accumulation.

    `device_kinds` are the names the driver (and so JAX) gives it. `primerl_bf16_flops` is the peak
    that the prime-rl benchmark page divides by. `memory` is in bytes as CUDA reports it,
    `memory_bandwidth` and `nvlink_bandwidth` (all links, both directions) in bytes per second.
    Sources: NVIDIA's data sheets.
    """

    name: str
    device_kinds: tuple[str, ...]
    compute_capability: str
    memory: int
    bf16_flops: float
    primerl_bf16_flops: float
    memory_bandwidth: float
    nvlink_bandwidth: float

    @property
    def memory_gib(self) -> float:
        return self.memory / GiB

    @property
    def pool_gib(self) -> float:
        """What of the memory programs can have: JAX's pool, as jaxrl's commands set it."""
        return MEMORY_FRACTION * self.memory_gib

    def target(self) -> str:
        """XLA's description of this GPU (a GpuTargetConfigProto as text), to compile for it."""
        folder = importlib.resources.files("jaxrl.perf") / "targets"
        return (folder / f"{self.name.lower()}.txtpb").read_text()


GPUS = {
    g.name: g
    for g in (
        Gpu(
            name="A6000",
            device_kinds=("NVIDIA RTX A6000",),
            compute_capability="8.6",
            memory=51_041_271_808,
            bf16_flops=154.8e12,
            primerl_bf16_flops=312e12,  # the page falls back to the A100's peak
            memory_bandwidth=768e9,
            nvlink_bandwidth=112.5e9,
        ),
        Gpu(
            name="A100",
            device_kinds=("NVIDIA A100-SXM4-80GB",),
            compute_capability="8.0",
            memory=85_100_068_864,
            bf16_flops=312e12,
            primerl_bf16_flops=312e12,
            memory_bandwidth=2039e9,
            nvlink_bandwidth=600e9,
        ),
        Gpu(
            name="H100",
            device_kinds=("NVIDIA H100 80GB HBM3",),
            compute_capability="9.0",
            memory=84_942_979_072,
            bf16_flops=989e12,
            primerl_bf16_flops=989e12,
            memory_bandwidth=3352e9,
            nvlink_bandwidth=900e9,
        ),
        Gpu(
            name="H200",
            device_kinds=("NVIDIA H200", "NVIDIA H200 141GB HBM3e"),
            compute_capability="9.0",
            memory=151_397_597_184,
            bf16_flops=989e12,
            primerl_bf16_flops=989e12,
            memory_bandwidth=4800e9,
            nvlink_bandwidth=900e9,
        ),
        Gpu(
            name="B200",
            device_kinds=("NVIDIA B200",),
            compute_capability="10.0",
            memory=191_514_411_008,
            bf16_flops=2250e12,
            primerl_bf16_flops=2250e12,
            memory_bandwidth=7672e9,
            nvlink_bandwidth=1800e9,
        ),
    )
}


def gpu(name: str) -> Gpu:
    """The GPU called `name` ("H100", in any case) or one of whose device kinds is `name`.

    Raises ValueError, with the nearest names, for one that is not in the table.
    """
    for g in GPUS.values():
        if name.upper() == g.name or name in g.device_kinds:
            return g
    near = difflib.get_close_matches(name.upper(), GPUS, n=2, cutoff=0.4) or list(GPUS)
    raise ValueError(f"unknown GPU {name!r}; did you mean {' or '.join(near)}?")


def local_gpus() -> list[str]:
    """Device kinds of the NVIDIA GPUs that a JAX process on this host would see; [] without any.

    Asks nvidia-smi, so that no CUDA context is made here. Honours a CUDA_VISIBLE_DEVICES made of
    indices or UUIDs (nvidia-smi itself does not).
    """
    query = ["nvidia-smi", "--query-gpu=index,uuid,name", "--format=csv,noheader"]
    try:
        out = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    found = [tuple(x.strip() for x in line.split(",", 2)) for line in out.splitlines() if line]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [kind for _, _, kind in found]
    kinds = []
    for wanted in filter(None, (x.strip() for x in visible.split(","))):
        match = [k for i, uuid, k in found if wanted == i or uuid.startswith(wanted)]
        if not match:  # CUDA stops at the first entry that is no device
            break
        kinds.append(match[0])
    return kinds


def check_gpus_are_used() -> None:
    """Raise ConfigError where this host's GPUs are there for JAX, and it runs on the CPU all the
    same, though nobody asked it to."""
    import jax

    if "JAX_PLATFORMS" not in os.environ and jax.default_backend() == "cpu" and local_gpus():
        raise ConfigError(
            f"this host has {local_gpus()[0]}, which JAX cannot use: pip install 'jaxrl[cuda]' (uv "
            "sync --extra cuda), or set JAX_PLATFORMS=cpu to run on the CPU"
        )


def measure_matmul_peak(
    dtype="float32",
    *,
    sizes: tuple[int, ...] = (512, 1024, 2048, 4096),
    repetitions: int = 5,
    seconds_per_size: float = 10.0,
) -> float:
    """FLOP/s of this host's default JAX device on square matrix products of `dtype`.

    The best over `sizes` of the median over `repetitions`, each synchronised, after one warm-up
    per size; fewer repetitions, but one at least, where they would take longer than
    `seconds_per_size`. It is the denominator of MFU where no data sheet gives one (CPUs). A
    product of size n counts 2 n^3 FLOPs. No size is skipped: the largest can be the fastest.
    """
    import jax
    import jax.numpy as jnp

    product = jax.jit(jnp.matmul)

    def seconds(a) -> float:
        start = time.perf_counter()
        product(a, a).block_until_ready()
        return time.perf_counter() - start

    best = 0.0
    for n in sizes:
        a = jax.random.normal(jax.random.key(0), (n, n), jnp.dtype(dtype)).block_until_ready()
        count = max(1, min(repetitions, int(seconds_per_size / seconds(a))))
        best = max(best, 2 * n**3 / statistics.median(seconds(a) for _ in range(count)))
    return best
