"""Runs that are killed or stopped, or whose disk is full, lose no complete checkpoint."""

import itertools
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading

import pytest
from checkpoint_worker import abstract, check, forked

from jaxrl.options import ConfigError
from jaxrl.parallel import distributed
from jaxrl.train.checkpoint import Checkpoints

WORKER = pathlib.Path(__file__).with_name("checkpoint_worker.py")


def start(folder: pathlib.Path, *mode: str, **env: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(WORKER), str(folder), *mode],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | env,
    )


class Forked:
    """The worker in a process that begins with everything imported, as `subprocess.Popen`."""

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["checkpoint_worker"])

    def __init__(self, folder: pathlib.Path, *mode: str):
        ours, theirs = self.context.Pipe(duplex=False)
        self.process = self.context.Process(target=forked, args=(theirs, str(folder), *mode))
        self.process.start()
        theirs.close()
        self.stdout = os.fdopen(os.dup(ours.fileno()))
        ours.close()

    def ended(self) -> list[str]:
        """What it said, from here to its end by SIGKILL."""
        try:
            self.process.join(timeout=100)
        finally:
            self.process.kill()
            self.process.join()
        lines = self.stdout.read().splitlines()
        assert self.process.exitcode == -signal.SIGKILL, lines
        return lines


def ended(run: subprocess.Popen) -> tuple[list[str], str]:
    """What it says, line by line, from here to its end; and on stderr."""
    assert run.stdout is not None and run.stderr is not None
    late = threading.Timer(100, run.kill)
    late.start()
    # Not `communicate`, which does not see what `readline` has read ahead.
    lines, err = run.stdout.read().splitlines(), run.stderr.read()
    run.wait()
    late.cancel()
    return lines, err


def steps(lines: list[str], event: str) -> list[int]:
    return [int(line.split()[1]) for line in lines if line.startswith(f"{event} ")]


# Before what a run dies in its third save, and how many of its saves are there afterwards.
DEATHS = [
    (r"mkdir \S*\.partial$", 2),
    (r"tmp/_CHECKPOINT_METADATA w", 2),
    (r"tmp/_METADATA w", 2),
    (r"rename \S*orbax-checkpoint-tmp", 2),
    (r"state/commit_success.txt r", 2),
    (r"open \S*\.manifest\.json\.partial", 2),
    (r"rename \S*\.manifest\.json\.partial", 2),
    (r"rename \S*\.partial \S*/\d{8}$", 3),
    (r"rename \S* \S*\.deleted$", 3),
    (r"remove manifest\.json", 3),
    (r"rmdir state$", 3),
]
# What somebody else waits for in the folder before killing a run, and how that one saves.
KILLS = [
    ("", ""),
    ("", "rush"),
    (".*.partial", ""),
    (".*.partial/state.orbax-checkpoint-tmp", "rush"),
    (".*.partial/state.orbax-checkpoint-tmp/ocdbt.process_0", ""),
    (".*.partial/state.orbax-checkpoint-tmp/ocdbt.process_0/d/*", ""),
    (".*.partial/state.orbax-checkpoint-tmp/ocdbt.process_0/d/*", "rush"),
    (".*.partial/state", "rush"),
    (".*.partial/manifest.json", ""),
]


@pytest.mark.slow
def test_killed_twenty_times_a_run_goes_on_from_what_was_complete(tmp_path, monkeypatch):
    """The worker itself checks that what it restored is what it had at that step."""
    monkeypatch.setenv("PYTHONPATH", str(WORKER.parent))  # for what the forks begin with
    assert len(DEATHS) + len(KILLS) == 20
    reached = least = most = unfinished = 0
    for death, kill in itertools.zip_longest(DEATHS, KILLS):
        lines = Forked(tmp_path, "die", death[0]).ended()
        (resumed,) = steps(lines, "resumed")
        assert least <= resumed <= most, (death, lines)
        assert steps(lines, "complete")[-1:] == [resumed + 2]
        reached = resumed + death[1]
        unfinished += any(tmp_path.glob(".*.partial"))
        if kill is None:
            break

        pattern, mode = kill
        run, lines = Forked(tmp_path, mode), []
        while len(steps(lines, "saving")) < 3:
            lines.append(run.stdout.readline())
            assert lines[-1], lines
        while pattern and not any(tmp_path.glob(pattern)):
            assert run.process.is_alive()
        run.process.kill()
        lines += run.ended()
        unfinished += any(tmp_path.glob(".*.partial"))
        assert steps(lines, "resumed") == [reached], (death, kill, lines)
        # A save waits for the one before it.
        most = steps(lines, "saving")[-1]
        least = most - 2 if mode == "rush" else steps(lines, "complete")[-1]
    assert unfinished > 10
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(abstract())
    assert restored is not None and restored.step == reached and not restored.skipped
    check(restored)
    assert not list(tmp_path.glob(".*.partial")) and not list(tmp_path.glob(".*.deleted"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_saves_and_nobody_else_writes_meanwhile(number, tmp_path):
    run = start(tmp_path)
    assert run.stdout is not None
    lines = [run.stdout.readline() for _ in range(3)]
    assert lines[2] == "complete 1\n", (lines, ended(run))
    with pytest.raises(ConfigError, match=f"another process writes checkpoints to {tmp_path}; "):
        Checkpoints(tmp_path)
    with Checkpoints(tmp_path, read_only=True) as others:
        assert others.steps()
    run.send_signal(number)
    rest, err = ended(run)
    lines += rest
    assert (run.returncode, err) == (0, "")
    (stopped,) = steps(lines, "stopped")
    assert steps(lines, "complete")[-1] == stopped
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [*range(max(1, stopped - 1), stopped + 1)]


@pytest.mark.slow
def test_a_full_disk_ends_the_run_in_one_line_and_leaves_the_last_checkpoint(tmp_path):
    run = start(tmp_path, "full")
    lines, err = ended(run)
    assert lines[-1] == (
        f"failed the checkpoint of step 3 cannot be written to {tmp_path}: File too large; the "
        "checkpoint of step 2 is intact"
    )
    assert (run.returncode, err) == (0, "")  # no trace of a thread's either
    assert not list(tmp_path.glob(".*.partial"))
    lines, err = ended(start(tmp_path, "few"))
    assert (lines[0], lines[-1], err) == ("resumed 2", "stopped 5", "")


@pytest.mark.slow
def test_two_processes_write_one_checkpoint_and_agree_which_is_good(tmp_path):
    def both() -> list[list[str]]:
        with distributed.reserved_port("127.0.0.1") as port:
            values = (f"127.0.0.1:{port}", "2")
        runs = [
            start(
                tmp_path / "run",
                "few",
                **dict(zip(distributed.VARIABLES, (*values, str(i)), strict=True)),
            )
            for i in range(2)
        ]
        said = [ended(run) for run in runs]
        assert [run.returncode for run in runs] == [0, 0], said
        return [[line for line in lines if "Gloo" not in line] for lines, _ in said]

    (first, second) = both()
    assert first == second and first[0] == "resumed 0" and first[-1] == "stopped 3"
    # Each wrote its part.
    parts = {p.name for p in (tmp_path / "run/00000003/state").glob("ocdbt.process_*")}
    assert parts == {"ocdbt.process_0", "ocdbt.process_1"}
    with Checkpoints(shutil.copytree(tmp_path / "run", tmp_path / "copy")) as checkpoints:
        restored = checkpoints.restore(abstract())  # on eight devices of one process
    assert restored is not None and restored.step == 3
    check(restored)

    file = next((tmp_path / "run/00000003/state/ocdbt.process_1/d").iterdir())
    file.write_bytes(file.read_bytes()[:-1])
    first, second = both()
    assert first == second and first[1:2] == ["resumed 2"] and first[-1] == "stopped 5"
    assert re.match(r"skipped 3 state/ocdbt.process_1/d/\w+ has [\d,]+ bytes instead of", first[0])
