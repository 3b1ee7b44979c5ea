"""Rows of `bench/kernels.py` side by side: a line per shape and direction, and each implementation
in columns of its own."""

import re
from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

COLUMNS = {  # shown where a row of the table has it
    "temp_mib": ("temp", "{:.0f}"),
    "registers": ("regs", "{}"),
    "spill_bytes": ("spill", "{}"),
    "smem_bytes": ("KiB", "{:.0f}"),
    "mma_instructions": ("MMA", "{}"),
    "time_ms": ("ms", "{:.3g}"),
    "tflops": ("TFLOP/s", "{:.0f}"),
    "share_of_peak": ("peak", "{:.0%}"),
    "max_relative_error": ("error", "{:.0e}"),
}
LEGEND = (
    "temp: MiB of memory beside inputs and outputs. The worst of a row's kernels: regs and spill "
    "(bytes) of a thread, KiB of a program's shared memory, fewest tensor-core instructions (MMA)."
)


def table(rows: Sequence[dict]) -> Table:
    """Of one GPU and op."""
    implementations = list(dict.fromkeys(row["implementation"] for row in rows))
    shown = {i: _columns([r for r in rows if r["implementation"] == i]) for i in implementations}
    title = f"{rows[0]['gpu']}, {rows[0]['op']}: " + " and ".join(
        sorted({row["status"] for row in rows} - {"cannot"}) or ["cannot"]
    )
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    made.add_column("\nshape")
    made.add_column("\n", no_wrap=True)
    for implementation, keys in shown.items():
        made.add_column("│\n│", no_wrap=True)
        for i, key in enumerate(keys):
            head = f"{implementation if i == 0 else ''}\n{COLUMNS[key][0]}"
            made.add_column(head, no_wrap=True, justify="right")
    of = {(row["shape"], row["direction"], row["implementation"]): row for row in rows}
    for shape in dict.fromkeys(row["shape"] for row in rows):
        # The model and its sizes are a line each: there are two directions.
        names = iter(re.split(r" (?=[BM]\d)", shape, maxsplit=1))
        for direction in dict.fromkeys(row["direction"] for row in rows):
            cells = [next(names, ""), {"forward": "fwd", "backward": "bwd"}[direction]]
            for implementation, keys in shown.items():
                cells += ["│", *_cells(of.get((shape, direction, implementation)), keys)]
            made.add_row(*cells)
    return made


def reasons(rows: Sequence[dict]) -> list[str]:
    """Why rows have no figures, each reason once."""
    counts: dict[tuple, int] = {}
    for row in rows:
        if row["error"]:
            key = (row["implementation"], row["status"], row["error"])
            counts[key] = counts.get(key, 0) + 1
    return [f"{i} {status}, {n} rows: {error}" for (i, status, error), n in counts.items()]


def _columns(rows: Sequence[dict]) -> list[str]:
    return [k for k in COLUMNS if any(row[k] is not None for row in rows)] or ["temp_mib"]


def _cells(row: dict | None, keys: Sequence[str]) -> list[str | Text]:
    if row is None:
        return [""] * len(keys)
    if row["status"] in ("cannot", "failed"):
        said = Text(row["status"], style="red" if row["status"] == "failed" else "dim")
        return [said, *[""] * (len(keys) - 1)]
    return [_cell(row, key) for key in keys]


def _cell(row: dict, key: str) -> str | Text:
    value = row[key]
    if value is None:
        return "-"
    if key == "smem_bytes":
        value /= 1024
    text = COLUMNS[key][1].format(value)
    if key == "mma_instructions" and row["mma_kinds"]:
        text += f" {row['mma_kinds']}"
    return Text(text, style="red") if key == "spill_bytes" and value else text
