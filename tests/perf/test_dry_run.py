"""`jaxrl.sft --dry_run`: what a run would need, told before anything is loaded."""

import pathlib
import re
import types

import jax
import pytest

from jaxrl.options import ConfigError
from jaxrl.rl import main as rl_main
from jaxrl.sft import main

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
A6000 = ("gpu=1xA6000", "train.attention=triton")


def plan(capsys, name, *flags) -> str:
    config = f"--config={CONFIGS}/{name}.py"
    run = rl_main if name.startswith("rl") else main
    assert run(["run", config, *(f"--config.{flag}" for flag in flags), "--dry_run"]) == 0
    return capsys.readouterr().out


def test_a_run_on_a_gpu_that_is_not_here(capsys):
    printed = plan(capsys, "sft_qwen3_0_6b", *A6000, "data.seq_len=1024", "lora_rank=8")
    assert re.search(r"optimizer\.schedule\s+cosine", printed)
    assert re.search(r"trained \(fp32\)\s+5,046,272 ", printed)
    assert re.search(r"frozen\s+596,049,920 ", printed)
    peak = float(re.search(r"peak memory per device\s+([\d.]+) GiB \(planned\)", printed)[1])
    floor = float(re.search(r"floor\s+([\d.]+) GiB", printed)[1])
    assert 1.1 < floor < peak < 3.0
    assert "8 micro-batches of 1 rows of 1024 tokens = 8,192 tokens" in printed


def test_a_run_on_this_hosts_devices(capsys):
    flags = ("data.seq_len=128", "batch_size=16", "train.compute_dtype=float32", "lora_rank=4")
    printed = plan(capsys, "sft_qwen3_0_6b", *flags)
    assert "Plan: 8xCPU" in printed
    assert re.search(r"mesh\s+fsdp 8 x expert 1 x context 1", printed)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (("gpu=8xV100",), r"config.gpu: unknown GPU 'V100'; did you mean"),
        (("gpu=eight",), r"config.gpu: unknown GPU 'eight'"),
        (("gpu=8 x H100",), r"config.gpu is '8 x H100'; write COUNTxGPU"),
        (("gpu=3xH100",), r"batch_size 8 is no multiple of the 3 rows .* use e.g. 6"),
        (("model=somebody/else",), r"'somebody/else' is no folder and no model that jaxrl knows"),
        (("model=",), r"config.model names no checkpoint"),
        (("gpu=8xA100",), r"'auto' finds no kernel .* A100.*; use 'triton', whose tests have not"),
    ],
)
def test_bad_input_is_one_line(capsys, flags, problem):
    with pytest.raises(ConfigError, match=problem):
        plan(capsys, "sft_qwen3_0_6b", *flags)


RL = ("model=Qwen3-0.6B", "seq_len=512", "tasks_per_step=2", "algorithm.group_size=4")


@pytest.mark.slow
def test_an_rl_run_has_an_engine_beside_its_step(capsys):
    printed = plan(capsys, "rl_qwen3_4b", *A6000, *RL, "lora_rank=8", "rollout.slots=4")

    def gib(name: str) -> float:
        return float(re.search(rf"{name}\s+([\d.]+) GiB", printed)[1])

    assert gib("peak memory per device") == max(gib("while it trains"), gib("while it draws"))
    cache = 2 * 28 * 8 * 128 * 2 * 4 * 512 / 2**30  # 4 sequences of 512 tokens, in bf16
    assert gib("the engine's cache") == pytest.approx(cache, rel=0.02)
    assert "of 2,048 tokens" in printed
    assert gib("while it trains") > 1.1 + cache  # the frozen parameters


def test_an_rl_run_that_servers_draw_for_has_none(capsys):
    flags = (*RL, "lora_rank=4", "train.compute_dtype=float32", "rollout.servers=http://x:1")
    printed = plan(capsys, "rl_qwen3_4b", *flags)
    assert "Plan: 8xCPU" in printed and "peak memory per device" in printed
    assert "cache" not in printed[printed.index("Plan:") :]


@pytest.mark.slow
def test_a_run_that_does_not_fit_is_refused(capsys):
    flags = (*A6000, "data.seq_len=1024", "batch_size=1")
    message = r"this run needs .* GiB on each A6000, where 43.7 of 47.5 can be had"
    with pytest.raises(ConfigError, match=message):
        plan(capsys, "sft_qwen3_4b", *flags)


def test_this_hosts_gpu_may_be_one_that_no_plan_knows(monkeypatch, capsys):
    here = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA L40S")
    monkeypatch.setattr(jax, "devices", lambda: [here])
    with pytest.raises(ConfigError, match=r"this host's unknown GPU 'NVIDIA L40S'.*config\.gpu"):
        plan(capsys, "sft_qwen3_0_6b", "gpu=")
