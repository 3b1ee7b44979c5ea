"""PEFT's adapter folders: read, computed with and written as PEFT itself does (tests/golden)."""

import functools
import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxrl import load_pretrained, save_pretrained
from jaxrl.models.hf_config import CheckpointError
from jaxrl.models.lora import LoraConfig, add_lora, merge_lora
from jaxrl.models.params import nest, specs
from jaxrl.models.peft import load_adapter, save_adapter
from jaxrl.models.transformer import Transformer
from jaxrl.parallel.mesh import make_mesh

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/adapter"))


@functools.cache
def base_of(case: str) -> Transformer:
    return load_pretrained(GOLDEN / case, dtype=jnp.float32)


def adapted_as_in(case: str) -> Transformer:
    return load_adapter(base_of(case), GOLDEN / case / "adapter")


def values_of(model: Transformer) -> dict:
    return {tuple(map(str, p)): v.get_value() for p, v in nnx.to_flat_state(nnx.state(model))}


def arrays_of(model: Transformer) -> dict:
    return {path: np.asarray(value) for path, value in values_of(model).items()}


def with_adapters(case: str, rank=3, alpha=12.0, targets=("q", "down")) -> Transformer:
    """The case's model with adapters of its own, B not zero."""
    base = base_of(case)
    fresh = add_lora(Transformer(base.config), LoraConfig(rank, alpha, targets))
    rng, values = np.random.default_rng(0), values_of(base)
    for path, spec in specs(fresh, nnx.LoRAParam).items():
        values[path] = jnp.asarray(0.5 * rng.standard_normal(spec.shape), jnp.float32)
    return nnx.merge(nnx.graphdef(fresh), nest(values))


def logits(model: Transformer, case: str) -> np.ndarray:
    return np.asarray(model(load_file(GOLDEN / case / "golden.safetensors")["tokens"]))


def golden_adapter(case: str) -> tuple[dict, dict]:
    """(adapter_config.json, the tensors by module and letter)."""
    folder = GOLDEN / case / "adapter"
    tensors = load_file(folder / "adapter_model.safetensors")
    return json.loads((folder / "adapter_config.json").read_text()), tensors


def test_the_cases_are_there():
    assert CASES == ["glm4_moe", "llama_bias", "qwen3_moe", "qwen3_tied"]


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_that_peft_computes(case):
    model = adapted_as_in(case)
    golden = load_file(GOLDEN / case / "adapter/golden.safetensors")["logits"]
    assert np.max(np.abs(logits(base_of(case), case) - golden)) > 1.0
    assert np.max(np.abs(logits(model, case) - golden)) < 1e-4
    assert np.max(np.abs(logits(merge_lora(model), case) - golden)) < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_written_is_what_was_read(case, tmp_path):
    save_adapter(adapted_as_in(case), tmp_path / "adapter", base="owner/model")
    config, tensors = golden_adapter(case)
    written = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert written.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(written[name], value)
    found = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config.items() <= found.items()
    assert found["base_model_name_or_path"] == "owner/model"
    assert isinstance(found["lora_alpha"], int)
    assert [file.name for file in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("case", CASES)
def test_the_merged_folder_holds_each_weight_plus_its_adapters_product(case, tmp_path):
    """In the names and layout of the checkpoint, which transformers reads (test_hf)."""
    merged = merge_lora(adapted_as_in(case))
    save_pretrained(merged, tmp_path / "merged", source=GOLDEN / case)
    config, adapter = golden_adapter(case)
    before = load_file(GOLDEN / case / "model.safetensors")
    after = load_file(tmp_path / "merged/model.safetensors")
    assert after.keys() == before.keys()
    changed = 0
    for name, w in before.items():
        a, b = (
            adapter.get(f"base_model.model.{name.removesuffix('.weight')}.lora_{letter}.weight")
            for letter in "AB"
        )
        if a is not None and b is not None:
            w, changed = w + config["lora_alpha"] / config["r"] * b @ a, changed + 1
        np.testing.assert_allclose(after[name], w, atol=2e-6, rtol=2e-6)
    assert changed == len(adapter) // 2


@pytest.mark.parametrize(
    ("case", "targets", "modules"),
    [
        ("qwen3_tied", ("o", "q"), ["o_proj", "q_proj"]),
        ("qwen3_tied", ("gate",), ["gate_proj"]),
        ("llama_bias", ("v", "down"), ["down_proj", "v_proj"]),
        ("qwen3_moe", ("k",), ["k_proj"]),
        ("qwen3_moe", ("down",), ["down_proj"]),
        # PEFT holds experts' gate and up as one, and looks for down's where it holds theirs.
        ("qwen3_moe", ("gate",), ["down_proj", "gate_proj", "up_proj"]),
        ("glm4_moe", ("up", "v"), ["down_proj", "gate_proj", "up_proj", "v_proj"]),
    ],
)
def test_a_subset_of_the_targets_is_named_and_reads_back_as_the_same_model(
    case, targets, modules, tmp_path
):
    model = with_adapters(case, rank=2, alpha=5.0, targets=targets)
    save_adapter(model, tmp_path / "adapter", base=GOLDEN / case)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 5, modules)
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert {name.split(".")[-3] for name in tensors} == set(modules)
    for name, value in tensors.items():
        if name.split(".")[-3].removesuffix("_proj") not in targets:
            assert not np.any(value), name
    again = arrays_of(load_adapter(base_of(case), tmp_path / "adapter"))
    for path, value in arrays_of(model).items():
        np.testing.assert_array_equal(again.pop(path), value)
    assert not any(np.any(value) for path, value in again.items() if path[-1] == "lora_b")


def test_what_stands_beside_experts_is_named_apart(tmp_path):
    """Only where an expert has the same name."""
    save_adapter(with_adapters("glm4_moe", targets=("q", "down")), tmp_path / "a", base="x")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config["target_parameters"] == [
        "mlp.down_proj.weight",
        "mlp.shared_experts.down_proj.weight",
    ]
    for case, targets in (("glm4_moe", ("q",)), ("qwen3_moe", ("down",)), ("qwen3_tied", ("up",))):
        out = tmp_path / case
        save_adapter(with_adapters(case, targets=targets), out, base="x")
        assert "target_parameters" not in json.loads((out / "adapter_config.json").read_text())


@pytest.mark.parametrize(("alpha", "rank"), [(1.0, 49), (0.3, 7), (32.0, 3)])
def test_alpha_survives_being_kept_as_a_scale(alpha, rank, tmp_path):
    model = with_adapters("qwen3_tied", rank=rank, alpha=alpha, targets=("k",))
    save_adapter(model, tmp_path / "adapter", base="x")
    file = tmp_path / "adapter/adapter_config.json"
    config = json.loads(file.read_text())
    assert config["lora_alpha"] == pytest.approx(alpha, rel=1e-12)
    file.write_text(json.dumps(config | {"lora_alpha": alpha}))
    load_adapter(model, tmp_path / "adapter")


def test_dtype_of_what_is_written_and_sharding_of_what_is_read(tmp_path):
    model = with_adapters("qwen3_moe", rank=8, targets=("q", "down"))
    save_adapter(model, tmp_path / "low", base="x", dtype=jnp.bfloat16)
    tensors = load_file(tmp_path / "low/adapter_model.safetensors")
    assert {value.dtype for value in tensors.values()} == {np.dtype(jnp.bfloat16)}
    sharding = jax.sharding.NamedSharding(
        make_mesh(jax.devices()), jax.sharding.PartitionSpec(None, "fsdp")
    )
    path = ("layers", "mlp", "experts", "down", "lora_a")
    values = values_of(model)
    exact, values[path] = values[path], jax.device_put(values[path], sharding)
    again = load_adapter(nnx.merge(nnx.graphdef(model), nest(values)), tmp_path / "low")
    found = values_of(again)[path]
    assert (found.sharding, found.dtype) == (sharding, jnp.float32)
    np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16).astype(jnp.float32))


def test_what_has_no_adapters_or_no_values_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="no LoRA adapters; save the model itself"):
        save_adapter(base_of("qwen3_tied"), tmp_path / "adapter", base="x")
    abstract = add_lora(Transformer(base_of("qwen3_tied").config), LoraConfig())
    with pytest.raises(ValueError, match="no values; initialize or load it before saving"):
        save_adapter(abstract, tmp_path / "adapter", base="x")
    model = with_adapters("qwen3_tied")
    with pytest.raises(ValueError, match="already exists and is not an empty folder"):
        save_adapter(model, GOLDEN, base="x")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rank": 4, "alpha": 16.0},
            r"lora_A.weight in .* has shape \(3, 32\); the model's rank makes it \(4, 32\)",
        ),
        ({"alpha": 6.0}, r"lora_alpha 12 and r 3; the model scales adapters by 2"),
        ({"targets": ("q",)}, r"has .*down_proj.*, which the model does not take"),
    ],
)
def test_an_adapter_of_another_model_is_refused(change, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        load_adapter(with_adapters("qwen3_tied", **change), GOLDEN / "qwen3_tied/adapter")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, r"has peft_type 'IA3'; LORA is read"),
        ({"use_rslora": True}, r"has use_rslora True; only plain LoRA is read"),
        ({"alpha_pattern": {"q": 1}}, r"has alpha_pattern \{'q': 1\}; only plain"),
        ({"r": None}, r"has r None and lora_alpha 12; both are needed"),
        ({"target_modules": ["q_proj", "lm_head"]}, r"'lm_head'\]; a list of q_proj, .* is read"),
        ({"target_modules": "all-linear"}, r"target_modules 'all-linear'; a list of"),
        ({"target_modules": ["q_proj"]}, r"has base_model.*, which the model does not take"),
    ],
)
def test_a_config_that_means_something_else_is_refused(change, message, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(GOLDEN / "qwen3_tied/adapter", folder)
    config, _ = golden_adapter("qwen3_tied")
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_adapter(base_of("qwen3_tied"), folder)
    assert str(folder) in str(caught.value)


def test_missing_tensors_and_files_are_named(tmp_path):
    base, folder = base_of("qwen3_tied"), tmp_path / "adapter"
    shutil.copytree(GOLDEN / "qwen3_tied/adapter", folder)
    _, tensors = golden_adapter("qwen3_tied")
    gone = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    del tensors[gone]
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=rf"has no {re.escape(gone)}"):
        load_adapter(base, folder)
    (folder / "adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors is truncated"):
        load_adapter(base, folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_config.json"):
        load_adapter(base, folder)


def test_the_written_modules_are_those_of_the_checkpoint(tmp_path):
    """Every adapter's module is a matrix of model.safetensors, [out, in] as it is there."""
    model = with_adapters("glm4_moe", targets=("q", "k", "v", "o", "gate", "up", "down"))
    save_adapter(model, tmp_path / "adapter", base="x")
    weights = load_file(GOLDEN / "glm4_moe/model.safetensors")
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    linears = {p[:-1] for p in specs(model) if p[-1] == "lora_a"}
    assert len(linears) == 7 + 4 + 3 + 3
    for name, value in tensors.items():
        module, letter = re.fullmatch(
            r"base_model\.model\.(.*)\.lora_([AB])\.weight", name
        ).groups()
        out, into = weights[f"{module}.weight"].shape
        assert value.shape == ((3, into) if letter == "A" else (out, 3))
