"""A checkpoint's weights as a run's first state, and where checkpoints are found."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tiny import TINY, TINY_GLM, TINY_MOE, tiny_program

from jaxrl import load_pretrained, save_pretrained
from jaxrl.config import OptimizerConfig
from jaxrl.models.hf_config import CheckpointError
from jaxrl.models.params import specs
from jaxrl.models.transformer import Transformer
from jaxrl.options import ConfigError
from jaxrl.train.pretrained import completed, find_checkpoint, kept, load_state

MODELS = {"dense": TINY.replace(num_layers=2), "moe": TINY_MOE, "glm": TINY_GLM}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, pathlib.Path]:
    """A checkpoint of each model, every value its own."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name, config in MODELS.items():
        graphdef, state = nnx.split(Transformer(config))
        rng = np.random.default_rng(0)
        filled = jax.tree.map(
            lambda s, rng=rng: jnp.asarray(rng.standard_normal(s.shape), jnp.float32), state
        )
        save_pretrained(nnx.merge(graphdef, filled), root / name)
    return {name: root / name for name in MODELS}


def by_path(tree) -> dict:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {tuple(key.key for key in path): leaf for path, leaf in leaves}


def weights(folder: pathlib.Path) -> dict[tuple[str, ...], np.ndarray]:
    state = nnx.state(load_pretrained(folder, dtype=jnp.float32))
    return {
        tuple(map(str, path)): np.asarray(variable.get_value())
        for path, variable in nnx.to_flat_state(state)
    }


def same_places(state, layout) -> None:
    for found, wanted in zip(
        jax.tree.leaves(state), jax.tree.leaves(layout.abstract()), strict=True
    ):
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
        assert found.sharding.is_equivalent_to(wanted.sharding, len(found.shape))


CASES = [("dense", 1, 1), ("dense", 8, 1), ("moe", 1, 1), ("moe", 8, 4), ("glm", 8, 2)]


@pytest.mark.parametrize(("name", "devices", "expert"), CASES)
def test_full_training_begins_with_the_weights_as_fp32_masters(name, devices, expert, folders):
    program = tiny_program(devices, model=MODELS[name], expert=expert, compute_dtype="bfloat16")
    layout = program.layout
    state = load_state(layout, folders[name], jax.random.key(0))
    same_places(state, layout)
    found = by_path(state.params) | by_path(state.frozen)
    expected = weights(folders[name])
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        assert found[path].dtype == jnp.float32
        np.testing.assert_array_equal(np.asarray(found[path]), value)
    assert int(state.step) == 0
    assert not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(state.opt_state))


@pytest.mark.parametrize(("name", "devices", "expert"), CASES)
def test_lora_begins_with_frozen_weights_and_the_seeds_adapters(name, devices, expert, folders):
    """As initialisation would draw them; the base in the compute dtype, routers in fp32."""
    program = tiny_program(
        devices, model=MODELS[name], expert=expert, rank=8, compute_dtype="bfloat16"
    )
    layout, key = program.layout, jax.random.key(3)
    state = load_state(layout, folders[name], key)
    same_places(state, layout)
    adapters, drawn = by_path(state.params), by_path(layout.initialize(key).params)
    assert adapters.keys() == drawn.keys()
    for path, value in drawn.items():
        np.testing.assert_array_equal(np.asarray(adapters[path]), np.asarray(value))
        assert np.any(np.asarray(value)) == (path[-1] == "lora_a")
    other = by_path(load_state(layout, folders[name], jax.random.key(4)).params)
    first = next(path for path in drawn if path[-1] == "lora_a")
    assert np.any(np.asarray(other[first]) != np.asarray(drawn[first]))
    frozen, declared, expected = by_path(state.frozen), specs(layout.model), weights(folders[name])
    assert frozen.keys() == expected.keys()
    for path, value in expected.items():
        dtype = jnp.float32 if declared[path].fp32 else jnp.bfloat16
        assert frozen[path].dtype == dtype
        np.testing.assert_array_equal(np.asarray(frozen[path]), value.astype(dtype))


def test_the_optimizers_state_is_what_it_would_be_at_the_start(folders):
    """Of one whose state is not all zeros."""
    optimizer = OptimizerConfig(name="adafactor", learning_rate=1e-2)
    layout = tiny_program(8, model=MODELS["dense"], optimizer=optimizer).layout
    state = load_state(layout, folders["dense"], jax.random.key(0))
    same_places(state, layout)
    expected = jax.jit(layout.optimizer.init)(state.params)
    for found, wanted in zip(
        jax.tree.leaves(state.opt_state), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))


@pytest.mark.parametrize("rank", [0, 4])
def test_what_a_checkpoint_keeps_is_completed_from_the_folder(rank, folders):
    """With LoRA: adapters and the router's bias, which training may have moved."""
    layout = tiny_program(1, model=MODELS["glm"], rank=rank).layout
    state = load_state(layout, folders["glm"], jax.random.key(0))
    bias = ("layers", "mlp", "router", "bias")
    state.frozen["layers"]["mlp"]["router"]["bias"] += 1.0
    held = kept(layout, state)
    assert by_path(held.frozen).keys() == {bias}
    again = completed(layout, held, folders["glm"])
    same_places(again, layout)
    for found, wanted in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))


def test_a_folder_with_another_model_is_refused(folders, tmp_path):
    layout = tiny_program(1, model=MODELS["dense"].replace(vocab_size=136)).layout
    with pytest.raises(CheckpointError, match=r"another model than the run's: vocab_size is 128"):
        load_state(layout, folders["dense"], jax.random.key(0))
    layout = tiny_program(1, model=MODELS["dense"]).layout
    folder = tmp_path / "cut"
    shutil.copytree(folders["dense"], folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:120]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight in .* has shape \(120, 64\)"):
        load_state(layout, folder, jax.random.key(0))


def test_a_local_folder_is_found_as_it_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner/model").mkdir(parents=True)
    assert find_checkpoint("owner/model") == pathlib.Path("owner/model")
    assert find_checkpoint(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("", r"config.model names no checkpoint; give a folder or a model on the hub"),
        ("/nowhere/model", r"'/nowhere/model' is no folder, and no model's name on the hub"),
        ("gpt2 large", r"'gpt2 large' is no folder, and no model's name"),
        ("a/b/c", r"'a/b/c' is no folder, and no model's name"),
    ],
)
def test_what_is_neither_a_folder_nor_a_name_is_refused(name, problem):
    with pytest.raises(ConfigError, match=problem):
        find_checkpoint(name)


def test_without_a_network_only_what_was_downloaded_is_found(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"'owner/model' is no folder here and cannot be") as told:
        find_checkpoint("owner/model")
    assert "\n" not in str(told.value)
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--owner--model/snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps({}))
    refs = tmp_path / "models--owner--model/refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    assert find_checkpoint("owner/model") == snapshot
