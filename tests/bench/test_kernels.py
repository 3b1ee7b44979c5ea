"""`bench/kernels.py`: what it writes for GPUs that are not here, and what it says to bad input."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxrl_kernels import launch, mosaic_resources
from jaxrl_kernels.grouped_matmul import triton
from rich.console import Console

from jaxrl.ops.registry import Target
from jaxrl.perf import compile_only, hardware

SCRIPT = pathlib.Path(__file__).parents[2] / "bench" / "kernels.py"
KEYS = {
    *("op", "implementation", "gpu", "shape", "direction", "status", "error", "temp_mib"),
    *("registers", "spill_bytes", "smem_bytes", "mma_instructions", "visited_blocks"),
    *("flops", "hbm_bytes"),
}
LORA = "INTELLECT-3 M131072 E128 K4096 N1408 R16"


@pytest.fixture
def bench(monkeypatch):
    """bench/'s modules, on a host without a GPU."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.setattr(hardware, "local_gpus", list)
    import kernel_problems
    import kernel_table

    import kernels

    return types.SimpleNamespace(main=kernels, problems=kernel_problems, table=kernel_table)


def run(*args):
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # as on a host without a GPU
    command = [sys.executable, str(SCRIPT), *args]
    return subprocess.run(command, capture_output=True, text=True, env=env)


def rows_of(file: pathlib.Path, *args) -> tuple[list[dict], str]:
    """What the command wrote to `file`, and what it said."""
    done = run(*args, "--json", str(file))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(set(row) > KEYS for row in rows) and list(file.parent.iterdir()) == [file]
    return rows, done.stdout


def test_the_newest_table_has_every_row_and_ours_spill_nowhere(bench):
    """tests/kernels compiles one kernel of each kind; the table has them all."""
    newest = max(SCRIPT.parent.glob("results/*_kernels_compiled.jsonl"))
    rows = [json.loads(line) for line in newest.read_text().splitlines()]
    everything = types.SimpleNamespace(ops=(), shapes=(), implementations=())
    asked = [row for gpu in bench.main.GPUS for row, _ in bench.main.rows_of(everything, gpu)]
    names = ("op", "implementation", "gpu", "shape", "direction")
    assert [[row[n] for n in names] for row in rows] == [[row[n] for n in names] for row in asked]
    assert {row["status"] for row in rows} == {"compiled", "cannot"}
    smem = {"A6000": 99, "A100": 163, "H100": 227, "H200": 227, "B200": 227}  # KiB per program
    mma = {"A6000": "HMMA", "A100": "HMMA", "H100": "HGMMA", "H200": "HGMMA", "B200": "UTCHMMA"}
    for row in rows:
        if row["implementation"] == "triton":
            assert row["status"] == "compiled" and row["mma_instructions"], row
            assert row["spill_bytes"] == 0 and row["temp_mib"] < 1024, row
            assert row["smem_bytes"] <= smem[row["gpu"]] * 1024, row
            assert mma[row["gpu"]] in row["mma_kinds"].split("+"), row


@pytest.mark.slow
def test_rows_of_a_gpu_that_is_not_here(tmp_path):
    rows, said = rows_of(tmp_path / "rows.jsonl", "--gpus", "a6000", "--shapes", "Qwen3-0.6B")
    seen = {(r["implementation"], r["direction"]): r for r in rows}
    assert [(r["op"], r["gpu"]) for r in rows] == [("attention", "A6000")] * 6
    forward, backward = seen["triton", "forward"], seen["triton", "backward"]
    for row in (forward, backward):
        assert row["status"] == "compiled" and row["error"] is None and row["time_ms"] is None
        assert row["spill_bytes"] == 0 and row["mma_instructions"] > 0 and row["temp_mib"] < 16
        assert row["mma_kinds"] == "HMMA"
    # Two products over the visible pairs forward, five backward.
    pairs = 16384 * 16385 // 2
    assert forward["flops"] == 2 * 2 * 16 * 128 * pairs
    assert backward["flops"] / forward["flops"] == 2.5
    blocks = sum(-(-(i + 128) // 64) for i in range(0, 16384, 128))
    assert forward["visited_blocks"] == 16 * blocks
    assert seen["tokamax", "forward"]["status"] == "cannot"
    assert "needs Hopper or Blackwell" in seen["tokamax", "forward"]["error"]
    cudnn = seen["cudnn", "backward"]
    assert cudnn["status"] == "compiled" and cudnn["registers"] is cudnn["visited_blocks"] is None
    # What is to be moved does not depend on who moves it: q, k, v, out, dout, dq, dk, dv, lse.
    moved = 2 * 16384 * 128 * (4 * 16 + 4 * 8) + 4 * 16384 * 16
    assert cudnn["hbm_bytes"] == backward["hbm_bytes"] == moved
    assert "A6000, attention: compiled" in said and "needs Hopper or Blackwell" in said


@pytest.mark.slow
def test_mosaics_kernels_say_what_they_need_alone_and_beside_tritons(tmp_path):
    options = ("--gpus", "h100", "--implementations", "tokamax", "--shapes", f"Qwen3-0.6B,{LORA}")
    rows, _ = rows_of(tmp_path / "rows.jsonl", *options)
    assert [r["op"] for r in rows] == ["attention"] * 2 + ["grouped_lora_matmul"] * 2
    for row in rows:
        assert row["status"] == "compiled" and row["visited_blocks"] is None
        assert 64 <= row["registers"] <= 255 and row["spill_bytes"] >= 0
        assert 64 * 1024 < row["smem_bytes"] <= 227 * 1024
        assert row["mma_instructions"] > 0 and "HGMMA" in row["mma_kinds"]


WORKER = """
import json, os, signal, sys
skip = int(sys.argv[sys.argv.index("--skip") + 1])
print("{}", flush=True)
for i in range(skip, 6):
    if i in (1, 4):
        said = f"F1128 11:03:22 mosaic.cc:7] Check failed: row {i}\\n*** a trace ***"
        print(said, file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    print(json.dumps({"status": "compiled", "registers": i}), flush=True)
"""


def faked(bench, monkeypatch, code: str, *args) -> int:
    """The exit code of the command whose workers run `code` instead."""
    worker = bench.main.worker

    def command(*args):
        return [sys.executable, "-c", code, *worker(*args)[2:]]

    monkeypatch.setattr(bench.main, "worker", command)
    monkeypatch.setattr(sys, "argv", ["kernels.py", *args])
    with pytest.raises(SystemExit) as exit:
        bench.main.main()
    return int(exit.value.code or 0)


def test_a_worker_that_dies_costs_its_row_only(bench, monkeypatch, tmp_path, capfd):
    file = tmp_path / "rows.jsonl"
    options = ("--gpus", "B200", "--shapes", "Qwen3-0.6B", "--json", str(file))
    assert faked(bench, monkeypatch, WORKER, *options) == 1
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["registers"] for row in rows] == [0, None, 2, 3, None, 5]
    named = [(r["op"], r["implementation"], r["gpu"], r["direction"]) for r in rows]
    both = ("forward", "backward")
    implementations = ("triton", "tokamax", "cudnn")
    assert named == [("attention", i, "B200", d) for i in implementations for d in both]
    assert len({row["shape"] for row in rows}) == 1
    for i in (1, 4):
        said = f"F1128 11:03:22 mosaic.cc:7] Check failed: row {i}"
        assert rows[i]["error"] == f"its process ended with SIGKILL: {said}"
        assert rows[i]["status"] == "failed" and set(rows[i]) > KEYS
    out = capfd.readouterr().out
    assert "B200, attention: compiled and failed" in out
    assert "triton failed, 1 rows: its process ended with SIGKILL" in out


def test_where_no_worker_starts_all_rows_have_failed(bench, monkeypatch, tmp_path):
    file, count = tmp_path / "rows.jsonl", tmp_path / "count"
    code = f"open({str(count)!r}, 'a').write('x'); raise ModuleNotFoundError('needs jaxrl[plan]')"
    options = ("--gpus", "B200", "--ops", "grouped_swiglu", "--json", str(file))
    assert faked(bench, monkeypatch, code, *options) == 1
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    error = "its process ended with exit code 1: ModuleNotFoundError: needs jaxrl[plan]"
    assert [row["error"] for row in rows] == [error] * 12
    assert count.read_text() == "x"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (
            ("--ops", "attention,foo"),
            "unknown op 'foo'; one of attention, grouped_matmul, grouped_lora_matmul, "
            "grouped_swiglu",
        ),
        (
            ("--implementations", "foo"),
            "unknown implementation 'foo'; one of triton, tokamax, cudnn",
        ),
        (
            ("--ops", "grouped_swiglu", "--shapes", "Qwen3,nothing"),
            "no shape's name holds 'nothing'; they begin with Qwen3-30B-A3B, Qwen3-235B-A22B, "
            "INTELLECT-3",
        ),
        (
            ("--ops", "grouped_matmul", "--implementations", "cudnn"),
            "no rows for these options: grouped_matmul has triton, tokamax",
        ),
        (("--gpus", "H300"), "unknown GPU 'H300'; did you mean H200 or H100?"),
        (("--tune",), "--tune needs a GPU, and this host has none"),
    ],
)
def test_bad_options_say_so_and_leave_the_file(bench, monkeypatch, tmp_path, capfd, args, said):
    file = tmp_path / "rows.jsonl"
    file.write_text("of yesterday")
    assert faked(bench, monkeypatch, "", *args, "--json", str(file)) == 2
    assert said in capfd.readouterr().err.splitlines()[-1]
    assert file.read_text() == "of yesterday" and list(tmp_path.iterdir()) == [file]


def test_a_file_that_cannot_be_written_is_one_line(bench, monkeypatch, tmp_path, capfd):
    for path, said in (
        (tmp_path / "no" / "rows.jsonl", f"there is no folder {tmp_path / 'no'}; make it first"),
        (tmp_path, "is not a file; give it a file's name"),
    ):
        assert faked(bench, monkeypatch, "", "--json", str(path)) == 2
        assert capfd.readouterr().err.splitlines()[-1].endswith(said)


def test_an_older_file_stays_until_all_rows_are_there(bench, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("of yesterday")
    with pytest.raises(KeyboardInterrupt), bench.main.replacing(file) as written:
        written.write("half")
        raise KeyboardInterrupt
    assert file.read_text() == "of yesterday"
    with bench.main.replacing(file) as written:
        written.write("all")
    assert file.read_text() == "all" and list(tmp_path.iterdir()) == [file]


def test_shapes_can_be_asked_for_by_name(bench):
    for shapes in bench.problems.SHAPES.values():
        names = [shape.name for shape in shapes]
        assert len(set(names)) == len(names)
        assert not any("," in name for name in names)  # which separates them


def collected(fn) -> list[str]:
    """Names of the kernels of `fn(x, w, sizes)`, compiled for an A6000."""
    devices = compile_only.topology("A6000", 1)
    mesh = Mesh(np.array(devices), ("fsdp",), axis_types=(AxisType.Auto,))
    here = NamedSharding(mesh, PartitionSpec())
    shapes = (((64, 32), "bfloat16"), ((2, 32, 16), "bfloat16"), ((2,), "int32"))
    args = [jax.ShapeDtypeStruct(s, jnp.dtype(d), sharding=here) for s, d in shapes]
    with compile_only.as_device(mesh), launch.collect() as kernels:
        jax.jit(lambda *args: fn(*args)).lower(*args)
    assert all(kernel.ptx for kernel in kernels)
    return [kernel.name for kernel in kernels]


def test_kernels_are_collected_once_each_and_also_if_compiled_before():
    product = functools.partial(triton.grouped_matmul, capability=86)
    for _ in range(2):
        assert collected(lambda *args: product(*args) + product(*args)) == ["rows_kernel"]

    def gradient_of_rows(x, w, sizes):  # the other one is made, and thrown away
        return jax.vjp(lambda x: product(x, w, sizes), x)[1](jnp.ones((64, 16), x.dtype))

    assert collected(gradient_of_rows) == ["rows_kernel"]


DUMP = {
    ".ptxas": "ptxas warning : Registers are spilled to local memory in function 'k', 80 bytes "
    "spill stores, 96 bytes spill loads\nptxas info    : Function properties for k\n"
    "    88 bytes stack frame, 80 bytes spill stores, 96 bytes spill loads\n"
    "ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem\n",
    ".resources.txt": "Resources(smem_scratch_bytes=197632, tmem_scratch_cols=0, "
    "tmem_collective_scratch_cols=512, barrier_counts=Counter({Barrier(arrival_count=1, "
    "num_barriers=2, orders_tensor_core=True): 4, ClusterBarrier(collective_dims=("
    "<Dimension.x: 0>,), arrival_count=1, num_barriers=2, orders_tensor_core=True, "
    "leader_tracked=False): 2}), scoped_gmem_semaphores={})",
    ".ptx": "mbarrier.init.shared.b64 [%r1], 2;\natom.global.add.u32 %r2, [%rd1], 1;\n",
    ".sass_ctrl": "/*0000*/ UTCHMMA.2CTA gdesc[UR4]\n/*0010*/ R2UR R1\n/*0020*/ UTCHMMA gdesc\n",
}


def test_what_mosaic_says_of_a_kernel(tmp_path):
    for suffix, text in DUMP.items():
        (tmp_path / f"k{suffix}").write_text(text)
    found = mosaic_resources.resources(tmp_path / "k.ptxas")
    assert (found.registers, found.spill_bytes) == (168, 80 + 96)
    # As its launch asks for: 12 barriers of 8 bytes and a pointer of 4 more than the scratch.
    assert found.smem_bytes == 197732
    assert (found.mma_instructions, found.mma_kinds) == (2, ("UTCHMMA",))
    assert found.global_atomics == ("atom.global.add.u32",)
    (tmp_path / "k.sass_ctrl").unlink()
    with pytest.raises(RuntimeError, match="dump of k lacks registers, spills"):
        mosaic_resources.resources(tmp_path / "k.ptxas")


@pytest.mark.parametrize("before", [None, "/mine"])
def test_the_dump_is_off_again_afterwards(monkeypatch, before):
    monkeypatch.delenv("MOSAIC_GPU_DUMP_TO", raising=False)
    if before:
        monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", before)
    with mosaic_resources.collect() as found:
        folder = os.environ["MOSAIC_GPU_DUMP_TO"]
        assert folder != before and pathlib.Path(folder).is_dir()
    assert found == [] and os.environ.get("MOSAIC_GPU_DUMP_TO") == before
    assert not pathlib.Path(folder).exists()


@pytest.mark.parametrize("op", ["grouped_matmul", "grouped_lora_matmul", "grouped_swiglu"])
def test_grouped_problems(bench, op):
    M, E, K, N, R = 64, 4, 32, 16, 8
    shape = bench.problems.Grouped("tiny", (K, N), K, N, R * ("lora" in op), M, E)
    p = bench.problems.problem(op, shape, "xla", Target("cpu"))
    assert bench.main.error_of(p, "backward") < 2e-2
    call, args = bench.main.runnable(p, "forward")
    assert call(*args).shape == (M, N)
    product, low_rank = 2 * M * K * N, 2 * M * R * (K + N)
    x, y, w, ab = 2 * M * K, 2 * M * N, 2 * E * K * N, 2 * E * R * (K + N)
    flops, moved = {
        "grouped_matmul": ((1, 2), (x + y + w, 2 * x + y + 2 * w)),
        "grouped_swiglu": ((2, 4), (x + y + 2 * w, 2 * x + 3 * y + 4 * w)),
        # The experts do not train.
        "grouped_lora_matmul": ((1, 1), (x + y + w + ab, 2 * x + y + w + 2 * ab)),
    }[op]
    extra = (low_rank, 2 * low_rank) if "lora" in op else (0, 0)
    assert tuple(p.flops.values()) == tuple(
        n * product + e for n, e in zip(flops, extra, strict=True)
    )
    assert tuple(p.hbm_bytes.values()) == moved


def test_an_adapters_products_are_those_of_its_experts(bench):
    """Rank 16 is too narrow for tokamax's Mosaic kernels, and a layer runs Triton's for it."""
    narrow = next(s for s in bench.problems.SHAPES["grouped_matmul"] if s.N == 16)
    target = Target("gpu", "NVIDIA H100 80GB HBM3", 90)
    assert bench.problems.problem("grouped_matmul", narrow, "tokamax", target).fn
    alone = dataclasses.replace(narrow, features=(narrow.K, narrow.N))
    with pytest.raises(bench.problems.Cannot, match="features in steps of 64"):
        bench.problems.problem("grouped_matmul", alone, "tokamax", target)


def test_the_table_is_side_by_side_and_fits(bench):
    said = {"status": "compiled", "temp_mib": 514.2, "registers": 255, "spill_bytes": 0}
    said |= {"smem_bytes": 163840, "mma_instructions": 24, "mma_kinds": "HGMMA"}
    of = {
        "triton": said,
        "tokamax": said | {"spill_bytes": 176},
        "cudnn": {"status": "cannot", "error": "has no packed documents"},
    }
    shapes = bench.problems.SHAPES["attention"]
    rows = [
        bench.main.RESULT
        | {"op": "attention", "gpu": "H100", "implementation": i, "shape": s.name, "direction": d}
        | of[i]
        for s in shapes
        for i in of
        for d in ("forward", "backward")
    ]
    console = Console(width=120)
    with console.capture() as captured:
        console.print(bench.table.table(rows))
    lines = captured.get().splitlines()
    body = [line for line in lines if "255" in line]
    assert len(body) == 2 * len(shapes)
    for line in body:
        assert line.count("24 HGMMA") == 2 and "176" in line and "160" in line and "cannot" in line
    assert not any("ms" in line.split() for line in lines)  # nothing was measured
    assert bench.table.reasons(rows) == [f"cudnn cannot, {len(body)} rows: has no packed documents"]

    measured = rows[0] | {"status": "measured", "time_ms": 4.69, "tflops": 469.0}
    with console.capture() as captured:
        console.print(bench.table.table([measured]))
    text = captured.get()
    assert "4.69" in text and "469" in text and "TFLOP/s" in text
