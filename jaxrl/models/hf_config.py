"""Hugging Face's config.json, as transformers 4 and 5 write it, to and from `ModelConfig`."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxrl.models.config import ModelConfig, RopeScaling
from jaxrl.options import ConfigError

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class CheckpointError(ConfigError):
    """A checkpoint that is malformed or not supported: one line with the file and the value."""


@dataclasses.dataclass(frozen=True)
class Key:
    """A config.json key of some families: its name, what its absence means, another name for it."""

    name: str
    default: int | float | bool
    alias: str | None = None


@dataclasses.dataclass(frozen=True)
class Family:
    """One supported architecture: its `model_type`, and what an absent config.json key means.

    The defaults are those of transformers' config class. None: one kv head per query head,
    head_dim hidden_size / num_attention_heads, and rotary embeddings that always turn whole heads.
    keys: what config.json says besides of a field of `ModelConfig`. fixed: fields that are the
    same in every model of the family. only: keys with one supported value, which is the default.
    prediction_layers: the default of num_nextn_predict_layers, see `prediction_layers`.
    """

    model_type: str
    num_kv_heads: int | None
    head_dim: int | None
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    partial_rotary_factor: float | None = None
    keys: Mapping[str, Key] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    only: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prediction_layers: int = 0


FAMILIES = {
    "Qwen3ForCausalLM": Family("qwen3", 32, 128, 32768, fixed={"qk_norm": True}),
    "LlamaForCausalLM": Family("llama", None, None, 2048),
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe",
        4,
        None,
        32768,
        keys={
            # transformers 4 writes the first name, transformers 5 the second.
            "num_experts": Key("num_experts", 128, "num_local_experts"),
            "num_experts_per_tok": Key("num_experts_per_tok", 8),
            "moe_intermediate_size": Key("moe_intermediate_size", 768),
            "norm_topk_prob": Key("norm_topk_prob", False),
        },
        fixed={"qk_norm": True},
        only={"decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "Glm4MoeForCausalLM": Family(
        "glm4_moe",
        8,
        None,
        131072,
        rms_norm_eps=1e-5,
        partial_rotary_factor=0.5,
        keys={
            "num_experts": Key("n_routed_experts", 128, "num_local_experts"),
            "num_experts_per_tok": Key("num_experts_per_tok", 8),
            "moe_intermediate_size": Key("moe_intermediate_size", 1408),
            "num_shared_experts": Key("n_shared_experts", 1),
            "first_k_dense": Key("first_k_dense_replace", 1),
            "norm_topk_prob": Key("norm_topk_prob", True),
            "routed_scaling_factor": Key("routed_scaling_factor", 1.0),
            "qk_norm": Key("use_qk_norm", False),
        },
        fixed={"router": "sigmoid", "attention_out_bias": False},
        only={"n_group": 1, "topk_group": 1},
        prediction_layers=1,
    ),
}


def read_config(folder: str | Path) -> ModelConfig:
    """The `ModelConfig` of a checkpoint folder's config.json, named after the folder.

    Raises `CheckpointError` where the file is missing or not JSON, lacks a shape, or asks for
    anything that this decoder would compute differently.
    """
    folder = Path(folder)
    return parse_config(read_json(folder / "config.json"), folder.resolve().name)


def parse_config(raw: Mapping[str, Any], name: str) -> ModelConfig:
    """The `ModelConfig` that a parsed config.json describes; errors as in `read_config`."""
    architectures = raw.get("architectures") or [None]
    architecture = architectures[0] if isinstance(architectures, list) else architectures
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        raise CheckpointError(
            f"{name}/config.json: architecture {architecture!r} is not supported; "
            f"supported: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[architecture]
    for key, fine in (
        ("hidden_act", "silu"),
        ("mlp_bias", False),
        ("use_sliding_window", False),
        ("quantization_config", None),
        *family.only.items(),
    ):
        if raw.get(key) not in (fine, None):
            raise CheckpointError(
                f"{name}/config.json: {key} {raw[key]!r} is not supported; supported: {fine!r}"
            )
    if other := set(raw.get("layer_types") or ()) - {"full_attention"}:
        raise CheckpointError(
            f"{name}/config.json: layer_types has {min(other)!r}; supported: 'full_attention'"
        )

    number = functools.partial(_number, raw, name)
    hidden, heads = number("hidden_size"), number("num_attention_heads")
    if heads < 1:  # before it divides
        raise CheckpointError(f"{name}/config.json: num_attention_heads is {heads}; at least 1")
    max_positions = number("max_position_embeddings", 0) or family.max_position_embeddings
    theta, scaling, partial = _rope(raw, name, max_positions, family.partial_rotary_factor)
    keys = {
        field: number(key.name, key.default, key.alias, type(key.default))
        for field, key in family.keys.items()
    }
    if keys.get("num_experts") == 0:
        raise CheckpointError(
            f"{name}/config.json: {family.keys['num_experts'].name} is 0; it must be at least 1"
        )
    # What is null is not what is absent: transformers' classes then count query heads.
    kv_heads = family.num_kv_heads if "num_key_value_heads" not in raw else None
    head_dim = family.head_dim if "head_dim" not in raw else None
    try:
        return ModelConfig(
            name=name,
            architecture=architecture,
            vocab_size=number("vocab_size"),
            hidden_size=hidden,
            num_layers=number("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=number("num_key_value_heads", kv_heads or heads),
            head_dim=number("head_dim", head_dim or hidden // heads),
            intermediate_size=number("intermediate_size"),
            rope_theta=theta,
            rms_norm_eps=number("rms_norm_eps", family.rms_norm_eps, kind=float),
            tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
            attention_bias=bool(raw.get("attention_bias", False)),
            rope_scaling=scaling,
            max_position_embeddings=max_positions,
            partial_rotary_factor=partial,
            **family.fixed,
            **keys,
        )
    except CheckpointError:
        raise
    except ValueError as error:  # sizes that do not fit each other
        raise CheckpointError(f"config.json of {error}") from None


def prediction_layers(raw: Mapping[str, Any], config: ModelConfig) -> range:
    """Numbers of the layers behind the model's own that predict further tokens (GLM-4.5's
    multi-token prediction). Neither transformers' forward pass nor this decoder uses them."""
    count = default = FAMILIES[config.architecture].prediction_layers
    if default and isinstance(said := raw.get("num_nextn_predict_layers"), int):
        count = said
    return range(config.num_layers, config.num_layers + count)


def config_json(config: ModelConfig, dtype: Any, token_ids: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says about a model, readable by transformers 4 and 5 alike.

    token_ids: values for `TOKEN_IDS`; one left out is written as null, because the Llama class
    would otherwise assume ids 1 and 2.

    Raises `ValueError` for a model that its architecture's config.json cannot describe.
    """
    family = FAMILIES[config.architecture]
    theta, scaling = float(config.rope_theta), config.rope_scaling
    partial = {}
    if family.partial_rotary_factor is not None:
        partial = {"partial_rotary_factor": config.partial_rotary_factor}
    llama3 = None if scaling is None else {"rope_type": "llama3", **dataclasses.asdict(scaling)}
    dtype = jnp.dtype(dtype).name
    written = {
        "architectures": [config.architecture],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.attention_bias,
        **{key.name: getattr(config, field) for field, key in family.keys.items()},
        **family.only,
        **{key: token_ids.get(key) for key in TOKEN_IDS},
        # transformers 4 reads the first of each pair, transformers 5 the second.
        "torch_dtype": dtype,
        "dtype": dtype,
        "rope_theta": theta,
        "rope_scaling": llama3,
        **partial,
        "rope_parameters": {"rope_theta": theta, **(llama3 or {"rope_type": "default"}), **partial},
    }
    if family.prediction_layers:
        written["num_nextn_predict_layers"] = 0
    read, fields = parse_config(written, config.name), dataclasses.fields(config)
    for field in [f.name for f in fields if getattr(read, f.name) != getattr(config, f.name)]:
        raise ValueError(
            f"{config.name}: {field} {getattr(config, field)!r} does not exist in "
            f"{config.architecture}, whose models have {getattr(read, field)!r}"
        )
    return written


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; anything else is a `CheckpointError` that names the file."""
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; the folder is no Hugging Face checkpoint")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is no valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds a JSON {type(value).__name__}; it must be an object")
    return value


def _rope(
    raw: Mapping, name: str, max_positions: int, partial_default: float | None
) -> tuple[float, RopeScaling | None, float]:
    """theta, scaling and the share of a head that is turned, from `rope_theta`, `rope_scaling` and
    `partial_rotary_factor` (4) or `rope_parameters` (5)."""
    rope = {}
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(said := raw.get(key) or {}, dict):
            raise CheckpointError(f"{name}/config.json: {key} is {said!r}; it must be an object")
        rope |= said
    given = {key: value for key, value in rope.items() if value is not None}
    either = functools.partial(_number, {**raw, **given}, name, kind=float)
    theta = either("rope_theta", 0) or 10000.0
    partial = either("partial_rotary_factor", 1.0 if partial_default is None else partial_default)
    rope.pop("rope_theta", None)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if partial_default is None and partial != 1:
        raise CheckpointError(
            f"{name}/config.json: partial_rotary_factor {partial} is not supported; supported: 1"
        )
    if kind not in ("default", "llama3") or any(isinstance(v, dict) for v in rope.values()):
        raise CheckpointError(
            f"{name}/config.json: rope type {kind!r} with {sorted(rope)} is not supported; "
            "supported: 'default' and 'llama3', the same in every layer"
        )
    if kind == "default":
        return theta, None, partial
    missing = [k for k in ("factor", "low_freq_factor", "high_freq_factor") if k not in rope]
    if missing:
        raise CheckpointError(f"{name}/config.json: rope type 'llama3' lacks {missing[0]!r}")
    number = functools.partial(_number, rope, name, kind=float)
    scaling = RopeScaling(
        factor=number("factor"),
        low_freq_factor=number("low_freq_factor"),
        high_freq_factor=number("high_freq_factor"),
        original_max_position_embeddings=number(
            "original_max_position_embeddings", max_positions, kind=int
        ),
    )
    return theta, scaling, partial


def _number(
    raw: Mapping[str, Any],
    name: str,
    key: str,
    default: float | None = None,
    alias: str | None = None,
    kind: Any = int,
) -> Any:
    """What `raw` has of a key or, where that is missing or null, of another one; else the default.
    Raises `CheckpointError` for a value, or a default, of another kind."""
    value = raw.get(key)
    value = raw.get(alias) if value is None and alias is not None else value
    value: Any = default if value is None else value
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, int | kind) and (kind is bool) == isinstance(value, bool):
        return kind(value)
    sort = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
    raise CheckpointError(f"{name}/config.json: {key} is {value!r}; it must be {sort}")
