"""`jaxrl.export` on runs of `jaxrl.sft`: the model that was trained is the one that is written."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_run import tiny_checkpoint, write_chats, write_config

from jaxrl.export import main
from jaxrl.models.hf import load_pretrained
from jaxrl.models.lora import LoraConfig, add_lora
from jaxrl.models.params import nest
from jaxrl.models.peft import load_adapter
from jaxrl.models.transformer import Transformer, initialize
from jaxrl.options import ConfigError
from jaxrl.sft import main as sft

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
    fresh = initialize(add_lora(Transformer(base.config), LoraConfig(rank=4)), jax.random.key(1))
    model = with_values_of(fresh, base)
    adapted = load_adapter(model, tmp_path / "adapter")
    found = np.asarray(adapted(TOKENS))
    assert np.max(np.abs(found - logits(inputs / "model"))) > 1e-2
    np.testing.assert_allclose(found, logits(tmp_path / "merged"), atol=1e-5)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 32.0)
    assert config["base_model_name_or_path"] == str(inputs / "model")


def with_values_of(model: Transformer, base: Transformer) -> Transformer:
    values = {
        tuple(map(str, path)): variable.get_value()
        for one in (model, base)
        for path, variable in nnx.to_flat_state(nnx.state(one))
    }
    return nnx.merge(nnx.graphdef(model), nest(values))


def test_a_lora_checkpoint_holds_no_base(full, lora):
    def size(run):
        files = (run / "checkpoints/00000002").rglob("*")
        return sum(file.stat().st_size for file in files if file.is_file())

    assert size(lora) < size(full) / 2


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
    moved = tmp_path / "moved"
    shutil.copytree(inputs, moved)
    run = trained(moved, tmp_path / "other" / "run")
    shutil.rmtree(moved)
    with pytest.raises(ConfigError, match=r"the checkpoint that the run began with, .*, has gone"):
        export(run, tmp_path / "out")
