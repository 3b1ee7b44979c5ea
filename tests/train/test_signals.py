"""A first signal asks, a second one insists."""

import signal
import subprocess
import sys

import pytest

from jaxrl.train.signals import StopSignals

# The pipe wakes `read` whenever the signal comes. `cli.run` is what every command runs under.
CODE = """
import os, signal, sys
from jaxrl import cli
from jaxrl.train.signals import StopSignals

def main(argv):
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)
    with StopSignals() as stop:
        print("ready", flush=True)
        os.read(read, 1)
        print("requested", stop.requested, flush=True)
        if argv[1] == "insist":
            while True:
                os.read(read, 1)
    return 0

cli.run(main)
"""


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("second", [None, signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_ends_a_run_well_and_the_second_at_once(first, second):
    command = [sys.executable, "-c", CODE, "insist" if second else "once"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout is not None and run.stdout.readline() == "ready\n"
    run.send_signal(first)
    assert run.stdout.readline() == "requested True\n"
    if second:
        run.send_signal(second)
    out, err = run.communicate(timeout=60)
    expected = (130, "interrupted\n") if second else (0, "")
    assert (out, run.returncode, err) == ("", *expected)


def test_handlers_are_put_back():
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with StopSignals() as stop:
        assert signal.getsignal(signal.SIGINT) != before[1]
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    assert not stop.requested
