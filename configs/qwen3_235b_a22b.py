"""Qwen3-235B-A22B-Instruct-2507: its rows of the published benchmark table.

`--config=configs/qwen3_235b_a22b.py:extra` has rows that the page never showed: its experts, or its
sequences, divided over GPUs.
"""

from jaxrl.config import table_config

TABLE = (
    "rl lora16 16384 recompute fa2 8xB200",
    "rl lora16 16384 offload fa2 8xB200",
)

EXTRA = (
    "rl lora16 16384 recompute fa2 8xB200 ep2",
    "rl lora16 16384 recompute fa2 8xB200 ep8",
    "rl lora16 16384 recompute fa2 8xB200 cp2",
)


def get_config(rows: str = ""):
    """`rows` filters the table (`:gpu=B200`), or the extra rows (`:extra`, `:extra,cp=2`)."""
    return table_config("Qwen3-235B-A22B-Instruct-2507", TABLE, rows, EXTRA)
