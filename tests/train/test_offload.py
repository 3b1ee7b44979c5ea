"""Optimizer state in host memory: the same arithmetic, on any mesh, and where it stays."""

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import TINY, TINY_GLM, relative_error, tiny_batch, tiny_program, tiny_state

from jaxrl.config import OptimizerConfig
from jaxrl.train import offload
from jaxrl.train.offload import HOST, on_host
from jaxrl.train.optimizer import make_optimizer

OPTIMIZER = OptimizerConfig(
    learning_rate=1e-2, schedule="cosine", warmup_steps=1, total_steps=6, max_grad_norm=0.3
)


def moments(opt_state):
    return [x for x in jax.tree.leaves(opt_state) if x.ndim]


def test_streamed_update_is_the_chains_bit_for_bit(monkeypatch):
    """Operation by operation, as compilers contract products and sums as they like."""
    rng = np.random.default_rng(0)
    shapes = {"embed": (16, 4), "layers": {"w": (3, 4, 8), "scale": (3, 4)}, "norm": (4,)}
    params, *gradients = (
        jax.tree.map(
            lambda s: jnp.asarray(rng.standard_normal(s), jnp.float32),
            shapes,
            is_leaf=lambda s: isinstance(s, tuple),
        )
        for _ in range(4)
    )
    results = []
    monkeypatch.setattr(offload, "BLOCK_BYTES", 4 * 16)  # four rows of the embedding
    for devices in (0, 2):
        tx = make_optimizer(OPTIMIZER, devices=devices)
        got, state = params, tx.init(params)
        with jax.disable_jit():
            for g in gradients:
                updates, state = tx.update(g, state, got)
                got = optax.apply_updates(got, updates)
        results.append((got, state))
    jax.tree.map(np.testing.assert_array_equal, *results)


@functools.cache
def trained(devices: int, model, offloads: bool):
    program = tiny_program(devices, model=model, optimizer=OPTIMIZER, offload_optimizer=offloads)
    state = tiny_state(program)
    for seed in range(2):
        state, metrics = program.step(state, tiny_batch(program, seed=seed))
    return state, metrics


@pytest.mark.parametrize(("devices", "model"), [(1, TINY), (8, TINY_GLM)], ids=["one", "eight"])
def test_training_is_the_same_and_the_moments_stay_on_the_host(devices, model):
    (kept, metrics), (offloaded, same) = (trained(devices, model, off) for off in (False, True))
    assert jax.tree.structure(kept) == jax.tree.structure(offloaded)
    assert relative_error(same, metrics) < 1e-5
    assert relative_error(offloaded.opt_state, kept.opt_state) < 1e-4
    for a, b in zip(moments(kept.opt_state), moments(offloaded.opt_state), strict=True):
        assert b.sharding.memory_kind == HOST
        assert a.sharding.spec == b.sharding.spec and a.sharding.memory_kind == "device"
    everything_else = (offloaded.step, offloaded.params, offloaded.frozen)
    assert {x.sharding.memory_kind for x in jax.tree.leaves(everything_else)} == {"device"}
    assert int(offloaded.opt_state[1].count) == 2


def test_initialize_makes_the_moments_on_the_host():
    state = tiny_program(8, offload_optimizer=True).layout.initialize(jax.random.key(0))
    for x in moments(state.opt_state):
        assert x.sharding.memory_kind == HOST and not np.any(x)


def test_lora_is_refused():
    with pytest.raises(ValueError, match=r"nothing to gain with LoRA.*turn it off"):
        tiny_program(rank=4, offload_optimizer=True)


def test_devices_without_pinned_memory_are_refused():
    def refuse(kind):
        raise ValueError(f"Could not find memory addressable by device: {kind}")

    device = jax.devices()[0]
    sharding: Any = types.SimpleNamespace(device_set={device}, with_memory_kind=refuse)
    with pytest.raises(ValueError, match=r"which cpu devices \(cpu\) do not have; turn it off"):
        on_host(sharding)
