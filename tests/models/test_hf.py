"""Checkpoint folders: config.json dialects, refusals, malformed files, round trips."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxrl import load_pretrained, save_pretrained
from jaxrl.models import safetensors_folder
from jaxrl.models.config import RopeScaling
from jaxrl.models.hf_config import CheckpointError, config_json, parse_config, read_config
from jaxrl.models.lora import LoraConfig, add_lora
from jaxrl.models.params import nest, specs
from jaxrl.models.presets import PRESETS
from jaxrl.models.safetensors_folder import Pending, list_tensors, write_tensors
from jaxrl.models.transformer import Transformer

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(f.parent.name for f in GOLDEN.glob("*/golden.safetensors"))

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SCALING = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA3 = SCALING | {"rope_type": "llama3"}
WINDOWED = {"architectures": ["Qwen3ForCausalLM"], "use_sliding_window": True}


# --- config.json ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dialect",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_theta": 500000, "rope_scaling": SCALING | {"type": "llama3"}},
        {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
        {"rope_parameters": LLAMA3, "rope_theta": 5e5},
    ],
)
def test_rope_scaling_in_the_dialects_of_transformers_4_and_5(dialect):
    config = parse_config(LLAMA | dialect, "x")
    assert config.rope_theta == 5e5
    assert config.rope_scaling == RopeScaling(32.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize(
    "dialect",
    [
        {"rope_theta": 1e6, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"rope_scaling": {"type": "default"}, "rope_theta": 1e6},
    ],
)
def test_plain_rope_in_both_dialects(dialect):
    config = parse_config(LLAMA | dialect, "x")
    assert (config.rope_theta, config.rope_scaling) == (1e6, None)


def test_absent_keys_mean_what_they_mean_to_transformers():
    """An old Llama config.json: no head_dim, kv heads, theta, eps or biases."""
    config = parse_config(LLAMA, "x")
    theirs = transformers.LlamaConfig(**LLAMA)
    assert (config.head_dim, config.num_kv_heads) == (8, 4)
    assert config.head_dim == theirs.head_dim
    assert config.num_kv_heads == theirs.num_key_value_heads
    assert config.rope_theta == theirs.to_dict()["rope_parameters"]["rope_theta"] == 10000.0
    assert config.rms_norm_eps == theirs.rms_norm_eps
    assert config.max_position_embeddings == theirs.max_position_embeddings
    assert (config.tie_embeddings, config.attention_bias, config.qk_norm) == (False, False, False)
    # Qwen3's head_dim does not follow from hidden_size.
    qwen = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "num_key_value_heads": 2}
    assert parse_config(qwen, "x").head_dim == transformers.Qwen3Config(**qwen).head_dim == 128
    assert parse_config(qwen, "x").qk_norm


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel'.*LlamaForCausalLM"),
        ({"architectures": None}, "architecture None is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'.*'llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'.*'llama3'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"partial_rotary_factor": 0}, "partial_rotary_factor 0.0.*supported: 1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5.*supported: 1"),
        (WINDOWED, "use_sliding_window True.*supported: False"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "'sliding_attention'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'.*'silu'"),
        ({"mlp_bias": True}, "mlp_bias True.*False"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"num_attention_heads": "four"}, "num_attention_heads is 'four'"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; at least 1"),
        ({"num_key_value_heads": 3}, "num_kv_heads"),
        ({"num_key_value_heads": 0}, "num_kv_heads is 0"),
        ({"num_hidden_layers": -1}, "num_layers is -1"),
        ({"head_dim": "x"}, "head_dim is 'x'; it must be a whole number"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'; it must be a number"),
        ({"max_position_embeddings": [1]}, "max_position_embeddings is .1.; it must be a whole"),
        ({"rope_theta": "big"}, "rope_theta is 'big'; it must be a number"),
        ({"rope_scaling": "big"}, "rope_scaling is 'big'; it must be an object"),
        ({"rope_scaling": LLAMA3 | {"factor": "big"}}, "factor is 'big'; it must be a number"),
        ({"architectures": {"a": 1}}, "architecture .* is not supported"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change, message):
    with pytest.raises(CheckpointError, match=message) as error:
        parse_config(LLAMA | change, "x")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config", PRESETS.values(), ids=list(PRESETS))
def test_a_written_config_json_reads_back_here_and_in_transformers(config, tmp_path):
    written = config_json(config, jnp.bfloat16, {"eos_token_id": [7, 8]})
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert read_config(tmp_path) == config.replace(name=tmp_path.name)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert theirs.rope_parameters == written["rope_parameters"]
    assert theirs.tie_word_embeddings == config.tie_embeddings
    assert (theirs.head_dim, theirs.num_key_value_heads) == (config.head_dim, config.num_kv_heads)
    assert (theirs.eos_token_id, theirs.bos_token_id) == ([7, 8], None)
    # The two keys that transformers 4 reads instead.
    assert written["rope_theta"] == config.rope_theta
    assert (written["rope_scaling"] or {}).get("rope_type") == (
        "llama3" if config.rope_scaling else None
    )


# --- round trips ---------------------------------------------------------------------------------


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for file in folder.glob("*.safetensors"):
        if file.name != "golden.safetensors":
            found |= load_file(file)
    return found


def assert_same_tensors(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert a[name].tobytes() == b[name].tobytes(), name


@pytest.mark.parametrize("case", CASES)
def test_load_and_save_gives_the_same_file_back(case, tmp_path):
    save_pretrained(load_pretrained(GOLDEN / case, dtype=jnp.float32), tmp_path / "out")
    assert_same_tensors(tensors_of(tmp_path / "out"), tensors_of(GOLDEN / case))
    assert read_config(tmp_path / "out") == read_config(GOLDEN / case).replace(name="out")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_survives_in_shards(dtype, tmp_path):
    model = load_pretrained(GOLDEN / "qwen3_untied", dtype=dtype)
    assert model.embed.get_value().dtype == dtype
    save_pretrained(model, tmp_path / "out", max_shard_bytes=20_000)
    shards = sorted(tmp_path.glob("out/*.safetensors"))
    assert [s.name for s in shards[:2]] == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
    ]
    assert all(s.stat().st_size < 20_000 + 8_000 for s in shards)  # + the header
    expected = {
        k: v.astype(jnp.dtype(dtype)) for k, v in tensors_of(GOLDEN / "qwen3_untied").items()
    }
    assert_same_tensors(tensors_of(tmp_path / "out"), expected)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == jnp.dtype(dtype).name
    again = load_pretrained(tmp_path / "out", dtype=dtype)
    save_pretrained(again, tmp_path / "again")
    assert_same_tensors(tensors_of(tmp_path / "again"), expected)


def test_the_default_dtype_is_bfloat16():
    assert load_pretrained(GOLDEN / "qwen3_tied").final_norm.scale.get_value().dtype == jnp.bfloat16


def test_source_carries_tokenizer_files_and_token_ids_along(tmp_path):
    source = copied("llama_bias", tmp_path)
    edit_config(source, eos_token_id=[5, 6], bos_token_id=None)
    (source / "tokenizer.json").write_text("{}")
    (source / "generation_config.json").write_text('{"eos_token_id": 5}')
    save_pretrained(load_pretrained(source), tmp_path / "out", source=source)
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert (written["eos_token_id"], written["bos_token_id"]) == ([5, 6], None)
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}"
    assert (tmp_path / "out/generation_config.json").is_file()


def test_tensors_are_cast_as_they_are_written_routers_are_not(tmp_path):
    model = load_pretrained(GOLDEN / "glm4_moe", dtype=jnp.float32)
    save_pretrained(model, tmp_path / "out", dtype=jnp.bfloat16)
    before = load_file(GOLDEN / "glm4_moe/model.safetensors")
    for name, value in load_file(tmp_path / "out/model.safetensors").items():
        dtype = jnp.float32 if ".mlp.gate." in name else jnp.bfloat16
        assert value.dtype == dtype, name
        np.testing.assert_array_equal(value, before[name].astype(dtype))
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def test_shardings_place_each_parameter():
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="unpinned_host")
    model = Transformer(read_config(GOLDEN / "qwen3_tied"))
    shardings = jax.tree.map(lambda _: device, parameters(model))
    loaded = load_pretrained(GOLDEN / "qwen3_tied", shardings=shardings)
    assert all(p.sharding == device for p in jax.tree.leaves(parameters(loaded)))
    with pytest.raises(ValueError, match="mesh and shardings"):
        load_pretrained(GOLDEN / "qwen3_tied", mesh=jax.make_mesh((1,), "x"), shardings=shardings)


def parameters(model):
    return nnx.to_pure_dict(nnx.state(model))


def test_strided_arrays_are_written_in_order(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    write_tensors(tmp_path, [Pending("a", 24, lambda: array.T)], max_shard_bytes=100)
    assert (load_file(tmp_path / "model.safetensors")["a"] == array.T).all()


# --- refusals to save ----------------------------------------------------------------------------


def test_an_existing_folder_is_never_overwritten(tmp_path):
    model = load_pretrained(GOLDEN / "qwen3_tied")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    with pytest.raises(ValueError, match="full already exists and is not an empty folder"):
        save_pretrained(model, tmp_path / "full")
    assert [f.name for f in (tmp_path / "full").iterdir()] == ["precious"]
    (tmp_path / "empty").mkdir()
    save_pretrained(model, tmp_path / "empty")  # an empty one is fine
    assert (tmp_path / "empty" / "model.safetensors").is_file()


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors_folder, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_pretrained(load_pretrained(GOLDEN / "qwen3_tied"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_lora_and_empty_models_are_not_saved(tmp_path):
    model = Transformer(read_config(GOLDEN / "qwen3_tied"))
    with pytest.raises(ValueError, match="has no value; initialize or load"):
        save_pretrained(model, tmp_path / "out")
    add_lora(model, LoraConfig(rank=2))
    zeros = {path: jnp.zeros(spec.shape) for path, spec in specs(model).items()}
    model = nnx.merge(nnx.split(model)[0], nest(zeros))
    with pytest.raises(ValueError, match=r"lora_a is a LoRA adapter; merge"):
        save_pretrained(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- malformed checkpoints -----------------------------------------------------------------------


def copied(case: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / case, tmp_path / case))


def edit_config(folder: Path, **changes) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))


def edit_tensors(folder: Path, changes: dict) -> None:
    """Replace tensors of model.safetensors; None removes one."""
    tensors = load_file(folder / "model.safetensors") | changes
    kept = {k: v for k, v in tensors.items() if v is not None}
    save_file(kept, folder / "model.safetensors")


def break_it(folder: Path, how: str) -> None:
    weights, norm = folder / "model.safetensors", "model.norm.weight"
    match how:
        case "no folder":
            shutil.rmtree(folder)
        case "no config":
            (folder / "config.json").unlink()
        case "config no json":
            (folder / "config.json").write_text("{")
        case "config a list":
            (folder / "config.json").write_text("[]")
        case "no weights":
            weights.rename(folder / "pytorch_model.bin")
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "empty":
            weights.write_bytes(b"")
        case "missing":
            edit_tensors(folder, {norm: None})
        case "shape":
            edit_tensors(folder, {norm: np.ones(31, np.float32)})
        case "transposed":
            down = "model.layers.1.mlp.down_proj.weight"
            edit_tensors(folder, {down: np.ascontiguousarray(load_file(weights)[down].T)})
        case "layers":
            edit_config(folder, num_hidden_layers=1)
        case "integers":
            edit_tensors(folder, {norm: np.ones(32, np.int32)})
        case "untied":
            edit_config(folder, tie_word_embeddings=False)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no folder", "qwen3_tied is no folder"),
        ("no config", "config.json is missing"),
        ("config no json", "config.json is no valid JSON"),
        ("config a list", "config.json holds a JSON list"),
        ("no weights", "neither model.safetensors nor .*; only safetensors"),
        ("truncated", "model.safetensors is truncated"),
        ("empty", "model.safetensors is truncated"),
        ("missing", "tensor model.norm.weight is missing from .*qwen3_tied"),
        ("shape", r"model.norm.weight in .*model.safetensors has shape \(31,\).*makes it \(32,\)"),
        ("transposed", r"layers.1.mlp.down_proj.weight .* shape \(48, 32\); .* \(32, 48\)"),
        ("layers", r"tensor model.layers.1.\S+ in .*model.safetensors belongs to no parameter"),
        ("integers", "model.norm.weight in .*model.safetensors is I32; supported: F32"),
        ("untied", "tensor lm_head.weight is missing"),
    ],
)
def test_a_malformed_checkpoint_is_one_clear_line(how, message, tmp_path):
    folder = copied("qwen3_tied", tmp_path)
    break_it(folder, how)
    with pytest.raises(CheckpointError, match=message) as error:
        load_pretrained(folder)
    assert "\n" not in str(error.value)


def test_harmless_extra_tensors_are_ignored(tmp_path):
    folder = copied("qwen3_tied", tmp_path)
    extra = {
        "lm_head.weight": np.zeros((96, 32), np.float32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32),
    }
    edit_tensors(folder, extra)
    save_pretrained(load_pretrained(folder, dtype=jnp.float32), tmp_path / "out")
    assert_same_tensors(tensors_of(tmp_path / "out"), tensors_of(GOLDEN / "qwen3_tied"))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("gone", "model-00002-of-00004.safetensors is missing; .* says that it holds model"),
        ("truncated", "model-00002-of-00004.safetensors is truncated"),
        ("elsewhere", r"model.norm.weight is not in .*model-00002-of-00004.safetensors"),
        ("outside", "'../secret.safetensors', outside its own folder"),
        ("no map", "index.json has no weight_map"),
        ("a list", "index.json: weight_map gives tensors no files' names"),
        ("numbers", "index.json: weight_map gives tensors no files' names"),
    ],
)
def test_a_malformed_set_of_shards_is_one_clear_line(how, message, tmp_path):
    folder = tmp_path / "sharded"
    model = load_pretrained(GOLDEN / "qwen3_tied", dtype=jnp.float32)
    save_pretrained(model, folder, max_shard_bytes=30_000)
    second, index = folder / "model-00002-of-00004.safetensors", folder / safetensors_folder.INDEX
    written = json.loads(index.read_text())
    weight_map = written["weight_map"]
    assert set(weight_map) == set(list_tensors(folder)) == set(tensors_of(GOLDEN / "qwen3_tied"))
    match how:
        case "gone":
            second.unlink()
        case "truncated":
            second.write_bytes(second.read_bytes()[:5000])
        case "elsewhere":
            first = folder / weight_map["model.norm.weight"]
            save_file({k: v for k, v in load_file(first).items() if "model.norm" not in k}, first)
            weight_map["model.norm.weight"] = second.name
        case "outside":
            weight_map["model.norm.weight"] = "../secret.safetensors"
        case "no map":
            written = {}
        case "a list":
            written = {"weight_map": list(weight_map)}
        case "numbers":
            written = {"weight_map": dict.fromkeys(weight_map, 7)}
    index.write_text(json.dumps(written))
    with pytest.raises(CheckpointError, match=message) as error:
        load_pretrained(folder)
    assert "\n" not in str(error.value)
