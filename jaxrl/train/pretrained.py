"""A run's first state: a Hugging Face checkpoint's weights, straight into their places."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrl.models.hf import load_pretrained
from jaxrl.models.params import initial_value, nest, specs
from jaxrl.models.transformer import merge_trees
from jaxrl.options import ConfigError
from jaxrl.train.state import StateLayout, TrainState

# What is downloaded of a model on the hub; never pickles, never code.
PATTERNS = ("*.safetensors", "*.json", "*.jinja", "tokenizer*", "merges.txt")


def find_checkpoint(name: str) -> Path:
    """The folder of a checkpoint: `name` itself, or of a model's name on the Hugging Face hub where
    it was downloaded to. Raises ConfigError for what is neither."""
    if not name:
        raise ConfigError("config.model names no checkpoint; give a folder or a model on the hub")
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ConfigError(
            f"config.model {name!r} is no folder, and no model's name on the hub (owner/name)"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(PATTERNS)))
    except Exception as error:  # no such model, no connection, no permission
        line = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"config.model {name!r} is no folder here and cannot be downloaded: {line}"
        ) from error


def load_state(layout: StateLayout, folder: str | Path, key: jax.Array) -> TrainState:
    """The first state of training what is in a Hugging Face checkpoint folder.

    Full fine-tuning: its weights as fp32 masters. LoRA: its weights frozen, in the layout's
    `frozen_dtype`, and fresh adapters drawn from `key`. Every array is made where it will live, one
    parameter's part at a time. Raises `CheckpointError` as `load_pretrained` does.
    """
    abstract = layout.abstract()
    places = merge_trees(abstract.params, abstract.frozen)
    base = [path for path, spec in specs(layout.model).items() if spec.hf is not None]
    model = load_pretrained(
        folder,
        dtype=layout.frozen_dtype if layout.is_lora else jnp.float32,
        shardings=nest({path: _at(places, path).sharding for path in base}),
    )
    values = {
        tuple(map(str, path)): variable.get_value()
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }
    adapters = {p: s for p, s in layout.trainable_specs.items() if p not in values}
    if adapters:

        def draw(key):
            return {p: initial_value(p, s, key) for p, s in adapters.items()}

        shardings = {p: _at(places, p).sharding for p in adapters}
        values |= jax.jit(draw, out_shardings=shardings)(key)
    params = nest({p: values[p] for p in layout.trainable_specs})
    frozen = nest({p: values[p] for p in layout.frozen_specs})
    begin = jax.jit(
        lambda params: (jnp.zeros((), jnp.int32), layout.optimizer.init(params)),
        out_shardings=(
            abstract.step.sharding,
            jax.tree.map(lambda s: s.sharding, abstract.opt_state),
        ),
    )
    step, opt_state = begin(params)
    return TrainState(step, params, frozen, opt_state)


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree
