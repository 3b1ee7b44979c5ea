"""`jaxrl.sft`, from a checkpoint and chats to a checkpoint: trained, written, resumed, refused."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from tiny_run import metrics, write_config, write_inputs

from jaxrl.options import ConfigError
from jaxrl.sft import main
from jaxrl.train.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> pathlib.Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def sft(inputs, output, *flags, train: str = "train.jsonl") -> int:
    """Run in this process, on eight devices."""
    names = {"model": inputs / "model", "train": inputs / train, "output": output}
    output.parent.mkdir(parents=True, exist_ok=True)
    return main(["sft", write_config(output.parent, **names), *(f"--config.{f}" for f in flags)])


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory) -> pathlib.Path:
    """The output of an uninterrupted run of six steps."""
    output = tmp_path_factory.mktemp("whole") / "run"
    validation = f"data.validation={inputs / 'validation.jsonl'}"
    assert sft(inputs, output, validation, "eval_every=3", "tensorboard") == 0
    return output


def arrays(output: pathlib.Path, step: int) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint, on the host, by path."""
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as reader:
        folder = (output / "checkpoints" / f"{step:08d}" / "state").absolute()
        return jax.tree.map(np.asarray, reader.restore(folder))


def test_learns_and_writes_a_line_per_step(whole):
    lines = metrics(whole)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5, 6]
    assert lines[6]["loss"] < 0.8 * lines[1]["loss"]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 3, 6]
    assert lines[6]["eval_loss"] < 0.8 * lines[0]["eval_loss"]
    keys = {
        "loss",
        "grad_norm",
        "lr",
        "tokens_per_s",
        "mfu_pct",
        "peak_mem_gib",
        "step_s",
        "data_s",
    }
    for line in lines[1:]:
        assert keys <= line.keys()
        assert 75 < line["fill_pct"] <= 100
        assert 0 < line["trained_tokens"] < line["documents"] * 128
    assert [line["lr"] for line in lines[1:4]] == pytest.approx([0.0, 5e-3, 1e-2])


def test_writes_what_it_was_asked_to_do_and_samples(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert json.loads((whole / "config.json").read_text())["optimizer"]["learning_rate"] == 1e-2
    events = EventAccumulator(str(whole)).Reload()
    assert {"loss", "eval_loss", "tokens_per_s"} <= set(events.Tags()["scalars"])
    texts = {
        tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode()
        for tag in events.Tags()["tensors"]
    }
    shown = texts["samples/text_summary"]
    assert "assistant  \n**It is" in shown and "&lt;|im_end|>**" in shown
    assert "| data.seq_len | 128 |" in texts["options/text_summary"]


def test_keeps_the_newest_checkpoints(whole):
    with Checkpoints(whole / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps() == [4, 6]
        step, extra = checkpoints.extra()
    assert (step, extra["kind"], extra["config"]["batch_size"]) == (6, "sft", 8)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_resumed_is_uninterrupted_bit_for_bit(kind, inputs, whole, tmp_path):
    flags = ["lora_rank=4"] if kind == "lora" else []
    once = whole
    if kind == "lora":
        once = tmp_path / "once" / "run"
        sft(inputs, once, *flags)
    sft(inputs, tmp_path / "run", *flags, "max_steps=3")
    assert sft(inputs, tmp_path / "run", *flags, "data.workers=0") == 0
    jax.tree.map(np.testing.assert_array_equal, arrays(tmp_path / "run", 6), arrays(once, 6))
    keys = ("step", "loss", "grad_norm", "lr", "entropy", "total/samples")
    first = [{k: line.get(k) for k in keys} for line in metrics(once) if line["step"]]
    assert [{k: line.get(k) for k in keys} for line in metrics(tmp_path / "run")] == first


def test_resumed_on_fewer_devices_is_the_same_to_rounding(inputs, whole, tmp_path, monkeypatch):
    sft(inputs, tmp_path / "run", "max_steps=3")
    everything = jax.devices()
    monkeypatch.setattr(jax, "devices", lambda *_: everything[:2])
    assert sft(inputs, tmp_path / "run", "rows_per_device=2") == 0
    for a, b in zip(metrics(tmp_path / "run"), metrics(whole)[1:], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4), a["step"]


def test_other_options_are_refused_or_forked(inputs, whole, tmp_path, capsys):
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    with pytest.raises(
        ConfigError, match=r"config.batch_size is '16', and the run .* has '8'; .*fork"
    ):
        sft(inputs, output, "batch_size=16")
    with pytest.raises(
        ConfigError, match=r"resume is none, and .* holds checkpoints of steps 4, 6"
    ):
        sft(inputs, output, "checkpoint.resume=none")
    with pytest.raises(ConfigError, match=r"no checkpoint of step 5 in .*; there are 4, 6"):
        sft(inputs, output, "checkpoint.resume=5")
    fork = (f"checkpoint.fork={output}@4", "max_steps=5", "optimizer.learning_rate=0.001")
    assert sft(inputs, tmp_path / "fork" / "run", *fork) == 0
    forked = metrics(tmp_path / "fork" / "run")
    assert [line["step"] for line in forked] == [5]
    assert forked[0]["loss"] == metrics(whole)[5]["loss"]  # the same state on the same batch
    assert forked[0]["lr"] == pytest.approx(1e-3)
    assert f"going on from step 4 of {output}" in capsys.readouterr().out.replace("\n", "")


def test_a_given_step_is_gone_on_from_and_later_lines_are_dropped(inputs, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    assert sft(inputs, tmp_path / "run", "checkpoint.resume=4") == 0
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5, 6]
    assert [line.get("loss") for line in lines] == [line.get("loss") for line in metrics(whole)]


def test_corrupted_newest_is_named_and_the_one_before_used(inputs, whole, tmp_path, capsys):
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    file = max((output / "checkpoints/00000006/state").rglob("*"), key=lambda f: f.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert sft(inputs, output) == 0
    printed = capsys.readouterr().out.replace("\n", "")
    assert "checkpoint of step 6 cannot be used: state/" in printed and "is corrupted" in printed
    assert f"going on from step 4 of {output}" in printed


def test_changed_data_is_refused(inputs, whole, tmp_path):
    changed = tmp_path / "inputs"
    shutil.copytree(inputs, changed)
    output = tmp_path / "run"
    sft(changed, output, "max_steps=2")
    file = changed / "train.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:50]))
    with pytest.raises(ConfigError, match=r"had 60 samples when the checkpoint .* and has 50"):
        sft(changed, output)
    file.write_text("".join([*lines[1:], lines[0]]))
    with pytest.raises(ConfigError, match="other contents than when the checkpoint"):
        sft(changed, output)


def test_epochs_end_the_run_and_every_sample_is_seen(inputs, tmp_path):
    assert sft(inputs, tmp_path / "run", "max_steps=0", "epochs=2", "batch_size=8") == 0
    lines = metrics(tmp_path / "run")
    assert sum(line["documents"] for line in lines) == 120
    assert lines[-1]["total/samples"] == 120 and lines[-1]["epoch"] == pytest.approx(2.0)


def test_held_out_samples_are_not_trained(inputs, tmp_path):
    flags = ("max_steps=0", "epochs=1", "data.hold_out=20", "eval_batches=1")
    assert sft(inputs, tmp_path / "run", *flags) == 0
    assert sum(line.get("documents", 0) for line in metrics(tmp_path / "run")) == 40


@pytest.mark.parametrize("end", ["epochs=1", "max_steps=2"])
def test_validates_before_and_after_also_where_the_last_step_is_a_checkpoint(inputs, tmp_path, end):
    flags = ("max_steps=0", "epochs=0", end, "eval_every=0", "checkpoint.every=1")
    validation = f"data.validation={inputs / 'validation.jsonl'}"
    assert sft(inputs, tmp_path / "run", validation, *flags) == 0
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(len(lines))) and len(lines) > 2
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, len(lines) - 1]


def test_a_new_run_drops_what_another_left_without_a_checkpoint(inputs, tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    (output / "metrics.jsonl").write_text('{"step": 0, "eval_loss": 1.0}\n{"step": 1, "loss": 2')
    assert sft(inputs, output, "max_steps=1") == 0
    assert [line["step"] for line in metrics(output)] == [1]


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (("model=nowhere",), r"config.model 'nowhere' is no folder"),
        (("data.train=",), r"config.data.train names no data"),
        (("data.train=nothing.jsonl",), r"no data file 'nothing.jsonl'"),
        (("batch_size=12",), r"batch_size 12 is no multiple of the 8 rows .* use e.g. 8"),
        (("data.hold_out=60",), r"hold_out is 60, and there are 60 samples"),
        (("checkpoint.fork=nowhere",), r"checkpoint.fork: nowhere holds no checkpoint"),
        (("wandb=x",), r"wandb is 'x', and the package is not installed: pip install wandb"),
        (("profile=4",), r"profile is '4'; write FIRST:LAST"),
        (("mesh.expert=3",), r"expert axis 3 does not divide 8 devices; use one of \[1, 2, 4, 8\]"),
        (("mesh.context=8",), r"context axis 8 \(ulysses\) does not split num_heads"),
        (("mesh.expert=2",), r"expert axis 2 needs experts, and .* is dense; use 1"),
        (("train.attention=cudnn",), r"attention 'cudnn' needs .*; use 'xla'"),
        (("lora_rank=2", "train.offload_optimizer"), r"offload_optimizer has nothing to gain with"),
    ],
)
def test_bad_input_is_one_line(inputs, tmp_path, flags, problem):
    with pytest.raises(ConfigError, match=problem):
        sft(inputs, tmp_path / "run", *flags)


def test_a_broken_checkpoint_is_one_line(inputs, tmp_path):
    broken = tmp_path / "model"
    shutil.copytree(inputs / "model", broken)
    (broken / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config.json"):
        sft(inputs, tmp_path / "run", f"model={broken}")


def test_sample_that_cannot_be_used_stops_the_run_with_its_state_saved_or_is_counted(
    inputs, tmp_path, capsys
):
    chats = (inputs / "train.jsonl").read_text().splitlines(keepends=True)
    chats[40] = '{"messages": [{"role": "user", "content": "and?"}]}\n'
    bad = inputs / "bad.jsonl"
    bad.write_text("".join(chats))
    flags = ("data.shuffle=false", "max_steps=20", "epochs=1", "data.window=16", "batch_size=8")
    flags = (*flags, "rows_per_device=1", "checkpoint.every=0")
    output = tmp_path / "run"
    with pytest.raises(
        ConfigError, match=r"bad.jsonl:41: no message of assistant is to be trained"
    ):
        sft(inputs, output, *flags, train="bad.jsonl")
    before = metrics(output)
    with Checkpoints(output / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps() == [before[-1]["step"]]
    assert sft(inputs, output, *flags, "data.bad_samples=skip", train="bad.jsonl") == 0
    lines = metrics(output)
    assert lines[: len(before)] == before and len(lines) > len(before)
    assert sum(line["documents"] for line in lines) == 59  # each once, whatever happened between
    assert lines[-1]["total/skipped: nothing trained"] == 1
    assert "1 skipped: nothing trained" in capsys.readouterr().out
