"""Test files that run themselves as scripts: a kernel for the wrong GPU can end the process."""

import functools
import json
import os
import pathlib
import subprocess
import sys

HERE = str(pathlib.Path(__file__).parent)  # scripts import this module, too


@functools.cache
def output_of(script: str, argument: str) -> dict:
    """The JSON object on the last line that `python script argument` prints."""
    env = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (HERE, env.get("PYTHONPATH"))))
    command = [sys.executable, script, argument]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])
