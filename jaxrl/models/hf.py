"""Load and save Hugging Face checkpoint folders: config.json and safetensors, never pickle."""

import functools
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrl.models.hf_config import (
    TOKEN_IDS,
    CheckpointError,
    config_json,
    parse_config,
    prediction_layers,
    read_json,
)
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
_GENERATION = ("generation_config.json",)
_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)


def load_pretrained(
    path: str | Path,
    *,
    dtype=jnp.bfloat16,
    mesh: jax.sharding.Mesh | None = None,
    shardings: Mapping | None = None,
    attention: str = "auto",
    grouped_matmul: str = "auto",
) -> Transformer:
    """The model in a Hugging Face checkpoint folder, its parameters in `dtype` (routers in fp32).

    One device's part of one parameter at a time is read, stacked over layers and experts, and
    moved to the device: host memory holds at most one of them besides what the devices own, and
    no process reads what is another's. `mesh` shards parameters by
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
    raw = read_json(folder / "config.json")
    config = parse_config(raw, folder.resolve().name)
    model = Transformer(config, attention=attention, grouped_matmul=grouped_matmul)
    if mesh is not None:
        from jaxrl.parallel.sharding import param_shardings

        shardings = param_shardings(model, mesh)
    stored = list_tensors(folder)
    for i in prediction_layers(raw, config):
        prefix = f"model.layers.{i}."
        if f"{prefix}eh_proj.weight" in stored:  # which no layer of the decoder has
            stored = {k: v for k, v in stored.items() if not k.startswith(prefix)}
    declared = specs(model)
    _check(declared, stored, config.tie_embeddings, folder)
    values = {}
    for parameter, spec in declared.items():
        sharding = shardings
        for key in parameter:
            sharding = None if sharding is None else sharding[key]
        values[parameter] = _read_parameter(spec, stored, spec.dtype(dtype), sharding)
    graphdef, _ = nnx.split(model)
    return nnx.merge(graphdef, nest(values))


def save_pretrained(
    model: Transformer,
    path: str | Path,
    *,
    source: str | Path | None = None,
    tokenizer: str | Path | None = None,
    dtype=None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write `model` as a Hugging Face checkpoint folder that transformers 4 and 5 load.

    Each expert's matrices become tensors of their own. dtype: what the parameters are written in
    (routers in fp32), default their own; cast one by one, as they are written. source: the folder
    the model came from; its tokenizer, chat template and generation settings are copied along and
    its special token ids kept. tokenizer: a folder whose tokenizer and chat template are copied in
    place of those. The folder appears under its name only when complete.

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
        # An abstract model holds ShapeDtypeStructs.
        if not isinstance(values[parameter], jax.Array | np.ndarray):
            raise ValueError(f"{name} has no value; initialize or load the model before saving it")
        if not getattr(values[parameter], "is_fully_addressable", True):
            raise ValueError(f"{name} lies partly on another process's devices; gather it first")

    token_ids = {}
    if source is not None:
        raw = read_json(Path(source) / "config.json")
        token_ids = {key: raw.get(key) for key in TOKEN_IDS}
    with new_folder(path) as folder:
        shown = values[("embed",)].dtype if dtype is None else jnp.dtype(dtype)
        write_json(folder / "config.json", config_json(model.config, shown, token_ids))
        write_tensors(folder, list(_pending(declared, values, dtype)), max_shard_bytes)
        for origin, patterns in ((source, _GENERATION), (tokenizer or source, _TOKENIZER)):
            if origin is not None:
                _copy(Path(origin), patterns, folder)


def _copy(source: Path, patterns: Sequence[str], folder: Path) -> None:
    for pattern in patterns:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)


def hf_names(spec: ParamSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors that make up a parameter: (name, index), which says where each lies: (), (layer,)
    or (layer, expert)."""
    assert spec.hf is not None
    stacked = [mark for mark in ("{i}", "{e}") if mark in spec.hf]
    for index in np.ndindex(*spec.shape[: len(stacked)]):
        name = spec.hf
        for mark, i in zip(stacked, index, strict=True):
            name = name.replace(mark, str(i + spec.first_layer if mark == "{i}" else i))
        yield name, index


def _check(declared: Mapping, stored: Mapping[str, Stored], tied: bool, folder: Path) -> None:
    """Refuse missing and misshapen tensors, and those that nothing here would read."""
    expected = set()
    for spec in declared.values():
        for name, index in hf_names(spec):
            expected.add(name)
            if name not in stored:
                raise CheckpointError(f"tensor {name} is missing from the checkpoint in {folder}")
            shape = spec.shape[len(index) :]
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


def _read_parameter(spec: ParamSpec, stored: Mapping[str, Stored], dtype, sharding) -> jax.Array:
    """A parameter on its devices, read one device's part at a time."""

    names = list(hf_names(spec))
    stacked = len(names[0][1])

    def read(index: tuple[slice, ...]) -> np.ndarray:
        part = [slice(*s.indices(n)[:2]) for s, n in zip(index, spec.shape, strict=True)]
        lead, rest = part[:stacked], part[stacked:]
        host = np.empty([s.stop - s.start for s in part], dtype)
        slots = {
            name: tuple(i - s.start for i, s in zip(at, lead, strict=True))
            for name, at in names
            if all(s.start <= i < s.stop for i, s in zip(at, lead, strict=True))
        }
        read_into(host, slots, stored, rest, transposed=spec.hf_transposed)
        return host

    whole = (slice(None),) * len(spec.shape)
    # Waits, here and below, so that the host's copy is freed: transfers are asynchronous.
    if sharding is None:
        return jax.device_put(read(whole)).block_until_ready()
    devices: dict[tuple[slice, ...], list] = {}
    for device, index in sharding.addressable_devices_indices_map(spec.shape).items():
        devices.setdefault(index, []).append(device)
    parts = []
    for index, same in devices.items():
        host = read(index)
        for device in same:
            one = jax.sharding.SingleDeviceSharding(device, memory_kind=sharding.memory_kind)
            parts.append(jax.device_put(host, one).block_until_ready())
        del host  # before the next one is allocated
    return jax.make_array_from_single_device_arrays(spec.shape, sharding, parts, dtype=dtype)


def _pending(declared: Mapping, values: Mapping, dtype) -> Iterator[Pending]:
    """The tensors to write, layer by layer, each fetched from its devices when it is due."""

    def tensor(value, index, transposed, held):
        host = _fetch(value, index).astype(held, copy=False)
        return host.swapaxes(-1, -2) if transposed else host

    rows = [
        (index[0] + spec.first_layer if index else -1, name, parameter, index)
        for parameter, spec in declared.items()
        for name, index in hf_names(spec)
    ]
    for _, name, parameter, index in sorted(rows, key=lambda row: row[0]):
        value, spec = values[parameter], declared[parameter]
        held = value.dtype if dtype is None else spec.dtype(dtype)
        nbytes = held.itemsize * math.prod(spec.shape[len(index) :])
        make = functools.partial(tensor, value, index, spec.hf_transposed, held)
        yield Pending(name, nbytes, make)


def _fetch(value: jax.Array | np.ndarray, index: tuple[int, ...]) -> np.ndarray:
    """value[index] on the host, from the devices that hold it and no others: slicing the sharded
    array would first gather it on each of them."""
    if isinstance(value, np.ndarray):
        return value[index]
    shape = value.shape[len(index) :]
    host = None
    for shard in value.addressable_shards:
        bounds = [s.indices(n)[:2] for s, n in zip(shard.index, value.shape, strict=True)]
        lead, rest = bounds[: len(index)], bounds[len(index) :]
        held = all(start <= i < stop for i, (start, stop) in zip(index, lead, strict=True))
        if shard.replica_id or not held:
            continue
        part, sizes = shard.data, [stop - start for start, stop in rest]
        if index:
            starts = [i - start for i, (start, _) in zip(index, lead, strict=True)]
            starts, slice_sizes = [*starts, *(0 for _ in rest)], [*(1 for _ in index), *sizes]
            part = jax.lax.dynamic_slice(part, starts, slice_sizes)
        part = np.asarray(part).reshape(sizes)
        if part.shape == shape:
            return part
        host = np.empty(shape, value.dtype) if host is None else host
        host[tuple(slice(*b) for b in rest)] = part
    assert host is not None
    return host
