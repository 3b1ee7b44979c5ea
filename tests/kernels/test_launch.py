"""What kernels are compiled for and with, and what the compiler says of them."""

import jax_triton
import pytest
from jaxrl_kernels import launch, resources


@pytest.mark.parametrize(
    ("capability", "ptx"), [(80, 86), (100, 86), (103, 88), (120, 88), (None, 86)]
)
def test_ptx_is_the_oldest_that_knows_the_gpu(monkeypatch, capability, ptx):
    seen = {}
    monkeypatch.setattr(jax_triton, "triton_call", lambda *_, **options: seen.update(options))
    launch.launch(
        None,
        out=[],
        grid=(1, 1),
        name="k",
        capability=capability,
        flops=1,
        bytes_accessed=2,
        num_warps=4,
        num_stages=1,
    )
    assert seen["backend_options"]["ptx_version"] == ptx
    assert seen["compute_capability"] == capability
    assert seen["cost_estimate"] == {"flops": 1, "bytes_accessed": 2}


def test_why_not_triton(monkeypatch):
    assert launch.why_not_triton(80) is None
    assert "sm_80 or newer, and this is sm_75" in str(launch.why_not_triton(75))
    for missing in ("triton", "jax_triton"):
        monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name, m=missing: name != m)
        assert "is not installed" in str(launch.why_not_triton(90))


def test_spills_are_stores_and_loads(monkeypatch):
    said = "Used 40 registers\n 0 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads"
    sass = "HGMMA.64x8\n UTCHMMA gdesc\n FMUL"
    monkeypatch.setattr(resources, "_run", lambda tool, *_: sass if "nvdisasm" in tool else said)
    found = resources.resources(launch.Compiled("k", "", 1024, 90, 4))
    assert (found.registers, found.spill_bytes, found.smem_bytes) == (40, 8 + 12, 1024)
    assert found.mma_instructions == 2
