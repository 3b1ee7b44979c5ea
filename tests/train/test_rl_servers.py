"""`jaxrl.rl` with rollouts of servers in other processes: the same run, and one of them dies."""

import json
import os
import pathlib
import re
import subprocess
import sys

import httpx
import pytest
from test_rl import rl, task_of
from tiny_run import assert_alike, metrics, tiny_checkpoint

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[2]


def serve(model, *flags) -> tuple[subprocess.Popen, str]:
    """(the process of a server, its URL)."""
    flags = (
        f"model={model}",
        "server.port=0",
        "engine.max_len=128",
        "engine.dtype=float32",
        "engine.slots=8",
        "engine.warm_up=false",
        *flags,
    )
    command = [sys.executable, "-m", "jaxrl.serve", f"--config={ROOT}/configs/serve.py"]
    process = subprocess.Popen(
        [*command, *(f"--config.{flag}" for flag in flags)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"http://\S+", line)
    assert found, line
    return process, found[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> pathlib.Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("inputs") / "model")


@pytest.fixture
def servers(model):
    """Two of them; those that are left are stopped as one stops a server."""
    made = [serve(model) for _ in range(2)]
    yield made
    for process, _ in made:
        if process.poll() is None:
            process.terminate()
            assert process.wait(30) == 0


@pytest.mark.parametrize("rank", [0, 4])
def test_learns_the_same_from_servers_in_turns(model, tmp_path, rank):
    process, url = serve(model, f"lora_rank={rank}")
    flags = ("max_steps=2", "checkpoint.every=0", f"lora_rank={rank}")
    assert rl(model, tmp_path / "own/run", *flags) == 0
    assert rl(model, tmp_path / "served/run", *flags, f"rollout.servers={url}") == 0
    process.terminate()
    assert process.wait(30) == 0
    assert_alike(tmp_path / "own/run", tmp_path / "served/run")
    assert len(list((tmp_path / "served/run/weights").iterdir())) == 2


def test_a_server_that_is_killed_ends_nothing(model, servers, tmp_path, capfd):
    urls = ",".join(url for _, url in servers)
    assert rl(model, tmp_path / "own/run", "max_steps=2", "eval.tasks=0") == 0
    at = task_of(tmp_path / "own/run", step=2)
    options = json.dumps({"at": at, "kills": servers[0][0].pid})
    flags = (f"env.options={options}", f"rollout.servers={urls}", "rollout.max_staleness=1")
    assert rl(model, tmp_path / "run", *flags, "max_steps=4") == 0
    assert servers[0][0].wait(30) == -9
    printed = capfd.readouterr().out
    assert "is lost" in printed and "its tasks go to others" in " ".join(printed.split())
    assert [line["step"] for line in metrics(tmp_path / "run")] == [0, 1, 2, 3, 4]
    groups = [json.loads(line) for line in (tmp_path / "run/rollouts.jsonl").open()]
    assert all(r["failure"] is None for r in groups)
    shown = httpx.get(f"{servers[1][1].removesuffix('/v1')}/metrics").text
    assert re.search(r"jaxrl_weights_version [34]\.0", shown)
