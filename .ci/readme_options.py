"""Write the README's table of options from the config dataclasses; `--check` only compares."""

import pathlib
import sys

from jaxrl.config import BenchConfig, options_table

README = pathlib.Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- options: .ci/readme_options.py writes this -->\n", "<!-- end of options -->"


def updated(text: str) -> str:
    """The README's text with its table of options made anew."""
    before, rest = text.split(BEGIN)
    return (
        before
        + BEGIN
        + "\n"
        + options_table(BenchConfig).strip()
        + "\n\n"
        + END
        + rest.split(END)[1]
    )


if __name__ == "__main__":
    text = README.read_text()
    if updated(text) == text:
        sys.exit(0)
    if "--check" in sys.argv:
        sys.exit(
            "README.md: the table of options is stale; run `uv run python .ci/readme_options.py`"
        )
    README.write_text(updated(text))
