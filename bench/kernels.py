"""Kernels side by side at the models' shapes: ours, tokamax's, cuDNN's.

    uv run python bench/kernels.py --json FILE                    # compile for five GPUs
    uv run python bench/kernels.py --json FILE --gpus H100,B200 --ops attention
    uv run python bench/kernels.py --json FILE --tune             # on a GPU: tiles first

Each kernel is compiled for each GPU, forward and backward, in a process per GPU (a kernel for the
wrong one can end it: its row has failed then, and another process goes on); no GPU is needed for
that. Where one of the GPUs is here, its kernels also run: time (median of rounds of launches, the
device synchronised after each round), TFLOP/s, share of the GPU's data-sheet peak, and the error
against the plain fp32 implementation. `--tune` times tiles first and keeps the best ones in
`jaxrl_kernels/tiles.json`, which the kernels read.

Prints a table per GPU and op, and writes one JSON object per op x implementation x gpu x shape x
direction.
"""

import argparse
import concurrent.futures
import contextlib
import itertools
import json
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, TextIO

import kernel_table
import kernel_tuning
from kernel_problems import SHAPES, Cannot, Problem, arrays, problem, small, timed
from rich.console import Console

GPUS = ("A6000", "A100", "H100", "H200", "B200")
IMPLEMENTATIONS = {
    "attention": ("triton", "tokamax", "cudnn"),
    "grouped_matmul": ("triton", "tokamax"),
    "grouped_lora_matmul": ("triton", "tokamax"),
    "grouped_swiglu": ("triton", "tokamax"),
}
RESULT = dict.fromkeys(
    (
        *("op", "implementation", "gpu", "shape", "direction", "status", "error", "temp_mib"),
        *("registers", "spill_bytes", "smem_bytes", "mma_instructions", "mma_kinds"),
        *("visited_blocks", "flops", "hbm_bytes", "time_ms", "time_iqr_ms", "tflops"),
        *("share_of_peak", "max_relative_error", "device", "commit", "versions", "date"),
    )
)


def compile_rows(args, gpu_name: str, skip: int) -> Iterator[dict]:
    """Rows of one absent GPU, behind the first `skip`; an empty one once it is set up."""
    from jaxrl.perf import compile_only

    devices = compile_only.topology(gpu_name, 1)

    import jax
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
    from jaxrl_kernels import launch, mosaic_resources, resources

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
            mosaic_resources.collect() as mosaic,
        ):
            lowered = jax.jit(fn).lower(*args)
            compiled = compile_only.compile_for(lowered)
        return compiled, [resources.resources(k) for k in kernels] + mosaic

    yield {}
    for row, shape in itertools.islice(rows_of(args, gpu_name), skip, None):
        try:
            p = problem(row["op"], shape, row["implementation"], target)
            inputs, frozen = (
                placed([jax.ShapeDtypeStruct(s, "bfloat16") for s in shapes])
                for shapes in (p.inputs, p.frozen)
            )
            fixed = frozen + placed([jax.ShapeDtypeStruct(a.shape, a.dtype) for a in p.fixed])
            with compile_only.as_device(mesh), compile_only.cudnn_assumed():
                out, pull = jax.eval_shape(with_pull_back(p), inputs, fixed)
            if row["direction"] == "forward":
                compiled, kernels = collecting(p.fn, *inputs, *fixed)
            else:
                compiled, kernels = collecting(lambda pull, d: pull(d), *placed((pull, out)))
            if not kernels and row["implementation"] != "cudnn":
                raise RuntimeError("none of its kernels was seen when it was compiled")
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
    """FLOPs, bytes, visited blocks, and the worst of the kernels' needs."""
    said: dict[str, Any] = {"flops": p.flops[row["direction"]]}
    said["hbm_bytes"] = p.hbm_bytes[row["direction"]]
    if kernels:
        for key in ("registers", "spill_bytes", "smem_bytes"):
            said[key] = max(getattr(k, key) for k in kernels)
        said["mma_instructions"] = min(k.mma_instructions for k in kernels)
        said["mma_kinds"] = "+".join(sorted({kind for k in kernels for kind in k.mma_kinds}))
    if row["implementation"] == "triton":
        said["visited_blocks"] = p.visited(row["direction"])
    return said


def rows_of(args, gpu_name: str) -> Iterator[tuple[dict, Any]]:
    """The rows that the command line asks for, still empty, with their shapes."""
    from jaxrl.perf.provenance import provenance

    made = provenance()
    for op in args.ops or SHAPES:
        for shape, implementation in itertools.product(SHAPES[op], IMPLEMENTATIONS[op]):
            if args.shapes and not any(part in shape.name for part in args.shapes):
                continue
            if args.implementations and implementation not in args.implementations:
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

    inputs, fixed = arrays(p.inputs), arrays(p.frozen, 2) + [jnp.asarray(a) for a in p.fixed]
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

    inputs, frozen, fixed = arrays(p.inputs), arrays(p.frozen, 2), map(jnp.asarray, p.fixed)

    def both(fn, dtype):
        cast = lambda of: [a.astype(dtype) for a in of]  # noqa: E731
        held = [*cast(frozen), *fixed]
        out, pull = jax.vjp(lambda *inputs: fn(*inputs, *held), *cast(inputs))
        cotangent = arrays([out.shape], 1)[0].astype(dtype)
        return [out] if direction == "forward" else pull(cotangent)

    fixed = list(fixed)
    got, exact = (
        jax.jit(both, static_argnums=(0, 1))(fn, dtype)
        for fn, dtype in ((p.fn, jnp.bfloat16), (p.plain, jnp.float32))
    )

    def relative(a, b):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return float(jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel()))

    return max(relative(a, b) for a, b in zip(got, exact, strict=True))


def main() -> None:
    args, names, here = options()
    console = Console(width=None if sys.stdout.isatty() else 140)
    progress = Console(stderr=True)
    statuses = set()
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(replacing(args.json)) if args.json else None
        if args.tune:
            kernel_tuning.tune(args.ops or list(SHAPES))
        status = stack.enter_context(progress.status("compiling"))
        for name in names:
            rows = run_rows(args, name) if name in here else absent(args, name)
            for op, of_op in itertools.groupby(rows, key=lambda row: row["op"]):
                shown = []
                for row in of_op:
                    shown.append(row)
                    statuses.add(row["status"])
                    status.update(f"{name} {op}: {len(shown)} rows")
                    if file:
                        file.write(json.dumps(row) + "\n")
                        file.flush()
                console.print(kernel_table.table(shown))
                for reason in kernel_table.reasons(shown):
                    console.print(reason, markup=False, highlight=False)
    console.print("\n" + kernel_table.LEGEND, highlight=False)
    sys.exit("failed" in statuses)


def options() -> tuple[argparse.Namespace, list[str], list[str]]:
    """(the command line, names of its GPUs, those of them that are here), checked; of a worker it
    does not return."""
    parts = lambda text: list(dict.fromkeys(filter(None, text.split(","))))  # noqa: E731
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, help="file to write the rows to")
    parser.add_argument(
        "--gpus", type=parts, default=[], help="names, by default all, or the one that is here"
    )
    parser.add_argument("--ops", type=parts, default=[], help=f"of {', '.join(SHAPES)}")
    parser.add_argument(
        "--implementations", type=parts, default=[], help="only these: triton,tokamax,cudnn"
    )
    parser.add_argument(
        "--shapes", type=parts, default=[], help="only shapes whose name holds one of these"
    )
    parser.add_argument("--tune", action="store_true", help="on a GPU: tune tiles first")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--skip", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        sys.exit()

    known = dict.fromkeys(i for of_op in IMPLEMENTATIONS.values() for i in of_op)
    for what, given, choices in (
        ("op", args.ops, SHAPES),
        ("implementation", args.implementations, known),
    ):
        if unknown := [name for name in given if name not in choices]:
            parser.error(f"unknown {what} {unknown[0]!r}; one of {', '.join(choices)}")
    ops = args.ops or list(SHAPES)
    names = [shape.name for op in ops for shape in SHAPES[op]]
    for part in args.shapes:
        if not any(part in name for name in names):
            models = dict.fromkeys(shape.model for op in ops for shape in SHAPES[op])
            parser.error(f"no shape's name holds {part!r}; they begin with {', '.join(models)}")
    if not any(True for _ in rows_of(args, "")):
        of_op = "; ".join(f"{op} has {', '.join(IMPLEMENTATIONS[op])}" for op in ops)
        parser.error(f"no rows for these options: {of_op}")
    if args.json and not args.json.absolute().parent.is_dir():
        parser.error(f"--json {args.json}: there is no folder {args.json.parent}; make it first")
    if args.json and args.json.exists() and not args.json.is_file():
        parser.error(f"--json {args.json} is not a file; give it a file's name")

    from jaxrl.perf.hardware import GPUS as KNOWN
    from jaxrl.perf.hardware import gpu, local_gpus

    found = local_gpus()[:1]
    here = [g.name for kind in found for g in KNOWN.values() if kind in g.device_kinds]
    if found and not here:
        parser.error(f"this host's {found[0]} is not in jaxrl.perf.hardware.GPUS; add it there")
    if args.tune and not here:
        parser.error("--tune needs a GPU, and this host has none")
    try:
        gpus = list(dict.fromkeys(gpu(name).name for name in args.gpus))
    except ValueError as error:
        parser.error(str(error))
    return args, gpus or here or list(GPUS), here


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[TextIO]:
    """A file that takes the place of `path` when all of it is written, and not before."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as file:
        yield file
    partial.replace(path)


def work(args) -> None:
    """Write the rows of an absent GPU to stdout, which nothing else in the process writes to."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        for row in compile_rows(args, args.worker, args.skip):
            print(json.dumps(row), file=out, flush=True)


def absent(args, name: str) -> Iterator[dict]:
    """Rows of a GPU that is not here, from a process of its own. Where that dies the row that it
    was at has failed, and another goes on behind it; where it does not even start, all have."""
    left = [row for row, _ in rows_of(args, name)]
    total = len(left)
    while left:
        started = False
        with (
            tempfile.TemporaryFile("w+", errors="replace") as said,
            subprocess.Popen(
                worker(args, name, total - len(left)),
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
            ) as process,
        ):
            assert process.stdout
            for text in process.stdout:
                if started:
                    yield left.pop(0) | json.loads(text)
                started = True
            code = process.wait()
            said.seek(0)
            error = f"its process ended with {why(code, said.read())}"
        lost = 1 if started else len(left)
        for row in left[:lost]:
            yield row | {"status": "failed", "error": error[:200]}
        left = left[lost:]


def worker(args, name: str, skip: int) -> list[str]:
    """The command that compiles for the GPU `name`, all rows but the first `skip`."""
    command = [sys.executable, __file__, "--worker", name, "--skip", str(skip)]
    for option in ("ops", "implementations", "shapes"):
        command += [f"--{option}", ",".join(getattr(args, option))]
    return command


def why(code: int, stderr: str) -> str:
    """What ended a process, and the line that tells more: what C++ says before its trace, or the
    exception that is Python's last word."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    if code >= 0:
        return ": ".join([f"exit code {code}", *lines[-1:]])
    fatal = [line for line in lines if re.match(r"F\d{4} |.*(LLVM ERROR|Check failed)", line)]
    return ": ".join([signal.Signals(-code).name, *fatal[-1:]])


if __name__ == "__main__":
    main()
