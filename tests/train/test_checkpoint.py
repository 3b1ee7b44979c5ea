"""Checkpoints: what is saved comes back, on other devices too; which are kept; what is refused."""

import dataclasses
import errno
import gc
import logging
import os
import pathlib
import resource
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tiny import TINY_MOE, tiny_batch, tiny_program, tiny_state

from jaxrl.cli import OutputError
from jaxrl.options import ConfigError
from jaxrl.train import checkpoint
from jaxrl.train.checkpoint import Checkpoints
from jaxrl.train.state import TrainState


def on(devices: int, values, *spec):
    mesh = Mesh(np.array(jax.devices()[:devices]), ("fsdp",))
    return jax.device_put(values, NamedSharding(mesh, PartitionSpec(*spec)))


def small(step: int, devices: int = 2) -> TrainState:
    """A state that is its own only at this step."""
    w = np.random.default_rng(step).standard_normal((8, 4), np.float32)
    return TrainState(
        step=on(devices, np.int32(step)),
        params={"w": on(devices, w, "fsdp")},
        frozen={"base": on(devices, w.astype(jnp.bfloat16))},
        opt_state=({"mu": on(devices, w * 2, "fsdp")}, ()),
    )


def like(state):
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state
    )


def assert_same(found, expected) -> None:
    """Bit for bit, NaNs and signs of zeros included, and of the same structure."""

    def same(a, b):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()

    jax.tree.map(same, found, expected)


def written(folder, steps, **options) -> pathlib.Path:
    with Checkpoints(folder, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, small(step), {"at": step})
    return folder


@pytest.mark.parametrize(
    "options",
    [{}, {"rank": 4}, {"model": TINY_MOE, "expert": 2}],
    ids=["full", "lora", "experts"],
)
def test_comes_back_bit_for_bit_on_fewer_devices(options, tmp_path):
    state = tiny_state(tiny_program(8, **options))
    w = state.params
    while isinstance(w, dict):
        w, path = next(iter(w.values())), w
    odd = np.asarray(w).copy()
    odd.flat[:4] = np.nan, -np.inf, -0.0, 1e-45
    path[next(iter(path))] = jax.device_put(odd, w.sharding)
    extra = {"data": [1, 2.5, None, "ä"], "counts": {"samples": 3}, "loss": 0.1 + 0.2}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, state, extra)
        for devices in (8, 4, 1):
            few = options | {"expert": min(devices, options.get("expert", 1))}
            abstract = tiny_program(devices, **few).layout.abstract()
            restored = checkpoints.restore(abstract)
            assert restored is not None and (restored.step, restored.extra) == (7, extra)
            assert_same(restored.state, state)
            placed = jax.tree.map(lambda a: a.sharding, restored.state)
            assert placed == jax.tree.map(lambda a: a.sharding, abstract)


OPTIMIZERS = {
    "muon": optax.contrib.muon(1e-2),  # masked states
    "adafactor": optax.adafactor(1e-2),
    "sgd": optax.sgd(1e-2, momentum=0.9),
    "plain": optax.sgd(1e-2),  # all of its state is empty
    "skipping": optax.apply_if_finite(optax.adamw(1e-2), 3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizers_state_comes_back(name, tmp_path):
    rng = np.random.default_rng(0)
    params = {"a": {"w": on(2, rng.standard_normal((128, 256), np.float32))}, "none": None}
    params["b"] = on(2, rng.standard_normal((256,), np.float32))
    optimizer = OPTIMIZERS[name]
    opt_state = optimizer.init(params)
    _, opt_state = optimizer.update(params, opt_state, params)
    state = TrainState(jnp.int32(1), params, {}, opt_state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        restored = checkpoints.restore(like(state))
    assert restored is not None
    assert_same(restored.state, state)


def test_a_saved_state_may_be_donated_at_once(tmp_path):
    program = tiny_program(2)
    batch, abstract = tiny_batch(program), program.layout.abstract()
    expected, state = [], tiny_state(program)
    for _ in range(3):
        expected.append(jax.tree.map(jnp.copy, state))
        before = state
        state, _ = program.step(state, batch)
        assert all(a.is_deleted() for a in jax.tree.leaves(before))
    state = tiny_state(program)
    with Checkpoints(tmp_path, keep_last=9) as checkpoints:
        for step in range(3):
            checkpoints.save(step, state, {})
            state, _ = program.step(state, batch)
        for step, values in enumerate(expected):
            restored = checkpoints.restore(abstract, step)
            assert restored is not None
            assert_same(restored.state, values)


def test_saves_beside_the_training(tmp_path, monkeypatch):
    go_on, write = threading.Event(), checkpoint.write_manifest
    monkeypatch.setattr(checkpoint, "write_manifest", lambda *args: go_on.wait(60) and write(*args))
    extra = {"at": [1]}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, small(1), extra)
        assert checkpoints.steps() == []
        extra["at"].append(2)  # what was given is what is saved
        go_on.set()
        checkpoints.wait()
        assert checkpoints.steps() == [1] and checkpoints.extra() == (1, {"at": [1]})


def test_optimizer_state_in_pinned_host_memory_comes_back_there(tmp_path):
    state = small(1)
    moments = state.opt_state[0]["mu"]
    host = moments.sharding.with_memory_kind("pinned_host")
    state = dataclasses.replace(state, opt_state=({"mu": jax.device_put(moments, host)}, ()))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        restored = checkpoints.restore(like(state))
    assert restored is not None
    assert_same(restored.state, small(1))
    assert restored.state.opt_state[0]["mu"].sharding.memory_kind == "pinned_host"
    assert restored.state.params["w"].sharding.memory_kind == "device"


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [(1, 0, [7]), (3, 0, [5, 6, 7]), (1, 3, [3, 6, 7]), (2, 2, [2, 4, 6, 7])],
)
def test_which_are_kept(keep_last, keep_every, kept, tmp_path):
    options = {"keep_last": keep_last, "keep_every": keep_every}
    written(tmp_path, range(1, 8), **options)
    assert sorted(path.name for path in tmp_path.glob("*")) == [
        ".lock",
        *(f"{step:08d}" for step in kept),
    ]


def test_a_run_that_went_back_replaces_what_came_later(tmp_path):
    written(tmp_path, [10, 20, 30], keep_last=9)
    with Checkpoints(tmp_path, keep_last=2) as checkpoints:
        restored = checkpoints.restore(like(small(0)), 10)
        assert restored is not None and restored.step == 10
        assert checkpoints.steps() == [10, 20, 30]  # until there is something better
        checkpoints.save(20, small(99), {"at": 99})
        checkpoints.wait()
        assert checkpoints.steps() == [10, 20]
        restored = checkpoints.restore(like(small(0)))
    assert restored is not None and restored.extra == {"at": 99}
    assert_same(restored.state, small(99))


def test_only_what_is_its_own_is_cleaned_up(tmp_path):
    written(tmp_path, [1])
    for name in (".00000002.partial", ".00000003.deleted", "20261126-notes", ".git", "1", "2.old"):
        (tmp_path / name / "state").mkdir(parents=True)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == [1]
        with pytest.raises(ValueError, match="opened to be read only"):
            checkpoints.save(4, small(4), {})
    assert (tmp_path / ".00000002.partial").exists()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1]
    there = {path.name for path in tmp_path.iterdir()}
    assert there == {".lock", "00000001", "20261126-notes", ".git", "1", "2.old"}


def flip(file: pathlib.Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "is corrupted": flip,
    "bytes instead of": lambda file: os.truncate(file, file.stat().st_size - 1),
    "is missing": pathlib.Path.unlink,
}


def test_damage_to_any_file_is_named_and_the_one_before_is_used(tmp_path):
    written(tmp_path, [1, 2])
    folder = tmp_path / "00000002"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 8
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        for file in files:
            name, before = file.relative_to(folder), file.read_bytes()
            for what, damage in DAMAGES.items():
                damage(file)
                if name.name == "manifest.json" and what == "bytes instead of":
                    what = "is corrupted"
                restored = checkpoints.restore(like(small(0)))
                assert restored is not None and restored.step == 1, (name, what)
                assert_same(restored.state, small(1))
                ((step, reason),) = restored.skipped
                assert step == 2 and reason.startswith(str(name)) and what in reason
                file.write_bytes(before)
        restored = checkpoints.restore(like(small(0)))
    assert restored is not None and (restored.step, restored.skipped) == (2, ())


def test_a_damaged_checkpoint_does_not_outlive_the_next_one(tmp_path):
    written(tmp_path, [10, 20])
    flip(tmp_path / "00000020" / "manifest.json")
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        restored = checkpoints.restore(like(small(0)))
        assert restored is not None and restored.step == 10
        checkpoints.save(15, small(15), {})  # stopped before it came to 20 again
        checkpoints.wait()
        assert checkpoints.steps() == [15]


def test_what_is_not_there_or_cannot_be_used(tmp_path):
    abstract = like(small(0))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(abstract) is None
        assert checkpoints.restore_params(abstract) is None
        with pytest.raises(ConfigError, match=rf"^{tmp_path} holds no checkpoint$"):
            checkpoints.extra()
        with pytest.raises(ConfigError, match=f"^no checkpoint of step 5 in {tmp_path}; there are"):
            checkpoints.restore(abstract, 5)
    written(tmp_path, [3, 4])
    with Checkpoints(tmp_path) as checkpoints:
        for ask in (checkpoints.extra, lambda step: checkpoints.restore(abstract, step)):
            with pytest.raises(
                ConfigError, match=r"no checkpoint of step 5 in .*; there are 3, 4$"
            ):
                ask(5)
        (tmp_path / "00000004/manifest.json").unlink()
        line = (
            "a checkpoint in .* cannot be used: step 4: manifest.json is missing; others there: 3"
        )
        with pytest.raises(ConfigError, match=f"{line}$"):
            checkpoints.restore(abstract, 4)
        assert checkpoints.extra() == (3, {"at": 3})
        flip(tmp_path / "00000003/state/_METADATA")
        line = "no checkpoint in .* can be used: step 4: manifest.* missing; step 3: state/_METADA"
        with pytest.raises(ConfigError, match=line):
            checkpoints.restore(abstract)


def other(**changes) -> TrainState:
    return dataclasses.replace(small(0), **changes)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (
            other(params={"w": on(2, np.zeros((8, 5), np.float32))}),
            r"params/w is float32\[8,4\], and this run has float32\[8,5\]; go on with",
        ),
        (
            other(params={"w": small(0).params["w"], "lora": on(2, np.zeros(3, np.float32))}),
            r"params/lora is not there, and this run has float32\[3\]",
        ),
        (other(opt_state=()), r"opt_state/0/mu is float32\[8,4\], and this run has nothing"),
        (other(step=on(2, np.float32(0))), r"step is int32\[\], and this run has float32\[\]"),
    ],
    ids=["shape", "more", "fewer", "dtype"],
)
def test_another_model_or_optimizer_is_one_line_that_names_the_difference(wanted, words, tmp_path):
    written(tmp_path, [1])
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(ConfigError, match=f"00000001 is of another model, .*: {words}") as error,
    ):
        checkpoints.restore(like(wanted))
    assert "\n" not in str(error.value)


def test_floats_come_back_in_the_dtype_that_is_asked_for(tmp_path):
    written(tmp_path, [1])
    wanted = other(frozen={"base": on(2, np.zeros((8, 4), np.float32))})
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(like(wanted))
    assert restored is not None
    assert_same(restored.state.frozen["base"], np.asarray(small(1).frozen["base"], np.float32))


def test_parameters_without_the_optimizers_state(tmp_path):
    written(tmp_path, [1, 2])
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        restored = checkpoints.restore_params(like(small(0, devices=4)))
        assert restored is not None and restored.step == 2 and restored.state.opt_state is None
        assert_same(restored.state.params, small(2).params)
        assert_same(restored.state.frozen, small(2).frozen)
        assert len(restored.state.params["w"].sharding.device_set) == 4
        wanted = other(params={}, opt_state=())
        with pytest.raises(ConfigError, match=r"params/w is float32\[8,4\], and this run has noth"):
            checkpoints.restore_params(like(wanted))


def test_a_failed_save_is_told_at_the_next_one_and_leaves_nothing(tmp_path, caplog):
    """As on a full disk: no file may grow beyond a limit."""
    big = {name: on(8, np.arange(2.0**20, dtype=np.float32), "fsdp") for name in "abcd"}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, big, {})
        checkpoints.wait()
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, before[1]))
        try:
            checkpoints.save(2, big, {})
            with pytest.raises(OutputError) as error:
                checkpoints.save(3, big, {})
            assert str(error.value) == (
                f"the checkpoint of step 2 cannot be written to {tmp_path}: "
                f"{os.strerror(errno.EFBIG)}; the checkpoint of step 1 is intact"
            )
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert {path.name for path in tmp_path.iterdir()} == {".lock", "00000001"}
        restored = checkpoints.restore(like(big))
        assert restored is not None and restored.step == 1
        checkpoints.save(4, big, {})  # somebody made room
        checkpoints.wait()
        assert checkpoints.steps() == [1, 4]
    del error
    gc.collect()  # asyncio tells of failed tasks when they are deleted
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_close_tells_of_the_last_save_unless_something_else_ended_the_run(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "write_manifest", full)
    with pytest.raises(OutputError, match=r"step 1 .*: No space left"), Checkpoints(tmp_path) as c:
        c.save(1, small(1), {})
    with pytest.raises(ZeroDivisionError), Checkpoints(tmp_path) as c:
        c.save(1, small(1), {})
        raise ZeroDivisionError
    assert not list(tmp_path.glob("*0*"))


def test_what_cannot_be_saved_is_said_before_anything_is_written(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(TypeError, match="not JSON serializable"):
            checkpoints.save(1, small(1), {"a": object()})
        with pytest.raises(ValueError, match="same path"):
            checkpoints.save(1, {"a": {"b": jnp.ones(2)}, "a/b": jnp.ones(2)}, {})
    assert {path.name for path in tmp_path.iterdir()} == {".lock"}
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"checkpoints cannot be written to .*: Not a directory"):
        Checkpoints(tmp_path / "file" / "checkpoints")


def test_a_save_that_lacked_only_its_name_is_completed_if_it_is_good(tmp_path):
    for damaged in (False, True):
        folder = written(tmp_path / str(damaged), [1, 2], keep_last=2)
        (folder / "00000002").rename(folder / ".00000002.partial")
        if damaged:
            flip(folder / ".00000002.partial/state/_METADATA")
        with Checkpoints(folder, keep_last=1) as checkpoints:
            assert checkpoints.steps() == ([1] if damaged else [2])
        assert not (folder / ".00000002.partial").exists()
