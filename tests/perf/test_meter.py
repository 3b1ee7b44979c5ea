"""A step's throughput against counts by hand."""

import jax
import pytest

from jaxrl.models.presets import preset
from jaxrl.perf import flops
from jaxrl.perf.hardware import gpu
from jaxrl.perf.meter import Meter


class FakeGpu:
    platform, process_index = "gpu", 0

    def __init__(self, kind, peak):
        self.device_kind, self._peak = kind, peak

    def memory_stats(self):
        return {"peak_bytes_in_use": self._peak}


def test_tokens_and_mfu_are_of_the_documents_alone():
    kind = gpu("H100").device_kinds[0]
    devices = [FakeGpu(kind, 2**30), FakeGpu(kind, 3 * 2**30)]
    model = preset("Qwen3-0.6B")
    values = Meter(model, devices, lora_params=0, dtype="bfloat16").step([100, 300], 2.0)
    assert values["tokens_per_s"] == 200 and values["step_s"] == 2.0
    expected = flops.model_flops_per_step(model, [100, 300]) / 2.0 / (2 * 989e12)
    assert values["mfu_pct"] == pytest.approx(100 * expected)
    assert values["peak_mem_gib"] == 3.0


def test_without_a_known_peak_there_is_no_mfu_and_without_tokens_no_error():
    meter = Meter(preset("Qwen3-0.6B"), [FakeGpu("Unknown", 1)], lora_params=0, dtype="bfloat16")
    assert "mfu_pct" not in meter.step([10], 1.0)
    kind = gpu("H100").device_kinds[0]
    meter = Meter(preset("Qwen3-0.6B"), [FakeGpu(kind, 1)], lora_params=0, dtype="bfloat16")
    assert meter.step([], 1.0)["tokens_per_s"] == 0


def test_a_cpu_is_measured_and_its_memory_the_process():
    meter = Meter(preset("Qwen3-0.6B"), jax.devices()[:1], lora_params=0, dtype="float32")
    assert meter.peak is not None and meter.peak > 1e9
    assert 0.1 < meter.step([128], 1.0)["peak_mem_gib"] < 100
