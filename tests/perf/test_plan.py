"""What a planned row says of its program: real programs, compiled for GPUs that are not here."""

import functools
import re

import pytest

from jaxrl.config import BenchConfig, TrainConfig
from jaxrl.perf import compile_only, flops, hlo, plan
from jaxrl.perf.audit import audit
from jaxrl.perf.hardware import GiB, gpu
from jaxrl.perf.rows import parse_row
from jaxrl.train.program import floor_bytes

pytestmark = pytest.mark.slow
MODEL = "Qwen3-0.6B"


@functools.cache
def compiled(text: str, **train):
    """(program, compiled for the GPUs of the row, its HLO summary)."""
    row = parse_row(MODEL, text)
    devices = compile_only.topology(row.gpu, row.num_gpus)
    program = plan.program_for(row, BenchConfig(train=TrainConfig(**train)), devices)
    with compile_only.as_device(program.layout.mesh), compile_only.cudnn_assumed():
        program_compiled = compile_only.compile_for(program.lower())
    return program, program_compiled, hlo.summarize(program_compiled.as_text() or "")


EIGHT = "rl full 16384 recompute fa3 8xH100"
FOUR_A6000 = "rl full 65536 recompute fa2 4xA6000"
SHORT = "Qwen3-4B-Instruct-2507 rl full 16384 recompute fa3 8xH200"  # for its weights
OFFLOAD = "rl lora16 65536 offload fa2 1xA6000"


# Calls of each kernel: forward, again in backward (recompute), and backward's own.
KERNELS = {
    "fa2": {"triton_kernel_call_ffi": 2 + 2},  # dq; dk and dv
    "fa3": {"mosaic_gpu_v2": 2 + 2},
    "cudnn": {"__cudnn$fmhaSoftmax": 2, "__cudnn$fmhaSoftmaxBackward": 1},
}


@pytest.mark.parametrize("attn", KERNELS)
def test_flash_attention_runs_as_often_as_it_should(attn):
    program, done, summary = compiled(EIGHT.replace("fa3", attn))
    runs = program.layout.model.config.num_layers * program.micro_batches
    calls = {k: n for k, n in summary.custom_calls.items() if not k.startswith("__cublas")}
    assert calls == {k: n * runs for k, n in KERNELS[attn].items()}
    asked = program.step.attention(packed=False, seq_len=16384).name
    assert plan.compiled_attention(done.as_text() or "", program) == asked


def test_attention_costs_what_its_kernels_do():
    """Two forward products twice, and backward five (cuDNN) or seven (two kernels)."""
    pairs = 16384 * 16385 // 2
    program, *_ = compiled(EIGHT)
    model = program.layout.model.config
    product = 2 * model.num_heads * model.head_dim * pairs * model.num_layers * 2

    def total(attn, docs=None):
        program, done, _ = compiled(EIGHT.replace("fa3", attn))
        return plan.hardware_flops(program, done.as_text() or "", docs)

    assert total("fa2") - total("cudnn") == pytest.approx(2 * product, rel=1e-3)
    assert total("fa3") == total("fa2")
    # Documents: ours does their pairs only, tokamax all pairs backward.
    docs = (4096, 12288)
    left = 1 - sum(n * (n + 1) // 2 for n in docs) / pairs
    assert total("fa2") - total("fa2", docs) == pytest.approx(11 * product * left, rel=1e-6)
    assert total("fa3") - total("fa3", docs) == pytest.approx(4 * product * left, rel=1e-6)
    with pytest.raises(ValueError, match="documents of 5 tokens, and rows of 16384"):
        total("fa2", (5,))


def test_no_array_of_tokens_times_vocabulary():
    program, done, summary = compiled(EIGHT)
    tokens, vocab = program.seq_len, program.layout.model.config.vocab_size
    assert not audit(program, done.as_text() or "", gpu("H100")).forbidden
    assert max(a.bytes for a in summary.largest_arrays) < tokens * vocab
    # Nor the whole embedding table on any device: it is not gathered, and neither is its gradient.
    whole = [a for a in summary.largest_arrays if vocab in a.dims]
    assert not whole


def test_gradients_are_reduced_in_fp32():
    _, done, _ = compiled(EIGHT)
    scatters = [x for x in (done.as_text() or "").splitlines() if " reduce-scatter-start(" in x]
    assert scatters
    for line in scatters:  # embedding's rows are not summed, they only travel
        assert "bf16[" not in line.split(" reduce-scatter-start(")[0] or "/embed/" in line


def test_weights_are_gathered_twice_a_micro_batch_beside_compute():
    program, _, summary = compiled(EIGHT)
    layers = [s for p, s in program.layout.trainable_specs.items() if p[0] == "layers"]
    weights = 2 * sum(s.size for s in layers if len(s.shape) == 3)  # bytes, bf16
    gathers = [c for c in summary.collectives if c.kind == "all-gather" and c.is_async]
    total = sum(c.bytes * c.calls for c in gathers)
    # The rest, a little, is the tokens that visit the vocabulary's shards.
    assert 1.0 <= total / (2 * program.micro_batches * weights) < 1.2
    assert all(c.is_async for c in summary.collectives if c.kind == "reduce-scatter")


def test_offload_puts_the_layers_inputs_into_host_memory():
    program, done, _ = compiled(OFFLOAD)
    config = program.layout.model.config
    inputs = config.num_layers * program.seq_len * config.hidden_size * 2
    memory = compile_only.memory(done)
    assert memory.host_temp >= inputs
    assert memory.peak < floor_bytes(program) + inputs / 3


def test_offloaded_optimizer_state_leaves_the_device():
    program, kept, _ = compiled(EIGHT)
    offloading, done, _ = compiled(EIGHT, offload_optimizer=True)
    sizes = [s.size for s in program.layout.trainable_specs.values()]
    moments = 2 * 4 * sum(sizes) / program.layout.mesh.size
    before, after = compile_only.memory(kept), compile_only.memory(done)
    assert before.host == 0
    assert after.host == pytest.approx(moments, rel=0.01)  # norms are not divided
    assert before.peak - after.peak >= 0.98 * moments
    assert before.argument - after.argument == after.host == after.host_argument
    assert floor_bytes(program) - floor_bytes(offloading) == after.host
    # Block by block, each device its own: never the moments of its whole table, none exchanged.
    text = done.as_text() or ""
    assert not re.search(r"f32\[18992,1024\].* copy-start\(", text)
    assert not re.search(r" all-(gather|to-all)[a-z-]*\(.*/optimizer/", text)
    # Its transfers hide no work from the count.
    flops = (
        plan.hardware_flops(p, c.as_text() or "") for p, c in ((program, kept), (offloading, done))
    )
    assert len(set(flops)) == 1


def test_peak_stays_close_to_the_floor_and_below_the_page():
    program, done, _ = compiled(EIGHT)
    assert 1.0 < compile_only.memory(done).peak / floor_bytes(program) < 1.2
    program, done, _ = compiled(OFFLOAD)
    assert compile_only.memory(done).peak_gib < 0.95 * 7.9  # the page's 1xH100 row


def test_hardware_flops_are_the_models_plus_recomputation():
    program, done, _ = compiled(EIGHT.replace("fa3", "cudnn"))
    counted = plan.count_flops(program, done.as_text() or "")
    model, tokens = program.layout.model.config, program.seq_len
    exact = flops.model_flops_per_token(model, tokens)
    assert counted["model_flops_per_token"] == pytest.approx(exact, rel=0.01)
    ratio = counted["hardware_flops_per_step"] / (exact * program.tokens_per_step)
    # Layers and head run forward twice, and flash backward recomputes its scores: 8/6 and a little.
    assert 1.25 < ratio < 1.45


def test_a_row_that_does_not_fit_says_so():
    row = parse_row("Llama-3.1-8B-Instruct", "rl full 65536 recompute fa2 1xA6000")
    message = r"needs \d+\.\d GiB on each A6000, where 43\.7 of 47\.5 can be had; use more GPUs"
    with pytest.raises(ValueError, match=message):
        plan.plan_row(row, BenchConfig())


def test_plan_row_fills_the_keys(monkeypatch):
    row = parse_row(MODEL, "sft lora8 8192 selective cudnn 1xB200")
    planned = []
    memory = compile_only.memory
    monkeypatch.setattr(compile_only, "memory", lambda c: planned.append(memory(c)) or planned[0])
    result = plan.plan_row(row, BenchConfig())
    # cuDNN's workspace, as measured at twice the length and heads: 514 MiB.
    workspace = result["peak_mem_gib"] - planned[0].peak_gib
    assert workspace == pytest.approx(514 / 1024 / 4, rel=0.01)
    assert result["attn_compiled"] == "cudnn"
    assert result["floor_mem_gib"] * GiB > 0 and result["compile_s"] > 0
    assert result["host_mem_gib"] == 0


@pytest.mark.parametrize("row", [EIGHT, FOUR_A6000, SHORT])
def test_gathers_overlap_compute_and_none_comes_early(row):
    program, done, _ = compiled(row)
    found = audit(program, done.as_text() or "", gpu(row.rpartition("x")[2]))
    assert found.overlapped >= 0.9
    assert found.hidden >= 0.9
    assert found.layers_ahead <= 1.0
