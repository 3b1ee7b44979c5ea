"""Qwen3-4B-Instruct-2507: its rows of the published benchmark table.

`--config=configs/qwen3_4b.py:extra` has rows that the page never showed: sequences of 131,072 and
262,144 tokens, divided over 4 and 8 GPUs.
"""

from jaxrl.config import table_config

TABLE = (
    "rl full 16384 recompute fa2 8xB200",
    "rl full 16384 recompute fa3 8xH200",
    "rl full 16384 recompute fa3 8xH100",
    "rl full 65536 recompute fa3 8xH200",
    "rl full 65536 recompute fa3 8xH100",
    "rl full 65536 recompute fa2 8xB200",
    "rl lora16 16384 recompute fa3 8xH200",
    "rl lora16 16384 recompute fa2 8xB200",
    "rl lora16 16384 recompute fa3 8xH100",
    "rl lora16 16384 recompute fa3 1xH100",
    "rl lora16 16384 offload fa3 1xH100",
    "rl lora16 16384 recompute fa2 1xA6000",
    "rl lora16 65536 recompute fa3 8xH200",
    "rl lora16 65536 recompute fa3 8xH100",
    "rl lora16 65536 recompute fa2 8xB200",
    "rl lora16 65536 recompute fa3 1xH100",
    "rl lora16 65536 offload fa3 1xH100",
    "sft full 16384 recompute fa2 8xB200",
    "sft full 16384 recompute fa2 8xH200",
    "sft full 16384 recompute fa2 8xH100",
    "sft full 65536 recompute fa2 8xB200",
)

EXTRA = (
    "rl full 131072 recompute fa3 8xH100 cp4",
    "rl full 131072 recompute fa3 8xH100 cp8",
    "rl full 262144 recompute fa3 8xH100 cp4",
    "rl full 262144 recompute fa3 8xH100 cp8",
)


def get_config(rows: str = ""):
    """`rows` filters the table (`:gpu=H100`), or the extra rows (`:extra`, `:extra,cp=8`)."""
    return table_config("Qwen3-4B-Instruct-2507", TABLE, rows, EXTRA)
