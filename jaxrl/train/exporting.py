"""From a run's checkpoint to a Hugging Face folder or a PEFT adapter, on the CPU."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from flax import nnx
from safetensors import SafetensorError

from jaxrl.cli import OutputError
from jaxrl.data.tokenizer import load_tokenizer
from jaxrl.models.hf import save_pretrained
from jaxrl.models.hf_config import read_config
from jaxrl.models.lora import merge_lora
from jaxrl.models.peft import save_adapter
from jaxrl.models.safetensors_folder import check_new
from jaxrl.models.transformer import Transformer, merge_trees
from jaxrl.options import ConfigError, from_config
from jaxrl.rl_config import RlConfig
from jaxrl.run_config import MeshConfig, RunConfig, RunTrainConfig
from jaxrl.sft_config import SftConfig
from jaxrl.train.checkpoint import Checkpoints, Restored
from jaxrl.train.pretrained import completed, kept
from jaxrl.train.program import Program, rl_program, sft_program


@dataclasses.dataclass(frozen=True)
class Kind:
    """What is to be known of a kind of runs: their options, their program from (options, model,
    devices), and where the options have a chat template."""

    options: type[RunConfig]
    program: Callable[..., Program]
    chat_template: Callable[..., str]


KINDS = {
    "sft": Kind(SftConfig, sft_program, lambda config: config.data.chat_template),
    "rl": Kind(RlConfig, rl_program, lambda config: config.chat_template),
}


def export(run: Path, out: Path, step: int | None, form: str, dtype: str | None) -> str:
    """Write the checkpoint of `step` (None: the newest) of a run to the new folder `out`; returns
    what was written, in a line.

    form: "auto" and "merged" are the model, a LoRA run's with its adapters merged; "adapter" is a
    LoRA run's PEFT folder. dtype: default bfloat16 for a model, float32 for an adapter. Raises
    ConfigError where the run has no such checkpoint, its base checkpoint has gone, it has no
    adapter, or `out` is not empty; OutputError where `out` cannot be written.
    """
    check_new(out)
    with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        _, extra = checkpoints.extra(step)
        kind = KINDS[extra["kind"]]
        config, base = from_config(kind.options, extra["config"]), Path(extra["model_folder"])
        if not base.is_dir():
            raise ConfigError(
                f"the checkpoint that the run began with, {base}, has gone; its tokenizer (and, "
                "with LoRA, its weights) is needed"
            )
        if form == "adapter" and not config.lora_rank:
            raise ConfigError(f"the run in {run} trains all weights: there is no adapter to write")
        restored, model = trained_model(checkpoints, kind, config, base, step)
    said = "".join(f"step {n} cannot be used: {reason}\n" for n, reason in restored.skipped)
    said += f"step {restored.step} of {run} written to {out}: "
    if form == "adapter":
        # As it may be found from elsewhere: a name on the hub, or a whole path.
        name = base if Path(config.model).is_dir() else config.model
        with _told(out):
            save_adapter(model, out, base=name, dtype=dtype or "float32")
        return f"{said}a PEFT adapter of {name}, {dtype or 'float32'}"
    if config.lora_rank:
        model = merge_lora(model)
    template = kind.chat_template(config)
    with _tokenizer(config, template, base) as tokenizer, _told(out):
        save_pretrained(model, out, source=base, tokenizer=tokenizer, dtype=dtype or "bfloat16")
    return f"{said}a Hugging Face folder, {dtype or 'bfloat16'}"


def trained_model(
    checkpoints: Checkpoints, kind: Kind, config: RunConfig, base: Path, step: int | None
) -> tuple[Restored, Transformer]:
    """The run's model with the checkpoint's values, adapters and all, in fp32 in host memory."""
    one = dataclasses.replace(
        config, mesh=MeshConfig(), rows_per_device=1, train=RunTrainConfig(compute_dtype="float32")
    )
    layout = kind.program(one, read_config(base), jax.devices("cpu")[:1]).layout
    abstract = dataclasses.replace(kept(layout, layout.abstract()), opt_state=None)
    restored = checkpoints.restore_params(abstract, step)
    assert restored is not None  # its manifest was read
    state = completed(layout, restored.state, base)
    model = nnx.merge(nnx.graphdef(layout.model), merge_trees(state.params, state.frozen))
    return restored, model


@contextlib.contextmanager
def _tokenizer(config: RunConfig, template: str, base: Path) -> Iterator[Path | None]:
    """A folder with the tokenizer and the chat template that the run's data was written with, where
    they are not those of its base checkpoint."""
    if not config.tokenizer and not template:
        yield None
        return
    vocab_size = read_config(base).vocab_size
    used = load_tokenizer(config.tokenizer or base, vocab_size, template)
    with tempfile.TemporaryDirectory() as folder:
        used.hf.save_pretrained(folder)
        yield Path(folder)


@contextlib.contextmanager
def _told(out: Path) -> Iterator[None]:
    """What the operating system refuses, in one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{out} cannot be written: {error}; nothing was left there") from error
