"""A measured row, on this host's CPU, with a model small enough for a test."""

import dataclasses

import pytest
from tiny import TINY

from jaxrl.config import BenchConfig, ProxyConfig
from jaxrl.models.params import specs
from jaxrl.models.presets import PRESETS, preset
from jaxrl.models.transformer import Transformer
from jaxrl.perf import measure
from jaxrl.perf.rows import parse_row, proxy_row


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    config = BenchConfig(
        output=str(folder),
        profile=True,
        proxy=ProxyConfig(num_layers=2, seq_len=512),
    )
    row = proxy_row(parse_row("Qwen3-0.6B", "rl lora4 16384 recompute fa3 1xH100"), 512)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "preset", lambda name: TINY)
        patch.setattr(measure, "measure_matmul_peak", lambda dtype: 1e11)
        seen = []
        values = measure.measure_row(row, config, lambda *a, **k: seen.append((a, k)))
    return dataclasses.make_dataclass("Measured", ["values", "seen", "folder"])(
        values, seen, folder
    )


def test_every_number_is_there_and_agrees_with_the_others(result):
    values = result.values
    assert values["attn_compiled"] == "xla"
    assert values["num_layers"] == 2
    seconds = 512 / values["tps"]
    assert values["step_time_s"] == pytest.approx(seconds)
    mfu = 100 * values["model_flops_per_token"] * values["tps"] / 1e11
    assert values["mfu_pct"] == pytest.approx(mfu)
    assert values["hfu_pct"] > values["mfu_pct"] > 0
    assert values["mfu_primerl_pct"] > 0
    assert 0.05 < values["peak_mem_gib"] < 16


def test_steps_are_reported_one_by_one(result):
    stages = [a[0] for a, _ in result.seen]
    assert stages.count("step") == 10 and stages.count("warming up") == 2
    losses = [k["loss"] for a, k in result.seen if a[0] == "step"]
    assert all(isinstance(x, float) for x in losses)


def test_the_trace_is_one_that_tensorboard_opens(result):
    assert list(result.folder.glob("profile/*/plugins/profile/*/*.xplane.pb"))


@pytest.mark.parametrize("name", [n for n, c in PRESETS.items() if c.num_experts])
def test_a_proxy_with_experts_fits_a_laptop(name):
    """It keeps what makes the architecture, and its fp32 training state stays under 6 GiB."""
    model, proxy = preset(name), measure.proxy_model(preset(name), 2)
    assert (proxy.num_layers, proxy.num_experts, proxy.num_experts_per_tok) == (2, 8, 2)
    assert proxy.num_sparse_layers == (1 if model.first_k_dense else 2)
    same = ("router", "num_shared_experts", "hidden_size", "moe_intermediate_size", "head_dim")
    assert all(getattr(proxy, key) == getattr(model, key) for key in same)
    state = 16 * sum(s.size for s in specs(Transformer(proxy)).values())
    assert name != "Qwen3-30B-A3B-Instruct-2507" or state < 6 * 2**30  # others: LoRA rows only
    assert 4 * sum(s.size for s in specs(Transformer(proxy)).values()) < 6 * 2**30


def test_a_dense_proxy_loses_layers_only():
    assert measure.proxy_model(TINY, 1) == TINY.replace(num_layers=1)
