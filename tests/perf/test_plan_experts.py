"""Compiled steps of models with experts: what is in them, what is not, what runs beside what."""

import functools

import jax
import pytest
from tiny import TINY_GLM, tiny_program

from jaxrl.config import BenchConfig
from jaxrl.perf import compile_only, flops, hlo, plan
from jaxrl.perf.audit import audit
from jaxrl.perf.hardware import gpu
from jaxrl.perf.rows import parse_row
from jaxrl.train.program import floor_bytes

ROWS = {
    # The tightest of the page: 74.6 GiB there.
    "full": ("Qwen3-30B-A3B-Instruct-2507", "rl full 16384 recompute fa2 8xH200"),
    "exchange": ("INTELLECT-3", "rl lora16 16384 offload fa2 8xH200 ep2"),
}


@functools.cache
def compiled(name: str):
    """(program, its text and memory, compiled for the GPUs of the row)."""
    model, text = ROWS[name]
    row = parse_row(model, text)
    program = plan.program_for(row, BenchConfig(), compile_only.topology(row.gpu, row.num_gpus))
    with compile_only.as_device(program.layout.mesh):
        done = compile_only.compile_for(program.lower())
    return program, done.as_text() or "", compile_only.memory(done)


@functools.cache
def audited(name: str):
    program, text, _ = compiled(name)
    return audit(program, text, gpu("H200"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_kernels_are_ours_and_nothing_is_densified(name):
    program, text, _ = compiled(name)
    assert plan.compiled_attention(text, program) == "triton"
    assert plan.compiled_experts(text, program) == "triton"
    assert not audited(name).forbidden


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_gathers_run_beside_compute_and_none_comes_early(name):
    assert audited(name).overlapped >= 0.9
    assert audited(name).layers_ahead <= 1.0


@pytest.mark.slow
def test_full_fine_tuning_fits_an_h100_too():
    program, _, memory = compiled("full")
    assert memory.peak_gib < 0.9 * 74.6  # the page's, on H100 and on H200
    assert memory.peak < 1.1 * floor_bytes(program)


@pytest.mark.slow
def test_offload_and_the_exchange_are_on():
    program, text, memory = compiled("exchange")
    config = program.layout.model.config
    inputs = config.num_layers * program.seq_len * config.hidden_size * 2
    assert memory.host_temp >= 0.9 * inputs
    kinds = {c.kind for c in hlo.summarize(text).collectives}
    assert "ragged-all-to-all" in kinds
    assert memory.peak_gib < 0.6 * 84.2  # the page's row with ep 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_flops_are_the_models_plus_recomputation(name):
    program, text, _ = compiled(name)
    config = program.layout.model.config
    counted = plan.count_flops(program, text)
    rank = 16 if program.layout.is_lora else 0
    lora = flops.active_lora_params(config, rank) if rank else 0
    exact = flops.model_flops_per_token(config, program.seq_len, lora_params=lora)
    assert counted["model_flops_per_token"] == pytest.approx(exact, rel=0.01)
    ratio = counted["hardware_flops_per_step"] / (exact * program.tokens_per_step)
    assert 1.25 < ratio < 1.85


def test_loops_over_experts_count_on_cpu():
    program = tiny_program(type="sft", model=TINY_GLM, seq_len=128, rows=2)
    text = (
        jax.jit(program.step.gradients)
        .lower(
            program.layout.abstract().params,
            program.layout.abstract().frozen,
            program.abstract_batch(),
        )
        .compile()
        .as_text()
    )
    counted = plan.hardware_flops(program, text or "")
    exact = flops.model_flops_per_token(TINY_GLM, 128) * program.tokens_per_step
    assert 1.2 < counted / exact < 1.6
