"""Qwen3-0.6B: its rows of the published benchmark table."""

from jaxrl.config import table_config

TABLE = (
    "rl full 16384 recompute fa3 1xH100",
    "rl full 16384 recompute fa2 1xA6000",
    "rl full 65536 recompute fa3 1xH100",
    "rl full 65536 offload fa3 1xH100",
    "rl full 65536 recompute fa2 4xA6000",
    "rl full 65536 recompute fa2 1xA6000",
    "rl lora16 16384 recompute fa3 1xH100",
    "rl lora16 16384 recompute fa2 1xA6000",
    "rl lora16 65536 recompute fa3 1xH100",
    "rl lora16 65536 offload fa3 1xH100",
    "rl lora16 65536 recompute fa2 1xA6000",
    "sft full 8192 recompute fa3 1xH100",
    "sft full 8192 recompute fa2 1xA6000",
    "sft full 16384 recompute fa3 1xH100",
)


def get_config(rows: str = ""):
    """`rows` filters the table: `--config=configs/qwen3_0_6b.py:gpu=H100`."""
    return table_config("Qwen3-0.6B", TABLE, rows)
