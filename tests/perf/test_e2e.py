"""Whole RL steps as benchmark rows: measured on the CPU, planned for a GPU."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny import TINY, tiny_program

from jaxrl.config import BenchConfig, E2eConfig, ProxyConfig
from jaxrl.options import ConfigError
from jaxrl.perf import compile_only, e2e, measure, plan
from jaxrl.perf.hardware import GiB
from jaxrl.perf.report import notes
from jaxrl.perf.results import make_result
from jaxrl.perf.rows import parse_row, proxy_row
from jaxrl.perf.runner import Job
from jaxrl.rollout.engine import Engine

ROW = parse_row("Qwen3-0.6B", "rl_e2e lora4 4096 none fa3 1xH100")
CONFIG = BenchConfig(
    warmup_steps=1,
    e2e=E2eConfig(tasks=2, group_size=3, prompt_tokens=100),
    proxy=ProxyConfig(num_layers=2, seq_len=128),
)


def small_program():
    program = tiny_program(rows=1, seq_len=128, micro_batches=6, type="rl")
    return dataclasses.replace(program, packed=True)


@pytest.fixture(scope="module")
def measured():
    """The proxy of a row of 20 longer rollouts: 6 of 128 tokens, 32 of them the prompt."""
    seen = []
    config = dataclasses.replace(
        CONFIG,
        e2e=E2eConfig(tasks=4, group_size=5, prompt_tokens=1000),
        proxy=dataclasses.replace(CONFIG.proxy, tasks=2, group_size=3),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "preset", lambda name: TINY)
        patch.setattr(measure, "measure_matmul_peak", lambda dtype: 1e11)
        row = proxy_row(ROW, 128)
        return row, seen, measure.measure_row(row, config, lambda *a, **k: seen.append((a, k)))


def test_the_phases_make_the_step(measured):
    row, seen, values = measured
    parts = sum(values[name] for name in ("rollout_s", "train_s", "sync_s"))
    assert values["wait_s"] == 0 and all(values[name] > 0 for name in ("rollout_s", "train_s"))
    assert values["total_s"] == pytest.approx(parts, rel=0.5)  # medians, each of its own
    assert values["tokens_per_s_rollout"] == pytest.approx(6 * 96 / values["rollout_s"])
    assert values["tokens_per_s_train"] == pytest.approx(6 * 128 / values["train_s"])
    assert values["tps"] == pytest.approx(6 * 128 / values["total_s"])
    assert [a[0] for a, _ in seen].count("step") == CONFIG.steps
    result = make_result(Job(row, "proxy"), values, None)
    (said,) = [note for note in notes([result]) if note.startswith(row.title)]
    assert f"total {values['total_s']:.3g} s a step" in said


def test_every_rollout_fills_a_row():
    program = small_program()
    engine = Engine(e2e.make_programs(program), e2e.limits(program, CONFIG))
    engine.set_weights(program.layout.initialize(jax.random.key(0)).params, 0)
    rollouts = e2e.draw(engine, program, CONFIG, 100, seed=1)
    assert [len(r.tokens) for r in rollouts] == [128] * 6 and rollouts[0].length == 28
    assert len({tuple(r.tokens[:100]) for r in rollouts}) == 2
    assert len({tuple(r.tokens) for r in rollouts}) == 6
    batch = e2e.to_batch(program, rollouts, seed=1)
    assert batch.tokens.shape == (6, 1, 128)
    assert np.asarray(batch.loss_mask).sum() == 6 * 28
    assert np.asarray(batch.sampler_logprobs).min() < 0


def test_a_prompt_that_leaves_no_room():
    config = dataclasses.replace(CONFIG, e2e=E2eConfig(prompt_tokens=128))
    program = small_program()
    with pytest.raises(ConfigError, match="128 leaves no room in 128 tokens"):
        e2e.time_e2e(program, program.step, config, lambda *a, **k: None)


def test_the_planned_peak_has_the_cache_and_the_optimizer_in_it(monkeypatch):
    monkeypatch.setattr(plan, "preset", lambda name: TINY)
    row = parse_row("Qwen3-0.6B", "rl_e2e full 256 none xla 2xH100")
    planned = plan.plan_row(row, CONFIG)
    program = plan.program_for(row, CONFIG, compile_only.topology("H100", 2))
    alone = plan.plan_program(program, "H100")
    # 2 x layers x pages (3 sequences of 8 and nobody's) x 32 tokens x heads x size, in bf16.
    cache = 2 * TINY.num_layers * 25 * 32 * TINY.num_kv_heads * TINY.head_dim * 2 / GiB
    assert planned["cache_gib"] == pytest.approx(cache)
    # Beside the masters, layers in bf16, whole on each device.
    layers = [s.size for p, s in program.layout.trainable_specs.items() if p[0] == "layers"]
    copies = planned["engine_weights_gib"]
    assert copies * GiB > 2 * sum(layers) > 0
    assert planned["train_peak_gib"] == pytest.approx(alone["peak_mem_gib"] + cache + copies)
    assert planned["peak_mem_gib"] == max(planned["train_peak_gib"], planned["decode_peak_gib"])
    moments = 2 * 4 * sum(s.size for s in program.layout.trainable_specs.values()) / 2
    assert planned["decode_peak_gib"] > 1.5 * moments / GiB + cache  # weights are the half more
