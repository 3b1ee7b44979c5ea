"""Rows that take the GPUs of several hosts: process 0 leads, the others run what it asks for.

Every host runs the same command. Process 0 listens at the coordinator's address; the others
connect, say which GPUs they have, and then start a worker for each row that is run together, and
end it when told to. Each such row is a `jax.distributed` job of its own, at a port of its own, so
that a row that fails costs only itself. JSON lines over TCP; what connects is trusted, as it is by
JAX's own coordinator: keep the port inside the cluster's network.

A host that disappears is noticed when its connection closes, or by TCP keep-alive within a minute.
"""

import contextlib
import dataclasses
import pathlib
import selectors
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxrl.cli import HostLostError
from jaxrl.config import BenchConfig
from jaxrl.options import ConfigError, from_config
from jaxrl.parallel.distributed import ADDRESS, COUNT, INDEX, Processes, reserved_port
from jaxrl.perf.link import Link, connect
from jaxrl.perf.provenance import source_hash, versions
from jaxrl.perf.rows import Row
from jaxrl.perf.runner import TICK_S, WORKER, Finished, Job, Progress, Worker, watch

GRACE_S = 5.0  # after the first failure, for the processes that know the reason to tell it
MAX_LOG = 1 << 16


@dataclasses.dataclass(frozen=True)
class Other:
    """Another process, as process 0 sees it."""

    link: Link
    index: int
    host: str
    gpus: tuple[str, ...]

    def __str__(self) -> str:
        return f"process {self.index} ({self.host})"


class Team:
    """Process 0 and those that have joined it; of one process, nothing but its GPUs.

    Use as a context manager: entering waits for the others, leaving ends them with `code`, or
    with an error's code. Raises ConfigError if they do not come, or do not fit together.
    """

    def __init__(self, processes: Processes, gpus: Sequence[str], join_timeout_s: float):
        self.processes, self.gpus, self.join_timeout_s = processes, tuple(gpus), join_timeout_s
        self.others: list[Other] = []
        self.code = 0
        self.rows_started = 0

    @property
    def all_gpus(self) -> list[str]:
        """Device kinds of the GPUs of all hosts."""
        return [*self.gpus, *(kind for other in self.others for kind in other.gpus)]

    @property
    def hosts(self) -> list[str]:
        return [socket.gethostname(), *(other.host for other in self.others)]

    def runs_together(self, job: Job) -> bool:
        """Whether a row takes the GPUs of all hosts, this one's being too few."""
        return job.mode == "measured" and job.row.num_gpus > len(self.gpus)

    def start(
        self, job: Job, config: BenchConfig, logs: pathlib.Path, command: Sequence[str]
    ) -> Worker:
        """The job's worker, for `run_jobs`."""
        if self.runs_together(job):
            return _Together(self, job, config, logs, command)
        return Worker(job, config, logs, command)

    def __enter__(self) -> "Team":
        if self.processes.count > 1:
            try:
                self._wait_for_others()
            except BaseException as error:
                self.__exit__(type(error))
                raise
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *_) -> None:
        if kind is not None:
            self.code = 130 if issubclass(kind, KeyboardInterrupt) else 2
        for other in self.others:
            other.link.send(end=self.code)
        for other in self.others:
            other.link.close()

    def _wait_for_others(self) -> None:
        host, port = self.processes.address
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        both = not self.processes.bind_host and socket.has_dualstack_ipv6()
        try:
            server = socket.create_server(
                (self.processes.bind_host, port),
                family=socket.AF_INET6 if both else family,
                dualstack_ipv6=both,
                backlog=self.processes.count,
            )
        except OSError as error:
            raise ConfigError(
                f"{ADDRESS} {self.processes.coordinator}: cannot listen there "
                f"({error.strerror or error}); name a free port of process 0's host"
            ) from error
        with server:
            self._accept(server)
        self.others.sort(key=lambda other: other.index)

    def _accept(self, server: socket.socket) -> None:
        """Take in a hello from each other process; what says none is turned away."""
        deadline = time.monotonic() + self.join_timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(server, selectors.EVENT_READ)
            try:
                while len(self.others) < self.processes.count - 1:
                    left = deadline - time.monotonic()
                    if left <= 0:
                        self._report_missing()
                    for key, _ in selector.select(left):
                        if key.fileobj is server:
                            link = Link(server.accept()[0])
                            selector.register(link.sock, selectors.EVENT_READ, link)
                        else:
                            self._greet(key.data, selector)
            finally:
                for key in selector.get_map().values():
                    if key.data:  # said nothing so far
                        key.data.sock.close()

    def _greet(self, link: Link, selector: selectors.BaseSelector) -> None:
        """Read the hello of what has connected, if it is one."""
        for message in link.messages():
            try:
                hello = message["hello"]
                other = Other(link, int(hello["index"]), hello["host"], tuple(hello["gpus"]))
                count, code = hello["count"], dict(hello["code"])
            except (KeyError, TypeError, ValueError):
                link.closed = True
                break
            selector.unregister(link.sock)
            self._add(other, count, code)
            return
        if link.closed:
            selector.unregister(link.sock)
            link.sock.close()

    def _add(self, other: Other, count: int, theirs: Mapping[str, str]) -> None:
        before = {o.index: o for o in self.others}
        self.others.append(other)
        if count != self.processes.count:
            raise ConfigError(
                f"{other} has {COUNT} {count}, process 0 has {self.processes.count}; "
                "set the same on every host"
            )
        if other.index in before:
            raise ConfigError(
                f"{before[other.index]} and {other} have the same {INDEX}; give each host its own"
            )
        ours = _code()
        for name in sorted(theirs.keys() | ours.keys()):
            if theirs.get(name) != ours.get(name):
                raise ConfigError(
                    f"{other} has {name} {theirs.get(name)}, process 0 has {ours.get(name)}; "
                    "install the same on every host"
                )

    def _report_missing(self) -> None:
        there = {other.index for other in self.others}
        missing = [str(i) for i in range(1, self.processes.count) if i not in there]
        raise ConfigError(
            f"process {', '.join(missing)} of {self.processes.count} did not connect to "
            f"{self.processes.coordinator} within config.join_timeout_s = {self.join_timeout_s:g} "
            "s; start the same command on every host, and let them reach that port"
        )


def _code() -> dict[str, str]:
    return {"jaxrl source": source_hash()} | versions()


class _Together(Worker):
    """Process 0's worker of a row that all hosts run, and what the others say of theirs."""

    def __init__(self, team: Team, job: Job, config: BenchConfig, logs, command: Sequence[str]):
        self.others, self.logs = team.others, logs
        self.outcome: dict[int, Mapping[str, Any]] = {}
        self.failed_at: float | None = None
        team.rows_started += 1
        self.number = team.rows_started
        host, _ = team.processes.address
        with contextlib.ExitStack() as stack:
            port = stack.enter_context(reserved_port(team.processes.bind_host))
            address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            processes = Processes(address, team.processes.count, 0)
            super().__init__(job, config, logs, command, processes)
            self.stack = stack.pop_all()
        for other in self.others:
            theirs = dataclasses.replace(processes, index=other.index)
            other.link.send(
                start=self.number, mode=job.mode, row=job.row, config=config, processes=theirs
            )

    def sources(self) -> list[int]:
        links = [other.link for other in self.others]
        return super().sources() + [link.sock.fileno() for link in links if not link.closed]

    def read(self) -> Iterator[Progress]:
        yield from super().read()
        for other in self.others:
            for message in other.link.messages():
                if message.get("done") == self.number:  # not of a row that was stopped
                    self.outcome[other.index] = message
                    self._keep_log(other, message.get("log"))

    def finished(self, time_limit_s: float) -> Finished | None:
        """All have a result, or one has failed and the others have had the time to say why."""
        own = super().finished(float("inf"))
        lost = {str(o): "has gone" for o in self.others if o.link.closed}
        errors = {"process 0": own.error} if own and own.error else {}
        told = {str(o): self.outcome[o.index] for o in self.others if o.index in self.outcome}
        errors |= {who: m["error"] for who, m in told.items() if m.get("error")}
        errors = lost or errors  # who is gone took the others along
        all_told = own is not None and len(told) == len(self.others)
        seconds = time.monotonic() - self.start
        if errors:
            self.failed_at = self.failed_at or time.monotonic()
            late = time.monotonic() - self.failed_at > GRACE_S or seconds > time_limit_s
            if not (lost or all_told or late):
                return None
            return Finished(self.job, seconds, None, _one_line(errors))
        if not all_told:
            if seconds <= time_limit_s:
                return None
            silent = [] if own else ["process 0"]
            silent += [str(o) for o in self.others if o.index not in self.outcome]
            error = f"stopped after config.time_limit_s = {time_limit_s:g} s, waiting for "
            return Finished(self.job, seconds, None, error + ", ".join(silent))
        assert own and own.result
        peaks = [own.result["peak_mem_gib"], *(m["result"]["peak_mem_gib"] for m in told.values())]
        return Finished(self.job, seconds, own.result | {"peak_mem_gib": max(peaks)})

    def close(self) -> None:
        for other in self.others:
            other.link.send(stop=self.number)
        super().close()
        self.stack.close()

    def _keep_log(self, other: Other, text: str | None) -> None:
        if text:
            path = self.logs / f"{self.job.name}.process{other.index}.log"
            with contextlib.suppress(OSError):
                path.write_text(text)


def _one_line(errors: Mapping[str, str]) -> str:
    same = set(errors.values())
    if len(same) == 1 and len(errors) > 1:
        return same.pop()
    return "; ".join(f"{who}: {error}" for who, error in errors.items())


def follow(
    processes: Processes,
    gpus: Sequence[str],
    join_timeout_s: float,
    worker_command: Sequence[str] = WORKER,
) -> int:
    """Be one of the others: run what process 0 asks for, say nothing; its exit code.

    Raises ConfigError if process 0 is not there, HostLostError if it disappears.
    """
    link = connect(processes, join_timeout_s)
    with contextlib.closing(link), tempfile.TemporaryDirectory(prefix="jaxrl-") as folder:
        hello = {"index": processes.index, "count": processes.count, "gpus": gpus}
        link.send(hello=hello | {"host": socket.gethostname(), "code": _code()})
        logs = pathlib.Path(folder, "logs")
        logs.mkdir()
        return _obey(link, processes, logs, worker_command)


def _obey(
    link: Link, processes: Processes, logs: pathlib.Path, worker_command: Sequence[str]
) -> int:
    worker, number, told = None, 0, True
    with selectors.DefaultSelector() as selector:
        try:
            while True:
                busy = [worker] if worker and not told else []
                watch(selector, busy, (link.sock.fileno(), None))
                selector.select(TICK_S if busy else None)
                for message in link.messages():
                    if "end" in message:
                        return message["end"]
                    if worker:  # "stop", or the next row
                        watch(selector, [])
                        worker.close()
                        worker = None
                    if "start" in message:
                        number, told = message["start"], False
                        try:
                            worker = _start(message, logs, worker_command)
                        except OSError as error:  # no memory for a process, no room for its log
                            told = True
                            link.send(done=number, error=f"cannot start a worker: {error}")
                if link.closed:
                    raise HostLostError(
                        f"process 0 at {processes.coordinator} has gone; see its output"
                    )
                if worker and not told:
                    for _ in worker.read():  # progress is process 0's to show
                        pass
                    if done := worker.finished(float("inf")):
                        told = True
                        log = _tail(worker.log) if done.error else ""
                        link.send(done=number, result=done.result, error=done.error, log=log)
        finally:
            if worker:
                worker.close()


def _start(message: dict[str, Any], logs: pathlib.Path, worker_command: Sequence[str]) -> Worker:
    return Worker(
        Job(Row(**message["row"]), message["mode"]),
        from_config(BenchConfig, message["config"]),
        logs,
        worker_command,
        Processes(**message["processes"]),
    )


def _tail(path: pathlib.Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_bytes()[-MAX_LOG:].decode(errors="replace")
    return ""
