"""`jaxrl.rl` as one program over two processes: what one process learns from the same server."""

import json
import pathlib

import pytest
from processes import outputs, start
from test_rl import command, rl
from test_rl_servers import serve
from tiny_run import metrics, tiny_checkpoint

from jaxrl.rollout.http_workers import ServerMissing
from jaxrl.train import rl_rollouts
from jaxrl.train.checkpoint import Checkpoints

HOST = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> pathlib.Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("inputs") / "model")


def run_two(model, folder, *flags):
    """Exit code, stdout, stderr of each of two processes."""
    return outputs(start(["-m", "jaxrl.rl", *command(model, folder, *flags)], **HOST))


def said_in(output):
    """What every rollout of a run says, in any order."""
    lines = map(json.loads, (output / "rollouts.jsonl").open())
    return sorted(json.dumps([line["step"], line["group"], line["messages"]]) for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 4])
def test_two_processes_learn_and_resume_as_one(model, tmp_path, rank):
    server, url = serve(model, f"lora_rank={rank}")
    flags = (f"lora_rank={rank}", f"rollout.servers={url}", "checkpoint.every=1")
    try:
        for steps in (1, 2):  # the second goes on from the first
            first, other = run_two(model, tmp_path / "two/run", *flags, f"max_steps={steps}")
            assert first[0] == other[0] == 0, (first, other)
            assert "step" not in other[1]
            assert "4 cpu (fsdp 4" in first[1]
        assert rl(model, tmp_path / "one/run", *flags, "max_steps=2") == 0
    finally:
        server.terminate()
        assert server.wait(30) == 0
    one, two = metrics(tmp_path / "one/run"), metrics(tmp_path / "two/run")
    assert [line["step"] for line in two] == [line["step"] for line in one]
    for a, b in zip(one, two, strict=True):
        keys = ["reward_mean", "loss", "grad_norm"] if a["step"] else []
        keys += ["eval/reward_mean"] if a["step"] in (0, 2) else []  # before and after training
        for key in keys:
            assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-5), (a["step"], key)
    drawn = [said_in(tmp_path / name / "run") for name in ("one", "two")]
    assert drawn[0] == drawn[1] and drawn[0]
    with Checkpoints(tmp_path / "two/run/checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps()[-1] == 2


@pytest.mark.slow
def test_no_servers(model, tmp_path):
    for code, _, said in run_two(model, tmp_path / "run", "max_steps=1"):
        assert code == 2 and "give config.rollout.servers" in said


@pytest.mark.slow
def test_a_server_that_is_not_there_ends_both(model, tmp_path):
    url = "http://127.0.0.1:9"
    for code, _, said in run_two(model, tmp_path / "run", f"rollout.servers={url}"):
        assert code == 2 and url in said


class Starting:
    """A server that answers when it has been asked so many times."""

    name = "http://late"

    def __init__(self, silent: int):
        self.silent = silent

    def check(self, max_len: int) -> None:
        self.silent -= 1
        if self.silent >= 0:
            raise ServerMissing("no rollout server at http://late")


def test_waits_for_servers_that_are_not_there_yet(monkeypatch):
    now, said = [0.0], []
    monkeypatch.setattr(rl_rollouts.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(rl_rollouts.time, "sleep", lambda s: now.__setitem__(0, now[0] + s))
    rl_rollouts._wait_for(Starting(3), 128, 10.0, said.append)
    assert 2 < now[0] <= 10 and said == ["waiting for the rollout server at http://late"]
    with pytest.raises(ServerMissing):
        rl_rollouts._wait_for(Starting(300), 128, 10.0, said.append)
    assert now[0] <= 11
