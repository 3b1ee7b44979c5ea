"""Checkpoints of mixture-of-experts models: config.json, and experts stacked and unstacked."""

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
from jaxrl.models.hf_config import CheckpointError, config_json, parse_config
from jaxrl.models.presets import PRESETS
from jaxrl.parallel.mesh import make_mesh

GOLDEN = Path(__file__).parents[1] / "golden"

# The published config.json files, without what says nothing about the model's arithmetic.
QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GLM4_MOE = {
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "attention_bias": True,
    "first_k_dense_replace": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "max_position_embeddings": 131072,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 46,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "torch_dtype": "bfloat16",
    "use_qk_norm": False,
    "vocab_size": 151552,
}
PUBLISHED = {
    "Qwen3-30B-A3B-Instruct-2507": QWEN3_MOE
    | {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_hidden_layers": 48,
        "rope_theta": 10000000,
    },
    "Qwen3-235B-A22B-Instruct-2507": QWEN3_MOE
    | {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_attention_heads": 64,
        "num_hidden_layers": 94,
        "rope_theta": 5000000,
    },
    "INTELLECT-3": GLM4_MOE,
}


# --- config.json ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_what_the_published_config_json_says(name):
    assert parse_config(PUBLISHED[name], name) == PRESETS[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_dialect_of_transformers_5_says_the_same(name, tmp_path):
    """What transformers 5 makes of a published config.json, and writes."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    transformers.AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "5")
    written = json.loads((tmp_path / "5/config.json").read_text())
    assert not {"rope_theta", "num_experts", "partial_rotary_factor"} & written.keys()
    assert parse_config(written, name) == PRESETS[name]


def test_a_written_config_json_means_the_same_to_transformers(tmp_path):
    for name, published in PUBLISHED.items():
        ours = config_json(PRESETS[name], jnp.bfloat16, {})
        # transformers 4 reads the names of the published file.
        ignored = {"sliding_window", "use_sliding_window", "num_nextn_predict_layers"}
        assert {k: ours.get(k) for k in published.keys() - ignored} == {
            k: published[k] for k in published.keys() - ignored
        }
        read = []
        for number, raw in enumerate((published, ours)):
            folder = tmp_path / name / str(number)
            folder.mkdir(parents=True)
            (folder / "config.json").write_text(json.dumps(raw))
            read.append(transformers.AutoConfig.from_pretrained(folder).to_dict())
        differing = {k for k in read[0] if read[0][k] != read[1].get(k)}
        # The further layer of GLM-4.5 is not saved.
        assert differing <= {"_name_or_path", "num_nextn_predict_layers"}


@pytest.mark.parametrize("published", [QWEN3_MOE, GLM4_MOE], ids=["qwen3_moe", "glm4_moe"])
def test_absent_keys_mean_what_they_mean_to_transformers(published):
    kept = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    raw = {k: (GLM4_MOE | published)[k] for k in (*kept, "architectures", "intermediate_size")}
    raw["num_attention_heads"] = 64
    config = parse_config(raw, "x")
    kind = transformers.Qwen3MoeConfig if published is QWEN3_MOE else transformers.Glm4MoeConfig
    theirs = kind(**raw)
    assert config.num_experts == theirs.num_local_experts == 128
    assert config.norm_topk_prob == theirs.norm_topk_prob == (published is GLM4_MOE)
    for ours, name in (
        ("num_experts_per_tok", "num_experts_per_tok"),
        ("moe_intermediate_size", "moe_intermediate_size"),
        ("num_kv_heads", "num_key_value_heads"),
        ("max_position_embeddings", "max_position_embeddings"),
        ("rms_norm_eps", "rms_norm_eps"),
        ("attention_bias", "attention_bias"),
    ):
        assert getattr(config, ours) == getattr(theirs, name), name
    rope = theirs.to_dict()["rope_parameters"]
    assert config.rope_theta == rope["rope_theta"]
    assert config.partial_rotary_factor == rope.get("partial_rotary_factor", 1.0)
    assert config.head_dim == 4096 // 64
    if published is GLM4_MOE:
        assert (config.num_shared_experts, config.first_k_dense) == (1, 1)
        assert (config.qk_norm, config.routed_scaling_factor) == (theirs.use_qk_norm, 1.0)
        assert (config.router, config.attention_out_bias) == ("sigmoid", False)
    else:
        assert (config.num_shared_experts, config.first_k_dense) == (0, 0)
        assert (config.qk_norm, config.router) == (True, "softmax")


@pytest.mark.parametrize(
    "rope",
    [
        {"partial_rotary_factor": 0.25, "rope_theta": 5e5},
        {"rope_parameters": {"partial_rotary_factor": 0.25, "rope_theta": 5e5}},
        {"rope_parameters": {"rope_theta": 5e5}, "partial_rotary_factor": 0.25},
    ],
)
def test_partial_rotary_factor_in_the_dialects_of_transformers_4_and_5(rope):
    raw = {k: v for k, v in GLM4_MOE.items() if k not in ("rope_theta", "partial_rotary_factor")}
    config = parse_config(raw | rope, "x")
    assert (config.partial_rotary_factor, config.rope_theta) == (0.25, 5e5)
    assert config.rotary_dim == 32


@pytest.mark.parametrize(
    ("published", "change", "message"),
    [
        ("qwen", {"decoder_sparse_step": 2}, "decoder_sparse_step 2 is not supported.*1"),
        ("qwen", {"mlp_only_layers": [0]}, r"mlp_only_layers \[0\] is not supported"),
        ("qwen", {"num_experts": 0}, "num_experts is 0; it must be at least 1"),
        ("qwen", {"num_experts_per_tok": 129}, "num_experts_per_tok is 129; .* 1 to 128"),
        ("qwen", {"num_experts": "many"}, "num_experts is 'many'; it must be a whole number"),
        ("qwen", {"norm_topk_prob": "yes"}, "norm_topk_prob is 'yes'; it must be true or false"),
        ("qwen", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5.*supported: 1"),
        ("glm", {"n_group": 8}, "n_group 8 is not supported; supported: 1"),
        ("glm", {"topk_group": 4}, "topk_group 4 is not supported"),
        ("glm", {"first_k_dense_replace": 46}, "first_k_dense is 46; it must be 0 to 45"),
        ("glm", {"routed_scaling_factor": "x"}, "routed_scaling_factor is 'x'.* a number"),
        ("glm", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(published, change, message):
    raw = GLM4_MOE if published == "glm" else PUBLISHED["Qwen3-30B-A3B-Instruct-2507"]
    with pytest.raises(ValueError, match=message) as error:
        parse_config(raw | change, "x")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("Qwen3-0.6B", {"qk_norm": False}),
        ("Llama-3.1-8B-Instruct", {"partial_rotary_factor": 0.5}),
        ("Qwen3-30B-A3B-Instruct-2507", {"num_shared_experts": 1}),
        ("INTELLECT-3", {"router": "softmax"}),
        ("INTELLECT-3", {"attention_out_bias": True}),
    ],
)
def test_a_model_that_no_config_json_describes_is_not_written(name, change):
    message = f"{name}: {next(iter(change))} .* does not exist in {PRESETS[name].architecture}"
    with pytest.raises(ValueError, match=message):
        config_json(PRESETS[name].replace(**change), jnp.bfloat16, {})


# --- tensors -------------------------------------------------------------------------------------


def copied(case: str, tmp_path: Path, changes: dict | None = None) -> Path:
    """A golden checkpoint with some tensors replaced; None removes one."""
    folder = Path(shutil.copytree(GOLDEN / case, tmp_path / case))
    tensors = load_file(folder / "model.safetensors") | (changes or {})
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors")
    return folder


def assert_same_tensors(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert a[name].tobytes() == b[name].tobytes(), name


def values(model) -> dict:
    return {path: np.asarray(v.get_value()) for path, v in nnx.to_flat_state(nnx.state(model))}


def fuse(tensors: dict) -> dict:
    """As transformers 5 writes them with save_original_format=False."""
    fused = {k: v for k, v in tensors.items() if ".mlp.experts." not in k}
    for prefix in {k.split(".experts.")[0] for k in tensors if ".mlp.experts." in k}:
        gate, up, down = (
            np.stack([tensors[f"{prefix}.experts.{e}.{m}_proj.weight"] for e in range(8)])
            for m in ("gate", "up", "down")
        )
        fused[f"{prefix}.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        fused[f"{prefix}.experts.down_proj"] = down
    return fused


def test_each_experts_tensor_lies_in_its_slot():
    tensors = load_file(GOLDEN / "glm4_moe/model.safetensors")
    model = load_pretrained(GOLDEN / "glm4_moe", dtype=jnp.float32)
    down = np.asarray(model.layers.mlp.experts.down.kernel.get_value())
    assert down.shape == (2, 8, 8, 24)
    for layer in (1, 2):  # the first one is dense
        for e in range(8):
            expected = tensors[f"model.layers.{layer}.mlp.experts.{e}.down_proj.weight"].T
            np.testing.assert_array_equal(down[layer - 1, e], expected)
    assert model.dense_layers.mlp.up.kernel.get_value().shape == (1, 24, 40)
    assert model.layers.mlp.shared.up.kernel.get_value().shape == (2, 24, 8)


@pytest.mark.parametrize("case", ["qwen3_moe", "glm4_moe"])
@pytest.mark.parametrize("expert", [1, 4, 8])
def test_every_mesh_loads_and_saves_the_same_tensors(case, expert, tmp_path):
    mesh = make_mesh(jax.devices("cpu")[:8], expert)
    model = load_pretrained(GOLDEN / case, dtype=jnp.float32, mesh=mesh)
    up = model.layers.mlp.experts.up.kernel.get_value()
    assert up.addressable_shards[0].data.shape == (2, 1, 24, 8)
    plain = values(load_pretrained(GOLDEN / case, dtype=jnp.float32))
    for path, value in values(model).items():
        np.testing.assert_array_equal(value, plain[path])
    save_pretrained(model, tmp_path / "out", max_shard_bytes=30_000)
    shards = sorted(tmp_path.glob("out/*.safetensors"))
    assert len(shards) > 2
    saved = {name: tensor for file in shards for name, tensor in load_file(file).items()}
    assert_same_tensors(saved, load_file(GOLDEN / case / "model.safetensors"))


@pytest.mark.parametrize("mesh", [False, True])
@pytest.mark.parametrize("case", ["qwen3_moe_unnormalized_tied", "glm4_moe"])
def test_experts_that_a_file_holds_stacked_are_read_too(case, mesh, tmp_path):
    plain = load_pretrained(GOLDEN / case, dtype=jnp.float32)
    folder = tmp_path / "fused"
    shutil.copytree(GOLDEN / case, folder)
    fused = fuse(load_file(folder / "model.safetensors"))
    assert "model.layers.1.mlp.experts.gate_up_proj" in fused
    save_file(fused, folder / "model.safetensors")
    devices = make_mesh(jax.devices("cpu")[:8], 4) if mesh else None
    model = load_pretrained(folder, dtype=jnp.float32, mesh=devices)
    expected = values(plain)
    for path, value in values(model).items():
        np.testing.assert_array_equal(value, expected[path])
    save_pretrained(model, tmp_path / "out")
    assert_same_tensors(
        load_file(tmp_path / "out/model.safetensors"),
        load_file(GOLDEN / case / "model.safetensors"),
    )


def test_routers_stay_in_fp32(tmp_path):
    tensors = load_file(GOLDEN / "glm4_moe/model.safetensors")
    model = load_pretrained(GOLDEN / "glm4_moe", dtype=jnp.bfloat16)
    router = model.layers.mlp.router
    assert model.layers.mlp.experts.up.kernel.get_value().dtype == jnp.bfloat16
    for i in range(2):
        prefix = f"model.layers.{i + 1}.mlp.gate"
        kernel, bias = router.kernel.get_value()[i], router.bias.get_value()[i]
        assert (kernel.dtype, bias.dtype) == (jnp.float32, jnp.float32)
        np.testing.assert_array_equal(kernel, tensors[f"{prefix}.weight"].T)
        np.testing.assert_array_equal(bias, tensors[f"{prefix}.e_score_correction_bias"])
    save_pretrained(model, tmp_path / "out")
    saved = load_file(tmp_path / "out/model.safetensors")
    fp32 = {name for name, tensor in saved.items() if tensor.dtype == np.float32}
    assert fp32 == {name for name in saved if ".mlp.gate." in name}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def prediction_layer(number: int, *, but: str = "") -> dict:
    """The further layer of a published GLM-4.5 checkpoint, some of it."""
    names = ("eh_proj", "enorm", "shared_head.head", "embed_tokens", "mlp.experts.0.up_proj")
    return {
        f"model.layers.{number}.{n}.weight": np.zeros((2, 2), np.float32) for n in names if n != but
    }


def test_the_layer_that_predicts_further_tokens_is_ignored(tmp_path):
    folder = copied("glm4_moe", tmp_path, prediction_layer(3))
    save_pretrained(load_pretrained(folder, dtype=jnp.float32), tmp_path / "out")
    assert_same_tensors(
        load_file(tmp_path / "out/model.safetensors"),
        load_file(GOLDEN / "glm4_moe/model.safetensors"),
    )
    # Nobody may look for it.
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["num_nextn_predict_layers"] == 0


@pytest.mark.parametrize(
    ("case", "changes", "config", "message"),
    [
        ("glm4_moe", prediction_layer(4), {}, r"layers.4.\S+ in .* belongs to no parameter"),
        ("glm4_moe", prediction_layer(3, but="eh_proj"), {}, r"layers.3.\S+ in .* belongs to no"),
        (
            "glm4_moe",
            prediction_layer(3),
            {"num_nextn_predict_layers": 0},
            r"layers.3.\S+ in .* belongs to no parameter",
        ),
        ("qwen3_moe", prediction_layer(2), {}, r"layers.2.\S+ in .* belongs to no parameter"),
        (
            "qwen3_moe",
            {"model.layers.1.mlp.experts.7.up_proj.weight": None},
            {},
            "tensor model.layers.1.mlp.experts.7.up_proj.weight is missing",
        ),
        (
            "qwen3_moe",
            {"model.layers.1.mlp.experts.3.up_proj.weight": np.zeros((24, 8), np.float32)},
            {},
            r"experts.3.up_proj.weight in .* has shape \(24, 8\); .* makes it \(8, 24\)",
        ),
        ("qwen3_moe", {}, {"num_local_experts": 7}, r"mlp.gate.weight in .* shape \(8, 24\)"),
        ("qwen3_moe", {}, {"num_local_experts": 9}, r"experts.8.\S+ is missing"),
        ("glm4_moe", {}, {"first_k_dense_replace": 0}, r"layers.0.mlp.experts.0.\S+ is missing"),
    ],
)
def test_a_malformed_checkpoint_is_one_clear_line(case, changes, config, message, tmp_path):
    folder = copied(case, tmp_path, changes)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | config))
    with pytest.raises(CheckpointError, match=message) as error:
        load_pretrained(folder)
    assert "\n" not in str(error.value)
