"""Throughput of a training run, step by step: tokens per second, MFU, peak memory."""

import resource
from collections.abc import Sequence

import jax

from jaxrl.perf import flops
from jaxrl.perf.hardware import GiB, gpu, measure_matmul_peak


class Meter:
    """Turns a step's documents and seconds into its throughput.

    MFU is `flops.model_flops_per_step` over the devices' peak: the GPU's data sheet, or, on a CPU,
    a matmul peak measured once here; of a GPU that jaxrl does not know it is left out.
    lora_params: `flops.active_lora_params`, 0 for full fine-tuning.
    """

    def __init__(self, model: flops.Shapes, devices: Sequence, *, lora_params: int, dtype: str):
        self.model, self.devices, self.lora_params = model, devices, lora_params
        self.peak = self._peak(dtype)

    def _peak(self, dtype: str) -> float | None:
        """FLOP/s of all devices."""
        device = self.devices[0]
        if device.platform == "cpu":
            # Virtual devices share the host's cores.
            return measure_matmul_peak(dtype, sizes=(1024, 2048), repetitions=3)
        try:
            return gpu(device.device_kind).bf16_flops * len(self.devices)
        except ValueError:
            return None

    def step(
        self, doc_lengths: Sequence[int], seconds: float, prefixes: Sequence[int] = ()
    ) -> dict[str, float]:
        """Of one step on documents of these lengths (of all devices): step_s, tokens_per_s
        (padding is no token), mfu_pct, peak_mem_gib (of the fullest device here; on a CPU the
        process's peak resident size). prefixes: as `flops.model_flops_per_step` has them."""
        tokens = sum(doc_lengths)
        values = {"step_s": seconds, "tokens_per_s": tokens / seconds}
        if self.peak is not None and tokens:
            done = flops.model_flops_per_step(
                self.model, doc_lengths, lora_params=self.lora_params, prefixes=prefixes
            )
            values["mfu_pct"] = 100 * done / seconds / self.peak
        return values | {"peak_mem_gib": self.peak_memory() / GiB}

    def peak_memory(self) -> int:
        here = [d for d in self.devices if d.process_index == jax.process_index()]
        stats = [s for s in (d.memory_stats() for d in here) if s]
        if not stats:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return max(s["peak_bytes_in_use"] for s in stats)
