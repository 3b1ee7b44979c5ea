"""Compile rows as the bench plans them, and look through each program: kernels, forbidden arrays,
gathers beside compute, weights ahead of their layer, time and host memory of the compilation.

python bench/audit.py --config=configs/published.py [--config.rows=...] --config.output=FOLDER

Writes one JSON object per row to FOLDER/audit.jsonl; exit code 1 if a row holds what it must not,
or its gathers wait. Host memory is the most that its process has held so far.
"""

import json
import pathlib
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from jaxrl import bench, cli
from jaxrl.config import BenchConfig
from jaxrl.perf import audit, compile_only, plan, worker
from jaxrl.perf.hardware import GiB, gpu
from jaxrl.perf.rows import Row
from jaxrl.perf.runner import Finished, Job, run_jobs

WORKER = "--worker"
OVERLAPPED = 0.9  # of the gathered bytes, at least


def audit_row(row: Row, config: BenchConfig) -> dict:
    """What is known of the row's program, and what it took to compile it."""
    start = time.perf_counter()
    devices = compile_only.topology(row.gpu, row.num_gpus, row.num_hosts)
    program = plan.program_for(row, config, devices)
    with compile_only.as_device(program.layout.mesh), compile_only.cudnn_assumed():
        compiled = compile_only.compile_for(program.lower())
    text, memory = compiled.as_text() or "", compile_only.memory(compiled)
    seconds = time.perf_counter() - start
    found = audit.audit(program, text, gpu(row.gpu))
    forbidden = {k: [f"{a.dtype}{list(a.dims)}" for a in v] for k, v in found.forbidden.items()}
    experts = plan.compiled_experts(text, program) if program.has_experts else None
    return {
        "attn_compiled": plan.compiled_attention(text, program),
        "experts_compiled": experts,
        "peak_mem_gib": round(memory.peak_gib, 2),
        "forbidden": forbidden,
        "overlapped": round(found.overlapped, 4),
        "hidden": round(found.hidden, 4),
        "layers_ahead": round(found.layers_ahead, 3),
        "seconds": round(seconds, 1),
        "audit_s": round(time.perf_counter() - start - seconds, 1),
        "host_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GiB, 2),
    }


def main(argv: Sequence[str]) -> int:
    """Audit the rows that the command line asks for; returns the exit code."""
    config = cli.parse(BenchConfig, argv, __doc__ or "")
    folder = pathlib.Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [Job(row, "planned") for row in bench.table_rows(config)]
    command = (sys.executable, __file__, WORKER)
    events = run_jobs(jobs, config, parallel=2, logs=folder / "logs", worker_command=command)
    number = bad = 0
    with (folder / "audit.jsonl").open("w") as file:
        for event in events:
            if not isinstance(event, Finished):
                continue
            number += 1
            row = event.job.row
            result = {"model": row.model, "row": row.title, "hardware": row.hardware}
            result |= event.result or {"error": event.error}
            bad += not event.result or is_bad(event.result)
            print(json.dumps(result), file=file, flush=True)
            print(f"{number}/{len(jobs)}", *result.values(), flush=True)
    print(f"{bad} of {number} rows have something against them")
    return int(bad > 0)


def is_bad(result: Mapping[str, Any]) -> bool:
    """It holds what it must not, or its gathers wait, or come too early."""
    waits = result["overlapped"] < OVERLAPPED or result["layers_ahead"] > 1
    return bool(result["forbidden"]) or waits


if __name__ == "__main__":
    if WORKER in sys.argv:
        worker.main(lambda mode, row, config, progress: audit_row(row, config))
    cli.run(main)
