"""PEFT's adapter folders: read, computed with and written as PEFT itself does (tests/golden)."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from jaxrl.models.hf import load_pretrained
from jaxrl.models.hf_config import CheckpointError
from jaxrl.models.lora import LoraConfig, add_lora, merge_lora
from jaxrl.models.params import nest
from jaxrl.models.peft import load_adapter, save_adapter
from jaxrl.models.transformer import Transformer, initialize

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/adapter"))


def with_adapters(case: str, rank: int = 3, alpha: float = 12.0, targets=None) -> Transformer:
    """The case's model with fresh adapters where the case has some."""
    base = load_pretrained(GOLDEN / case, dtype=jnp.float32)
    config = json.loads((GOLDEN / case / "adapter/adapter_config.json").read_text())
    names = targets or tuple(name.removesuffix("_proj") for name in config["target_modules"])
    fresh = add_lora(Transformer(base.config), LoraConfig(rank, alpha, names))
    values = {
        tuple(map(str, path)): variable.get_value()
        for one in (initialize(fresh, jax.random.key(0)), base)
        for path, variable in nnx.to_flat_state(nnx.state(one))
    }
    return nnx.merge(nnx.graphdef(fresh), nest(values))


def logits(model: Transformer, case: str) -> np.ndarray:
    return np.asarray(model(load_file(GOLDEN / case / "golden.safetensors")["tokens"]))


def test_the_cases_are_there():
    assert CASES == ["llama_bias", "qwen3_moe", "qwen3_tied"]


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_that_peft_computes(case, tmp_path):
    model = load_adapter(with_adapters(case), GOLDEN / case / "adapter")
    golden = load_file(GOLDEN / case / "adapter.safetensors")["logits"]
    assert np.max(np.abs(logits(model, case) - golden)) < 1e-4
    assert np.max(np.abs(logits(merge_lora(model), case) - golden)) < 1e-4
    assert np.max(np.abs(logits(with_adapters(case), case) - golden)) > 1.0  # B is zero


@pytest.mark.parametrize("case", CASES)
def test_written_is_what_was_read(case, tmp_path):
    model = load_adapter(with_adapters(case), GOLDEN / case / "adapter")
    save_adapter(model, tmp_path / "adapter", base="owner/model")
    for name in ("adapter_model.safetensors",):
        there, here = (
            load_file(f / name) for f in (GOLDEN / case / "adapter", tmp_path / "adapter")
        )
        assert there.keys() == here.keys()
        for tensor in there:
            np.testing.assert_array_equal(here[tensor], there[tensor])
    golden = json.loads((GOLDEN / case / "adapter/adapter_config.json").read_text())
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert golden.items() <= config.items()
    assert config["base_model_name_or_path"] == "owner/model"


def test_merging_keeps_the_kernels_dtype_and_needs_values():
    model = with_adapters("qwen3_tied")
    merged = merge_lora(model)
    assert {p for p, _ in nnx.to_flat_state(nnx.state(merged))} == {
        p for p, _ in nnx.to_flat_state(nnx.state(model)) if p[-1] not in ("lora_a", "lora_b")
    }
    with pytest.raises(ValueError, match="no values; initialize or load"):
        merge_lora(add_lora(Transformer(model.config), LoraConfig()))
    with pytest.raises(ValueError, match="no LoRA adapters; save the model itself"):
        save_adapter(merged, "unused", base="x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rank": 4},
            r"lora_A.weight in .* has shape \(3, 32\); the model's rank makes it \(4, 32\)",
        ),
        ({"alpha": 6.0}, r"lora_alpha 12 and r 3; the model scales adapters by 2.0"),
        (
            {"targets": ("q", "k", "v", "o", "gate", "up")},
            r"has .*down_proj.*, which the model does",
        ),
    ],
)
def test_an_adapter_of_another_model_is_refused(change, message):
    with pytest.raises(CheckpointError, match=message):
        load_adapter(with_adapters("qwen3_tied", **change), GOLDEN / "qwen3_tied/adapter")


def test_a_missing_tensor_and_a_full_folder_are_refused(tmp_path):
    model = with_adapters("qwen3_tied")
    with pytest.raises(CheckpointError, match=r"has no base_model.model.model.layers.0.*k_proj"):
        folder = tmp_path / "adapter"
        shutil.copytree(GOLDEN / "llama_bias/adapter", folder)
        load_adapter(model, folder)
    with pytest.raises(ValueError, match="already exists and is not an empty folder"):
        save_adapter(model, tmp_path / "adapter", base="x")
