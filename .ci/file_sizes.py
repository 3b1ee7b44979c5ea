"""No Python file over 700 lines; a line for each over 400."""

import pathlib
import subprocess
import sys

files = subprocess.run(["git", "ls-files", "*.py"], capture_output=True, text=True, check=True)
lines = {f: len(pathlib.Path(f).read_text().splitlines()) for f in files.stdout.split()}
for file, count in sorted(lines.items(), key=lambda item: -item[1]):
    if count > 400:
        print(f"{file}: {count} lines")
sys.exit(any(count > 700 for count in lines.values()))
