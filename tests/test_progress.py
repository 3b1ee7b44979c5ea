"""The console's lines of a run."""

import io

from rich.console import Console

from jaxrl.progress import RunConsole, describe, duration


def run_console(every=1, total=6, done=0):
    console = Console(file=io.StringIO(), width=200)
    return RunConsole(total, done, every=every, console=console), console


def test_a_line_has_what_there_is():
    values = {"loss": 1.25, "lr": 1e-4, "tokens_per_s": 12345.6, "mfu_pct": 41.26}
    assert describe(values) == "loss 1.2500  lr 0.0001  12,346 tokens/s  41.3% MFU"
    assert describe({"loss": float("nan"), "skipped": 1.0}) == "loss nan  update skipped"


def test_lines_come_when_due_at_the_end_and_with_a_validation():
    run, console = run_console(every=4)
    with run:
        for step in range(1, 7):
            run.step(step, {"loss": 1.0} | ({"eval_loss": 2.0} if step == 3 else {}))
    printed = console.file.getvalue().splitlines()
    assert [line.split()[1] for line in printed] == ["3/6", "4/6", "6/6"]
    assert printed[-1].endswith("ETA 0:00:00")


def test_the_time_left_counts_the_steps_of_this_process_alone(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("jaxrl.progress.time.monotonic", lambda: clock[0])
    run, _ = run_console(total=20, done=10)
    assert run.eta() == "?"
    clock[0] += 8
    run.step(12, {})
    assert run.eta() == "0:00:32"  # 4 s a step, 8 steps
    assert run_console(total=None)[0].eta() == "?"


def test_text_is_not_taken_for_markup():
    run, console = run_console()
    run.say("[red]data[/red] of step 1")
    assert console.file.getvalue() == "[red]data[/red] of step 1\n"


def test_duration():
    assert [duration(s) for s in (0, 59.6, 3725)] == ["0:00:00", "0:01:00", "1:02:05"]
