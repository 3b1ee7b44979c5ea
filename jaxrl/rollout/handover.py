"""Weights handed to other processes as folders: a Hugging Face model, or a PEFT adapter."""

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

from flax import nnx
from safetensors import SafetensorError

from jaxrl.cli import OutputError
from jaxrl.models.hf import save_pretrained
from jaxrl.models.peft import save_adapter
from jaxrl.models.transformer import Transformer

COMPLETE = "COMPLETE"  # a file that is in a folder when all of it is


@dataclasses.dataclass(frozen=True)
class Handover:
    """Writes `root`/step_N, and keeps the last `keep` of them.

    model: whose weights are written; of one with adapters only those. base: the checkpoint folder
    that the run began with. dtype: what whole models are written in.
    """

    model: Transformer
    root: Path
    base: Path
    dtype: str = "bfloat16"
    keep: int = 2

    def write(self, weights: Any, version: int) -> Path:
        """The folder, complete. weights: nested dict of the model's parameters. Raises OutputError
        where it cannot be written."""
        folder = self.root / f"step_{version:06d}"
        model = nnx.merge(nnx.graphdef(self.model), weights)
        try:
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
            if self.is_adapter:
                save_adapter(model, folder, base=self.base, dtype="float32")
            else:
                save_pretrained(model, folder, source=self.base, dtype=self.dtype)
            (folder / COMPLETE).touch()
        except (OSError, SafetensorError) as error:
            raise OutputError(f"{folder} cannot be written: {error}") from error
        written = (p for p in self.root.iterdir() if re.fullmatch(r"step_\d+", p.name))
        for old in sorted(written, key=lambda p: int(p.name[5:]))[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)
        return folder.absolute()

    @property
    def is_adapter(self) -> bool:
        return bool(nnx.state(self.model, nnx.LoRAParam))
