"""What the user sees while rows run: finished rows scroll by, running ones stay below them."""

import time
from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from jaxrl.perf.report import brief
from jaxrl.perf.results import Result
from jaxrl.perf.rows import names
from jaxrl.perf.runner import Event, Finished, Job, Progress, Started


class Display:
    """Live on a terminal; elsewhere one plain line per finished row and per stage of a long one."""

    def __init__(self, console: Console, jobs: Sequence[Job], done: int = 0):
        self.console, self.total, self.done = console, len(jobs), done
        self.failed = 0
        self.names = names(job.row for job in jobs)
        self.name_width = max(map(len, self.names.values()), default=0)
        self.running: dict[Job, tuple[float, Progress]] = {}
        self.begin = time.monotonic()
        self.live = Live(console=console, transient=True, refresh_per_second=8)

    def __enter__(self) -> "Display":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_) -> None:
        if self.live.is_started:
            self.live.stop()

    def event(self, event: Event, result: Result | None = None) -> None:
        """Show `event`; for `Finished`, with the row's result."""
        match event:
            case Started(job):
                self.running[job] = (time.monotonic(), Progress(job, "starting"))
            case Progress(job):
                before = self.running[job][1].stage
                self.running[job] = (self.running[job][0], event)
                if not self.console.is_terminal and job.mode != "planned" and event.stage != before:
                    steps = f" 1 of {event.of}" if event.of else ""
                    self._line(job, "...", f"{event.stage}{steps}")
            case Finished(job, seconds):
                self.running.pop(job)
                assert result is not None
                self.finished(job, result, f"{seconds:.0f} s")
        if self.live.is_started:
            self.live.update(self._running_table())

    def finished(self, job: Job, result: Result, how: str) -> None:
        """A line for a row that is done; `how`: its time, or "reused"."""
        ok = result["status"] == "ok"
        self.done += 1
        self.failed += not ok
        mark = f"{self.done:>{len(str(self.total))}}/{self.total}"
        self._line(job, mark, f"{brief(result)}  ({how})", "" if ok else "red")

    def _line(self, job: Job, mark: str, text: str, style: str = "") -> None:
        line = f"{mark}  {job.mode:<8}  {self.names[job.row]:<{self.name_width}}  {text}"
        self.console.print(escape(line), style=style, highlight=False, soft_wrap=True)

    def _running_table(self) -> Group:
        table = Table.grid(padding=(0, 2))
        for job, (start, progress) in self.running.items():
            seconds = f"{time.monotonic() - start:.0f} s"
            steps = f" {progress.step}/{progress.of}" if progress.of else ""
            table.add_row(
                Spinner("line"), job.mode, self.names[job.row], f"{progress.stage}{steps}", seconds
            )
        waiting = self.total - self.done - len(self.running)
        minutes, seconds = divmod(int(time.monotonic() - self.begin), 60)
        counts = f"{self.done} of {self.total} done, {waiting} queued"
        failed = f", [red]{self.failed} failed[/red]" if self.failed else ""
        total = Text.from_markup(f"{counts}{failed}, {minutes}:{seconds:02d}", style="dim")
        return Group(table, total)
