"""Kernels side by side at the models' shapes: ours, tokamax's, cuDNN's.

    uv run python bench/kernels.py --json FILE                    # compile for five GPUs
    uv run python bench/kernels.py --json FILE --gpus H100,B200 --ops attention
    uv run python bench/kernels.py --json FILE --tune             # on a GPU: tiles first

Each kernel is compiled for each GPU, forward and backward, in a process per GPU (a kernel for the
wrong one can end it); no GPU is needed for that. Where one of the GPUs is here, its kernels also
run: time (median of rounds of launches, the device synchronised after each round), TFLOP/s, share
of the GPU's data-sheet peak, and the error against the plain fp32 implementation. `--tune` times
tiles first and keeps the best ones in `jaxrl_kernels/tiles.json`, which the kernels read.

Writes one JSON object per op x implementation x gpu x shape x direction.
"""

import argparse
import concurrent.futures
import contextlib
import itertools
import json
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import kernel_tuning
from kernel_problems import SHAPES, Cannot, Problem, arrays, problem, small, timed

GPUS = ("A6000", "A100", "H100", "H200", "B200")
IMPLEMENTATIONS = {
    "attention": ("triton", "tokamax", "cudnn"),
    "grouped_matmul": ("triton", "tokamax"),
}
RESULT = dict.fromkeys(
    (
        *("op", "implementation", "gpu", "shape", "direction", "status", "error", "temp_mib"),
        *("registers", "spill_bytes", "smem_bytes", "mma_instructions", "visited_blocks"),
        *("flops", "hbm_bytes", "time_ms", "time_iqr_ms", "tflops", "share_of_peak"),
        *("max_relative_error", "device", "commit", "versions", "date"),
    )
)


def compile_rows(args, gpu_name: str) -> Iterator[dict]:
    """Rows of one absent GPU."""
    from jaxrl.perf import compile_only

    devices = compile_only.topology(gpu_name, 1)

    import jax
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
    from jaxrl_kernels import launch, resources

    from jaxrl.ops.registry import Target

    mesh = Mesh(np.array(devices), ("fsdp",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec())
    target = Target.of(devices[0])

    def placed(tree):
        as_struct = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)  # noqa: E731
        return jax.tree.map(as_struct, tree)

    def collecting(fn, *args):
        with (
            compile_only.as_device(mesh),
            compile_only.cudnn_assumed(),
            launch.collect() as kernels,
        ):
            lowered = jax.jit(fn).lower(*args)
        compiled = compile_only.compile_for(lowered)
        return compiled, [resources.resources(k) for k in kernels]

    for row, shape in rows_of(args, gpu_name):
        try:
            p = problem(row["op"], shape, row["implementation"], target)
            inputs = placed([jax.ShapeDtypeStruct(s, "bfloat16") for s in p.inputs])
            fixed = placed([jax.ShapeDtypeStruct(a.shape, a.dtype) for a in p.fixed])
            with compile_only.as_device(mesh), compile_only.cudnn_assumed():
                out, pull = jax.eval_shape(with_pull_back(p), inputs, fixed)
            if row["direction"] == "forward":
                compiled, kernels = collecting(p.fn, *inputs, *fixed)
            else:
                compiled, kernels = collecting(lambda pull, d: pull(d), *placed((pull, out)))
            row |= facts(p, row, kernels)
            row["temp_mib"] = compile_only.memory(compiled).temp / 2**20
            row["status"] = "compiled"
        except Exception as error:
            row |= failed(error)
        yield row


def with_pull_back(p: Problem):
    """(inputs, fixed) -> (out, pull-back)."""
    import jax

    return lambda inputs, fixed: jax.vjp(lambda *inputs: p.fn(*inputs, *fixed), *inputs)


def facts(p: Problem, row: dict, kernels) -> dict:
    """FLOPs, bytes, visited blocks, and the worst of the Triton kernels' needs."""
    said: dict[str, Any] = {"flops": p.flops[row["direction"]]}
    said["hbm_bytes"] = p.hbm_bytes[row["direction"]]
    if kernels:
        for key in ("registers", "spill_bytes", "smem_bytes"):
            said[key] = max(getattr(k, key) for k in kernels)
        said["mma_instructions"] = min(k.mma_instructions for k in kernels)
    if row["implementation"] == "triton":
        said["visited_blocks"] = p.visited(row["direction"])
    return said


def rows_of(args, gpu_name: str) -> Iterator[tuple[dict, Any]]:
    """The rows that the command line asks for, still empty, with their shapes."""
    from jaxrl.perf.provenance import provenance

    made = provenance()
    for op in args.ops.split(","):
        for shape, implementation in itertools.product(SHAPES[op], IMPLEMENTATIONS[op]):
            if not any(part in shape.name for part in args.shapes.split(",")):
                continue
            if implementation not in (args.implementations or implementation).split(","):
                continue
            for direction in ("forward", "backward"):
                row = RESULT | {"op": op, "implementation": implementation, "gpu": gpu_name}
                row |= {"shape": shape.name, "direction": direction}
                yield row | {key: made[key] for key in ("commit", "versions", "date")}, shape


def failed(error: Exception) -> dict:
    text = " ".join(str(error).split())
    if isinstance(error, Cannot):
        return {"status": "cannot", "error": text[:200]}
    return {"status": "failed", "error": f"{type(error).__name__}: {text}"[:200]}


def run_rows(args, gpu_name: str) -> Iterator[dict]:
    """Rows of the GPU that is here: compiled side by side, then compared and timed one by one."""
    from jaxrl.ops.registry import Target
    from jaxrl.perf.hardware import gpu

    target, peak = Target.here(), gpu(gpu_name).bf16_flops
    for rows in itertools.batched(rows_of(args, gpu_name), 8):  # their arrays are held together
        with concurrent.futures.ThreadPoolExecutor() as pool:
            prepared = list(pool.map(lambda item: prepare(*item, target), rows))
        for (row, shape), timing in zip(rows, prepared, strict=True):
            if timing is not None:
                try:
                    measure(row, shape, target, timing, peak)
                except Exception as error:
                    row |= failed(error)
            yield row


def prepare(row: dict, shape, target) -> tuple | None:
    """What to time of a row: (compiled call, arguments); its failure is put into the row."""
    from jaxrl.perf.compile_only import memory

    try:
        p = problem(row["op"], shape, row["implementation"], target)
        call, args = runnable(p, row["direction"])
        row |= facts(p, row, []) | {"temp_mib": memory(call).temp / 2**20}
        return call, args
    except Exception as error:
        row |= failed(error)
        return None


def measure(row: dict, shape, target, timing: tuple, peak: float) -> None:
    """Put time and error into the row."""
    seconds = timed(*timing)
    low, median, high = statistics.quantiles(seconds, n=4)
    row |= {"time_ms": 1e3 * median, "time_iqr_ms": 1e3 * (high - low)}
    row |= {"tflops": row["flops"] / median / 1e12, "share_of_peak": row["flops"] / median / peak}
    tiny = problem(row["op"], small(row["op"], shape), row["implementation"], target)
    row["max_relative_error"] = error_of(tiny, row["direction"])
    row |= {"device": target.gpu, "status": "measured"}


def runnable(p: Problem, direction: str):
    """(compiled call, its arguments) of one direction; backward's residuals are made."""
    import jax
    import jax.numpy as jnp

    inputs, fixed = arrays(p.inputs), [jnp.asarray(a) for a in p.fixed]
    if direction == "forward":
        args = (*inputs, *fixed)
        return jax.jit(p.fn).lower(*args).compile(), args
    out, pull = jax.jit(with_pull_back(p))(inputs, fixed)
    args = (pull, arrays([out.shape], 1)[0])
    return jax.jit(lambda pull, d: pull(d)).lower(*args).compile(), args


def error_of(p: Problem, direction: str) -> float:
    """Largest relative error (Frobenius) of any tensor against the plain fp32 implementation."""
    import jax
    import jax.numpy as jnp

    inputs, fixed = arrays(p.inputs), [jnp.asarray(a) for a in p.fixed]

    def both(fn, inputs, dtype):
        out, pull = jax.vjp(lambda *inputs: fn(*inputs, *fixed), *inputs)
        cotangent = arrays([out.shape], 1)[0].astype(dtype)
        return [out] if direction == "forward" else pull(cotangent)

    got = jax.jit(lambda *x: both(p.fn, x, jnp.bfloat16))(*inputs)
    exact = jax.jit(lambda *x: both(p.plain, x, jnp.float32))(
        *(a.astype(jnp.float32) for a in inputs)
    )

    def relative(a, b):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return float(jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel()))

    return max(relative(a, b) for a, b in zip(got, exact, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, help="file to write the rows to")
    parser.add_argument("--gpus", default="", help="names, by default all, or the one that is here")
    parser.add_argument("--ops", default=",".join(SHAPES))
    parser.add_argument("--implementations", default="", help="only these: triton,tokamax,cudnn")
    parser.add_argument("--shapes", default="", help="only shapes whose name holds one of these")
    parser.add_argument("--tune", action="store_true", help="on a GPU: tune tiles first")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := [op for op in args.ops.split(",") if op not in SHAPES]:
        parser.error(f"unknown op {unknown[0]!r}; one of {', '.join(SHAPES)}")
    if args.worker:
        for row in compile_rows(args, args.worker):
            print(json.dumps(row), flush=True)
        return
    from jaxrl.perf.hardware import GPUS as KNOWN
    from jaxrl.perf.hardware import gpu, local_gpus

    here = [g.name for kind in local_gpus()[:1] for g in KNOWN.values() if kind in g.device_kinds]
    if local_gpus() and not here:
        parser.error(
            f"this host's {local_gpus()[0]} is not in jaxrl.perf.hardware.GPUS; add it there"
        )
    try:
        names = [gpu(name).name for name in args.gpus.split(",") if name] or here or list(GPUS)
    except ValueError as error:
        parser.error(str(error))
    if args.tune:
        if not here:
            parser.error("--tune needs a GPU, and this host has none")
        kernel_tuning.tune(args.ops.split(","))
    statuses = set()
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(args.json.open("w")) if args.json else None
        for name in names:
            for row in run_rows(args, name) if name in here else absent(args, name):
                statuses.add(row["status"])
                print(line(row), flush=True)
                if file:
                    file.write(json.dumps(row) + "\n")
                    file.flush()
    sys.exit("failed" in statuses)


def absent(args, name: str) -> Iterator[dict]:
    """Rows of a GPU that is not here, from a process of its own; if it dies, that is a row too."""
    command = [sys.executable, __file__, "--worker", name]
    for option in ("ops", "implementations", "shapes"):
        command += [f"--{option}", getattr(args, option)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for text in process.stdout:
            yield json.loads(text)
    if process.returncode:
        error = f"the process that compiled for {name} ended with {process.returncode}"
        yield RESULT | {"op": args.ops, "gpu": name, "status": "failed", "error": error}


def line(row: dict) -> str:
    known = {
        "time_ms": "{:.3f} ms",
        "tflops": "{:.0f} TFLOP/s",
        "share_of_peak": "{:.0%} of peak",
        "max_relative_error": "error {:.1e}",
        "temp_mib": "temp {:.0f} MiB",
        "registers": "{} registers",
        "spill_bytes": "{} B spilled",
        "smem_bytes": "{} B shared",
        "mma_instructions": "{} MMA",
    }
    said = [form.format(row[k]) for k, form in known.items() if row[k] is not None]
    head = f"{row['gpu']:6} {row['op']:14} {row['implementation']:8} {row['direction']:8}"
    return f"{head} {row['shape']}: {row['status']} {row['error'] or ', '.join(said)}"


if __name__ == "__main__":
    main()
