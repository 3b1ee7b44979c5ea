"""Keep the results of bench runs: `uv run python bench/merge.py RUN_FOLDER...`

Writes the rows of the folders' results.jsonl into bench/results/DATE.jsonl (a new file; nothing is
overwritten) and bench/BENCHMARKS.md from them, in the order given.
"""

import datetime
import json
import pathlib
import sys

from jaxrl.perf.report import markdown
from jaxrl.perf.results import write_atomic

HERE = pathlib.Path(__file__).parent


def main(folders: list[str]) -> None:
    results = [
        json.loads(line)
        for folder in folders
        for line in (pathlib.Path(folder) / "results.jsonl").read_text().splitlines()
    ]
    day = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    path = HERE / "results" / f"{day}.jsonl"
    number = 1
    while path.exists():
        number += 1
        path = path.with_name(f"{day}_{number}.jsonl")
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, "".join(json.dumps(r) + "\n" for r in results))
    write_atomic(HERE / "BENCHMARKS.md", markdown(results))
    print(f"{len(results)} rows: {path.name}, BENCHMARKS.md")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: bench/merge.py RUN_FOLDER...")
    main(sys.argv[1:])
