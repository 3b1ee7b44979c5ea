"""What process 0 finds out reaches all processes, and so do its errors, of whatever kind."""

import json

import pytest
from processes import outputs, start

ASKS = """
import json
import pathlib
import sys

import jax
from jaxrl.options import ConfigError
from jaxrl.parallel import distributed
from jaxrl.parallel.first_process import from_first

distributed.initialize()


def wrong():
    raise ConfigError("no such file")


def broken():
    return dict()["no such key"]


found = []
for ask in (lambda: {"from": jax.process_index()}, wrong, broken, lambda: {1}, lambda: "after"):
    try:
        found.append(from_first(ask))
    except Exception as error:
        found.append(f"{type(error).__name__}: {error}")
pathlib.Path(sys.argv[1]).write_text(json.dumps(found))  # gloo prints, too
"""
NO_JSON = "Object of type set is not JSON serializable"


@pytest.mark.slow
def test_values_and_errors_of_process_0_are_everybodys(tmp_path):
    cpu = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    ended = outputs(start(["-c", ASKS, str(tmp_path / "{}")], **cpu))
    assert [code for code, _, _ in ended] == [0, 0], ended
    first, other = (json.loads((tmp_path / name).read_text()) for name in "01")
    assert first == [
        {"from": 0},
        "ConfigError: no such file",
        "KeyError: 'no such key'",
        f"TypeError: {NO_JSON}",
        "after",
    ]
    assert other == [
        {"from": 0},
        "ConfigError: no such file",
        "RuntimeError: process 0 has failed: KeyError: 'no such key'",
        f"RuntimeError: process 0 has failed: TypeError: {NO_JSON}",
        "after",
    ]
