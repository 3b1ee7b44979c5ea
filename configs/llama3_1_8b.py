"""Llama-3.1-8B-Instruct: its rows of the published benchmark table."""

from jaxrl.config import table_config

TABLE = (
    "rl lora16 16384 recompute fa4 8xB200",
    "rl lora16 65536 recompute fa4 8xB200",
)


def get_config(rows: str = ""):
    """`rows` filters the table: `--config=configs/llama3_1_8b.py:gpu=B200`."""
    return table_config("Llama-3.1-8B-Instruct", TABLE, rows)
