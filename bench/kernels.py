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
import dataclasses
import functools
import itertools
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

GPUS = ("A6000", "A100", "H100", "H200", "B200")


@dataclasses.dataclass(frozen=True)
class Attention:
    """One row of attention; `docs`: lengths of packed documents, or one document."""

    model: str
    T: int
    N: int
    K: int
    H: int
    docs: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        packed = f" {len(self.docs)} documents" if self.docs else ""
        return f"{self.model} B1 T{self.T} N{self.N} K{self.K} H{self.H}{packed}"


@dataclasses.dataclass(frozen=True)
class Grouped:
    """One product of a MoE layer: M rows over E experts of K x N, evenly."""

    model: str
    M: int
    E: int
    K: int
    N: int

    @property
    def name(self) -> str:
        return f"{self.model} M{self.M} E{self.E} K{self.K} N{self.N}"


# Documents as they come in chats: a few long ones, many short ones.
MIXED = (4096, 37, 512, 1900, 255, 3000, 1, 1100, 640, 2048, 75, 1024, 1696)
SHAPES: dict[str, list] = {
    "attention": [
        Attention("Qwen3-0.6B", 16384, 16, 8, 128),
        Attention("Qwen3-4B, Llama-3.1-8B", 16384, 32, 8, 128),
        Attention("Qwen3-4B, Llama-3.1-8B", 16384, 32, 8, 128, MIXED),
        Attention("Qwen3-4B, Llama-3.1-8B", 65536, 32, 8, 128),
        Attention("Qwen3-30B-A3B", 16384, 32, 4, 128),
        Attention("Qwen3-235B-A22B", 16384, 64, 4, 128),
        Attention("INTELLECT-3", 16384, 96, 8, 128),
        Attention("Llama-3.2-1B", 16384, 32, 8, 64),
        Attention("Llama-3.2-1B", 16384, 32, 8, 64, MIXED),
        Attention("Llama-3.2-3B", 16384, 24, 8, 128),
    ],
    "grouped_matmul": [
        Grouped("Qwen3-30B-A3B", 131072, 128, 2048, 768),
        Grouped("Qwen3-30B-A3B", 131072, 128, 768, 2048),
        Grouped("Qwen3-30B-A3B LoRA", 131072, 128, 2048, 16),
        Grouped("Qwen3-30B-A3B LoRA", 131072, 128, 16, 768),
        Grouped("Qwen3-235B-A22B", 131072, 128, 4096, 1536),
        Grouped("INTELLECT-3", 131072, 128, 4096, 1408),
    ],
}
assert sum(MIXED) == 16384
IMPLEMENTATIONS = {
    "attention": ("triton", "tokamax", "cudnn"),
    "grouped_matmul": ("triton", "tokamax"),
}
RESULT = dict.fromkeys(
    (
        *("op", "implementation", "gpu", "shape", "direction", "status", "error", "temp_mib"),
        *("registers", "spill_bytes", "smem_bytes", "mma_instructions", "visited_blocks"),
        *("flops", "hbm_bytes", "time_ms", "tflops", "share_of_peak", "max_relative_error"),
        *("versions", "date"),
    )
)


# --- what is run -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Problem:
    """fn(*inputs, *fixed) is differentiated in its inputs; `small`: a shape for the error."""

    fn: Callable
    plain: Callable
    inputs: list[tuple]
    fixed: list[Any]
    flops: dict[str, int]
    hbm_bytes: dict[str, int]
    visited: Callable[[Any], int] | None = None


def problem(op: str, shape, implementation: str, target) -> Problem:
    return {"attention": _attention, "grouped_matmul": _grouped}[op](shape, implementation, target)


def _attention(shape: Attention, implementation: str, target) -> Problem:
    import jax.numpy as jnp
    import numpy as np
    from jaxrl_kernels.flash_attention import cost, reference

    from jaxrl.ops.attention import ATTENTION

    T, N, K, H = shape.T, shape.N, shape.K, shape.H
    docs = shape.docs or (T,)
    ids = np.repeat(np.arange(len(docs), dtype=np.int32), docs)[None] if shape.docs else None
    case = {"dtype": jnp.bfloat16, "head_dim": H, "packed": ids is not None, "seq_len": T}
    _, fn = ATTENTION.resolve(implementation, target, **case)
    parts = {"forward": ("forward",), "backward": ("dq", "dkv")}
    moved = lambda w: cost.bytes_accessed(w, 1, T, N, K, H, 2)  # noqa: E731
    # What the mathematics needs: backward's five products, however a kernel arranges them.
    pairs = 2 * N * H * cost.pairs(docs)
    return Problem(
        fn=lambda q, k, v, *ids: fn(q, k, v, *ids),
        plain=lambda q, k, v, *ids: reference.flash_attention(
            q, k, v, segment_ids=ids[0] if ids else None
        ),
        inputs=[(1, T, N, H), (1, T, K, H), (1, T, K, H)],
        fixed=[] if ids is None else [ids],
        flops={"forward": 2 * pairs, "backward": 5 * pairs},
        hbm_bytes={d: sum(map(moved, ws)) for d, ws in parts.items()},
        visited=lambda tile: N * cost.visited_blocks(docs, tile.block_q, tile.block_k),
    )


def _grouped(shape: Grouped, implementation: str, target) -> Problem:
    import numpy as np
    from jaxrl_kernels.grouped_matmul import reference, triton

    from jaxrl.ops import tokamax_kernels

    M, E, K, N = shape.M, shape.E, shape.K, shape.N
    if implementation == "triton":
        fn = lambda x, w, sizes: triton.grouped_matmul(  # noqa: E731
            x, w, sizes, gpu=target.gpu, capability=target.capability
        )
    else:
        fn = tokamax_kernels.ragged_dot
    # Uneven as a router is: drawn once, the same everywhere.
    share = np.random.default_rng(0).dirichlet(np.full(E, 8.0))
    sizes = np.floor(share * M).astype(np.int32)
    sizes[0] += M - sizes.sum()
    product = 2 * M * K * N
    return Problem(
        fn=fn,
        plain=reference.grouped_matmul,
        inputs=[(M, K), (E, K, N)],
        fixed=[sizes],
        flops={"forward": product, "backward": 2 * product},
        hbm_bytes={
            "forward": 2 * (M * K + E * K * N + M * N),
            "backward": 2 * (2 * M * K + 2 * E * K * N + 2 * M * N),
        },
    )


def small(op: str, shape):
    """The same heads or widths, few enough rows for the plain implementation."""
    if op == "attention":
        docs, left = [], 2048
        for n in shape.docs:
            docs.append(min(n, left))
            left -= docs[-1]
            if not left:
                break
        return dataclasses.replace(shape, T=2048, docs=tuple(docs))
    return dataclasses.replace(shape, M=2048, E=8)


# --- compiling ---------------------------------------------------------------------------------


def compile_rows(args, gpu_name: str) -> Iterator[dict]:
    """Rows of one absent GPU."""
    from jaxrl.perf import compile_only

    devices = compile_only.topology(gpu_name, 1)

    import jax
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
    from jaxrl_kernels import resources

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
            resources.collect() as kernels,
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
            row |= facts(p, row, shape, target, kernels)
            row["temp_mib"] = compile_only.memory(compiled).temp / 2**20
            row["status"] = "compiled"
        except Exception as error:
            row |= failed(error)
        yield row


def with_pull_back(p: Problem):
    """(inputs, fixed) -> (out, pull-back)."""
    import jax

    return lambda inputs, fixed: jax.vjp(lambda *inputs: p.fn(*inputs, *fixed), *inputs)


def facts(p: Problem, row: dict, shape, target, kernels) -> dict:
    """FLOPs, bytes, and the worst of the Triton kernels' needs."""
    from jaxrl_kernels import tiles

    said: dict[str, Any] = {"flops": p.flops[row["direction"]]}
    said["hbm_bytes"] = p.hbm_bytes[row["direction"]]
    if kernels:
        for key in ("registers", "spill_bytes", "smem_bytes"):
            said[key] = max(getattr(k, key) for k in kernels)
        said["mma_instructions"] = min(k.mma_instructions for k in kernels)
    if row["implementation"] == "triton" and p.visited:
        passes = ("forward",) if row["direction"] == "forward" else ("dq", "dkv")
        of = lambda w: tiles.attention(  # noqa: E731
            w, target.gpu, target.capability, "bfloat16", shape.H, shape.T, shape.N
        )
        said["visited_blocks"] = sum(p.visited(of(w)) for w in passes)
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
                yield row | {"versions": made["versions"], "date": made["date"]}, shape


def failed(error: Exception) -> dict:
    text = " ".join(str(error).split())
    if not isinstance(error, ValueError):
        text = f"{type(error).__name__}: {text}"
    # An implementation that does not take a case says so in a ValueError of its own.
    return {"status": "cannot" if isinstance(error, ValueError) else "failed", "error": text[:200]}


# --- running -----------------------------------------------------------------------------------


def run_rows(args, gpu_name: str) -> Iterator[dict]:
    """Rows of the GPU that is here: compiled side by side, then compared and timed one by one."""
    from jaxrl.ops.registry import Target
    from jaxrl.perf.hardware import gpu

    target, peak = Target.here(), gpu(gpu_name).bf16_flops
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        prepared = list(pool.map(lambda item: prepare(*item, target), rows_of(args, gpu_name)))
    for row, timing in prepared:
        if timing is not None:
            try:
                seconds = timed(*timing)
                row["time_ms"] = 1e3 * seconds
                row["tflops"] = row["flops"] / seconds / 1e12
                row["share_of_peak"] = row["flops"] / seconds / peak
                row["status"] = "measured"
            except Exception as error:
                row |= failed(error)
        yield row


def prepare(row: dict, shape, target) -> tuple[dict, tuple | None]:
    """(the row with all but its time, what to time)."""
    from jaxrl.perf.compile_only import memory

    try:
        p = problem(row["op"], shape, row["implementation"], target)
        call, args = runnable(p, row["direction"])
        tiny = problem(row["op"], small(row["op"], shape), row["implementation"], target)
        row |= facts(p, row, shape, target, [])
        row["temp_mib"] = memory(call).temp / 2**20
        row["max_relative_error"] = error_of(tiny, row["direction"])
        return row, (call, args)
    except Exception as error:
        return row | failed(error), None


def arrays(shapes, seed=0):
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes, strict=True)]


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


def timed(call, args, *, rounds: int = 7) -> float:
    """Seconds per launch: median over rounds, each long enough to hide the launch itself."""
    import jax

    jax.block_until_ready(call(*args))
    start = time.perf_counter()
    jax.block_until_ready(call(*args))
    launches = max(2, min(50, int(0.05 / (time.perf_counter() - start))))
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(launches):
            result = call(*args)
        jax.block_until_ready(result)
        seconds.append((time.perf_counter() - start) / launches)
    return statistics.median(seconds)


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


# --- tuning ------------------------------------------------------------------------------------

# Of attention, for bf16: (block_q, block_k, warps, stages); none spills on Hopper.
ATTENTION_TILES = {
    ("forward", 128): [(128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3)],
    ("dq", 128): [(64, 64, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3), (64, 128, 8, 2)],
    ("dkv", 128): [(64, 64, 8, 2), (32, 128, 8, 2), (32, 64, 4, 2), (64, 32, 4, 2)],
    ("forward", 64): [(128, 64, 8, 3), (128, 128, 8, 2), (128, 64, 4, 3), (64, 64, 4, 3)],
    ("dq", 64): [(64, 64, 4, 2), (128, 64, 4, 3), (128, 128, 8, 2), (64, 128, 4, 2)],
    ("dkv", 64): [(64, 128, 8, 2), (64, 64, 8, 3), (64, 64, 4, 2), (32, 128, 8, 2)],
}
# Of grouped products: (block_m, block_n, block_k, warps, stages, band).
GROUPED_TILES = {
    "forward": [
        *((128, 256, 64, 8, 3, 8), (128, 128, 64, 8, 3, 8), (128, 128, 64, 4, 4, 8)),
        *((128, 256, 64, 8, 4, 8), (256, 128, 64, 8, 3, 8), (128, 256, 64, 8, 3, 4)),
    ],
    "dw": [
        *((64, 256, 128, 8, 3, 8), (64, 128, 128, 8, 3, 8), (64, 128, 256, 8, 3, 8)),
        *((64, 128, 128, 4, 4, 8), (128, 128, 128, 8, 2, 8)),
    ],
}


def tune(ops: list[str]) -> None:
    """Time the tiles of each kernel here and keep the fastest in `tiles.json`.

    All are compiled first, side by side, and timed after that, one by one.
    """
    from jaxrl_kernels import tiles

    from jaxrl.ops.registry import Target

    target = Target.here()
    trials = []
    if "attention" in ops:
        for (which, H), candidates in ATTENTION_TILES.items():
            key = tiles.attention_key(which, target.gpu, "bfloat16", H)
            kernel = functools.partial(attention_kernel, which, H, target)
            trials += [(key, tiles.Tile(*c), kernel) for c in candidates]
    if "grouped_matmul" in ops:
        for which, same in (("forward", "forward"), ("dx", "forward"), ("dw", "dw")):
            key = tiles.grouped_matmul_key(which, target.gpu, "bfloat16", 2048, 768)
            kernel = functools.partial(grouped_kernel, which, target)
            trials += [(key, tiles.GroupedTile(*c), kernel) for c in GROUPED_TILES[same]]

    def compiled(trial):
        key, tile, kernel = trial
        try:
            with tiles.trying(key, tile):
                return kernel()
        except Exception as error:
            print(f"{key} {tile}: {str(error)[:100]}", file=sys.stderr)

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        calls = list(pool.map(compiled, trials))
    times: dict[str, list] = {}
    for (key, tile, _), call in zip(trials, calls, strict=True):
        if call is not None:
            times.setdefault(key, []).append((timed(*call, rounds=3), tile))
    for of_key in times.values():
        of_key.sort(key=lambda pair: pair[0])
    for key, of_key in times.items():
        said = "; ".join(
            f"{dataclasses.astuple(tile)} {1e3 * seconds:.3f} ms" for seconds, tile in of_key
        )
        print(f"{key}: {said}", file=sys.stderr)
    tiles.save({key: dataclasses.asdict(of_key[0][1]) for key, of_key in times.items()})


def attention_kernel(which: str, H: int, target):
    """(compiled kernel, arguments) at T 16384, N 16, K 8."""
    import jax
    import jax.numpy as jnp
    from jaxrl_kernels.flash_attention import triton

    T, N, K = 16384, 16, 8
    static = triton._Static(H**-0.5, True, False, target.gpu, target.capability)
    q, k, v, dout = arrays([(1, T, N, H), (1, T, K, H), (1, T, K, H), (1, T, N, H)])
    rows = jnp.full((1, N, T), 10.0)
    kernel, args = {
        "forward": (triton.forward, (q, k, v, None, None)),
        "dq": (triton.backward_dq, (q, k, v, None, None, dout, rows, rows)),
        "dkv": (triton.backward_dkv, (q, k, v, None, None, dout, rows, rows)),
    }[which]
    return jax.jit(lambda *args: kernel(static, *args)).lower(*args).compile(), args


def grouped_kernel(which: str, target):
    """(compiled kernel, arguments) at Qwen3-30B-A3B's shapes."""
    import jax
    import jax.numpy as jnp
    from jaxrl_kernels.grouped_matmul import triton

    shape = SHAPES["grouped_matmul"][0]
    M, E, K, N = shape.M, shape.E, shape.K, shape.N
    static = triton._Static(target.gpu, target.capability)
    sizes = jnp.full(E, M // E, jnp.int32)
    x, w, dy = arrays([(M, K), (E, K, N), (M, N)])
    call, args = {
        "forward": (
            lambda x, w, s: triton.rows_product(static, "forward", [(x, w)], s),
            (x, w, sizes),
        ),
        "dx": (
            lambda dy, w, s: triton.rows_product(static, "dx", [(dy, w)], s),
            (dy, w, sizes),
        ),
        "dw": (
            lambda x, dy, s: triton.weights_gradient(static, x, dy, s, jnp.float32),
            (x, dy, sizes),
        ),
    }[which]
    return jax.jit(call).lower(*args).compile(), args


# --- command line ------------------------------------------------------------------------------


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
    from jaxrl.perf.hardware import gpu, local_gpus

    here = local_gpus()
    names = args.gpus.split(",") if args.gpus else [gpu(here[0]).name] if here else list(GPUS)
    rows = []
    for name in names:
        if here and gpu(here[0]).name == name:
            if args.tune:
                tune(args.ops.split(","))
            source = run_rows(args, name)
        else:
            source = absent(args, name)
        for row in source:
            rows.append(row)
            print(line(row), flush=True)
    if args.json:
        args.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sys.exit(any(row["status"] == "failed" for row in rows))


def absent(args, name: str) -> Iterator[dict]:
    command = [sys.executable, __file__, "--worker", name]
    for option in ("ops", "implementations", "shapes"):
        command += [f"--{option}", getattr(args, option)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for text in process.stdout:
            yield json.loads(text)
    if process.returncode:
        sys.exit(f"the process that compiles for {name} ended with {process.returncode}")


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
