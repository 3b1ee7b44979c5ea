"""Process 0 and another, with invented workers: rows run together, and every way to lose one."""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time

import pytest

from jaxrl import bench
from jaxrl.cli import HostLostError
from jaxrl.config import BenchConfig, ConfigError
from jaxrl.parallel.distributed import Processes, reserved_port
from jaxrl.perf import hosts
from jaxrl.perf.hosts import Team, follow
from jaxrl.perf.link import Link
from jaxrl.perf.rows import parse_row
from jaxrl.perf.runner import Finished, Job, Progress, run_jobs

FAKE = (sys.executable, str(pathlib.Path(__file__).with_name("fake_worker.py")))
H100 = "NVIDIA H100 80GB HBM3"
ROWS = [parse_row("Qwen3-0.6B", f"rl full {n} recompute fa3 8xH100") for n in (1024, 2048)]
TOGETHER = [Job(row, "measured") for row in ROWS]


def worker(**what: str):
    """The fake worker, which does `what` to rows of a sequence length."""
    plan = {f"-{name.strip('_')}-": value for name, value in what.items()}
    return ("env", f"FAKE_WORKER={json.dumps(plan)}", *FAKE)


@pytest.fixture
def processes():
    with reserved_port("127.0.0.1") as port:
        address = f"127.0.0.1:{port}"
    return [Processes(address, 2, i) for i in (0, 1)]


class Follower(threading.Thread):
    """`follow` as another process would call it: its exit code, or what it raised."""

    def __init__(self, me: Processes, command=FAKE):
        super().__init__(daemon=True)
        self.me, self.command, self.code, self.error = me, command, None, None
        self.start()

    def run(self):
        try:
            self.code = follow(self.me, [H100] * 4, 20, self.command)
        except Exception as error:
            self.error = error

    def end(self):
        self.join(20)
        return self.error if self.error else self.code


@contextlib.contextmanager
def team(processes, command=FAKE):
    """A team of two, four GPUs each, the other one running `command`."""
    follower = Follower(processes[1], command)
    with Team(processes[0], [H100] * 4, 20) as team:
        team.follower = follower
        yield team


def run(team, logs, *jobs, command=FAKE, **options):
    config = BenchConfig(**{"time_limit_s": 30} | options)
    return list(
        run_jobs(jobs, config, parallel=1, logs=logs, worker_command=command, start=team.start)
    )


def finished(events):
    return {e.job: e for e in events if isinstance(e, Finished)}


def test_rows_run_together_and_the_code_reaches_everyone(tmp_path, processes, monkeypatch):
    monkeypatch.setenv("FAKE_WORKER_LOG", str(tmp_path / "ran"))
    alone = Job(parse_row("Qwen3-0.6B", "rl full 4096 recompute fa3 4xH100"), "measured")
    with team(processes) as both:
        assert both.all_gpus == [H100] * 8 and both.hosts == [socket.gethostname()] * 2
        assert [both.runs_together(job) for job in (*TOGETHER, alone)] == [True, True, False]
        done = finished(run(both, tmp_path / "logs", alone, *TOGETHER))
        both.code = 7
    assert all(event.error is None for event in done.values()) and len(done) == 3
    assert done[TOGETHER[0]].result["peak_mem_gib"] == 7.75  # the most over both
    assert both.follower.end() == 7
    ran = (tmp_path / "ran").read_text().split()
    assert [sum(f"-{n}-" in name for name in ran) for n in (4096, 1024, 2048)] == [1, 2, 2]
    assert not list((tmp_path / "logs").iterdir())


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("error", "XlaRuntimeError: RESOURCE_EXHAUSTED: out of memory"),
        ("SIGABRT", "worker killed by SIGABRT; see logs/"),
        ("exit", "worker exit code 3 (F0000 mosaic: Check failed: wrong architecture); see logs/"),
    ],
)
def test_a_row_that_fails_on_one_host_ends_on_all(tmp_path, processes, monkeypatch, what, words):
    monkeypatch.setattr(hosts, "GRACE_S", 0.2)
    hang = worker(_1024="hang")  # what a collective does whose peer has failed
    with team(processes, worker(_1024=what)) as both:
        done = finished(run(both, tmp_path / "logs", *TOGETHER, command=hang))
    other = f"process 1 ({socket.gethostname()})"
    assert done[TOGETHER[0]].error.startswith(f"{other}: {words}")
    assert done[TOGETHER[1]].error is None and both.follower.end() == 0
    log = tmp_path / "logs" / f"{TOGETHER[0].name}.process1.log"
    assert log.exists() == (what == "exit")  # the one that said something


def test_both_reasons_are_told_and_one_if_they_are_the_same(tmp_path, processes):
    fails = worker(_1024="SIGABRT", _2048="error")
    with team(processes, worker(_1024="error", _2048="error")) as both:
        done = finished(run(both, tmp_path, *TOGETHER, command=fails))
    first = done[TOGETHER[0]].error
    assert first.startswith("process 0: worker killed by SIGABRT") and "; process 1 (" in first
    assert done[TOGETHER[1]].error == "XlaRuntimeError: RESOURCE_EXHAUSTED: out of memory"


def test_the_time_limit_names_who_is_silent(tmp_path, processes):
    with team(processes, worker(_1024="hang")) as both:
        done = finished(run(both, tmp_path, *TOGETHER, time_limit_s=2.5))
    said = done[TOGETHER[0]].error
    assert said.startswith("stopped after config.time_limit_s = 2.5 s, waiting for process 1 (")
    assert done[TOGETHER[1]].error is None


def test_a_lost_host_fails_its_rows_and_no_others(tmp_path, processes):
    planned = Job(parse_row("Qwen3-0.6B", "rl full 4096 recompute fa3 8xH100"), "planned")
    with team(processes, worker(H100="hang")) as both:
        events, link = [], both.others[0].link
        jobs = run_jobs(
            [*TOGETHER, planned],
            BenchConfig(time_limit_s=30),
            parallel=1,
            logs=tmp_path,
            worker_command=worker(_1024="hang"),
            start=both.start,
        )
        for event in jobs:
            events.append(event)
            if isinstance(event, Progress) and event.job == TOGETHER[0]:
                link.sock.shutdown(socket.SHUT_RDWR)  # as when that host's process has died
        done = finished(events)
    assert [done[job].error for job in TOGETHER] == [f"{both.others[0]}: has gone"] * 2
    assert isinstance(both.follower.end(), HostLostError)


def test_a_leader_that_disappears_ends_the_others_worker(processes, tmp_path):
    log = tmp_path / "ran"
    follower = Follower(processes[1], ("env", f"FAKE_WORKER_LOG={log}", *worker(_1024="hang")))
    with Team(processes[0], [H100] * 4, 20) as both:
        theirs = {"mode": "measured", "row": ROWS[0], "config": {}, "processes": processes[1]}
        both.others[0].link.send(start=1, **theirs)
        deadline = time.monotonic() + 20
        while not log.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        both.others.pop().link.close()
    assert log.exists() and "process 0 at 127.0.0.1:" in str(follower.end())
    ps = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True)
    assert b"fake_worker" not in ps.stdout


def test_who_does_not_come_is_named(processes):
    with pytest.raises(ConfigError, match=r"process 1 of 2 did not connect to 127.0.0.1:\d+ with"):
        Team(processes[0], [], 0.1).__enter__()
    with pytest.raises(ConfigError, match=r"process 0 did not answer within config.join_timeout_s"):
        follow(processes[1], [], 0.2)


def test_a_taken_port_is_named(processes):
    with (
        socket.create_server(processes[0].address),
        pytest.raises(ConfigError, match=r"cannot listen there .*; name a free port"),
    ):
        Team(processes[0], [], 1).__enter__()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"count": 3}, "has JAX_NUM_PROCESSES 3, process 0 has 2; set the same on every host"),
        ({"code": {"jax": "0.1"}}, "has jax 0.1, process 0 has 0.11"),
    ],
)
def test_hosts_that_do_not_fit_together(processes, monkeypatch, change, words):
    monkeypatch.setattr(hosts, "versions", lambda: {"jax": "0.11"})
    hello = {"index": 1, "count": 2, "host": "b", "gpus": [], "code": hosts._code()}
    hello |= {"code": hello["code"] | change.pop("code", {})} | change
    said = []

    def other():
        while True:
            with contextlib.suppress(OSError):
                link = Link(socket.create_connection(processes[0].address, timeout=10))
                break
        link.send(hello=hello)
        while not link.closed:
            said.extend(link.messages())

    thread = threading.Thread(target=other, daemon=True)
    thread.start()
    with pytest.raises(ConfigError) as error:
        Team(processes[0], [], 20).__enter__()
    assert str(error.value).startswith("process 1 (b)") and words in str(error.value)
    thread.join(20)
    assert said == [{"end": 2}]  # it ends too, and says nothing


def test_strangers_are_turned_away(processes):
    ended = []

    def stranger_then_follower():
        while True:
            with contextlib.suppress(OSError):
                stranger = socket.create_connection(processes[0].address, timeout=10)
                break
        silent = socket.create_connection(processes[0].address, timeout=10)
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        ended.append(stranger.recv(100))
        ended.append(follow(processes[1], [], 20))
        silent.close()

    thread = threading.Thread(target=stranger_then_follower, daemon=True)
    thread.start()
    with Team(processes[0], [], 20) as both:
        assert len(both.others) == 1
    thread.join(20)
    assert ended == [b"", 0]


def test_which_rows_are_measured_together():
    rows = ["rl full 1024 none xla 8xH100", "rl full 1024 none xla 4xH100"]
    rows += ["rl full 1024 none xla 6xH100"]
    config = BenchConfig(model="Qwen3-0.6B", table=tuple(rows))
    jobs = bench.plan_jobs(config, [H100] * 4, [H100] * 8)
    modes = {job.row.num_gpus: job.mode for job in jobs if job.mode != "proxy"}
    assert modes == {8: "measured", 4: "measured", 6: "planned"}
    mixed = bench.plan_jobs(config, [H100] * 4, [H100] * 7 + ["NVIDIA H200"])
    assert {j.row.num_gpus for j in mixed if j.mode == "measured"} == {4}
    config = BenchConfig(model="Qwen3-0.6B", table=tuple(rows), mode="measured")
    with pytest.raises(ConfigError, match="this host has 4xH100, all hosts 8xH100; use auto"):
        bench.plan_jobs(config, [H100] * 4, [H100] * 8)
