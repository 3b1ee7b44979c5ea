"""Commands to a worker process and its answers, one JSON object per line. Standard library only:
the workers run in different environments.
"""

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import time


class Worker:
    """A worker process, seen from the driver. `ask` waits for the answer."""

    def __init__(self, command, environment=None, cpus=None):
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | (environment or {}),
            preexec_fn=(lambda: os.sched_setaffinity(0, cpus)) if cpus else None,
        )

    def ask(self, do, **arguments):
        """The worker's answer to command `do`. Raises RuntimeError with its error, if any."""
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"worker ended with exit code {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def close(self):
        self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def parser(description, *, ours, peer, turns, steps):
    """The options that every side-by-side command has; ours, peer: what a variant of each is."""
    made = argparse.ArgumentParser(description=description)
    add = made.add_argument
    add("--peer-python", required=True, help="python of the torch environment (README.md)")
    add("--ours", action="append", help=f"variant of ours: {ours}")
    add("--peer", action="append", help=f"variant of the peer: {peer}")
    add("--turns", type=int, default=turns, help="turns per contender")
    add("--steps", type=int, default=steps, help="steps per turn")
    add("--threads", type=int, default=2)
    add("--seed", type=int, default=0)
    add("--note", default="", help="kept with the result")
    add("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results.jsonl")
    return made


def parse_variant(text):
    """(options, environment variables) of a contender: "name=value,..."; capitals are variables."""
    pairs = dict(pair.split("=", 1) for pair in text.split(",") if pair)
    capitals = {k: v for k, v in pairs.items() if k.isupper()}
    return {k: v for k, v in pairs.items() if k not in capitals}, capitals


def host():
    model = "unknown"
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {"cpu": model, "cores": os.cpu_count()}


def run_process(command, threads):
    """Run a whole program to its end on so many CPUs; ends this one with its error, if any."""
    cpus = sorted(os.sched_getaffinity(0))[:threads]
    environment = {"OMP_NUM_THREADS": str(threads), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cpus),
    )
    if done.returncode:
        sys.exit(f"{command[0]} ended with {done.returncode}: {done.stderr[-2000:]}")


def serve(commands):
    """Answer commands from stdin until it closes. commands: name -> function returning a dict."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the libraries print goes to stderr
    commands = {"peak_rss": lambda: {"bytes": peak_rss()}} | commands
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = commands[request.pop("do")](**request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        channel.write(json.dumps(answer) + "\n")
        channel.flush()


def peak_rss():
    """Bytes: the most this process has held, imports and compilation included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def timed(step, count):
    """Run step() -> loss (which must have waited for the whole step) `count` times."""
    seconds, cpu_seconds, losses = [], [], []
    for _ in range(count):
        start, cpu_start = time.perf_counter(), time.process_time()
        losses.append(step())
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)  # of all threads
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "losses": losses}
