"""Two processes with four virtual devices each do what one with eight does, and report once.

Run as a script, this file is one of the two: it trains and, as process 0, writes what came of it.
"""

import json
import os
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from processes import ROOT, explicit, outputs, start
from tiny import relative_error, tiny_batch, tiny_program

from jaxrl.config import ConfigError, OptimizerConfig
from jaxrl.data.fake import fake_batch
from jaxrl.parallel import distributed
from jaxrl.parallel.distributed import Processes, first_host, from_environment
from jaxrl.parallel.mesh import make_mesh

STEPS = 2
SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-09,12]-ib,login1",
    "SLURM_STEP_NUM_NODES": "5",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Processes()),
        (explicit(), Processes("node0:1234", 2, 1)),
        (explicit(address="[fd00::1]:1234"), Processes("[fd00::1]:1234", 2, 1)),
        ({"JAX_NUM_PROCESSES": "1"}, Processes()),
        ({"JOB_COMPLETION_INDEX": "1"}, Processes()),  # a Job of independent benches
        (explicit(index=None) | {"JOB_COMPLETION_INDEX": "1"}, Processes("node0:1234", 2, 1)),
        (SLURM, Processes("gpu07-ib:61442", 5, 3)),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "n:7"}, Processes("n:7", 5, 3)),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, Processes()),
        ({k: v for k, v in SLURM.items() if "STEP" not in k}, Processes()),  # no srun
    ],
)
def test_who_takes_part(environ, expected):
    assert from_environment(environ) == expected


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        (
            explicit(count=None),
            "JAX_COORDINATOR_ADDRESS=node0:1234, JAX_PROCESS_ID=1, but no JAX_NUM_PROCESSES; set "
            "all of JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID, or none",
        ),
        (explicit(None, index=None), "but no JAX_COORDINATOR_ADDRESS and no JAX_PROCESS_ID"),
        (explicit(index=None), "JAX_NUM_PROCESSES=2, but no JAX_PROCESS_ID"),
        (explicit("node0"), "JAX_COORDINATOR_ADDRESS is 'node0'; write process 0's host:port"),
        (explicit("node0:70000"), "JAX_COORDINATOR_ADDRESS is 'node0:70000'; write process 0's"),
        (explicit(count="two"), "JAX_NUM_PROCESSES is 'two'; it takes a whole number from 1"),
        (explicit(index="-1"), "JAX_PROCESS_ID is '-1'; it takes a whole number from 0"),
        (explicit(index="2"), "JAX_PROCESS_ID is 2, and JAX_NUM_PROCESSES 2; processes are number"),
        (SLURM | {"SLURM_STEP_NUM_NODES": "2"}, "srun started 5 tasks on 2 nodes; one process"),
    ],
)
def test_half_set_and_wrong_variables_are_one_line(environ, words):
    with pytest.raises(ConfigError) as error:
        from_environment(environ)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_the_bench_refuses_half_set_variables():
    command = [sys.executable, "-m", "jaxrl.bench", "--config=configs/qwen3_0_6b.py"]
    env = os.environ | explicit(count=None)
    ended = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert "but no JAX_NUM_PROCESSES" in ended.stderr


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node001", "node001"),
        ("node001,host2", "node001"),
        ("node[001-0015],host2", "node001"),
        ("node[001,007-015],host2", "node001"),
        ("rack[2-3]node[05,07]", "rack2node05"),
        ("gpu-a[7]-ib", "gpu-a7-ib"),
    ],
)
def test_the_first_host_of_a_node_list(nodes, host):
    assert first_host(nodes) == host


def test_a_global_batch_is_the_one_that_is_put_there():
    mesh = make_mesh(jax.devices()[:8], expert=2, context=2)
    sharding = NamedSharding(mesh, PartitionSpec(None, ("fsdp", "expert"), "context"))
    whole = np.arange(2 * 8 * 4, dtype=np.int32).reshape(2, 8, 4)
    abstract = jax.ShapeDtypeStruct(whole.shape, whole.dtype, sharding=sharding)
    batch = distributed.global_batch(abstract, lambda rows: whole[:, rows])
    assert batch.sharding == sharding
    for shard in batch.addressable_shards:
        np.testing.assert_array_equal(shard.data, whole[shard.index])
    with pytest.raises(ValueError, match=r"rows 0 to 8 .* an array of shape \(2, 7, 4\) was made"):
        distributed.global_batch(abstract, lambda rows: whole[:, 1:])


def rows_of(*slices):
    """A sharding of which this process's devices hold these rows."""
    indices = {i: (slice(None), s, slice(None)) for i, s in enumerate(slices)}
    return types.SimpleNamespace(addressable_devices_indices_map=lambda shape: indices)


def test_local_rows():
    shape = (2, 8, 16)
    assert distributed.local_rows(shape, rows_of(slice(4, 6), slice(6, 8))) == slice(4, 8)
    assert distributed.local_rows(shape, rows_of(slice(0, 4), slice(0, 4))) == slice(0, 4)
    assert distributed.local_rows(shape, rows_of(slice(None))) == slice(0, 8)
    with pytest.raises(ValueError, match="not one run of them; order the mesh's devices"):
        distributed.local_rows(shape, rows_of(slice(0, 2), slice(4, 6)))


def test_devices_host_by_host():
    devices = [types.SimpleNamespace(process_index=p, id=i) for p, i in ((1, 3), (0, 1), (1, 2))]
    assert [d.id for d in distributed.in_order(devices)] == [1, 2, 3]


@pytest.mark.parametrize("kind", ["rl", "sft"])
def test_a_row_of_fake_data_is_the_same_whoever_makes_it(kind):
    whole = fake_batch(kind, 2, 6, 16, seed=3)
    some = fake_batch(kind, 2, 6, 16, seed=3, only=slice(2, 4))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[:, 2:4], b), whole, some)
    assert whole.tokens.shape == (2, 6, 16) and whole.tokens.max() < 100
    assert len({row.tobytes() for row in np.swapaxes(whole.tokens, 0, 1)}) == 6


def train() -> dict:
    """Metrics of each step and the final parameters of the tiny model on all eight devices."""
    # A large eps: Adam divides no gradient of rounding errors by its own size.
    program = tiny_program(8, optimizer=OptimizerConfig(learning_rate=1e-2, eps=1e-3))
    made = []

    def make(rows: slice):
        made.append(rows)
        return jax.tree.map(lambda a: np.asarray(a)[:, rows], tiny_batch(program))

    batch = distributed.global_batch(program.abstract_batch(), make)
    shares = [jax.local_device_count(), jax.device_count(), made[0].start, made[0].stop]
    state = program.layout.initialize(jax.random.key(0))
    found = {"shares": np.array(shares)}
    for i in range(STEPS):
        state, metrics = program.step(state, batch)
        found |= {f"{name} {i}": np.asarray(metrics[name]) for name in ("loss", "grad_norm")}
    everywhere = NamedSharding(program.layout.mesh, PartitionSpec())
    whole = jax.jit(lambda tree: tree, out_shardings=everywhere)(state.params)
    leaves = jax.tree_util.tree_leaves_with_path(whole)
    return found | {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    cpu = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    processes = start([__file__, str(tmp_path / "{}.npz")], **cpu)
    expected = train()
    ended = outputs(processes)
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert not (tmp_path / "1.npz").exists()
    with np.load(tmp_path / "0.npz") as file:
        found = dict(file)
    assert found.keys() == expected.keys() and len(found) > 10
    # local devices, all devices, first and last of the rows that this process made
    assert found.pop("shares").tolist() == [4, 8, 0, 4]
    assert expected.pop("shares").tolist() == [8, 8, 0, 8]
    assert relative_error(found, expected) < 1e-5  # fp32, summed in another order by gloo


BENCH = """
import functools, sys
from jaxrl import bench, cli
bench.local_gpus = lambda: ["NVIDIA H100 80GB HBM3"] * 2
worker = (sys.executable, "tests/parallel/cpu_worker.py")
cli.run(functools.partial(bench.main, worker_command=worker))
"""


@pytest.mark.slow
def test_the_bench_measures_one_row_over_two_processes(tmp_path):
    row = "rl lora4 128 recompute xla 4xH100"
    options = {"table": row, "mode": "measured", "output": f"{tmp_path}/{{}}", "micro_batches": 1}
    args = [f"--config.{key}={value}" for key, value in options.items()]
    config = "--config=configs/qwen3_0_6b.py"
    (code, out, err), other = outputs(start(["-c", BENCH, config, *args]))
    assert (code, err) == (0, ""), (out, err, other)
    assert other == (0, "", "") and not (tmp_path / "1").exists()
    assert out.startswith("2 hosts, 4xH100: ") and out.splitlines()[-1].startswith("Results: ")
    (result,) = [json.loads(x) for x in (tmp_path / "0/results.jsonl").read_text().splitlines()]
    assert (result["status"], result["mode"], result["num_hosts"]) == ("ok", "measured", 2)
    assert result["host"].startswith("2 hosts, the first: ")
    assert result["tps"] == pytest.approx(4 * 128 / result["step_time_s"])  # a row per GPU
    assert result["attn_compiled"] == "xla" and result["mfu_pct"] > 0


if __name__ == "__main__":
    distributed.initialize()
    result = train()
    if distributed.is_reporter():
        np.savez(sys.argv[1], **result)
