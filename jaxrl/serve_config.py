"""The options of `python -m jaxrl.serve`: the model, the server, the engine.

Imports no JAX, as `jaxrl.config`.
"""

# ruff: noqa: RUF009 - `option` and `group` are dataclasses.field

import dataclasses
import ipaddress
from typing import Literal

from jaxrl.config import LoraOptions
from jaxrl.options import ConfigError, above, at_least, group, option
from jaxrl.run_config import MeshConfig


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """Who is served, and how much at once."""

    host: str = option("127.0.0.1", "Address to listen on; others than this host's need a key.")
    port: int = option(8000, "Port to listen on; 0: any that is free, which is printed.")
    api_key: str = option(
        "", "Key that requests must bear; default the environment's JAXRL_API_KEY, if it is set."
    )
    model_name: str = option("", "Name that clients call the model by; default its folder's.")
    max_waiting: int = option(
        256, "Completions that may wait for a place; further requests are told to come again."
    )
    max_n: int = option(128, "Completions of a request, over all of its prompts, at most.")
    max_body_bytes: int = option(4 * 2**20, "Bytes of a request's body, at most.")
    timeout_s: float = option(600.0, "Seconds after which a request is given up.")
    updates: bool = option(True, "Take new weights: POST /update_weights_from_disk.")

    def __post_init__(self):
        at_least(self, 0, "port")
        at_least(self, 1, "max_waiting", "max_n", "max_body_bytes")
        above(self, 0, "timeout_s")

    def is_local(self) -> bool:
        """Whether only this host's programs reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """The engine's sizes on each device, and how it computes."""

    max_len: int = option(2048, "Tokens of a prompt and its completion.")
    slots: int = option(64, "Sequences that a device decodes at once.")
    cache_tokens: int = option(
        0, "Tokens that its cache holds; 0: slots x max_len, or what a GPU has room for."
    )
    weights: Literal["auto", "divided", "whole"] = option(
        "auto",
        "Layers are gathered for each token (`divided`) or lie whole on each device; `auto`: "
        "`whole` on GPUs where that takes a quarter of the memory at most.",
    )
    page: int = option(32, "Tokens to a page of the cache.")
    decode_steps: int = option(4, "Tokens drawn between two looks at what is waiting.")
    prefill_tokens: int = option(4096, "Prompt tokens that are prefilled together.")
    dtype: Literal["bfloat16", "float16", "float32"] = option(
        "bfloat16", "Of weights, activations and cache."
    )
    attention: Literal["auto", "cudnn", "tokamax", "triton", "xla"] = option(
        "auto", "Attention implementation of prefill."
    )
    grouped_matmul: Literal["auto", "tokamax", "triton", "xla"] = option(
        "auto", "Implementation of the experts' products."
    )
    warm_up: bool = option(True, "Compile for every shape before the first request.")

    def __post_init__(self):
        at_least(self, 1, "max_len", "slots", "page", "decode_steps", "prefill_tokens")
        at_least(self, 0, "cache_tokens")


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """`python -m jaxrl.serve`: a checkpoint, and how it is served."""

    model: str = option(
        "", "Checkpoint: a Hugging Face folder, or a model's name on the hub (`Qwen/Qwen3-4B`)."
    )
    tokenizer: str = option("", "Folder or name of the tokenizer; default the model's.")
    chat_template: str = option("", "Jinja file that replaces the tokenizer's chat template.")
    lora_rank: int = option(0, "Rank of the adapters that updates may bring; 0: whole models.")
    lora: LoraOptions = group(LoraOptions, "Those adapters beside their rank.")
    mesh: MeshConfig = group(MeshConfig, "How devices share the work.")
    server: ServerConfig = group(ServerConfig, "Who is served, and how much at once.")
    engine: EngineConfig = group(EngineConfig, "The engine.")

    def __post_init__(self):
        at_least(self, 0, "lora_rank")
        if self.mesh.context > 1:
            raise ConfigError(
                f"mesh.context is {self.mesh.context}: sequences are not divided in decoding; use 1"
            )
