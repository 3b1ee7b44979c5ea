"""What is read from a kernel's PTX, and from what ptxas says of it."""

import pytest
from jaxrl_kernels import launch, resources
from jaxrl_kernels.resources import MMA, global_atomics


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("atom.global.add.f32 %f1, [%rd1], %f2;", "atom.global.add.f32"),
        ("@%p1 red.relaxed.gpu.global.add.f32 [%rd1], %f2;", "red.relaxed.gpu.global.add.f32"),
        ("atom.add.f32 %f1, [%rd1], %f2;", "atom.add.f32"),  # of a generic address
        ("red.add.u32 [%rd1], 1;", "red.add.u32"),
        ("multimem.red.global.add.f32 [%rd1], %f2;", "multimem.red.global.add.f32"),
        (
            "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%rd1], [%r1], 16;",
            "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32",
        ),
        ("atom.shared.add.u32 %r1, [%r2], 1;", None),
        ("red.async.relaxed.cluster.shared::cluster.add.u32 [%r1], 1;", None),
        ("mbarrier.arrive.shared::cta.b64 _, [%r1];", None),
        ("redux.sync.add.s32 %r1, %r2, -1;", None),
        ("// atomics", None),
    ],
)
def test_atomics_that_may_work_on_global_memory(line, found):
    assert global_atomics(f"ret;\n\t{line}\n") == ((found,) if found else ())


def test_instructions_of_the_tensor_cores():
    sass = "HMMA.16816 HGMMA.64x64x16 UTCHMMA gdesc UTCQMMA QGMMA UTCBAR FMMA HMMAX"
    assert MMA.findall(sass) == ["HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "QGMMA"]


def test_spills_are_stores_and_loads(monkeypatch):
    said = "Used 40 registers\n 0 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads"
    sass = "HGMMA.64x8\n UTCHMMA gdesc\n FMUL"
    monkeypatch.setattr(resources, "_run", lambda tool, *_: sass if "nvdisasm" in tool else said)
    found = resources.resources(launch.Compiled("k", "", 1024, 90, 4))
    assert (found.registers, found.spill_bytes, found.smem_bytes) == (40, 8 + 12, 1024)
    assert found.mma_instructions == 2
