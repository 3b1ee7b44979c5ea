"""Tiles and the list of validated GPUs: what the kernels read, and what a run on a GPU writes."""

import json
import shutil
import threading

import jax.numpy as jnp
import pytest
from jaxrl_kernels import tiles, validated

H200 = "NVIDIA H200"


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """No tile is tuned and no GPU validated; what is written goes to a folder of its own."""
    monkeypatch.setattr(tiles, "TUNED", tmp_path / "tiles.json")
    monkeypatch.setattr(validated, "FILE", tmp_path / "validated.json")
    tiles._file.cache_clear()
    validated.validated.cache_clear()
    yield tmp_path
    tiles._file.cache_clear()
    validated.validated.cache_clear()


def forward(gpu=H200, T=16384, dtype=jnp.bfloat16, H=128):
    return tiles.attention("forward", gpu, 90, dtype, H, T, 32)


@pytest.mark.usefixtures("empty")
def test_a_tuned_tile_is_read_for_its_gpu_dtype_and_head_only():
    tuned = tiles.Tile(16, 32, 2, 5)
    default = forward()
    tiles.save({tiles.attention_key("forward", H200, "bfloat16", 128): tuned.__dict__})
    assert forward() == tuned != default
    assert forward(gpu="NVIDIA H100 80GB HBM3") == default
    assert forward(dtype=jnp.float16) == default
    other = tiles.attention_key("forward", H200, "bfloat16", 64)
    assert other not in tiles.tuned_tiles()
    # A head is padded to a power of two, and a row shorter than a tile takes a smaller one.
    assert forward(H=100) == tuned
    assert forward(T=20) == tiles.Tile(16, 32, 2, 5)
    assert forward(T=5) == tiles.Tile(16, 16, 2, 5)


def test_tiles_are_saved_beside_those_of_other_gpus(empty):
    for gpu in ("one", "two"):
        tiles.save({f"attention forward {gpu} bfloat16 128": tiles.Tile(64, 64, 4, 2).__dict__})
    assert len(json.loads((empty / "tiles.json").read_text())) == 2


@pytest.mark.usefixtures("empty")
def test_a_tile_being_tried_is_that_of_this_thread():
    key = tiles.attention_key("forward", H200, "bfloat16", 128)
    seen = []
    with tiles.trying(key, tiles.Tile(16, 16, 1, 1)):
        assert forward().num_warps == 1
        thread = threading.Thread(target=lambda: seen.append(forward().num_warps))
        thread.start()
        thread.join()
    assert seen == [8] and forward().num_warps == 8


@pytest.mark.parametrize("which", ["forward", "dq", "dkv"])
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120, None])
def test_there_is_a_tile_for_every_gpu_head_and_dtype(which, capability):
    for H in (16, 64, 100, 128, 256):
        for dtype in ("bfloat16", "float32"):
            tile = tiles.attention(which, None, capability, dtype, H, 4096, 24)
            for size in (tile.block_q, tile.block_k, tile.num_warps):
                assert size & (size - 1) == 0 and size >= 4


TODAY = {"date": "2026-11-26", "triton": "3.9.0", "tokamax": "0.0.17"}


@pytest.fixture
def installed(monkeypatch, empty):
    """Versions of packages, as they can be changed."""
    versions = {"triton": "3.9.1", "tokamax": "0.0.17"}
    monkeypatch.setattr(validated, "_version", versions.get)
    return versions


@pytest.mark.usefixtures("installed")
def test_a_gpu_is_validated_once_it_is_recorded():
    assert not validated.is_validated("attention triton", H200)
    validated.record("attention triton", H200, TODAY)
    validated.record("grouped_matmul triton", "another", TODAY)
    assert validated.is_validated("attention triton", H200)
    assert not validated.is_validated("grouped_matmul triton", H200)
    assert not validated.is_validated("attention triton", None)


@pytest.mark.usefixtures("installed")
def test_two_gpus_are_validated_for_one_kernel():
    for gpu in (H200, "another"):
        validated.record("attention triton", gpu, TODAY)
    assert validated.is_validated("attention triton", H200)
    assert validated.is_validated("attention triton", "another")


@pytest.mark.usefixtures("installed")
def test_a_failure_takes_it_back():
    for kernel in ("attention triton", "attention tokamax"):
        validated.record(kernel, H200, TODAY)
        assert not validated.has_failed(kernel, H200)
        validated.record(kernel, H200, TODAY, failed=2)
        assert validated.has_failed(kernel, H200)
        assert not validated.is_validated(kernel, H200)
    validated.record("attention triton", H200, TODAY)
    assert validated.is_validated("attention triton", H200)


def test_it_holds_for_the_kernel_and_the_package_that_were_tested(monkeypatch, installed):
    validated.record("attention triton", H200, TODAY)
    validated.record("attention tokamax", H200, TODAY, failed=1)
    installed.update(triton="3.10.0", tokamax="0.1.0")
    assert not validated.is_validated("attention triton", H200)
    assert not validated.has_failed("attention tokamax", H200)
    installed.clear()  # a laptop that only plans
    assert validated.is_validated("attention triton", H200)
    assert validated.has_failed("attention tokamax", H200)
    monkeypatch.setattr(validated, "source", lambda kernel: "another")
    assert not validated.is_validated("attention triton", H200)


@pytest.mark.parametrize("kernel", validated.SOURCES)
def test_a_kernels_source_is_its_own_code(kernel, tmp_path, monkeypatch):
    source, folders = validated.source.__wrapped__, ("flash_attention", "grouped_matmul")
    before = source(kernel)
    for folder in folders:
        shutil.copytree(validated.FOLDER / folder, tmp_path / folder)
    monkeypatch.setattr(validated, "FOLDER", tmp_path)
    changes = []
    for folder in folders:
        code = tmp_path / folder / "kernels.py"
        committed = code.read_bytes()
        code.write_bytes(committed + b"\n")
        changes.append(source(kernel) != before)
        code.write_bytes(committed)
    assert changes == [kernel == "attention triton", kernel == "grouped_matmul triton"]


def test_what_is_committed_can_be_read():
    for kernel, gpus in validated.validated().items():
        assert kernel.split()[0] in ("attention", "grouped_matmul")
        assert all("date" in facts and "triton" in facts for facts in gpus.values())
    for key, tile in tiles.tuned_tiles().items():
        made = tiles.GroupedTile if key.startswith("grouped_matmul") else tiles.Tile
        assert made(**tile)
