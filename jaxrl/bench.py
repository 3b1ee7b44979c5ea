"""Benchmark a model's rows: measured where this host has the GPUs, planned where it has not.

python -m jaxrl.bench --config=configs/qwen3_4b.py
python -m jaxrl.bench --config=configs/qwen3_4b.py --config.rows=gpu=H100,num_gpus=1
python -m jaxrl.bench --config=configs/qwen3_4b.py --config.mode=planned --config.output=runs/mine
python -m jaxrl.bench --config=configs/qwen3_4b.py --config.table="rl lora8 32768 none fa3 2xH200"

Writes results.jsonl and BENCHMARKS.md into the output folder after each row; run again, it goes on
where it stopped. Exit code: 0 all rows ok, 1 a row failed, 2 bad input, 130 interrupted.

Started on several hosts (see launch/), rows with as many GPUs as all of them have are measured as
one program over all; everything else is process 0's, as is all output.
"""

import collections
import contextlib
import os
import pathlib
from collections.abc import Sequence

from rich.console import Console

from jaxrl import cli
from jaxrl.config import BenchConfig, ConfigError
from jaxrl.models.presets import preset
from jaxrl.monitor import Monitor
from jaxrl.parallel import distributed
from jaxrl.perf import report
from jaxrl.perf.baseline import NO_BASELINE, load_baselines
from jaxrl.perf.display import Display
from jaxrl.perf.hardware import gpu, local_gpus
from jaxrl.perf.hosts import Team, follow
from jaxrl.perf.provenance import fingerprint, provenance
from jaxrl.perf.results import NUMBER_KEYS, Result, Store, job_of, make_result, write_atomic
from jaxrl.perf.rows import Row, check_rows, filter_rows, names, parse_row, proxy_row
from jaxrl.perf.runner import WORKER, Finished, Job, Progress, run_jobs


def main(argv: Sequence[str], *, worker_command: Sequence[str] = WORKER) -> int:
    """Run the bench that the command line asks for; returns the exit code."""
    config = cli.parse(BenchConfig, argv, __doc__ or "")
    processes, gpus = distributed.from_environment(), local_gpus()
    if processes.index:
        return follow(processes, gpus, config.join_timeout_s, worker_command)
    table_rows(config)  # bad ones are refused before anybody is waited for
    with Team(processes, gpus, config.join_timeout_s) as team:
        team.code = lead(config, team, worker_command)
    return team.code


def lead(config: BenchConfig, team: Team, worker_command: Sequence[str]) -> int:
    """Run and report everything, with the team where a row takes it; returns the exit code."""
    jobs = plan_jobs(config, team.gpus, team.all_gpus)
    baselines = load_baselines(config.baseline)
    console = Console()
    if team.others:
        gpus = [_gpu_name(kind) for kind in team.all_gpus]
        line = f"{len(team.hosts)} hosts, {_counted(gpus)}: {', '.join(team.hosts)}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    with Store(config.output) as store:
        store.arrange(jobs)
        try:
            run(config, jobs, store, baselines, console, worker_command, team)
        except OSError as error:
            what = f"{error.filename or config.output}: {error.strerror or error}"
            raise cli.OutputError(f"cannot go on: {what}; finished rows are kept") from error
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"finished rows are in {store.path}; the same command goes on from there"
            ) from None
        results = [store.results[job] for job in jobs]
    show(console, results, store)
    return int(any(r["status"] != "ok" for r in results))


def table_rows(config: BenchConfig) -> list[Row]:
    """The rows that the config asks for. ConfigError for impossible ones."""
    if not config.table:
        raise ConfigError("config.table names no rows; see configs/qwen3_4b.py")
    rows = [parse_row(config.model, text) for text in config.table]
    check_rows(rows)
    return list(dict.fromkeys(filter_rows(rows, config.rows)))


def plan_jobs(
    config: BenchConfig, host_gpus: Sequence[str], all_gpus: Sequence[str] = ()
) -> list[Job]:
    """What to run: planned rows first, then what must run alone. ConfigError for impossible rows.

    `host_gpus`: device kinds of this host's GPUs; `all_gpus`: of all hosts', with several.
    """
    rows = table_rows(config)
    here, everywhere = ([_gpu_name(kind) for kind in gpus] for gpus in (host_gpus, all_gpus))
    jobs = [
        Job(row, _mode(row, config, here, everywhere)) for row in rows if config.mode != "proxy"
    ]
    if config.mode in ("auto", "proxy"):
        # The smallest model, and LoRA if there is a choice: full fine-tuning needs 16 bytes of host
        # memory per parameter.
        row = min(rows, key=lambda row: (preset(row.model).hidden_size, row.lora_rank == 0))
        jobs.append(Job(proxy_row(row, config.proxy.seq_len), "proxy"))
    return sorted(jobs, key=lambda job: ("planned", "measured", "proxy").index(job.mode))


def _gpu_name(kind: str) -> str:
    try:
        return gpu(kind).name
    except ValueError:  # a GPU that is no row's
        return kind


def _counted(names: Sequence[str]) -> str:
    """["H100", "H100"] -> "2xH100"."""
    return ", ".join(f"{n}x{name}" for name, n in collections.Counter(names).items()) or "none"


def _mode(row: Row, config: BenchConfig, here: Sequence[str], everywhere: Sequence[str]) -> str:
    if config.mode == "planned":
        return "planned"
    if here.count(gpu(row.gpu).name) >= row.num_gpus:
        return "measured"
    if list(everywhere) == [gpu(row.gpu).name] * row.num_gpus:  # all of them, and no other
        return "measured"
    if config.mode == "measured":
        has = _counted(here)
        if len(everywhere) > len(here):
            has += f", all hosts {_counted(everywhere)}"
        raise ConfigError(
            f"config.mode measured: row '{row.model} {row.title}' needs {row.hardware}, and "
            f"this host has {has}; use auto or planned"
        )
    return "planned"


def run(
    config: BenchConfig,
    jobs: Sequence[Job],
    store: Store,
    baselines,
    console: Console,
    worker_command: Sequence[str],
    team: Team,
) -> None:
    """Run `jobs` that `store` has no finished result for, storing each as it ends."""
    hosts = {job: len(team.hosts) if team.runs_together(job) else 1 for job in jobs}
    prints = {job: fingerprint(job, config, hosts[job]) for job in jobs}
    reused = store.reusable(jobs, prints.__getitem__) if config.resume else {}
    scalars: dict[Job, list[Progress]] = {}
    events = run_jobs(
        [job for job in jobs if job not in reused],
        config,
        parallel=config.jobs or len(os.sched_getaffinity(0)),
        logs=store.folder / "logs",
        worker_command=worker_command,
        start=team.start,
    )
    with Display(console, jobs) as display, contextlib.closing(events):
        for job, result in reused.items():
            keep(store, result | baselines.get(job.row, NO_BASELINE).keys())
            display.finished(job, result, "reused")
        for event in events:
            result = None
            if isinstance(event, Progress):
                scalars.setdefault(event.job, []).append(event)
            elif isinstance(event, Finished):
                job = event.job
                more = dict(provenance()) | {"fingerprint": prints[job]}
                more |= baselines.get(job.row, NO_BASELINE).keys()
                if job.mode == "proxy":
                    more["num_layers"] = config.proxy.num_layers
                if hosts[job] > 1:
                    more["num_hosts"] = hosts[job]
                    more["host"] = f"{hosts[job]} hosts, the first: {more['host']}"
                result = make_result(job, event.result, event.error, **more)
                keep(store, result)
                if config.tensorboard:
                    log_scalars(store.folder, result, scalars.pop(job, []))
            display.event(event, result)


def keep(store: Store, result: Result) -> None:
    """Put `result` into both files."""
    store.add(result)
    write_atomic(store.folder / "BENCHMARKS.md", report.markdown(list(store.results.values())))


def log_scalars(folder: pathlib.Path, result: Result, steps: Sequence[Progress]) -> None:
    """The row's step scalars and final numbers, one TensorBoard run per row."""
    with Monitor(folder / "tensorboard" / job_of(result).name) as monitor:
        for progress in steps:
            if progress.scalars:
                monitor.log(progress.step, progress.scalars)
        final = {f"row/{k}": result[k] for k in NUMBER_KEYS if result[k] is not None}
        if final:
            monitor.log(0, final)


def show(console: Console, results: Sequence[Result], store: Store) -> None:
    """The table, what it adds up to, and where the files are."""
    width = console.width if console.is_terminal else 200
    if not console.is_terminal:  # a pipe or a file has no width to fit
        console = Console(width=width)
    for model, group in report.by_model(results).items():
        for part in report.terminal(model, group, width):
            console.print(part, highlight=False)
        console.print()
        for note in report.notes(group):
            console.print(note, highlight=False, soft_wrap=True)
    called = names(job_of(result).row for result in results)
    for result in results:
        if result["status"] != "ok":
            title = f"{called[job_of(result).row]} ({result['mode']})"
            console.print(
                f"failed: {title}: {result['error']}", markup=False, highlight=False, soft_wrap=True
            )
    files = f"{store.path} and {store.folder / 'BENCHMARKS.md'}"
    console.print(f"Results: {files}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    cli.run(main)
