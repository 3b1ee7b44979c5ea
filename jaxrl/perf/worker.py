"""A row in a process apart: a kernel that aborts, or runs out of memory, takes only this.

`python -m jaxrl.perf.worker FD` reads one JSON line from stdin (mode, row, config, and the
processes where several run the row together), writes JSON lines to file descriptor FD (progress,
then one result or error), and leaves stdout and stderr, where JAX prints, to the row's log file.
After the result of a planned row it waits for another row of the same GPU, whose request also
names its log. It ends when its stdin closes, that is with its parent.
"""

import contextlib
import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

from jaxrl.config import BenchConfig
from jaxrl.options import from_config
from jaxrl.parallel import distributed
from jaxrl.perf.rows import Row

MAX_ERROR = 300
JOIN_S = 300  # for the other processes of a row; their workers start within a second of this one


def one_line(error: BaseException) -> str:
    """A ValueError's message, or type and message of any other error, in one line."""
    text = " ".join(str(error).strip().split("\n")[0].split())
    if not isinstance(error, ValueError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= MAX_ERROR else text[: MAX_ERROR - 3] + "..."


def run_row(mode: str, row: Row, config: BenchConfig, progress) -> dict[str, Any]:
    """What compiling (`planned`) or running (`measured`, `proxy`) the row gave."""
    if mode == "planned":
        from jaxrl.perf.plan import plan_row

        progress("compiling")
        return plan_row(row, config)
    from jaxrl.perf.hardware import check_gpus_are_used
    from jaxrl.perf.measure import measure_row

    check_gpus_are_used()
    return measure_row(row, config, progress=progress)


def main(run: Callable[..., dict[str, Any]] | None = None) -> None:
    """`run` is what rows are run with, instead of `run_row`."""
    channel = int(sys.argv[-1])
    os.set_inheritable(channel, False)  # or a program JAX starts would hold it open

    def send(**message) -> None:
        os.write(channel, json.dumps(message, default=float).encode() + b"\n")

    def progress(stage: str, step: int = 0, of: int = 0, **scalars: float) -> None:
        send(stage=stage, step=step, of=of, scalars=scalars)

    requests = queue.SimpleQueue[str]()
    threading.Thread(target=_read_requests, args=(requests,), daemon=True).start()
    while True:
        request = json.loads(requests.get())
        together = request.get("processes")
        try:
            if "log" in request:
                _print_to(request["log"])
            config = from_config(BenchConfig, request["config"])
            if together:
                progress("joining")
                timeout_s = min(JOIN_S, config.time_limit_s)
                distributed.initialize(distributed.Processes(**together), timeout_s=timeout_s)
            row = Row(**request["row"])
            result = (run or run_row)(request["mode"], row, config, progress)
            # Not after an error, which can leave anything behind.
            last = {"result": result, "goes_on": request["mode"] == "planned"}
        except Exception as error:
            last = {"error": one_line(error)}
            with contextlib.suppress(OSError):  # the log's disk may be full
                traceback.print_exc()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        send(**last)  # the parent may end this process from here on
        if together:  # the others would die with this one: the parent ends all when all are done
            threading.Event().wait()
        if not last.get("goes_on"):
            os._exit(0)  # do not wait for JAX's threads


def _read_requests(requests: queue.SimpleQueue) -> None:
    for line in sys.stdin:
        requests.put(line)
    os._exit(1)


def _print_to(path: str) -> None:
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for fd in (1, 2):
        os.dup2(log, fd)
    os.close(log)


if __name__ == "__main__":
    main()
