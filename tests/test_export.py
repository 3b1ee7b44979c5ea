"""`jaxrl.export` on runs of `jaxrl.sft`: the model that was trained is the one that is written."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_run import CHATML, tiny_checkpoint, write_chats, write_config

from jaxrl.cli import OutputError
from jaxrl.export import main
from jaxrl.models.hf import load_pretrained
from jaxrl.models.peft import load_adapter
from jaxrl.options import ConfigError
from jaxrl.sft import main as sft
from jaxrl.train.manifest import read_manifest

TOKENS = jnp.arange(40).reshape(2, 20) % 250


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny_checkpoint(folder / "model")
    write_chats(folder / "train.jsonl", 60)
    (folder / "model" / "generation_config.json").write_text('{"eos_token_id": 258}')
    return folder


def trained(inputs, output, *flags) -> pathlib.Path:
    output.parent.mkdir(parents=True, exist_ok=True)
    names = {"model": inputs / "model", "train": inputs / "train.jsonl", "output": output}
    steps = ("max_steps=2", "checkpoint.every=1")
    flags = tuple(f"--config.{flag}" for flag in (*steps, *flags))
    assert sft(["sft", write_config(output.parent, **names), *flags]) == 0
    return output


@pytest.fixture(scope="module")
def full(inputs, tmp_path_factory) -> pathlib.Path:
    return trained(inputs, tmp_path_factory.mktemp("full") / "run")


@pytest.fixture(scope="module")
def lora(inputs, tmp_path_factory) -> pathlib.Path:
    flags = ("lora_rank=4", "optimizer.learning_rate=0.1", "optimizer.warmup_steps=0")
    return trained(inputs, tmp_path_factory.mktemp("lora") / "run", *flags)


def export(run, out, *flags) -> int:
    return main(["export", str(run), str(out), *flags])


def logits(folder) -> np.ndarray:
    return np.asarray(load_pretrained(folder, dtype=jnp.float32)(TOKENS))


def test_full_run_becomes_a_model_folder_with_its_tokenizer(inputs, full, tmp_path, capsys):
    assert export(full, tmp_path / "out", "--dtype", "float32") == 0
    assert "step 2 of" in capsys.readouterr().out
    before, after = logits(inputs / "model"), logits(tmp_path / "out")
    assert np.max(np.abs(before - after)) > 1e-2
    assert export(full, tmp_path / "first", "--step", "1", "--dtype", "float32") == 0
    assert np.max(np.abs(logits(tmp_path / "first") - after)) > 1e-3
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (inputs / "model" / name).read_bytes()
    assert export(full, tmp_path / "low") == 0  # bfloat16
    assert json.loads((tmp_path / "low/config.json").read_text())["dtype"] == "bfloat16"
    np.testing.assert_allclose(logits(tmp_path / "low"), after, atol=0.05)


def test_lora_run_becomes_a_merged_model_and_an_adapter_of_the_same_logits(inputs, lora, tmp_path):
    assert export(lora, tmp_path / "merged", "--dtype", "float32") == 0
    assert export(lora, tmp_path / "adapter", "--format", "adapter") == 0
    base = load_pretrained(inputs / "model", dtype=jnp.float32)
    adapted = load_adapter(base, tmp_path / "adapter")
    found = np.asarray(adapted(TOKENS))
    assert np.max(np.abs(found - logits(inputs / "model"))) > 1e-2
    np.testing.assert_allclose(found, logits(tmp_path / "merged"), atol=1e-5)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 32.0)
    assert config["base_model_name_or_path"] == str(inputs / "model")


def adapter_dtypes(folder) -> set:
    return {value.dtype for value in load_file(folder / "adapter_model.safetensors").values()}


def test_dtype_is_that_of_the_adapter_too_where_it_is_asked_for(lora, tmp_path):
    assert export(lora, tmp_path / "default", "--format", "adapter") == 0
    assert export(lora, tmp_path / "low", "--format", "adapter", "--dtype", "bfloat16") == 0
    assert adapter_dtypes(tmp_path / "default") == {np.dtype(np.float32)}
    assert adapter_dtypes(tmp_path / "low") == {np.dtype(jnp.bfloat16)}


def test_template_and_tokenizer_are_those_that_the_data_was_written_with(inputs, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text(CHATML + "{# of this run #}")
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for file in (inputs / "model").glob("tokenizer*"):
        text = file.read_text().replace('"<|endoftext|>"', '"<|end|>"')
        (tokenizer / file.name).write_text(text)
    flags = ("max_steps=1", f"data.chat_template={template}", f"tokenizer={tokenizer}")
    run = trained(inputs, tmp_path / "run", *flags)
    assert export(run, tmp_path / "out") == 0
    from transformers import AutoTokenizer

    found, base = (AutoTokenizer.from_pretrained(f) for f in (tmp_path / "out", inputs / "model"))
    assert found.chat_template == template.read_text()
    assert found.pad_token == "<|end|>"
    assert base.chat_template == CHATML
    name = "generation_config.json"
    assert (tmp_path / "out" / name).read_bytes() == (inputs / "model" / name).read_bytes()


def test_a_lora_checkpoint_holds_no_base(lora):
    manifest = read_manifest(lora / "checkpoints/00000002")
    held = [path.split("/") for path in manifest["arrays"]]
    assert {path[0] for path in held} == {"step", "params", "opt_state"}
    assert {path[-1] for path in held if path[0] == "params"} == {"lora_a", "lora_b"}


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (("--step", "7"), r"no checkpoint of step 7 in .*; there are 1, 2"),
        (("--format", "adapter"), r"trains all weights: there is no adapter to write"),
    ],
)
def test_bad_input_is_one_line(full, tmp_path, flags, problem):
    with pytest.raises(ConfigError, match=problem):
        export(full, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_folders_that_are_not_what_is_needed(inputs, full, tmp_path):
    with pytest.raises(ConfigError, match=r"no run in .*nowhere: it is no folder"):
        export(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"holds no checkpoint"):
        export(inputs, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"already exists and is not an empty folder"):
        export(full, inputs)
    with pytest.raises(OutputError, match=r"train.jsonl/out cannot be written: .*File exists"):
        export(full, inputs / "train.jsonl" / "out")
    moved = tmp_path / "moved"
    shutil.copytree(inputs, moved)
    run = trained(moved, tmp_path / "other" / "run")
    shutil.rmtree(moved)
    with pytest.raises(ConfigError, match=r"the checkpoint that the run began with, .*, has gone"):
        export(run, tmp_path / "out")


def test_the_command_ends_with_one_line_and_its_exit_code(inputs, full, tmp_path):
    def command(*args, blocks="unlimited"):
        limited = ["sh", "-c", f'ulimit -f {blocks}; exec "$@"', "sh"]
        line = [*limited, sys.executable, "-m", "jaxrl.export", *map(str, args)]
        return subprocess.run(line, capture_output=True, text=True, check=False)

    done = command(full, tmp_path / "out", "--step", "1")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"step 1 of {full} written to {tmp_path / 'out'}: " + (
        "a Hugging Face folder, bfloat16\n"
    )
    again = command(full, tmp_path / "out")
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == (
        f"error: {tmp_path / 'out'} already exists and is not an empty folder; name a new one\n"
    )
    assert command(full, tmp_path / "new", "--format", "gguf").returncode == 2

    full_disk = command(full, tmp_path / "new", blocks=20)  # as a full disk, for this file alone
    assert full_disk.returncode == 2
    assert full_disk.stderr.startswith(f"error: {tmp_path / 'new'} cannot be written: ")
    assert full_disk.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
