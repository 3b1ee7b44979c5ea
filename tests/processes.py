"""One program over several processes on this machine, as on several hosts."""

import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence

from jaxrl.parallel import distributed

ROOT = pathlib.Path(__file__).parents[1]
TESTS = (str(ROOT / "tests"), str(ROOT / "tests/train"))


def explicit(address="node0:1234", count="2", index="1") -> dict[str, str]:
    """The environment variables that name the coordinator; one that is None is left out."""
    values = zip(distributed.VARIABLES, (address, count, index), strict=True)
    return {name: value for name, value in values if value is not None}


def start(code: Sequence[str], count: int = 2, **env: str) -> list[subprocess.Popen]:
    """`python CODE` as each of `count` processes; "{}" in it is the process's index."""
    path = os.pathsep.join([*TESTS, os.environ.get("PYTHONPATH", "")])
    with distributed.reserved_port("127.0.0.1") as port:
        address = f"127.0.0.1:{port}"
    return [
        subprocess.Popen(
            [sys.executable, *(part.replace("{}", str(i)) for part in code)],
            env=os.environ | explicit(address, str(count), str(i)) | {"PYTHONPATH": path} | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for i in range(count)
    ]


def outputs(processes: Sequence[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Exit code, stdout, stderr of each."""
    try:
        said = [p.communicate(timeout=200) for p in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *s) for p, s in zip(processes, said, strict=True)]
