"""Write docs/config.md, every option of every command, from their dataclasses; `--check` only
compares."""

import pathlib
import sys

from jaxrl.config import BenchConfig
from jaxrl.options import options_table
from jaxrl.rl_config import RlConfig
from jaxrl.serve_config import ServeConfig
from jaxrl.sft_config import SftConfig

PAGE = pathlib.Path(__file__).parents[1] / "docs/config.md"
HEAD = """# Options

Each command takes `--config=FILE.py`, whose `get_config()` returns these options as a ConfigDict of
ml_collections (`jaxrl.config.default_config(BenchConfig)` has them with their defaults), and
`--config.KEY=VALUE` for each of them. `FILE.py:ARG` hands ARG to `get_config`. An unknown key, a
value of the wrong type or out of range is refused in one line. Lists are written with commas.

This page is made by `.ci/config_page.py` from the options' own definitions.
"""


def page() -> str:
    parts = [HEAD]
    commands = {
        "jaxrl.bench": BenchConfig,
        "jaxrl.sft": SftConfig,
        "jaxrl.rl": RlConfig,
        "jaxrl.serve": ServeConfig,
    }
    for command, config in commands.items():
        parts += [f"## python -m {command}\n", options_table(config), ""]
    return "\n".join(parts)


if __name__ == "__main__":
    if PAGE.is_file() and PAGE.read_text() == page():
        sys.exit(0)
    if "--check" in sys.argv:
        sys.exit("docs/config.md is stale; run `uv run python .ci/config_page.py`")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
