"""Qwen3-4B-Instruct-2507: its rows of the published benchmark table."""

from jaxrl.config import BenchConfig, default_config

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


def get_config(rows: str = ""):
    """`rows` filters the table: `--config=configs/qwen3_4b.py:gpu=H100`."""
    return default_config(BenchConfig, model="Qwen3-4B-Instruct-2507", table=TABLE, rows=rows)
