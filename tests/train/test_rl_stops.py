"""`jaxrl.rl` killed, or stopped while it draws beside the trainer, takes every task once."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest
from processes import ROOT, TESTS
from test_rl import command, rl, task_of
from tiny_run import assert_alike, metrics, tiny_checkpoint

from jaxrl.envs.order import TaskOrder
from jaxrl.train import rl as train_rl
from jaxrl.train.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> pathlib.Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("inputs") / "model")


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> pathlib.Path:
    """The output of an uninterrupted run of four steps, in turns."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert rl(model, output) == 0
    return output


def stopping(folder, at, how) -> str:
    """The environment with a task `at` whose first reward ends the run, once."""
    return "env.options=" + json.dumps({"at": at, "stops": str(folder / "stopped"), "how": how})


def groups(output) -> list[tuple[int, int]]:
    """(step, number) of the groups that were drawn."""
    lines = map(json.loads, (output / "rollouts.jsonl").open())
    return sorted({(line["step"], line["group"]) for line in lines})


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_checkpoint(model, whole, tmp_path, monkeypatch):
    flags = (stopping(tmp_path, task_of(whole, step=4), "SIGKILL"), "checkpoint.every=1")
    path = os.pathsep.join([*TESTS, os.environ.get("PYTHONPATH", "")])
    killed = subprocess.run(
        [sys.executable, "-m", "jaxrl.rl", *command(model, tmp_path / "run", *flags)],
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"},
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [line["step"] for line in metrics(tmp_path / "run")] == [0, 1, 2, 3]
    one_step, steps = train_rl.one_step, []

    def counted(run, state, step, *more):
        steps.append(step)
        return one_step(run, state, step, *more)

    monkeypatch.setattr(train_rl, "one_step", counted)
    assert rl(model, tmp_path / "run", *flags) == 0
    assert steps in ([4], [3, 4])  # it may have been writing the third one's checkpoint
    assert_alike(tmp_path / "run", whole)
    assert groups(tmp_path / "run") == groups(whole)


def test_beside_the_trainer_what_was_in_flight_is_drawn_again(model, tmp_path, monkeypatch):
    made, programs = train_rl.rl_program, []

    def program(*args):
        programs.append(made(*args))
        return programs[-1]

    monkeypatch.setattr(train_rl, "rl_program", program)
    flags = ("rollout.max_staleness=1", "eval.tasks=0", "max_steps=8", "checkpoint.every=0")
    # Eight groups are ahead at most: it is begun when twelve others were handed out.
    flags += (stopping(tmp_path, f"0/{TaskOrder(40, 0).index(20)}", "SIGTERM"),)
    assert rl(model, tmp_path / "run", *flags) == 0
    stopped = metrics(tmp_path / "run")[-1]["step"]
    assert (tmp_path / "stopped").exists() and 0 < stopped < 8
    with Checkpoints(tmp_path / "run/checkpoints", read_only=True) as checkpoints:
        in_flight = checkpoints.extra()[1]["data"]["again"]
    assert in_flight
    assert rl(model, tmp_path / "run", *flags) == 0
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6, 7, 8]
    drawn = [number for _, number in groups(tmp_path / "run")]
    with Checkpoints(tmp_path / "run/checkpoints", read_only=True) as checkpoints:
        place = checkpoints.extra()[1]["data"]
    assert sorted([*drawn, *place["again"]]) == list(range(place["next"]))
    assert set(in_flight) <= {*drawn, *place["again"]}
    # Rows with prompts that rollouts share and rows without: two programs for any lengths.
    assert [program.step.jitted._cache_size() <= 2 for program in programs] == [True, True]
