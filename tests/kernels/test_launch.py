"""What kernels are compiled for, and by what version of PTX."""

import jax_triton
import pytest
from jaxrl_kernels import launch


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
