"""Load and save Hugging Face checkpoint folders: config.json and safetensors, never pickle."""

import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrl.models.hf_config import TOKEN_IDS, CheckpointError, config_json, read_config, read_json
from jaxrl.models.params import ParamSpec, nest, specs
from jaxrl.models.safetensors_folder import (
    Pending,
    Stored,
    list_tensors,
    new_folder,
    read_into,
    write_json,
    write_tensors,
)
from jaxrl.models.transformer import Transformer

__all__ = ["CheckpointError", "load_pretrained", "save_pretrained"]

# Buffers that older versions of transformers saved; they follow from config.json.
_HARMLESS = re.compile(r".*rotary_emb\.inv_freq$")
# What else makes a checkpoint folder usable, copied along from where the model came from.
_COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)


def load_pretrained(
    path: str | Path,
    *,
    dtype=jnp.bfloat16,
    mesh: jax.sharding.Mesh | None = None,
    shardings: Mapping | None = None,
    attention: str = "auto",
) -> Transformer:
    """The model in a Hugging Face checkpoint folder, its parameters in `dtype`.

    One parameter at a time is read, stacked over layers and moved to its devices: host memory
    holds at most one of them besides what the devices own. `mesh` shards parameters by
    `parallel.sharding.param_shardings`; `shardings` says it outright (a nested dict of
    `Sharding`s with the parameters' paths); with neither they go to the default device.

    Raises `CheckpointError` (a `ValueError`) that names the file and the tensor or key, before
    any parameter is allocated, where the folder is malformed or not supported.
    """
    folder = Path(path)
    if mesh is not None and shardings is not None:
        raise ValueError("mesh and shardings both say where parameters live; give one of them")
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; give a local Hugging Face checkpoint folder")
    model = Transformer(read_config(folder), attention=attention)
    if mesh is not None:
        from jaxrl.parallel.sharding import param_shardings

        shardings = param_shardings(model, mesh)
    stored = list_tensors(folder)
    declared = specs(model)
    _check(declared, stored, model.config.tie_embeddings, folder)
    values = {}
    for parameter, spec in declared.items():
        sharding = shardings
        for key in parameter:
            sharding = None if sharding is None else sharding[key]
        host = np.empty(spec.shape, jnp.dtype(dtype))
        read_into(host, dict(hf_names(spec)), stored, transposed=spec.hf_transposed)
        values[parameter] = _to_device(host, sharding)
        del host  # before the next one is allocated
    graphdef, _ = nnx.split(model)
    return nnx.merge(graphdef, nest(values))


def save_pretrained(
    model: Transformer,
    path: str | Path,
    *,
    source: str | Path | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write `model` as a Hugging Face checkpoint folder that transformers 4 and 5 load.

    Parameters keep their dtype. source: the folder the model came from; its tokenizer, chat
    template and generation settings are copied along and its special token ids kept. The folder
    appears under its name only when complete.

    Raises `ValueError` where `path` exists and is not empty, and for a model that has LoRA
    adapters, no values yet, or parameters on other processes' devices.
    """
    path = Path(path)
    variables = {tuple(map(str, p)): v for p, v in nnx.to_flat_state(nnx.state(model))}
    declared, values = specs(model), {p: v.get_value() for p, v in variables.items()}
    for parameter, spec in declared.items():
        name = ".".join(parameter)
        if spec.hf is None:
            raise ValueError(
                f"{name} is a LoRA adapter; merge the adapters into the weights before saving "
                "them as a checkpoint of the base model"
            )
        # An abstract model holds ShapeDtypeStructs, which are on no device.
        if not hasattr(values[parameter], "is_fully_addressable"):
            raise ValueError(f"{name} has no value; initialize or load the model before saving it")
        if not values[parameter].is_fully_addressable:
            raise ValueError(f"{name} lies partly on another process's devices; gather it first")

    token_ids = {}
    if source is not None:
        raw = read_json(Path(source) / "config.json")
        token_ids = {key: raw.get(key) for key in TOKEN_IDS}
    with new_folder(path) as folder:
        dtype = values[("embed",)].dtype
        write_json(folder / "config.json", config_json(model.config, dtype, token_ids))
        write_tensors(folder, list(_pending(declared, values)), max_shard_bytes)
        if source is not None:
            for pattern in _COMPANIONS:
                for file in Path(source).glob(pattern):
                    if file.is_file():
                        shutil.copyfile(file, folder / file.name)


def hf_names(spec: ParamSpec) -> Iterator[tuple[str, int | None]]:
    """The tensors that make up a parameter: (name, layer), layer None where it is not stacked."""
    assert spec.hf is not None
    if "{i}" not in spec.hf:
        yield spec.hf, None
        return
    for i in range(spec.shape[0]):
        yield spec.hf.replace("{i}", str(i)), i


def _check(declared: Mapping, stored: Mapping[str, Stored], tied: bool, folder: Path) -> None:
    """Refuse missing and misshapen tensors, and those that nothing here would read."""
    expected = set()
    for spec in declared.values():
        for name, i in hf_names(spec):
            expected.add(name)
            if name not in stored:
                raise CheckpointError(f"tensor {name} is missing from the checkpoint in {folder}")
            shape = spec.shape if i is None else spec.shape[1:]
            shape = (*shape[:-2], shape[-1], shape[-2]) if spec.hf_transposed else shape
            if stored[name].shape != shape:
                raise CheckpointError(
                    f"tensor {name} in {stored[name].file} has shape {stored[name].shape}; "
                    f"config.json makes it {shape}"
                )
    for name in sorted(set(stored) - expected):
        if not (_HARMLESS.match(name) or (tied and name == "lm_head.weight")):
            raise CheckpointError(
                f"tensor {name} in {stored[name].file} belongs to no parameter of "
                f"the model that config.json describes"
            )


def _to_device(host: np.ndarray, sharding) -> jax.Array:
    # Waits, so that the caller may free its copy: transfers are asynchronous.
    if sharding is None:
        return jax.device_put(host).block_until_ready()
    # From a callback each device gets its own shard only, and no process another's.
    value = jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
    return value.block_until_ready()


def _pending(declared: Mapping, values: Mapping) -> Iterator[Pending]:
    """The tensors to write, layer by layer, each fetched from its devices when it is due."""

    def tensor(value, i, transposed):
        value = value if i is None else jax.lax.dynamic_index_in_dim(value, i, keepdims=False)
        host = np.asarray(value)
        return host.swapaxes(-1, -2) if transposed else host

    rows = [
        (-1 if i is None else i, name, parameter, i)
        for parameter, spec in declared.items()
        for name, i in hf_names(spec)
    ]
    for _, name, parameter, i in sorted(rows, key=lambda row: row[0]):
        value, spec = values[parameter], declared[parameter]
        nbytes = value.nbytes // (1 if i is None else spec.shape[0])
        yield Pending(name, nbytes, lambda v=value, i=i, t=spec.hf_transposed: tensor(v, i, t))
