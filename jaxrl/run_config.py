"""The options that every training run has, of SFT and of RL: model, step, checkpoints, output.

Imports no JAX, as `jaxrl.config`, whose sections of the training step it shares.
"""

# ruff: noqa: RUF009 - `option` and `group` are dataclasses.field

import dataclasses
import re
from typing import Literal

from jaxrl.config import (
    ActivationCheckpointing,
    LoraOptions,
    OptimizerConfig,
    StepConfig,
    StepOptions,
)
from jaxrl.options import ConfigError, at_least, group, option


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and kept, and where a run begins."""

    every: int = option(100, "Steps between checkpoints; 0: only at the end and when stopped.")
    keep_last: int = option(2, "How many of the newest are kept.")
    keep_every: int = option(0, "Steps whose multiples are kept for good; 0: none.")
    resume: str = option("auto", "`auto`: the newest complete one; a step's number; or `none`.")
    fork: str = option(
        "",
        "Output folder of another run (`FOLDER` or `FOLDER@STEP`) whose state is the start.",
    )

    def __post_init__(self):
        at_least(self, 0, "every", "keep_every")
        at_least(self, 1, "keep_last")
        if self.resume not in ("auto", "none") and not re.fullmatch(r"\d+", self.resume):
            raise ConfigError(f"resume is {self.resume!r}; it takes auto, none or a step's number")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How the devices share the work; what is left of them goes to the fsdp axis."""

    expert: int = option(1, "Devices that share the experts of each layer.")
    context: int = option(1, "Devices that share each sequence.")
    context_method: Literal["ring", "ulysses"] = option(
        "ulysses", "How attention works over the context axis."
    )

    def __post_init__(self):
        at_least(self, 1, "expert", "context")


@dataclasses.dataclass(frozen=True)
class RunTrainConfig(StepOptions):
    """The training step beside its optimizer."""

    ac: ActivationCheckpointing = option("recompute", "What of a layer is kept for backward.")
    attention: Literal["auto", "cudnn", "tokamax", "triton", "xla"] = option(
        "auto", "Attention implementation."
    )


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What `SftConfig` and `RlConfig` have in common."""

    model: str = option(
        "", "Checkpoint: a Hugging Face folder, or a model's name on the hub (`Qwen/Qwen3-4B`)."
    )
    tokenizer: str = option("", "Folder or name of the tokenizer; default the model's.")
    output: str = option("runs", "Folder of the run: checkpoints, metrics, logs.")
    lora_rank: int = option(0, "Rank of LoRA's adapters; 0 is full fine-tuning.")
    lora: LoraOptions = group(LoraOptions, "LoRA beside its rank.")
    optimizer: OptimizerConfig = group(OptimizerConfig, "Optimizer, clipping, schedule.")
    train: RunTrainConfig = group(RunTrainConfig, "The training step.")
    mesh: MeshConfig = group(MeshConfig, "How devices share the work.")
    rows_per_device: int = option(1, "Rows that a device works on at once; the rest accumulates.")
    max_steps: int = option(0, "Optimizer steps.")
    max_bad_steps: int = option(
        3, "Steps in a row with a gradient that is not finite after which the run stops."
    )
    checkpoint: CheckpointConfig = group(CheckpointConfig, "Checkpoints.")
    seed: int = option(0, "Seed of all that is drawn.")
    log_every: int = option(1, "Steps between lines on the console.")
    tensorboard: bool = option(True, "Write TensorBoard files into the output folder.")
    wandb: str = option("", "Weights & Biases project to log to, if `wandb` is installed.")
    mlflow: str = option("", "MLflow experiment to log to, if `mlflow` is installed.")
    profile: str = option("", "Steps to trace for TensorBoard's profiler, `FIRST:LAST`.")
    dry_run: bool = option(False, "Print the resolved options and the plan, and stop.")
    gpu: str = option("", "`dry_run`: GPU to plan for, e.g. `8xH100`; default this host's devices.")

    def __post_init__(self):
        at_least(self, 0, "lora_rank", "max_steps", "seed")
        at_least(self, 1, "rows_per_device", "max_bad_steps", "log_every")
        if self.profile and not re.fullmatch(r"\d+:\d+", self.profile):
            raise ConfigError(f"profile is {self.profile!r}; write FIRST:LAST, e.g. 10:12")

    @property
    def step(self) -> StepConfig:
        """The training step's config."""
        raise NotImplementedError
