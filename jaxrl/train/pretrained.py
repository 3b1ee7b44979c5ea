"""A run's first state: a Hugging Face checkpoint's weights, straight into their places."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrl.models.hf import load_pretrained
from jaxrl.models.hf_config import CheckpointError, read_config
from jaxrl.models.params import Buffer, initial_value, nest, specs
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
    parameter's part at a time. Raises `CheckpointError` as `load_pretrained` does, and for a folder
    with another model than the layout's.
    """
    abstract, values = layout.abstract(), _base(layout, folder)
    adapters = {p: s for p, s in layout.trainable_specs.items() if p not in values}
    if adapters:

        def draw(key):
            return {p: initial_value(p, s, key) for p, s in adapters.items()}

        shardings = {p: _at(abstract.params, p).sharding for p in adapters}
        values |= jax.jit(draw, out_shardings=shardings)(key)
    params = nest({p: values[p] for p in layout.trainable_specs})
    frozen = nest({p: values[p] for p in layout.frozen_specs})

    def begin(params):
        return jnp.zeros((), jnp.int32), layout.optimizer.init(params)

    places = (abstract.step.sharding, jax.tree.map(lambda s: s.sharding, abstract.opt_state))
    step, opt_state = jax.jit(begin, out_shardings=places)(params)
    return TrainState(step, params, frozen, opt_state)


def base_params(layout: StateLayout, folder: str | Path, dtype: Any) -> tuple[Any, Any]:
    """(trainable, frozen) parameters of full fine-tuning as they are in the folder, in `dtype`.
    Raises as `load_state` does."""
    values = _base(layout, folder, dtype)
    trees = (layout.trainable_specs, layout.frozen_specs)
    trainable, frozen = (nest({p: values[p] for p in tree}) for tree in trees)
    return trainable, frozen


def kept(layout: StateLayout, state: TrainState) -> TrainState:
    """What of a state a run's checkpoint holds: all of it, but of the base that LoRA leaves as it
    is only what is no parameter (routers' biases)."""
    if not layout.is_lora:
        return state
    buffers = {p: _at(state.frozen, p) for p, s in layout.frozen_specs.items() if s.kind is Buffer}
    return dataclasses.replace(state, frozen=nest(buffers))


def completed(layout: StateLayout, state: TrainState, folder: str | Path) -> TrainState:
    """The state that `kept` made `state` of; the rest is read from the checkpoint folder that the
    run began with."""
    if not layout.is_lora:
        return state
    base = {p: value for p, value in _base(layout, folder).items() if p in layout.frozen_specs}
    for path, spec in layout.frozen_specs.items():
        if spec.kind is Buffer:
            base[path] = _at(state.frozen, path)
    return dataclasses.replace(state, frozen=nest(base))


def _base(
    layout: StateLayout, folder: str | Path, dtype: Any = None
) -> dict[tuple[str, ...], jax.Array]:
    """The folder's weights by path, in the layout's places, and in its dtypes or in `dtype`."""
    there, here = (dataclasses.asdict(c) for c in (read_config(folder), layout.model.config))
    for key in there.keys() - {"name"}:
        if there[key] != here[key]:
            raise CheckpointError(
                f"{folder} holds another model than the run's: {key} is {there[key]}, and not "
                f"{here[key]}"
            )
    abstract = layout.abstract()
    places = merge_trees(abstract.params, abstract.frozen)
    base = [path for path, spec in specs(layout.model).items() if spec.hf is not None]
    model = load_pretrained(
        folder,
        dtype=dtype or (layout.frozen_dtype if layout.is_lora else jnp.float32),
        shardings=nest({path: _at(places, path).sharding for path in base}),
    )
    return {
        tuple(map(str, path)): variable.get_value()
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree
