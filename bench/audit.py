"""Compile rows as the bench plans them, and look through each program: kernels, forbidden arrays,
gathers beside compute, weights ahead of their layer, time and host memory of the compilation.

python bench/audit.py --config=configs/published.py [--config.rows=...] --config.output=FOLDER

Writes one JSON object per row to FOLDER/audit.jsonl, each row in a process of its own; exit code 1
if a row holds what it must not, or its gathers wait.
"""

import concurrent.futures
import json
import multiprocessing
import pathlib
import resource
import time
from collections.abc import Sequence

from jaxrl import bench, cli
from jaxrl.config import BenchConfig
from jaxrl.perf import audit, compile_only, plan
from jaxrl.perf.hardware import GiB, gpu
from jaxrl.perf.rows import Row

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
        "model": row.model,
        "row": row.title,
        "hardware": row.hardware,
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
    rows = bench.table_rows(config)
    path = pathlib.Path(config.output) / "audit.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    alone = concurrent.futures.ProcessPoolExecutor(
        2, multiprocessing.get_context("spawn"), max_tasks_per_child=1
    )
    bad = 0
    with alone, path.open("w") as file:
        jobs = [alone.submit(audit_row, row, config) for row in rows]
        for number, job in enumerate(jobs, 1):
            result = job.result()
            fails = result["forbidden"] or result["overlapped"] < OVERLAPPED
            bad += bool(fails or result["layers_ahead"] > 1)
            print(json.dumps(result), file=file, flush=True)
            print(f"{number}/{len(jobs)}", *result.values(), flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    cli.run(main)
