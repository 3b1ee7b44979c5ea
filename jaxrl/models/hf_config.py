"""Hugging Face's config.json, as transformers 4 and 5 write it, to and from `ModelConfig`."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxrl.models.config import ModelConfig, RopeScaling

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class CheckpointError(ValueError):
    """A checkpoint that is malformed or not supported: one line with the file and the value."""


@dataclasses.dataclass(frozen=True)
class Family:
    """One supported architecture: its `model_type`, and what an absent config.json key means.

    The defaults are those of transformers' config class. None: one kv head per query head, and
    head_dim hidden_size / num_attention_heads.
    """

    model_type: str
    qk_norm: bool
    num_kv_heads: int | None
    head_dim: int | None
    max_position_embeddings: int


FAMILIES = {
    "Qwen3ForCausalLM": Family("qwen3", True, 32, 128, 32768),
    "LlamaForCausalLM": Family("llama", False, None, None, 2048),
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
    architecture = (raw.get("architectures") or [None])[0]
    if architecture not in FAMILIES:
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
    ):
        if raw.get(key) not in (fine, None):
            raise CheckpointError(
                f"{name}/config.json: {key} {raw[key]!r} is not supported; supported: {fine!r}"
            )
    if other := set(raw.get("layer_types") or ()) - {"full_attention"}:
        raise CheckpointError(
            f"{name}/config.json: layer_types has {min(other)!r}; supported: 'full_attention'"
        )

    def shape(key: str) -> int:
        if isinstance(value := raw.get(key), int):
            return value
        raise CheckpointError(f"{name}/config.json: {key} is {value!r}; it must be a whole number")

    hidden, heads = shape("hidden_size"), shape("num_attention_heads")
    max_positions = raw.get("max_position_embeddings") or family.max_position_embeddings
    theta, scaling = _rope(raw, name, max_positions)
    return ModelConfig(
        name=name,
        architecture=architecture,
        vocab_size=shape("vocab_size"),
        hidden_size=hidden,
        num_layers=shape("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=raw.get("num_key_value_heads", family.num_kv_heads) or heads,
        head_dim=raw.get("head_dim", family.head_dim) or hidden // heads,
        intermediate_size=shape("intermediate_size"),
        rope_theta=theta,
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qk_norm=family.qk_norm,
        attention_bias=bool(raw.get("attention_bias", False)),
        rope_scaling=scaling,
        max_position_embeddings=max_positions,
    )


def config_json(config: ModelConfig, dtype: Any, token_ids: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says about a model, readable by transformers 4 and 5 alike.

    token_ids: values for `TOKEN_IDS`; one left out is written as null, because the Llama class
    would otherwise assume ids 1 and 2.
    """
    theta, scaling = float(config.rope_theta), config.rope_scaling
    llama3 = None if scaling is None else {"rope_type": "llama3", **dataclasses.asdict(scaling)}
    dtype = jnp.dtype(dtype).name
    return {
        "architectures": [config.architecture],
        "model_type": FAMILIES[config.architecture].model_type,
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
        **{key: token_ids.get(key) for key in TOKEN_IDS},
        # transformers 4 reads the first of each pair, transformers 5 the second.
        "torch_dtype": dtype,
        "dtype": dtype,
        "rope_theta": theta,
        "rope_scaling": llama3,
        "rope_parameters": {"rope_theta": theta, **(llama3 or {"rope_type": "default"})},
    }


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


def _rope(raw: Mapping, name: str, max_positions: int) -> tuple[float, RopeScaling | None]:
    """theta and scaling from `rope_theta` + `rope_scaling` (4) or `rope_parameters` (5)."""
    rope = {**(raw.get("rope_parameters") or {}), **(raw.get("rope_scaling") or {})}
    theta = rope.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise CheckpointError(
            f"{name}/config.json: partial_rotary_factor {partial} is not supported; supported: 1"
        )
    if kind not in ("default", "llama3") or any(isinstance(v, dict) for v in rope.values()):
        raise CheckpointError(
            f"{name}/config.json: rope type {kind!r} with {sorted(rope)} is not supported; "
            "supported: 'default' and 'llama3', the same in every layer"
        )
    if kind == "default":
        return float(theta), None
    missing = [k for k in ("factor", "low_freq_factor", "high_freq_factor") if k not in rope]
    if missing:
        raise CheckpointError(f"{name}/config.json: rope type 'llama3' lacks {missing[0]!r}")
    return float(theta), RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position_embeddings=rope.get(
            "original_max_position_embeddings", max_positions
        ),
    )
