"""How a run of `jaxrl.sft` ends before its time: told to stop, or unable to learn."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_run import metrics, tiny_checkpoint, write_chats, write_config

from jaxrl.sft import main
from jaxrl.train.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny_checkpoint(folder / "model")
    write_chats(folder / "train.jsonl", 60)
    return folder


def command(inputs, output, *flags) -> list[str]:
    names = {"model": inputs / "model", "train": inputs / "train.jsonl", "output": output}
    output.parent.mkdir(parents=True, exist_ok=True)
    return [write_config(output.parent, **names), *(f"--config.{f}" for f in flags)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_with_zero_and_the_run_goes_on(inputs, tmp_path, number):
    """No checkpoint is due: the one that is there was written for the signal."""
    flags = ("max_steps=2000", "epochs=0", "checkpoint.every=0")
    run = subprocess.Popen(
        [sys.executable, "-m", "jaxrl.sft", *command(inputs, tmp_path / "run", *flags)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1", "JAX_PLATFORMS": "cpu"},
    )
    assert run.stdout is not None
    printed = ""
    for line in run.stdout:
        printed += line
        if line.startswith("step 3/"):
            run.send_signal(number)
    assert run.wait() == 0
    with Checkpoints(tmp_path / "run/checkpoints", read_only=True) as checkpoints:
        (step,) = checkpoints.steps()
    assert 3 <= step < 2000
    assert f"stopped at step {step}, which is saved" in printed
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, step + 1))
    again = command(inputs, tmp_path / "run", f"max_steps={step + 1}", "epochs=0")
    assert main(["sft", *again]) == 0
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, step + 2))


def test_gradients_that_are_not_finite_end_the_run_with_their_batches_aside(
    inputs, tmp_path, capsys
):
    broken = tmp_path / "inputs"
    shutil.copytree(inputs, broken)
    weights = load_file(broken / "model/model.safetensors")
    weights["model.norm.weight"] = np.full_like(weights["model.norm.weight"], np.nan)
    save_file(weights, broken / "model/model.safetensors", metadata={"format": "pt"})
    output = tmp_path / "run"
    assert main(["sft", *command(broken, output, "max_bad_steps=3", "max_steps=9")]) == 1
    lines = metrics(output)
    assert [line["skipped"] for line in lines] == [1.0] * len(lines) and len(lines) in (3, 4)
    assert all(line["loss"] is None for line in lines)  # no JSON number says NaN
    assert lines[-1]["total/updates_skipped"] == len(lines)
    files = sorted(file.name for file in (output / "bad_batches").iterdir())
    assert files[:3] == ["step_000001.npz", "step_000002.npz", "step_000003.npz"]
    with np.load(output / "bad_batches/step_000001.npz") as batch:
        assert batch["tokens"].shape == batch["segment_ids"].shape == (8, 128)
        assert batch["loss_mask"].any()
    printed = capsys.readouterr().out.replace("\n", "")
    assert "gradients in a row were not finite" in printed and "update skipped" in printed
    with Checkpoints(output / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps()[-1] == len(lines)


def test_a_trace_of_the_steps_that_were_asked_for(inputs, tmp_path):
    assert main(["sft", *command(inputs, tmp_path / "run", "profile=2:3", "max_steps=4")]) == 0
    (trace,) = (tmp_path / "run/profile").rglob("*.xplane.pb")
    content = trace.read_bytes()
    assert b"train" in content and trace.stat().st_size > 10_000


def test_options_and_counts_outlive_a_restart(inputs, tmp_path):
    flags = ("data.window=16", "checkpoint.every=1")
    main(["sft", *command(inputs, tmp_path / "run", *flags, "max_steps=2")])
    before = metrics(tmp_path / "run")[-1]["total/samples"]
    main(["sft", *command(inputs, tmp_path / "run", *flags, "max_steps=4")])
    assert metrics(tmp_path / "run")[-1]["total/samples"] > before
    assert json.loads((tmp_path / "run/config.json").read_text())["max_steps"] == 4
