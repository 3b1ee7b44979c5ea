"""The options of `python -m jaxrl.sft`: data, training, checkpoints, what is shown and written.

Imports no JAX, as `jaxrl.config`.
"""

# ruff: noqa: RUF009 - `option` and `group` are dataclasses.field

import dataclasses
from typing import Literal

from jaxrl.config import StepConfig, check_seq_len
from jaxrl.options import ConfigError, at_least, group, option
from jaxrl.run_config import RunConfig

ROLES = ("system", "user", "assistant", "tool")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Chat data: what is read, which of its tokens are trained, and how rows are filled."""

    train: tuple[str, ...] = option(
        (), "JSONL or Parquet files (`*` matches), or names of Hugging Face datasets."
    )
    validation: tuple[str, ...] = option((), "The same for validation; default none.")
    hold_out: int = option(
        0, "Samples taken from the training data for validation, where `validation` is empty."
    )
    split: str = option("train", "Split of training data that is a Hugging Face dataset.")
    validation_split: str = option("validation", "Split of validation data that is one.")
    seq_len: int = option(2048, "Tokens per row; a multiple of 128.")
    pack: bool = option(True, "Several conversations per row; false: one, and padding.")
    window: int = option(1024, "Conversations that are packed together.")
    overlong: Literal["drop", "truncate"] = option(
        "drop", "What happens to a conversation longer than `seq_len`; either is counted."
    )
    bad_samples: Literal["refuse", "skip"] = option(
        "refuse",
        "A sample that the chat template refuses, or in which nothing is trained: stop, or count.",
    )
    train_roles: tuple[str, ...] = option(
        ("assistant",), "Roles whose content (and stop token) is trained."
    )
    train_turns: Literal["all", "last"] = option(
        "all", "Train every turn of those roles, or the last one of each conversation."
    )
    chat_template: str = option("", "Jinja file that replaces the tokenizer's chat template.")
    shuffle: bool = option(True, "A new order in every epoch, drawn from `seed`.")
    workers: int = option(0, "Processes that tokenize and pack; 0: a thread of the trainer's.")

    def __post_init__(self):
        at_least(self, 0, "hold_out", "workers")
        at_least(self, 1, "window")
        check_seq_len(self.seq_len)
        if not self.train_roles:
            raise ConfigError(f"train_roles is empty; choose among {', '.join(ROLES)}")
        for role in self.train_roles:
            if role not in ROLES:
                raise ConfigError(f"train_roles has {role!r}; choose among {', '.join(ROLES)}")
        if self.hold_out and self.validation:
            raise ConfigError(
                f"hold_out is {self.hold_out}, and validation names data of its own; use one"
            )


@dataclasses.dataclass(frozen=True)
class SftConfig(RunConfig):
    """`python -m jaxrl.sft`: the model, its data, and how it is trained."""

    output: str = option("runs/sft", "Folder of the run: checkpoints, metrics, logs.")
    data: DataConfig = group(DataConfig, "Chat data.")
    batch_size: int = option(8, "Rows per optimizer step, over all devices.")
    max_steps: int = option(0, "Optimizer steps; 0: as many as `epochs` take.")
    epochs: int = option(1, "Passes over the data; with `max_steps`, 0 is without end.")
    eval_every: int = option(
        0, "Steps between validations; 0: only the two before and after, which there are always."
    )
    eval_batches: int = option(0, "Batches of a validation; 0: all of the data.")
    seed: int = option(0, "Seed of adapters and of the data's order.")

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 0, "epochs", "eval_every", "eval_batches")
        at_least(self, 1, "batch_size")
        if not self.max_steps and not self.epochs:
            raise ConfigError("max_steps and epochs are both 0; one of them has to end the run")

    @property
    def step(self) -> StepConfig:
        """The training step's config."""
        values = dataclasses.asdict(self.train)
        return StepConfig(type="sft", context_method=self.mesh.context_method, **values)
