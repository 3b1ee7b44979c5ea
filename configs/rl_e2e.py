"""Whole steps of RL, rollouts included: `python -m jaxrl.bench --config=configs/rl_e2e.py`.

`--config=configs/rl_e2e.py:gpu=H100` filters the rows. Where the GPUs are missing the rows are
planned, and a small one is measured on the CPU.
"""

from jaxrl.config import table_config

TABLE = (
    "Qwen3-0.6B rl_e2e full 4096 none fa3 1xH100",
    "Qwen3-4B-Instruct-2507 rl_e2e full 8192 recompute fa3 8xH100",
    "Qwen3-4B-Instruct-2507 rl_e2e lora16 2048 recompute fa2 1xA6000",
    "Qwen3-30B-A3B-Instruct-2507 rl_e2e lora16 8192 recompute fa3 8xH200",
)


def get_config(rows: str = ""):
    return table_config("", TABLE, rows)
