"""The GPU table, its target descriptions, and what this host is found to have."""

import re

import pytest

from jaxrl.options import ConfigError
from jaxrl.perf import hardware
from jaxrl.perf.hardware import GPUS, gpu, local_gpus, measure_matmul_peak

SMI = """#!/bin/sh
echo "0, GPU-aaaa, NVIDIA H100 80GB HBM3"
echo "1, GPU-bbbb, NVIDIA RTX A6000"
echo "2, GPU-cccc, NVIDIA B200"
"""


def field(text: str, name: str) -> str:
    (value,) = re.findall(rf"^\s*{name}: \"?([^\"\n]+)", text, re.MULTILINE)
    return value


@pytest.mark.parametrize("name", GPUS)
def test_target_describes_the_gpu_of_the_table(name):
    g, text = gpu(name), gpu(name).target()
    major, minor = g.compute_capability.split(".")
    assert field(text, "major") == major
    assert (re.search(r"minor: (\d+)", text) or ["", "0"])[1] == minor
    assert int(field(text, "device_memory_size")) == g.memory
    assert field(text, "device_description_str") == g.device_kinds[0]
    assert int(field(text, "memory_bandwidth")) == pytest.approx(g.memory_bandwidth, rel=1e-3)
    accelerated = "ACCELERATED_FEATURES" in text
    assert accelerated == (int(major) >= 9)  # wgmma and tcgen05 exist in sm_90a, sm_100a only


def test_peaks():
    peaks = {g.name: (g.bf16_flops / 1e12, g.primerl_bf16_flops / 1e12) for g in GPUS.values()}
    assert peaks == {
        "A6000": (154.8, 312),
        "A100": (312, 312),
        "H100": (989, 989),
        "H200": (989, 989),
        "B200": (2250, 2250),
    }


@pytest.mark.parametrize("name", ["H100", "h100", "NVIDIA H100 80GB HBM3"])
def test_names(name):
    assert gpu(name) is GPUS["H100"]


def test_unknown_gpu_names_the_nearest():
    with pytest.raises(ValueError, match="unknown GPU 'A600'; did you mean A6000 or A100"):
        gpu("A600")
    with pytest.raises(ValueError, match="did you mean A6000 or A100 or H100 or H200 or B200"):
        gpu("TPU v5")


@pytest.fixture
def three_gpus(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(SMI)
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return smi


H100, A6000, B200 = "NVIDIA H100 80GB HBM3", "NVIDIA RTX A6000", "NVIDIA B200"


@pytest.mark.parametrize(
    "visible, kinds",
    [
        (None, [H100, A6000, B200]),
        ("", []),
        ("-1", []),
        ("2,0", [B200, H100]),
        ("GPU-bb", [A6000]),
        ("0,7,1", [H100]),
    ],
)
def test_local_gpus(three_gpus, monkeypatch, visible, kinds):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert local_gpus() == kinds


def test_no_local_gpus_without_a_working_nvidia_smi(three_gpus, monkeypatch):
    three_gpus.write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    assert local_gpus() == []
    monkeypatch.setenv("PATH", "/nonexistent")
    assert local_gpus() == []


def clock(monkeypatch, *durations):
    """Make consecutive pairs of `perf_counter` calls differ by `durations`."""
    ticks = iter([t for d in durations for t in (0.0, d)])
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: next(ticks))


def test_matmul_peak_is_the_best_median(monkeypatch):
    # Warm-up, then three repetitions, for n = 16 and n = 32.
    clock(monkeypatch, 9.0, 1.0, 2.0, 100.0, 9.0, 8.0, 4.0, 2.0)
    peak = measure_matmul_peak("bfloat16", sizes=(16, 32), repetitions=3, seconds_per_size=1e9)
    assert peak == 2 * 32**3 / 4.0


def test_matmul_peak_repeats_slow_sizes_less(monkeypatch):
    clock(monkeypatch, 6.0, 4.0, 20.0, 2.0)  # after warm-ups of 6 and 20 s one repetition each
    assert (
        measure_matmul_peak(sizes=(16, 32), repetitions=3, seconds_per_size=10.0) == 2 * 32**3 / 2
    )
    with pytest.raises(StopIteration):  # every tick was used
        measure_matmul_peak(sizes=(16,), repetitions=1)


def test_matmul_peak_measures_something():
    assert measure_matmul_peak(sizes=(64,), repetitions=1) > 1e6


def test_a_gpu_that_jax_cannot_use_is_not_passed_over(three_gpus, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    hardware.check_gpus_are_used()
    monkeypatch.delenv("JAX_PLATFORMS")
    with pytest.raises(ConfigError, match=r"NVIDIA H100 80GB HBM3, which JAX cannot use: pip"):
        hardware.check_gpus_are_used()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    hardware.check_gpus_are_used()
