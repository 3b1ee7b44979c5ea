"""The console of a training run: a line per step or so, and a live bar on a terminal."""

import math
import time
from collections.abc import Mapping

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

# What a line shows: metric, label, format.
COLUMNS = (
    ("reward_mean", "reward", "{:.3f}"),
    ("eval/reward_mean", "eval reward", "{:.3f}"),
    ("loss", "loss", "{:.4f}"),
    ("eval_loss", "eval loss", "{:.4f}"),
    ("grad_norm", "grad norm", "{:.3g}"),
    ("lr", "lr", "{:.3g}"),
    ("tokens_per_s", "", "{:,.0f} tokens/s"),
    ("mfu_pct", "", "{:.1f}% MFU"),
    ("peak_mem_gib", "", "{:.1f} GiB"),
)


class RunConsole:
    """Lines of a run of `total` steps (None: not known), of which `done` were made before.

    quiet: print nothing (processes other than the first). Use as a context manager.
    """

    def __init__(
        self,
        total: int | None,
        done: int = 0,
        *,
        every: int = 1,
        quiet: bool = False,
        console: Console | None = None,
    ):
        self.console = Console(quiet=quiet) if console is None else console
        self.total, self.done, self.every = total, done, every
        self.begin, self.first = time.monotonic(), done
        self.bar: Progress | None = None
        if self.console.is_terminal and not quiet:
            self.bar = Progress(
                TextColumn("step {task.completed}" + (f"/{total}" if total else "")),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                console=self.console,
                transient=True,
            )
            self.task = self.bar.add_task("", total=total, completed=done)

    def __enter__(self) -> "RunConsole":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self.bar:
            self.bar.stop()

    def say(self, text: str, style: str = "") -> None:
        """A line of its own."""
        self.console.print(escape(text), style=style, highlight=False, soft_wrap=True)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """A finished step: its line, if it is due, the last, or has a validation."""
        self.done = step
        if self.bar:
            self.bar.update(self.task, completed=step, description=f"ETA {self.eta()}")
        if step % self.every == 0 or step == self.total or "eval_loss" in values:
            of = f"/{self.total}" if self.total else ""
            self.say(f"step {step}{of}  {describe(values)}  ETA {self.eta()}")

    def eta(self) -> str:
        """Hours, minutes and seconds that are left at the speed so far; "?" where not known."""
        made = self.done - self.first
        if not self.total or not made:
            return "?"
        seconds = (time.monotonic() - self.begin) / made * (self.total - self.done)
        return duration(seconds)


def describe(values: Mapping[str, float]) -> str:
    """The metrics of a step that a line shows."""
    parts = []
    for key, label, form in COLUMNS:
        if key in values:
            text = form.format(values[key]) if math.isfinite(values[key]) else str(values[key])
            parts.append(f"{label} {text}".strip())
    if values.get("skipped"):
        parts.append("update skipped")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """3725 -> "1:02:05"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
