"""Host memory while a checkpoint is loaded and saved, and loading onto several devices.

The measuring runs in processes of their own (this file as a script), with virtual CPU devices.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from jaxrl import load_pretrained, save_pretrained
from jaxrl.models.config import ModelConfig
from jaxrl.models.hf import hf_names
from jaxrl.models.hf_config import config_json
from jaxrl.models.params import specs
from jaxrl.models.safetensors_folder import Pending, write_json, write_tensors
from jaxrl.models.transformer import Transformer
from jaxrl.parallel.mesh import make_mesh

# 14 layers of 7 equally large matrices: 207 MB in bf16, the largest parameter 1/7 of it.
DENSE = ModelConfig(
    name="wide",
    architecture="LlamaForCausalLM",
    vocab_size=512,
    hidden_size=1024,
    num_layers=14,
    num_heads=16,
    num_kv_heads=16,
    head_dim=64,
    intermediate_size=1024,
    rope_theta=1e4,
    tie_embeddings=True,
)
# 3 layers of 16 experts: 193 MB in bf16, a third of it in each of 3 parameters.
SPARSE = ModelConfig(
    name="experts",
    architecture="Qwen3MoeForCausalLM",
    vocab_size=512,
    hidden_size=1024,
    num_layers=3,
    num_heads=8,
    num_kv_heads=8,
    head_dim=8,
    intermediate_size=1024,
    rope_theta=1e4,
    qk_norm=True,
    num_experts=16,
    num_experts_per_tok=2,
    moe_intermediate_size=640,
)
SHARD = 40_000_000


def write_checkpoint(config: ModelConfig, folder: Path) -> None:
    def tensor(seed, shape):
        values = np.random.default_rng(seed).integers(-100, 100, shape, np.int8)
        return values.astype(ml_dtypes.bfloat16)

    tensors = []
    for spec in specs(Transformer(config)).values():
        for name, index in hf_names(spec):
            shape = spec.shape[len(index) :]
            shape = shape[::-1] if spec.hf_transposed else shape
            seed, nbytes = len(tensors), 2 * int(np.prod(shape))
            tensors.append(Pending(name, nbytes, lambda a=seed, b=shape: tensor(a, b)))
    folder.mkdir()
    write_tensors(folder, tensors, max_shard_bytes=SHARD)
    write_json(folder / "config.json", config_json(config, jnp.bfloat16, {}))


def memory_of(action):
    """(what `action` returns, by how many bytes the process grew at most while it ran)."""

    def status(key):
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if key in x)
        return 1024 * int(line.split()[1])

    Path("/proc/self/clear_refs").write_text("5")  # restarts the high-water mark
    before = status("VmRSS")
    result = action()
    return result, status("VmHWM") - before


def memory_of_saving(model, folder: Path) -> int:
    """Of a second time: the first one also compiles, or reads what others have compiled."""
    save_pretrained(model, folder.with_name("first"), max_shard_bytes=SHARD)
    return memory_of(lambda: save_pretrained(model, folder, max_shard_bytes=SHARD))[1]


def parameters(model) -> list[jax.Array]:
    return [v.get_value() for _, v in nnx.to_flat_state(nnx.state(model))]


def same(a, b) -> bool:
    pairs = zip(parameters(a), parameters(b), strict=True)
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)


def measure_dense(folder: Path) -> dict:
    model, loading = memory_of(lambda: load_pretrained(folder))
    saving = memory_of_saving(model, folder / "saved")
    sharded = load_pretrained(folder, mesh=make_mesh(jax.devices()[:4]))
    q = sharded.layers.attention.q.kernel.get_value()
    return {
        "bytes": sum(p.nbytes for p in parameters(model)),
        "loading": loading,
        "saving": saving,
        "saved_shards": len(list((folder / "saved").glob("*.safetensors"))),
        "same": same(model, sharded),
        "q_shard": q.addressable_shards[0].data.shape,
    }


def measure_experts(folder: Path) -> dict:
    mesh = make_mesh(jax.devices(), expert=8)
    model, loading = memory_of(lambda: load_pretrained(folder, mesh=mesh))
    saving = memory_of_saving(model, folder / "saved")
    up = model.layers.mlp.experts.up.kernel.get_value()
    return {
        "bytes": sum(p.nbytes for p in parameters(model)),
        "parameter": up.nbytes,
        "loading": loading,
        "saving": saving,
        "saved_shards": len(list((folder / "saved").glob("*.safetensors"))),
        "same": same(model, load_pretrained(folder / "saved")),
        "shard": up.addressable_shards[0].data.shape,
    }


def report_of(kind: str, config: ModelConfig, tmp_path_factory) -> dict:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("reads the peak memory from Linux's /proc")
    folder = tmp_path_factory.mktemp("memory") / kind
    write_checkpoint(config, folder)
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    env["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    # glibc keeps freed arrays for later ones, as it comes, unless large ones are mapped.
    env["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
    done = subprocess.run(
        [sys.executable, __file__, kind, str(folder)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    shutil.rmtree(folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return report_of("dense", DENSE, tmp_path_factory)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return report_of("experts", SPARSE, tmp_path_factory)


def test_loading_never_holds_the_checkpoint_twice(report):
    assert report["bytes"] > 200e6
    # All parameters once, and two further copies (host, mapped file) of the one in flight.
    assert 0.9 < report["loading"] / report["bytes"] < 1 + 2 / 7


def test_saving_holds_one_shard_and_its_bytes(report):
    assert report["saved_shards"] == 6
    assert report["saving"] < 2.25 * SHARD


def test_a_mesh_gets_the_same_values_in_shards(report):
    assert report["same"]
    assert report["q_shard"] == [14, 1024 // 4, 1024]


def test_experts_stream_to_the_devices_that_hold_them(experts):
    assert experts["bytes"] > 180e6
    assert experts["shard"] == [3, 2, 1024, 640]
    # All parameters once, and two further copies (host, mapped file) of one device's part: far
    # from one stacked parameter, which would not fit a host for a large model.
    assert experts["loading"] > 0.9 * experts["bytes"]
    assert experts["loading"] - experts["bytes"] < 0.5 * experts["parameter"]


def test_saving_experts_holds_one_shard_and_its_bytes(experts):
    assert experts["same"]
    assert experts["saved_shards"] == 5
    assert experts["saving"] < 2.25 * SHARD


if __name__ == "__main__":
    jax.block_until_ready(jnp.ones(8)[0] + 1)  # starts JAX before anything is measured
    action = {"dense": measure_dense, "experts": measure_experts}[sys.argv[1]]
    print(json.dumps(action(Path(sys.argv[2]))))
