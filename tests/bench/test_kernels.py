"""`bench/kernels.py`: what it writes for a GPU that is not here, and what it says to bad input."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = str(pathlib.Path(__file__).parents[2] / "bench" / "kernels.py")
KEYS = {
    *("op", "implementation", "gpu", "shape", "direction", "status", "error", "temp_mib"),
    *("registers", "spill_bytes", "smem_bytes", "mma_instructions", "visited_blocks"),
    *("flops", "hbm_bytes"),
}


def run(*args):
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # as on a host without a GPU
    return subprocess.run([sys.executable, SCRIPT, *args], capture_output=True, text=True, env=env)


@pytest.mark.slow
def test_rows_of_a_gpu_that_is_not_here(tmp_path):
    file = tmp_path / "rows.jsonl"
    done = run("--gpus", "a6000", "--shapes", "Qwen3-0.6B", "--json", str(file))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(set(row) > KEYS for row in rows)
    seen = {(r["implementation"], r["direction"]): r for r in rows}
    assert [(r["op"], r["gpu"]) for r in rows] == [("attention", "A6000")] * 6
    forward, backward = seen["triton", "forward"], seen["triton", "backward"]
    for row in (forward, backward):
        assert row["status"] == "compiled" and row["error"] is None and row["time_ms"] is None
        assert row["spill_bytes"] == 0 and row["mma_instructions"] > 0 and row["temp_mib"] < 16
    # Two products over the visible pairs forward, five backward.
    pairs = 16384 * 16385 // 2
    assert forward["flops"] == 2 * 2 * 16 * 128 * pairs
    assert backward["flops"] / forward["flops"] == 2.5
    blocks = sum(-(-(i + 128) // 64) for i in range(0, 16384, 128))
    assert forward["visited_blocks"] == 16 * blocks
    assert seen["tokamax", "forward"]["status"] == "cannot"
    assert "needs Hopper or Blackwell" in seen["tokamax", "forward"]["error"]
    assert seen["cudnn", "backward"]["status"] == "compiled"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--ops", "attention,foo"), "unknown op 'foo'; one of attention, grouped_matmul"),
        (("--gpus", "H300"), "unknown GPU 'H300'; did you mean H200 or H100?"),
        (("--tune",), "--tune needs a GPU, and this host has none"),
    ],
)
def test_bad_input(args, said):
    done = run(*args)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
