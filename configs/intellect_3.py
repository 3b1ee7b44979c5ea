"""INTELLECT-3: its rows of the published benchmark table.

`--config=configs/intellect_3.py:extra` has rows that the page never showed: full fine-tuning, on 8
hosts.
"""

from jaxrl.config import table_config

TABLE = (
    "rl lora16 16384 recompute fa4 8xB200",
    "rl lora16 16384 recompute fa3 8xH200",
    "rl lora16 16384 offload fa3 8xH200",
    "rl lora16 16384 recompute fa2 8xB200",
    "rl lora16 65536 recompute fa4 8xB200",
    "rl lora16 65536 offload fa3 8xH200",
    "rl lora16 65536 offload fa2 8xH200",
    "rl lora16 65536 recompute fa2 8xB200",
    "rl lora16 65536 offload fa2 8xB200",
)

EXTRA = ("rl full 16384 recompute fa3 64xH200",)


def get_config(rows: str = ""):
    """`rows` filters the table (`:gpu=B200`), or the extra rows (`:extra`, `:extra,gpu=H200`)."""
    return table_config("INTELLECT-3", TABLE, rows, EXTRA)
