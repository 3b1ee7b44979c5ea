"""A row of the benchmark table: what is trained, on what; parsed, filtered and checked here."""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Literal

from jaxrl.config import ActivationCheckpointing, ConfigError, Type, check_seq_len
from jaxrl.models.config import ModelConfig
from jaxrl.models.presets import preset

TYPES = ("rl", "sft", "rl_e2e")
AC = ("none", "recompute", "selective", "offload")
ATTN = ("fa2", "fa3", "fa4", "triton", "tokamax", "cudnn", "xla", "auto")
CP_METHODS = ("ulysses", "ring")
RING_ATTN = ("fa2", "triton", "xla", "auto")  # `jaxrl.ops.attention_blocks` has no others
CPU = "CPU"
GPUS_PER_HOST = 8

_SYNTAX = (
    "write '[MODEL] rl|sft|rl_e2e full|loraRANK SEQ_LEN AC ATTN COUNTxGPU [epN] "
    "[cpN [ulysses|ring]]', "
    "e.g. 'rl lora16 16384 recompute fa3 8xH100'"
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One row. `lora_rank` 0 is full fine-tuning; `gpu` is "CPU" for this host's proxy row.

    `type`: "rl_e2e" is a whole step of RL, with its rollouts. `seq_len`: tokens per sequence. `ac`:
    activation checkpointing. `attn`: as requested. `ep`,
    `cp`: expert and context parallel sizes; `cp_method`: how attention works over the latter.
    """

    model: str
    type: Literal["rl", "sft", "rl_e2e"]
    lora_rank: int
    seq_len: int
    ac: ActivationCheckpointing
    attn: str
    ep: int
    cp: int
    num_gpus: int
    gpu: str
    cp_method: Literal["ulysses", "ring"] = "ulysses"

    @property
    def label(self) -> str:
        """Type as the published page writes it, e.g. "RL LoRA(r=16)"."""
        method = f"LoRA(r={self.lora_rank})" if self.lora_rank else "Full"
        return f"{'RL e2e' if self.is_e2e else self.type.upper()} {method}"

    @property
    def is_e2e(self) -> bool:
        """It draws rollouts, too."""
        return self.type == "rl_e2e"

    @property
    def trains(self) -> Type:
        """What the training step is."""
        return "sft" if self.type == "sft" else "rl"

    @property
    def hardware(self) -> str:
        return f"{self.num_gpus}x{self.gpu}"

    @property
    def num_hosts(self) -> int:
        """Hosts that have these GPUs."""
        return -(-self.num_gpus // GPUS_PER_HOST)

    @property
    def title(self) -> str:
        """Everything but the model, in the syntax of `parse_row`."""
        method = f"lora{self.lora_rank}" if self.lora_rank else "full"
        parts = [
            self.type,
            method,
            str(self.seq_len),
            self.ac,
            self.attn,
            self.hardware,
        ]
        parts += [f"ep{self.ep}"] * (self.ep > 1) + [f"cp{self.cp}"] * (self.cp > 1)
        parts += [self.cp_method] * (self.cp > 1 and self.cp_method != "ulysses")
        return " ".join(parts)

    @property
    def slug(self) -> str:
        """A file name that no other row has."""
        return f"{self.model}_{self.title.replace(' ', '_')}"

    @property
    def key(self) -> tuple:
        return dataclasses.astuple(self)


def parse_row(model: str, text: str) -> Row:
    """The row that `text` ("rl lora16 16384 recompute fa3 8xH100") describes.

    It is `model`'s, unless the text begins with the name of another.
    """
    parts = text.split()
    if len(parts) > 1 and parts[0] not in TYPES and parts[1] in TYPES:
        model = parts.pop(0)
    problem = ConfigError(f"cannot read row {text!r}; {_SYNTAX}")
    if len(parts) < 6:
        raise problem
    type_, method, seq_len, ac, attn, hardware, *rest = parts
    rank = re.fullmatch(r"full|lora(\d+)", method)
    count_gpu = re.fullmatch(r"(\d+)x(\w+)", hardware)
    method_of_cp = rest.pop() if rest and rest[-1] in CP_METHODS else "ulysses"
    axes = [re.fullmatch(r"(ep|cp)(\d+)", part) for part in rest]
    if not (rank and count_gpu and re.fullmatch(r"-?\d+", seq_len) and all(axes)):
        raise problem
    sizes = {"ep": 1, "cp": 1} | {m[1]: int(m[2]) for m in axes if m}
    for name, value, known in (
        ("type", type_, TYPES),
        ("ac", ac, AC),
        ("attn", attn, ATTN),
    ):
        if value not in known:
            raise ConfigError(f"row {text!r}: unknown {name} {value!r}; one of {', '.join(known)}")
    if not model:
        raise ConfigError(f"row {text!r}: of which model? begin with its name, or set config.model")
    if method == "lora0":
        raise ConfigError(f"row {text!r}: LoRA rank 0 has no adapters; write 'full'")
    return Row(
        model=model,
        type=type_,  # type: ignore[arg-type]
        lora_rank=int(rank[1] or 0),
        seq_len=int(seq_len),
        ac=ac,  # type: ignore[arg-type]
        attn=attn,
        num_gpus=int(count_gpu[1]),
        gpu=count_gpu[2],
        cp_method=method_of_cp,  # type: ignore[arg-type]
        **sizes,
    )


def names(rows: Iterable[Row]) -> dict[Row, str]:
    """What to call each row: its title, behind the model's name where there are several models."""
    rows = list(rows)
    several = len({row.model for row in rows}) > 1
    return {row: f"{row.model} {row.title}" if several else row.title for row in rows}


def filter_rows(rows: Sequence[Row], text: str) -> list[Row]:
    """Rows with the values that `text` asks for: "gpu=H100|A6000,num_gpus=1"; "" keeps all.

    `lora_rank=full` is 0; case does not matter. An unknown field, or no row left, is a
    ConfigError that lists what there is.
    """
    kept = list(rows)
    fields = [f.name for f in dataclasses.fields(Row)]
    for clause in filter(None, (part.strip() for part in text.split(","))):
        name, equals, wanted = (part.strip() for part in clause.partition("="))
        if name not in fields or not equals:
            raise ConfigError(
                f"rows filter {clause!r}: write field=value or field=a|b; fields: "
                f"{', '.join(fields)}"
            )
        values = {_same(v) for v in wanted.split("|")}
        left = [row for row in kept if _same(getattr(row, name)) in values]
        if not left:
            there = sorted({getattr(row, name) for row in kept})
            before = text[: text.index(clause)].strip(", ")
            where = f" with {before}" if before else ""
            raise ConfigError(
                f"rows filter {clause!r} leaves no row; {name} of the rows{where}: "
                f"{', '.join(map(str, there))}"
            )
        kept = left
    return kept


def _same(value) -> str:
    text = str(value).strip().lower()
    return "0" if text == "full" else text


def proxy_row(row: Row, seq_len: int) -> Row:
    """The row measured on this host's CPU in place of `row`."""
    alone = {"ep": 1, "cp": 1, "cp_method": "ulysses", "num_gpus": 1, "gpu": CPU}
    return dataclasses.replace(row, seq_len=seq_len, attn="xla", **alone)


def check_rows(rows: Iterable[Row]) -> None:
    """Raise ConfigError for the first row that can never run, naming value and way out."""
    for row, name in names(rows).items():
        try:
            _check_row(row)
        except ValueError as error:
            raise ConfigError(f"row '{name}': {error}") from None


def _check_row(row: Row) -> None:
    from jaxrl.perf.hardware import gpu

    model = preset(row.model)
    check_seq_len(row.seq_len)
    if row.num_gpus < 1:
        raise ConfigError("0 GPUs; use at least 1")
    _check_attention(row, gpu(row.gpu).compute_capability)
    for name, size in (("ep", row.ep), ("cp", row.cp)):
        if size < 1 or row.num_gpus % size:
            fits = _either(_divisors(row.num_gpus))
            raise ConfigError(f"{name} {size} does not divide {row.num_gpus} GPUs; use {fits}")
    if row.num_gpus % (row.ep * row.cp):
        fits = _either(_divisors(row.num_gpus // row.ep))
        raise ConfigError(
            f"ep {row.ep} x cp {row.cp} does not divide {row.num_gpus} GPUs; "
            f"beside ep {row.ep} use cp {fits}"
        )
    _check_experts(row, model)
    _check_context(row, model)


def _check_experts(row: Row, model: ModelConfig) -> None:
    if not model.num_experts:
        if row.ep > 1:
            raise ConfigError(f"ep {row.ep} needs experts, and {row.model} is dense; use ep 1")
        return
    if model.num_experts % row.num_gpus:  # their weights lie on all GPUs, whatever `ep` is
        fits = _either(d for d in _divisors(model.num_experts) if d % row.ep == 0)
        other = f"{fits} GPUs" if fits else f"an ep that divides {model.num_experts}"
        raise ConfigError(
            f"{model.num_experts} experts do not spread evenly over {row.num_gpus} GPUs; "
            f"use {other}"
        )


def _check_context(row: Row, model: ModelConfig) -> None:
    if row.cp == 1:
        if row.cp_method != "ulysses":
            raise ConfigError(f"{row.cp_method} splits sequences over devices; add cp2 or more")
        return
    if row.cp_method == "ring" and row.attn not in RING_ATTN:
        raise ConfigError(
            f"attention {row.attn} cannot run in a ring; use ulysses, or ring with "
            f"{_either(RING_ATTN)}"
        )
    if row.seq_len % (128 * row.cp):
        fits = _either(d for d in _divisors(row.num_gpus // row.ep) if row.seq_len % (128 * d) == 0)
        raise ConfigError(
            f"cp {row.cp} leaves no multiple of 128 of seq_len {row.seq_len} to a device; use cp "
            f"{fits}, or seq_len {-(-row.seq_len // (128 * row.cp)) * 128 * row.cp}"
        )
    from jaxrl.parallel.context import check_context  # imports JAX

    heads = {"num_heads": model.num_heads, "num_kv_heads": model.num_kv_heads}
    check_context(row.cp_method, size=row.cp, seq_len=row.seq_len, **heads)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _either(options: Iterable) -> str:
    return " or ".join(map(str, options))


def _check_attention(row: Row, capability) -> None:
    sm = _sm(capability)
    hopper, blackwell = sm == 90, 100 <= sm < 110
    needs = dict.fromkeys(("fa2", "triton", "cudnn"), "sm_80 or newer") | {
        "fa3": "Hopper (sm_90)",
        "fa4": "Blackwell (sm_100)",
        "tokamax": "Hopper or Blackwell (sm_90, sm_100)",
    }
    runs = dict.fromkeys(("fa2", "triton", "cudnn"), sm >= 80) | {
        "fa3": hopper,
        "fa4": blackwell,
        "tokamax": hopper or blackwell,
    }
    if not runs.get(row.attn, True):
        can = [name for name in ("fa4", "fa3", "fa2", "cudnn") if runs[name]] + [
            "xla",
            "auto",
        ]
        raise ConfigError(
            f"attention {row.attn} needs {needs[row.attn]}, and {row.gpu} is sm_{sm}; "
            f"use {' or '.join(can)}"
        )


def _sm(capability) -> int:
    """90 for "9.0", (9, 0) or 9.0."""
    if isinstance(capability, tuple):
        major, minor = capability
    else:
        major, _, minor = str(capability).partition(".")
    return 10 * int(major) + int(minor or 0)
