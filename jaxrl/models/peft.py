"""LoRA adapters as PEFT's folders: adapter_config.json and adapter_model.safetensors.

Experts' adapters are written expert by expert, under the names that the matrices have in the
checkpoint (`mlp.experts.3.gate_proj`), as vLLM reads them and PEFT turns them into the stacked form
that transformers 5 holds experts in. PEFT 0.21 then

- takes every "gate_proj", "up_proj" and "down_proj" of a model with experts for the experts':
  those of dense layers and shared experts are named as parameters of their own;
- reads the experts' adapters of "gate_proj" and "up_proj" only where all three have one: where one
  has none, it is written one of zeros, which changes nothing.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from jaxrl.models.hf import hf_names
from jaxrl.models.hf_config import CheckpointError, read_json
from jaxrl.models.lora import TARGETS, LoraConfig, adapted, add_lora
from jaxrl.models.params import ParamSpec, nest, specs
from jaxrl.models.params import Path as ParamPath
from jaxrl.models.safetensors_folder import new_folder, opened, write_json
from jaxrl.models.transformer import Transformer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# PEFT's wrapping of a causal language model.
PREFIX = "base_model.model."
# What an adapter may have that the model's own do not: it would change what they compute.
_OTHER_LORA = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save")


def save_adapter(model: Transformer, path: str | Path, *, base: str | Path, dtype=None) -> None:
    """Write the adapters of `model` as a new PEFT folder.

    base: the name or folder of the checkpoint that they belong to, for adapter_config.json. dtype:
    what they are written in, default their own. The folder appears only when complete. Raises
    ValueError where the model has no adapters or no values, or `path` is not empty.
    """
    scales = adapted(model)
    if not scales:
        raise ValueError("the model has no LoRA adapters; save the model itself")
    values, declared = _values(model), specs(model)
    rank = declared[*next(iter(scales)), "lora_a"].shape[-1]
    written, tensors = _written(model, declared), {}
    for linear, kernel in written.items():
        for letter, shape in _adapter_shapes(kernel, rank).items():
            value = values.get((*linear, f"lora_{letter.lower()}"))
            if value is not None and not isinstance(value, jax.Array | np.ndarray):
                raise ValueError("the model has no values; initialize or load it before saving")
            host = np.zeros(shape, np.float32) if value is None else np.asarray(value)
            host = host if dtype is None else host.astype(jnp.dtype(dtype))
            for name, index in _modules(kernel):
                tensors[_tensor(name, letter)] = np.ascontiguousarray(host[index].T)
    alpha = next(iter(scales.values())) * rank
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": round(alpha) if math.isclose(alpha, round(alpha)) else alpha,
        "target_modules": sorted({f"{linear[-1]}_proj" for linear in written}),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    if beside := _beside_experts(written):
        config["target_parameters"] = sorted(beside)
    with new_folder(Path(path)) as folder:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / WEIGHTS).chmod(folder.stat().st_mode & 0o666)
        write_json(folder / CONFIG, config)


def load_adapter(model: Transformer, path: str | Path) -> Transformer:
    """`model` with the adapters in a PEFT folder, in fp32, beside the given model's own arrays.

    A model without adapters gets those that adapter_config.json describes; one that has some has
    to have the same. Raises CheckpointError, naming file and tensor or key, for anything else.
    """
    folder = Path(path)
    rank, alpha, targets = _read_config(folder / CONFIG)
    base = _values(model)
    if not adapted(model):
        fresh = Transformer(
            model.config, attention=model.attention, grouped_matmul=model.grouped_matmul
        )
        model = add_lora(fresh, LoraConfig(rank, alpha, targets))
    for scale in adapted(model).values():
        if not math.isclose(alpha, scale * rank):
            raise CheckpointError(
                f"{folder / CONFIG} has lora_alpha {alpha:g} and r {rank}; the model scales "
                f"adapters by {scale:g}"
            )
    declared, new = specs(model), {}
    with opened(folder / WEIGHTS) as file:
        there = set(file.keys())
        for linear in adapted(model):
            kernel = declared[*linear, "kernel"]
            for letter in "AB":
                key = (*linear, f"lora_{letter.lower()}")
                value = np.empty(declared[key].shape, np.float32)
                for name, index in _modules(kernel):
                    tensor = _tensor(name, letter)
                    if tensor not in there:
                        raise CheckpointError(f"{folder / WEIGHTS} has no {tensor}")
                    found = file.get_tensor(tensor).T
                    if found.shape != value[index].shape:
                        raise CheckpointError(
                            f"{tensor} in {folder / WEIGHTS} has shape {found.T.shape}; the "
                            f"model's rank makes it {value[index].T.shape}"
                        )
                    value[index] = found
                    there.discard(tensor)
                old = base.get(key)
                place = old.sharding if isinstance(old, jax.Array) else None
                new[key] = jax.device_put(value, place)
    if there:
        raise CheckpointError(f"{folder / WEIGHTS} has {min(there)}, which the model does not take")
    return nnx.merge(nnx.graphdef(model), nest(base | new))


def _read_config(file: Path) -> tuple[int, float, tuple[str, ...]]:
    """(rank, alpha, the model's names of the targets) that an adapter_config.json describes."""
    config: Mapping[str, Any] = read_json(file)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{file} has peft_type {config.get('peft_type')!r}; LORA is read")
    for key in _OTHER_LORA:
        if config.get(key):
            raise CheckpointError(f"{file} has {key} {config[key]!r}; only plain LoRA is read")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or rank < 1:
        raise CheckpointError(f"{file} has r {rank!r} and lora_alpha {alpha!r}; both are needed")
    modules = config.get("target_modules")
    known = {f"{target}_proj": target for target in TARGETS}
    if not isinstance(modules, list) or not modules or not set(modules) <= known.keys():
        raise CheckpointError(
            f"{file} has target_modules {modules!r}; a list of {', '.join(known)} is read"
        )
    return rank, float(alpha), tuple(t for name, t in known.items() if name in modules)


def _values(model: Transformer) -> dict[ParamPath, Any]:
    return {tuple(map(str, p)): v.get_value() for p, v in nnx.to_flat_state(nnx.state(model))}


def _written(
    model: Transformer, declared: Mapping[ParamPath, ParamSpec]
) -> dict[ParamPath, ParamSpec]:
    """The kernels whose adapters are written, by the path of their linear map."""
    chosen = {linear[-1] for linear in adapted(model)}
    if model.config.num_experts and chosen & {"gate", "up"}:
        chosen |= {"gate", "up", "down"}
    return {
        path[:-1]: spec
        for path, spec in declared.items()
        if path[-1] == "kernel" and path[-2] in chosen
    }


def _beside_experts(written: Mapping[ParamPath, ParamSpec]) -> set[str]:
    """The matrices of a model with experts that are no expert's, but have an expert's name: ends of
    their parameters' names in the checkpoint."""
    experts = {linear[-1] for linear in written if "experts" in linear}
    return {
        re.sub(r"^model\.layers\.\{i\}\.", "", str(kernel.hf))
        for linear, kernel in written.items()
        if linear[-1] in experts and "experts" not in linear
    }


def _adapter_shapes(kernel: ParamSpec, rank: int) -> dict[str, tuple[int, ...]]:
    """Of a kernel [..., D, F]: A [..., D, R] and B [..., R, F]."""
    *lead, D, F = kernel.shape
    return {"A": (*lead, D, rank), "B": (*lead, rank, F)}


def _modules(kernel: ParamSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(module's name in the checkpoint, where its matrix lies in the stacked array)."""
    for name, index in hf_names(kernel):
        yield name.removesuffix(".weight"), index


def _tensor(module: str, letter: str) -> str:
    return f"{PREFIX}{module}.lora_{letter}.weight"
