"""Workers: what they say arrives, and however they end there is one line about it."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from jaxrl.config import BenchConfig
from jaxrl.perf import worker
from jaxrl.perf.rows import parse_row, proxy_row
from jaxrl.perf.runner import Finished, Job, Progress, Started, run_jobs

FAKE = (sys.executable, str(pathlib.Path(__file__).with_name("fake_worker.py")))
ROWS = [
    parse_row("Qwen3-0.6B", f"rl full {n} recompute fa3 1xH100") for n in (1024, 2048, 4096, 8192)
]
PLANNED = [Job(row, "planned") for row in ROWS]
PROXY = Job(proxy_row(ROWS[0], 256), "proxy")


@pytest.fixture
def plan(monkeypatch):
    """What the fake worker does, by part of the row's name."""

    def set_plan(**what):
        monkeypatch.setenv("FAKE_WORKER", json.dumps(what))

    return set_plan


def run(jobs, logs, *, parallel=2, command=FAKE, **options):
    return list(
        run_jobs(jobs, BenchConfig(**options), parallel=parallel, logs=logs, worker_command=command)
    )


def finished(events):
    return {e.job: e for e in events if isinstance(e, Finished)}


def test_every_job_finishes_once_with_progress(tmp_path):
    events = run([*PLANNED, PROXY], tmp_path / "logs")
    done = finished(events)
    assert set(done) == {*PLANNED, PROXY}
    assert done[PLANNED[0]].result["peak_mem_gib"] == 7.75
    steps = [e for e in events if isinstance(e, Progress) and e.job == PROXY and e.of]
    assert [e.step for e in steps] == list(range(1, 11))
    assert steps[0].scalars == {"step_time_s": 0.401}
    assert not list((tmp_path / "logs").iterdir())  # nobody printed anything


def test_measured_rows_run_alone(tmp_path):
    running, most = set(), {}
    jobs = [*PLANNED[:3], PROXY, Job(ROWS[0], "measured")]
    for event in run(jobs, tmp_path, parallel=3):
        if isinstance(event, Started):
            running.add(event.job)
        elif isinstance(event, Finished):
            running.remove(event.job)
        for job in running:
            most[job.mode] = max(most.get(job.mode, 0), len(running))
    assert most["planned"] > 1 and most["proxy"] == most["measured"] == 1


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("error", "XlaRuntimeError: RESOURCE_EXHAUSTED: out of memory"),
        ("SIGKILL", "killed by SIGKILL: the host most likely ran out of memory"),
        ("SIGABRT", "worker killed by SIGABRT; see "),
        ("exit", "worker exit code 3 (F0000 mosaic: Check failed: wrong architecture); see "),
    ],
)
def test_a_dead_worker_costs_only_its_row(tmp_path, plan, what, words):
    plan(**{"-2048-": what})
    done = finished(run(PLANNED, tmp_path))
    assert done[PLANNED[1]].error.startswith(words) and done[PLANNED[1]].result is None
    assert all(done[job].result for job in PLANNED if job != PLANNED[1])


def test_time_limit(tmp_path, plan):
    plan(**{"-2048-": "hang"})
    done = finished(run(PLANNED[:2], tmp_path, time_limit_s=1.5))
    assert done[PLANNED[1]].error == "stopped after config.time_limit_s = 1.5 s"
    assert done[PLANNED[0]].result


def test_closing_kills_the_workers(tmp_path, plan):
    plan(**{"H100": "hang"})
    events = run_jobs(PLANNED, BenchConfig(), parallel=2, logs=tmp_path, worker_command=FAKE)
    while not isinstance(next(events), Progress):
        pass
    assert children()
    events.close()
    assert not children()


def children(name="fake_worker"):
    """Workers of this process."""
    found = subprocess.run(
        ["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True
    )
    return [line for line in found.stdout.splitlines() if name in line]


def real_worker(code):
    """A command that is the real worker with `run_row` replaced."""
    return (sys.executable, "-c", f"import jaxrl.perf.worker as w\n{code}\nw.main()")


def test_the_worker_reports_progress_result_and_keeps_stdout_out_of_it(tmp_path):
    code = """
def run_row(mode, row, config, progress):
    progress('step', step=1, of=2, step_time_s=0.5)
    print('noise from JAX')
    return {'peak_mem_gib': row.seq_len / 1024, 'mode_was': mode, 'steps': config.steps}
w.run_row = run_row"""
    events = run(PLANNED[:1], tmp_path, command=real_worker(code), steps=12)
    assert finished(events)[PLANNED[0]].result == {
        "peak_mem_gib": 1.0,
        "mode_was": "planned",
        "steps": 12,
    }
    assert Progress(PLANNED[0], "step", 1, 2, {"step_time_s": 0.5}) in events
    assert (tmp_path / f"{PLANNED[0].name}.log").read_text() == "noise from JAX\n"


def test_a_worker_plans_further_rows_of_its_gpu_and_no_others(tmp_path):
    code = """
import os
def run_row(mode, row, config, progress):
    print('at', row.seq_len)
    if row.seq_len == 2048:
        raise ValueError('does not fit')
    return {'pid': os.getpid()}
w.run_row = run_row"""
    other = parse_row("Qwen3-0.6B", "rl full 16384 recompute fa2 1xA6000")
    jobs = [PLANNED[0], Job(other, "planned"), PLANNED[2], PLANNED[1], PLANNED[3]]
    jobs += [Job(ROWS[0], "measured"), Job(ROWS[2], "measured")]
    events = run(jobs, tmp_path, parallel=1, command=real_worker(code))
    started = [e.job for e in events if isinstance(e, Started)]
    # The H100's first, up to an error, after which the next process takes what is first.
    assert started == [*PLANNED[:1], *PLANNED[2:0:-1], jobs[1], PLANNED[3], *jobs[-2:]]
    done = finished(events)
    assert set(done) == set(jobs) and done[PLANNED[1]].error == "does not fit"
    pids = {job: done[job].result["pid"] for job in jobs if job != PLANNED[1]}
    assert pids[PLANNED[0]] == pids[PLANNED[2]]
    assert len(set(pids.values())) == len(pids) - 1
    for job in jobs:
        assert (tmp_path / f"{job.name}.log").read_text().startswith(f"at {job.row.seq_len}\n")
    assert not children("jaxrl.perf.worker")


def test_a_log_that_cannot_be_written_costs_only_its_row(tmp_path):
    code = "def run_row(*_): return {'peak_mem_gib': 1.0}\nw.run_row = run_row"
    (tmp_path / f"{PLANNED[1].name}.log").mkdir()
    done = finished(run(PLANNED[:3], tmp_path, parallel=1, command=real_worker(code)))
    assert done[PLANNED[1]].error.startswith("IsADirectoryError")
    assert done[PLANNED[0]].result == done[PLANNED[2]].result == {"peak_mem_gib": 1.0}


def test_the_workers_traceback_goes_to_the_log(tmp_path):
    code = "def run_row(*_): raise ValueError('expert axis 8\\nsecond line')\nw.run_row = run_row"
    events = run(PLANNED[:1], tmp_path, command=real_worker(code))
    assert finished(events)[PLANNED[0]].error == "expert axis 8"
    assert "Traceback" in (tmp_path / f"{PLANNED[0].name}.log").read_text()


def test_the_worker_ends_with_its_parent():
    read, write = os.pipe()
    code = "import time\ndef run_row(*_): time.sleep(600)\nw.run_row = run_row"
    process = subprocess.Popen(
        [*real_worker(code), str(write)], stdin=subprocess.PIPE, pass_fds=[write]
    )
    os.close(write)
    request = {"mode": "planned", "row": PLANNED[0].row.__dict__, "config": {}}
    process.stdin.write(json.dumps(request).encode() + b"\n")
    process.stdin.flush()
    time.sleep(0.5)
    assert process.poll() is None
    process.stdin.close()
    assert process.wait(timeout=10) == 1
    os.close(read)


def test_one_line_errors():
    assert worker.one_line(ValueError("expert axis 8\nmore")) == "expert axis 8"
    assert worker.one_line(RuntimeError("  boom \n x")) == "RuntimeError: boom"
    assert worker.one_line(MemoryError()) == "MemoryError"
    assert len(worker.one_line(RuntimeError("x" * 1000))) == worker.MAX_ERROR
    assert signal.Signals(6).name == "SIGABRT"
