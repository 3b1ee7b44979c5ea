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

# A file that is in a folder when all of it is there: not every shared disk renames at once for all.
COMPLETE = "COMPLETE"


@dataclasses.dataclass(frozen=True)
class Handover:
    """Writes `root`/step_N, and keeps the last `keep` of them, and those that are still read.

    model: whose weights are written; of one with adapters only those. base: the checkpoint folder
    that the run began with. dtype: what whole models are written in.
    """

    model: Transformer
    root: Path
    base: Path
    dtype: str = "bfloat16"
    keep: int = 2

    def write(self, weights: Any, version: int, read_from: int | None = None) -> Path:
        """The folder, which has `COMPLETE` when all of it is there. weights: nested dict of the
        model's parameters. read_from: the oldest version that somebody still reads, or is to.
        Raises OutputError where it cannot be written."""
        folder = self.root / f"step_{version:06d}"
        model = nnx.merge(nnx.graphdef(self.model), weights)
        try:
            for left in (folder, *self.root.glob(".step_*.partial-*")):  # of a run that was killed
                shutil.rmtree(left, ignore_errors=True)
            if self.is_adapter:
                save_adapter(model, folder, base=self.base, dtype="float32")
            else:
                save_pretrained(model, folder, source=self.base, dtype=self.dtype)
            (folder / COMPLETE).touch()
        except (OSError, SafetensorError) as error:
            raise OutputError(f"{folder} cannot be written: {error}") from error
        self._delete(version, version if read_from is None else read_from)
        return folder.absolute()

    @property
    def is_adapter(self) -> bool:
        return bool(nnx.state(self.model, nnx.LoRAParam))

    def _delete(self, version: int, read_from: int) -> None:
        """What nobody needs, of a run that stands at `version`. Later ones are of a run that was
        stopped, and has gone back to a checkpoint."""
        steps = (p for p in self.root.iterdir() if re.fullmatch(r"step_\d+", p.name))
        found = {int(p.name.removeprefix("step_")): p for p in steps}
        ours = sorted(number for number in found if number <= version)
        needed = {*ours[-self.keep :], *(number for number in ours if number >= read_from)}
        for number in found.keys() - needed:
            shutil.rmtree(found[number], ignore_errors=True)
