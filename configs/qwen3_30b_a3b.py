"""Qwen3-30B-A3B-Instruct-2507: its rows of the published benchmark table.

`--config=configs/qwen3_30b_a3b.py:extra` has rows that the page never showed: its experts divided
over 2, 4 and 8 GPUs.
"""

from jaxrl.config import table_config

TABLE = (
    "rl full 16384 recompute fa2 8xB200",
    "rl full 16384 recompute fa4 8xB200",
    "rl full 16384 recompute fa3 8xH100",
    "rl full 16384 recompute fa3 8xH200",
    "rl full 65536 recompute fa4 8xB200",
    "rl full 65536 recompute fa2 8xB200",
    "rl full 65536 recompute fa3 8xH200",
    "rl lora16 16384 recompute fa4 8xB200",
    "rl lora16 16384 recompute fa3 8xH200",
    "rl lora16 16384 recompute fa2 8xB200",
    "rl lora16 16384 recompute fa3 8xH100",
    "rl lora16 65536 recompute fa4 8xB200",
    "rl lora16 65536 recompute fa3 8xH200",
    "rl lora16 65536 recompute fa3 8xH100",
    "rl lora16 65536 recompute fa2 8xB200",
    "sft full 16384 recompute fa4 8xB200",
    "sft full 16384 recompute fa2 8xB200",
    "sft full 16384 recompute fa3 8xH200",
)

EXTRA = (
    "rl lora16 65536 recompute fa3 8xH200 ep2",
    "rl lora16 65536 recompute fa3 8xH200 ep4",
    "rl lora16 65536 recompute fa3 8xH200 ep8",
)


def get_config(rows: str = ""):
    """`rows` filters the table (`:gpu=H200`), or the extra rows (`:extra`, `:extra,ep=8`)."""
    return table_config("Qwen3-30B-A3B-Instruct-2507", TABLE, rows, EXTRA)
