"""What an engine takes of its devices' memory: layers that each holds whole, and the cache."""

import types

import jax
import jax.numpy as jnp
import pytest
from tiny import TINY, TINY_MOE, tiny_program, tiny_state

from jaxrl.models.transformer import merge_trees
from jaxrl.options import ConfigError
from jaxrl.perf.hardware import GiB, gpu
from jaxrl.rollout import memory
from jaxrl.rollout.engine import EngineLimits, lower_decode
from jaxrl.rollout.programs import STACKS, Programs
from jaxrl.train.program import local_bytes

LIMITS = EngineLimits(slots=4, max_len=64, page=4, steps=3, prefill_tokens=32)


def programs_of(whole, dtype="bfloat16", **options):
    program = tiny_program(devices=8, **options)
    layout, state = program.layout, tiny_state(program)
    made = Programs(layout.model, layout.mesh, dtype=dtype, whole_layers=whole)
    return made, merge_trees(state.params, state.frozen)


@pytest.mark.parametrize("options", [{}, {"model": TINY_MOE, "expert": 2}, {"rank": 4}])
def test_a_copy_has_the_layers_whole_in_the_dtype_they_are_used_in(options):
    programs, weights = programs_of(True, **options)
    own = programs.own(weights)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(own), jax.tree.leaves(programs.abstract_own(weights)), strict=True
    ):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
        if path[0].key in STACKS and not ("experts" in str(path) and "expert" in options):
            assert a.sharding.is_fully_replicated
    layers = {name: own[name] for name in STACKS if name in own}
    whole = memory.whole_layers_bytes(programs.model, programs.mesh, "bfloat16")
    assert local_bytes(layers) == whole
    # What is in place stays; a second update compiles nothing.
    again = programs.own(own)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (own, again)), strict=True))
    moves = dict(programs._moves)
    programs.own(weights)
    assert programs._moves == moves


def test_divided_ones_are_the_trainers():
    programs, weights = programs_of(False)
    assert programs.own(weights) is weights is programs.abstract_own(weights)


def test_a_copy_of_the_trainers_may_outlive_them():
    programs, weights = programs_of(True, dtype="float32")
    copy = programs.copy_weights(weights)
    assert all(a is not b for a, b in zip(*map(jax.tree.leaves, (copy, weights)), strict=True))
    again = programs.own(copy)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (copy, again)), strict=True))


def gathers(programs, weights) -> int:
    """How many gathers the compiled loop over tokens has."""
    lowered = lower_decode(programs, LIMITS, programs.abstract_own(weights))
    return lowered.compile().as_text().count(" all-gather(")


def test_nothing_is_gathered_for_a_token_but_its_vocabulary():
    """Of one row's x, and of tokens and log-probs behind the loop; the others are the layers'."""
    divided, whole = (gathers(*programs_of(w)) for w in (False, True))
    assert whole <= 4 < divided


def fake_mesh(kind="NVIDIA H100 80GB HBM3", platform="gpu", **stats):
    device = types.SimpleNamespace(
        platform=platform, device_kind=kind, memory_stats=lambda: stats or None
    )
    devices = types.SimpleNamespace(flat=[device])
    return types.SimpleNamespace(devices=devices, shape={"fsdp": 8, "expert": 1, "context": 1})


def test_the_pool_is_what_jax_takes_of_a_gpu():
    (h100,), (other,), (cpu,) = (
        mesh.devices.flat
        for mesh in (
            fake_mesh(),
            fake_mesh("NVIDIA L40S", bytes_limit=40 * GiB),
            fake_mesh("cpu", "cpu"),
        )
    )
    assert memory.pool_bytes(h100) == round(0.92 * gpu("H100").memory)
    assert memory.pool_bytes(other) == 40 * GiB
    assert memory.pool_bytes(cpu) is None


def test_layers_are_whole_where_they_take_little(monkeypatch):
    model, here = tiny_program(devices=8).layout.model, tiny_program(devices=8).layout.mesh
    holds = memory.holds_whole_layers
    assert holds("auto", model, fake_mesh(), jnp.bfloat16)
    assert not holds("divided", model, fake_mesh(), jnp.bfloat16)
    assert not holds("auto", model, here, jnp.bfloat16)  # a CPU
    assert holds("whole", model, here, jnp.bfloat16)
    size = memory.whole_layers_bytes(model, here, jnp.bfloat16)
    monkeypatch.setattr(memory, "pool_bytes", lambda device: 4 * size)
    assert holds("auto", model, fake_mesh(), jnp.bfloat16)
    monkeypatch.setattr(memory, "pool_bytes", lambda device: 4 * size - 1)
    assert not holds("auto", model, fake_mesh(), jnp.bfloat16)


def test_a_cache_takes_what_there_is_unless_its_size_is_named(monkeypatch):
    programs, weights = programs_of(True)
    each = 2 * TINY.num_layers * TINY.num_kv_heads * TINY.head_dim * 2
    assert memory.token_bytes(programs) == each
    asked, named = EngineLimits(slots=4, max_len=64, page=4), EngineLimits(cache_tokens=10**9)
    assert memory.trainers_limits(asked, programs) is asked  # on a CPU
    assert memory.servers_limits(asked, programs, weights) is asked
    monkeypatch.setattr(memory, "pool_bytes", lambda device: 1000 * each)
    assert memory.trainers_limits(asked, programs) is asked  # 256 of 400 tokens
    assert memory.trainers_limits(named, programs) is named
    monkeypatch.setattr(memory, "pool_bytes", lambda device: 255 * each)
    assert memory.trainers_limits(asked, programs).cache_tokens == 100  # of 102, in pages of 4
    held = local_bytes(weights)
    monkeypatch.setattr(memory, "pool_bytes", lambda device: held + 200 * each)
    assert memory.servers_limits(asked, programs, weights).cache_tokens == 168  # of 170
    monkeypatch.setattr(memory, "pool_bytes", lambda device: 150 * each)
    with pytest.raises(ConfigError, match=r"one sequence of 64 tokens takes .* GiB, and each dev"):
        memory.trainers_limits(asked, programs)
