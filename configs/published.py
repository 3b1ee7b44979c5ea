"""The whole published page: all rows of all models, in one run.

`--config=configs/published.py:extra` has the rows that the page never showed, of all models.
"""

import pathlib
import runpy

from jaxrl.config import table_config

CONFIGS = (  # in the page's order
    *("intellect_3", "qwen3_0_6b", "qwen3_235b_a22b", "qwen3_30b_a3b", "qwen3_4b"),
    *("llama3_1_8b", "llama3_2_1b", "llama3_2_3b"),
)


def get_config(rows: str = ""):
    """`rows` filters the table (`:gpu=H100`), or the extra rows (`:extra`, `:extra,ep=8`)."""
    table, extra = [], []
    for name in CONFIGS:
        config = runpy.run_path(str(pathlib.Path(__file__).with_name(f"{name}.py")))
        model = config["get_config"]().model
        table += [f"{model} {row}" for row in config["TABLE"]]
        extra += [f"{model} {row}" for row in config.get("EXTRA", ())]
    return table_config("", table, rows, extra)
