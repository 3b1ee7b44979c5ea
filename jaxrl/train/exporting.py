"""From a run's checkpoint to a Hugging Face folder or a PEFT adapter, on one device."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrl.models.hf import save_pretrained
from jaxrl.models.hf_config import read_config
from jaxrl.models.lora import merge_lora
from jaxrl.models.params import nest, specs
from jaxrl.models.peft import save_adapter
from jaxrl.models.transformer import Transformer, merge_trees
from jaxrl.options import ConfigError, from_config
from jaxrl.sft_config import MeshConfig, SftConfig, SftTrainConfig
from jaxrl.train.checkpoint import Checkpoints, Restored
from jaxrl.train.pretrained import completed, kept
from jaxrl.train.program import sft_program


def export(run: Path, out: Path, step: int | None, form: str, dtype: str) -> str:
    """Write the checkpoint of `step` (None: the newest) of a run to the new folder `out`; returns
    what was written, in a line.

    form: "auto" and "merged" are the model, a LoRA run's with its adapters merged, in `dtype`;
    "adapter" is a LoRA run's PEFT folder. Raises ConfigError where the run has no such checkpoint,
    its base checkpoint has gone, or it has no adapter; ValueError where `out` is not empty.
    """
    with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        _, extra = checkpoints.extra(step)
        config, base = from_config(SftConfig, extra["config"]), Path(extra["model_folder"])
        if not base.is_dir():
            raise ConfigError(
                f"the checkpoint that the run began with, {base}, has gone; its tokenizer (and, "
                "with LoRA, its weights) is needed"
            )
        if form == "adapter" and not config.lora_rank:
            raise ConfigError(f"the run in {run} trains all weights: there is no adapter to write")
        restored, model = trained_model(checkpoints, config, base, step)
    said = "".join(f"step {n} cannot be used: {reason}\n" for n, reason in restored.skipped)
    said += f"step {restored.step} of {run} written to {out}: "
    if form == "adapter":
        save_adapter(model, out, base=config.model)
        shape = model.config
        # Seen with PEFT 0.21, which takes every "gate_proj" for the experts'.
        mixed = shape.num_experts and (shape.first_k_dense or shape.num_shared_experts)
        note = "; PEFT itself does not read all of it for this architecture" if mixed else ""
        return f"{said}a PEFT adapter of {config.model}{note}"
    if config.lora_rank:
        model = merge_lora(model)
    save_pretrained(as_dtype(model, jnp.dtype(dtype)), out, source=base)
    return f"{said}a Hugging Face folder, {dtype}"


def trained_model(
    checkpoints: Checkpoints, config: SftConfig, base: Path, step: int | None
) -> tuple[Restored, Transformer]:
    """The run's model with the checkpoint's values, adapters and all, on the default device."""
    one = dataclasses.replace(
        config, mesh=MeshConfig(), rows_per_device=1, train=SftTrainConfig(compute_dtype="float32")
    )
    layout = sft_program(one, read_config(base), jax.devices()[:1]).layout
    abstract = dataclasses.replace(kept(layout, layout.abstract()), opt_state=None)
    restored = checkpoints.restore_params(abstract, step)
    assert restored is not None  # its manifest was read
    state = completed(layout, restored.state, base)
    model = nnx.merge(nnx.graphdef(layout.model), merge_trees(state.params, state.frozen))
    return restored, model


def as_dtype(model: Transformer, dtype: jnp.dtype) -> Transformer:
    """The model with its parameters in `dtype`, what belongs in fp32 (routers) left."""
    declared = specs(model)
    values = {
        path: variable.get_value().astype(declared[path].dtype(dtype))
        for path, variable in (
            (tuple(map(str, p)), v) for p, v in nnx.to_flat_state(nnx.state(model))
        )
    }
    return nnx.merge(nnx.graphdef(model), nest(values))
