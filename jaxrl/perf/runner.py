"""Runs rows in worker processes and tells what happens as a stream of events.

Planned rows run side by side; measured and proxy rows alone, so that nothing disturbs their times.
A worker that has planned a row plans the next ones for the same GPU, which saves the imports and
the kernels that it has already compiled; all other rows have a process of their own.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

from jaxrl._platform import whole_gpus
from jaxrl.config import BenchConfig
from jaxrl.parallel.distributed import Processes
from jaxrl.perf.rows import Row

WORKER = (sys.executable, "-m", "jaxrl.perf.worker")
TICK_S = 0.2  # how often time limits are looked at, and a display can be refreshed


@dataclasses.dataclass(frozen=True)
class Job:
    """A row and how to run it: "planned", "measured" or "proxy"."""

    row: Row
    mode: str

    @property
    def name(self) -> str:
        return f"{self.row.slug}_{self.mode}"


@dataclasses.dataclass(frozen=True)
class Started:
    job: Job


@dataclasses.dataclass(frozen=True)
class Progress:
    """`stage` ("compiling", "step"), and step i of n where there are steps."""

    job: Job
    stage: str
    step: int = 0
    of: int = 0
    scalars: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Finished:
    """Either `result` or `error` (one line) is set."""

    job: Job
    seconds: float
    result: dict[str, Any] | None = None
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Tick:
    """Nothing happened for a while."""


Event = Started | Progress | Finished | Tick


def run_jobs(
    jobs: Sequence[Job],
    config: BenchConfig,
    *,
    parallel: int,
    logs: pathlib.Path,
    worker_command: Sequence[str] = WORKER,
    start: "Callable[..., Worker] | None" = None,
) -> Generator[Event]:
    """Run `jobs` in order, at most `parallel` planned ones at once; one `Finished` for each.

    A planned row whose GPU a worker has planned for goes before those of other GPUs.

    Each worker's output goes to a file in `logs`, removed if empty. Closing the iterator, or an
    exception in it (Ctrl-C), kills the workers that run. `start` makes a worker, with `Worker`'s
    arguments, where rows need more than a process here.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting = list(jobs)
    running: list[Worker] = []
    with selectors.DefaultSelector() as selector:
        try:
            while waiting or running:
                while waiting and _may_start(waiting[0], running, parallel):
                    worker = (start or Worker)(waiting.pop(0), config, logs, worker_command)
                    running.append(worker)
                    yield Started(worker.job)
                watch(selector, running)
                ready = selector.select(TICK_S)
                for key, _ in ready:
                    yield from key.data.read()
                for worker in list(running):
                    if finished := worker.finished(config.time_limit_s):
                        following = worker.next_of(waiting)
                        if following:
                            waiting.remove(following)
                            worker.take(following)
                        else:
                            running.remove(worker)
                            watch(selector, running)
                            worker.close()
                        yield finished
                        if following:
                            yield Started(following)
                if not ready:
                    yield Tick()
        finally:
            for worker in running:
                worker.close()


def watch(
    selector: selectors.BaseSelector, workers: Sequence["Worker"], *others: tuple[int, Any]
) -> None:
    """Let `selector` look at what `workers` can be read from, and `others`, and nothing else.

    Call it before the file descriptors of a worker that has left are closed.
    """
    wanted = dict(others) | {fd: worker for worker in workers for fd in worker.sources()}
    for key in list(selector.get_map().values()):
        if key.fd not in wanted:
            selector.unregister(key.fd)
    for fd in wanted.keys() - {key.fd for key in selector.get_map().values()}:
        selector.register(fd, selectors.EVENT_READ, wanted[fd])


def _may_start(job: Job, running: Sequence["Worker"], parallel: int) -> bool:
    if job.mode == "planned":
        return len(running) < parallel and all(w.job.mode == "planned" for w in running)
    return not running


class Worker:
    """A worker process, the pipe it reports through, and what it has said of its row so far.

    With `processes`, it is one of several that run the row together.
    """

    def __init__(
        self,
        job: Job,
        config: BenchConfig,
        logs: pathlib.Path,
        command: Sequence[str],
        processes: Processes | None = None,
    ):
        self.config, self.logs, self.processes = config, logs, processes
        self._begin(job)
        self.channel, write_end = os.pipe()
        os.set_blocking(self.channel, False)
        self.buffer, self.closed = b"", False
        try:
            with self.log.open("wb") as log:
                self.process = subprocess.Popen(
                    [*command, str(write_end)],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=[write_end],
                    start_new_session=True,  # Ctrl-C reaches the parent, which ends the workers
                    env=os.environ | _environment(job.mode),
                )
        except OSError:
            os.close(self.channel)
            raise
        finally:
            os.close(write_end)
        self._ask()

    def _begin(self, job: Job) -> None:
        self.job, self.start = job, time.monotonic()
        other = f".process{self.processes.index}" if self.processes and self.processes.index else ""
        self.log = self.logs / f"{job.name}{other}.log"
        self.result: dict[str, Any] | None = None
        self.error: str | None = None
        self.goes_on = False  # it waits for another row

    def _ask(self, **more) -> None:
        request = {"mode": self.job.mode, "row": self.job.row, "config": self.config}
        request |= {"processes": self.processes} | more
        line = json.dumps(request, default=dataclasses.asdict).encode() + b"\n"
        with contextlib.suppress(BrokenPipeError):  # it died at once; `finished` says why
            assert self.process.stdin
            self.process.stdin.write(line)
            self.process.stdin.flush()

    def next_of(self, waiting: Sequence[Job]) -> Job | None:
        """The first job that this process can also run. What JAX keeps of one GPU does not do for
        another: programs would hold the wrong kernels."""
        if not self.goes_on or self.error:
            return None
        same = (job for job in waiting if job.mode == self.job.mode)
        return next((job for job in same if job.row.gpu == self.job.row.gpu), None)

    def take(self, job: Job) -> None:
        """Run `job` too, after a result that it `goes_on` after. `finished` is then of this one."""
        self._drop_empty_log()
        self._begin(job)
        self._ask(log=str(self.log.resolve()))

    def sources(self) -> list[int]:
        """File descriptors that `read` reads, while there is something to come."""
        return [] if self.closed else [self.channel]

    def read(self) -> Iterator[Progress]:
        """Take in what the worker has written."""
        while True:
            try:
                data = os.read(self.channel, 1 << 16)
            except BlockingIOError:
                break
            if not data:
                self.closed = True
                break
            self.buffer += data
        *lines, self.buffer = self.buffer.split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "stage" in message:
                yield Progress(self.job, **message)
            self.result = message.get("result", self.result)
            self.error = message.get("error", self.error)
            self.goes_on = message.get("goes_on", self.goes_on)

    def finished(self, time_limit_s: float) -> Finished | None:
        """The outcome, once there is one."""
        seconds = time.monotonic() - self.start
        if not self.closed and self.process.poll() is not None:
            for _ in self.read():  # what it wrote between the last read and its end
                pass
            self.closed = True
        if self.result is None and self.error is None:
            if self.closed:
                self.error = self._why_dead()
            elif seconds > time_limit_s:
                self.error = f"stopped after config.time_limit_s = {time_limit_s:g} s"
            else:
                return None
        return Finished(self.job, seconds, None if self.error else self.result, self.error)

    def close(self) -> None:
        """End the process with all it started; drop its log if it is empty."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        assert self.process.stdin
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        os.close(self.channel)
        self._drop_empty_log()

    def _drop_empty_log(self) -> None:
        with contextlib.suppress(OSError):
            if self.log.stat().st_size == 0:
                self.log.unlink()

    def _why_dead(self) -> str:
        """Why the process ended without a result."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=5)
        code = self.process.returncode
        log = f"see {self.log.parent.name}/{self.log.name}"
        if code is None:
            return f"the worker closed its channel and went on running; {log}"
        if code == -signal.SIGKILL:
            return (
                "killed by SIGKILL: the host most likely ran out of memory; use fewer config.jobs"
            )
        what = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        lines = [x for x in self.log.read_text(errors="replace").splitlines() if x.strip()]
        said = f" ({' '.join(lines[-1].split())[:160]})" if lines else ""
        return f"worker {what}{said}; {log}"


def _environment(mode: str) -> dict[str, str]:
    if mode == "measured":
        return whole_gpus()
    # Planned rows compile for GPUs without touching one; proxy rows are for the CPU.
    return {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
