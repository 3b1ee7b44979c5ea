"""LoRA adapters as PEFT's folders: adapter_config.json and adapter_model.safetensors.

Experts' adapters are written expert by expert, under the names that the matrices have in the
checkpoint (`mlp.experts.3.gate_proj`), as vLLM reads them and PEFT turns them into the stacked form
that transformers 5 holds experts in.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from jaxrl.models.hf import hf_names
from jaxrl.models.hf_config import CheckpointError, read_json
from jaxrl.models.lora import adapted
from jaxrl.models.params import ParamSpec, specs
from jaxrl.models.safetensors_folder import new_folder, opened, write_json
from jaxrl.models.transformer import Transformer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# PEFT's wrapping of a causal language model.
PREFIX = "base_model.model."


def save_adapter(model: Transformer, path: str | Path, *, base: str | Path) -> None:
    """Write the adapters of `model` as a new PEFT folder, in their own dtype.

    base: the name or folder of the checkpoint that they belong to, for adapter_config.json. The
    folder appears only when complete. Raises ValueError where the model has no adapters or `path`
    is not empty.
    """
    scales = adapted(model)
    if not scales:
        raise ValueError("the model has no LoRA adapters; save the model itself")
    values = {tuple(map(str, p)): v.get_value() for p, v in nnx.to_flat_state(nnx.state(model))}
    declared = specs(model)
    tensors, targets, rank = {}, set(), 0
    for linear in scales:
        a, b = (np.asarray(values[*linear, name]) for name in ("lora_a", "lora_b"))
        rank = a.shape[-1]
        for name, index in _module_names(declared[*linear, "kernel"]):
            tensors[f"{PREFIX}{name}.lora_A.weight"] = np.ascontiguousarray(a[index].T)
            tensors[f"{PREFIX}{name}.lora_B.weight"] = np.ascontiguousarray(b[index].T)
            targets.add(name.rpartition(".")[2])
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": next(iter(scales.values())) * rank,
        "target_modules": sorted(targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with new_folder(Path(path)) as folder:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / WEIGHTS).chmod(folder.stat().st_mode & 0o666)
        write_json(folder / CONFIG, config)


def load_adapter(model: Transformer, path: str | Path) -> Transformer:
    """`model`, which has adapters of the same rank on the same linear maps, with the values of a
    PEFT folder. Raises CheckpointError, naming file and tensor, for anything else."""
    folder = Path(path)
    config = read_json(folder / CONFIG)
    scales = adapted(model)
    declared, new = specs(model), {}
    with opened(folder / WEIGHTS) as file:
        there = set(file.keys())
        for linear, scale in scales.items():
            kernel = declared[*linear, "kernel"]
            for letter in "ab":
                spec = declared[*linear, f"lora_{letter}"]
                value = np.empty(spec.shape, np.float32)
                for name, index in _module_names(kernel):
                    tensor = f"{PREFIX}{name}.lora_{letter.upper()}.weight"
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
                new[*linear, f"lora_{letter}"] = jax.numpy.asarray(value)
            if config.get("lora_alpha", 0) != scale * config.get("r", 0):
                raise CheckpointError(
                    f"{folder / CONFIG} has lora_alpha {config.get('lora_alpha')} and r "
                    f"{config.get('r')}; the model scales adapters by {scale}"
                )
    if there:
        raise CheckpointError(f"{folder / WEIGHTS} has {min(there)}, which the model does not take")
    graphdef, state = nnx.split(model)
    flat = {tuple(map(str, path)): v for path, v in nnx.to_flat_state(state)}
    for key, value in new.items():
        flat[key] = flat[key].replace(value)
    return nnx.merge(graphdef, nnx.from_flat_state([(k, v) for k, v in flat.items()]))


def _module_names(kernel: ParamSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(module's name in the checkpoint, where its matrix lies in the stacked array)."""
    for name, index in hf_names(kernel):
        yield re.sub(r"\.weight$", "", name), index
