"""The published table that results are compared with."""

import csv
import dataclasses
import pathlib
from typing import Any

import jaxrl
from jaxrl.options import ConfigError
from jaxrl.perf.rows import Row

FOLDER = pathlib.Path(jaxrl.__file__).parents[1] / "bench" / "baselines"


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A published row. For RL Full the training step alone: the page adds a weight gather to it."""

    mfu_pct: float | None
    tps: float | None
    step_time_s: float | None
    peak_mem_gib: float | None

    def keys(self) -> dict[str, Any]:
        """As keys of a result."""
        return {f"baseline_{k}": v for k, v in dataclasses.asdict(self).items()}


NO_BASELINE = Baseline(None, None, None, None)


def load_baselines(name: str) -> dict[Row, Baseline]:
    """Rows of the CSV file `name`, or of the table of that name in `bench/baselines`.

    Empty where the default table is not at hand (an installed package without its checkout).
    """
    path = pathlib.Path(name)
    if not path.is_file():
        path = FOLDER / f"{name}.csv"
    if not path.is_file():
        if name == "prime_rl":
            return {}
        there = ", ".join(sorted(p.stem for p in FOLDER.glob("*.csv")))
        raise ConfigError(f"config.baseline {name!r} is no CSV file; tables at hand: {there}")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return dict(_read(line) for line in csv.DictReader(file))
    except (KeyError, ValueError, OSError) as error:
        raise ConfigError(
            f"config.baseline {path}: {error}; its columns must be those of prime_rl.csv"
        ) from error


def _read(line: dict[str, str]) -> tuple[Row, Baseline]:
    def number(key: str) -> float | None:
        return float(line[key]) if line.get(key) else None

    row = Row(
        model=line["model"],
        type=line["type"],  # type: ignore[arg-type]
        lora_rank=int(line["lora_rank"] or 0),
        seq_len=int(line["seq_len"]),
        ac=line["ac"],  # type: ignore[arg-type]
        attn=line["attn"],
        ep=int(line["ep"]),
        cp=int(line["cp"]),
        num_gpus=int(line["num_gpus"]),
        gpu=line["gpu"],
    )
    mfu, tps, step = number("mfu_pct"), number("tps"), number("step_time_s")
    alone = number("train_only_tps")
    if row.type == "rl" and not row.lora_rank and alone and tps:
        mfu = mfu and round(mfu * alone / tps, 2)
        tps, step = alone, number("train_only_step_time_s")
    return row, Baseline(mfu, tps, step, number("peak_mem_gib"))
