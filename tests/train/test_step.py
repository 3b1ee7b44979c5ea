"""The step against the plain computation, one device against eight, and every option of it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny import TINY, relative_error, tiny_batch, tiny_program, tiny_state

from jaxrl.config import LossConfig, OptimizerConfig
from jaxrl.models.transformer import merge_trees
from jaxrl.train.gradients import Gradients
from jaxrl.train.losses import RLTokens, rl_loss
from jaxrl.train.optimizer import make_optimizer
from jaxrl.train.remat import POLICIES


def plain_loss(params, program, frozen, batch):
    """The step's loss by the model's own logits and `jax.grad`: no chunks, no loops, no shards."""
    config = program.step.config
    model = nnx.merge(nnx.graphdef(program.layout.model), merge_trees(params, frozen))
    total = loss = 0.0
    for m in range(program.micro_batches):
        mb = jax.tree.map(lambda a, m=m: a[m], batch)
        logits = model(mb.tokens, mb.positions, mb.segment_ids) / config.temperature
        logp = jnp.take_along_axis(
            jax.nn.log_softmax(logits[:, :-1]), mb.tokens[:, 1:, None], axis=-1
        )[..., 0]
        mask = mb.loss_mask[:, 1:].astype(bool)
        segments = None
        if mb.segment_ids is not None:
            mask = mask & (mb.segment_ids[:, 1:] == mb.segment_ids[:, :-1])
            segments = mb.segment_ids[:, :-1]
        total += jnp.sum(mask)
        if config.type == "sft":
            loss += -jnp.sum(jnp.where(mask, logp, 0.0))
        else:
            ref = None if mb.ref_logprobs is None else mb.ref_logprobs[:, 1:]
            tokens = RLTokens(mb.sampler_logprobs[:, 1:], mb.advantages[:, 1:], mask, segments, ref)
            loss += rl_loss(logp, tokens, config.loss)[0]
    return loss / total


# Clipped loosely: no token is at the edge, where rounding would decide.
GSPO = LossConfig(name="gspo", sequence_clip_low=0.9, sequence_clip_high=9, ref_kl_coef=0.1)
CASES = {
    "sft": {"type": "sft"},
    "sft_lora": {"type": "sft", "rank": 4},
    "rl": {"type": "rl"},
    "rl_lora": {"type": "rl", "rank": 4},
    "rl_dppo_kl": {"type": "rl", "loss": LossConfig(name="dppo_kl")},
    "rl_gspo_ref": {"type": "rl", "loss": GSPO},
    "rl_skip_empty": {"type": "rl", "skip_empty": True},
    "rl_skip_chunks": {"type": "rl", "skip_empty": True, "head_chunk": 24, "temperature": 0.7},
    "rl_skip_chunks_lora": {"type": "rl", "skip_empty": True, "head_chunk": 24, "rank": 4},
    "rl_chunks": {"type": "rl", "head_chunk": 48, "mlp_chunk": 40, "temperature": 0.7},
    "sft_chunks_lora": {"type": "sft", "rank": 4, "head_chunk": 48, "mlp_chunk": 40},
    "untied": {"type": "sft", "model": TINY.replace(tie_embeddings=False, attention_bias=True)},
    "one_micro_batch": {"type": "rl", "micro_batches": 1},
}


@functools.cache
def gradients(name: str, devices: int):
    """(gradient, metrics, the batch they are of) of a case on so many devices."""
    program = tiny_program(devices, **CASES[name])
    state, batch = tiny_state(program), tiny_batch(program, packed=name != "rl")
    grads, metrics = jax.jit(program.step.gradients)(state.params, state.frozen, batch)
    return jax.device_get((grads, metrics)), batch


@pytest.mark.parametrize("name", CASES)
def test_gradient_is_that_of_the_plain_loss(name):
    (grads, metrics), batch = gradients(name, 1)
    program = tiny_program(**CASES[name])
    state = tiny_state(program)
    plain = functools.partial(plain_loss, program=program, frozen=state.frozen, batch=batch)
    loss, expected = jax.jit(jax.value_and_grad(plain))(state.params)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    assert relative_error(grads, expected) < 2e-5
    assert all(np.any(np.asarray(g)) for g in jax.tree.leaves(grads))


EIGHT = ["sft", "rl_chunks", "rl_gspo_ref", "rl_skip_chunks", "sft_chunks_lora", "untied"]


@pytest.mark.parametrize("name", EIGHT)
def test_eight_devices_equal_one(name):
    (one, one_metrics), _ = gradients(name, 1)
    (eight, eight_metrics), _ = gradients(name, 8)
    assert relative_error(eight, one) < 2e-5
    for key, value in one_metrics.items():
        np.testing.assert_allclose(eight_metrics[key], value, rtol=1e-4, err_msg=key)


def test_last_micro_batches_without_a_trained_token_are_not_computed(monkeypatch):
    computed = []
    plain = Gradients.micro_batch

    def counted(self, params, frozen, scale, grads, batch):
        jax.debug.callback(lambda: computed.append(1))
        return plain(self, params, frozen, scale, grads, batch)

    monkeypatch.setattr(Gradients, "micro_batch", counted)
    found = {}
    for skip in (False, True):
        program = tiny_program(micro_batches=5, skip_empty=skip)
        state, batch = tiny_state(program), tiny_batch(program)
        kept = jnp.array([1, 0, 1, 0, 0])[:, None, None]
        batch = dataclasses.replace(batch, loss_mask=batch.loss_mask * kept)
        found[skip] = jax.jit(program.step.gradients)(state.params, state.frozen, batch)
        jax.block_until_ready(found[skip])
        jax.effects_barrier()
        assert len(computed) == (5 + 3 if skip else 5)
    assert relative_error(found[True][0], found[False][0]) < 1e-6
    for key, value in found[False][1].items():
        np.testing.assert_allclose(found[True][1][key], value, rtol=1e-6, err_msg=key)


@pytest.mark.parametrize("ac", sorted(set(POLICIES) - {"recompute"}))
def test_checkpointing_does_not_change_the_gradient(ac):
    (expected, _), batch = gradients("rl", 1)
    program = tiny_program(**CASES["rl"], ac=ac)
    state = tiny_state(program)
    got, _ = jax.jit(program.step.gradients)(state.params, state.frozen, batch)
    assert relative_error(got, expected) < 2e-6


def test_what_each_policy_keeps():
    """Bytes of temporaries grow from recompute over selective to none.

    Twelve layers: with few, what one layer's backward needs outweighs what all layers keep.
    """
    deep = dataclasses.replace(TINY, num_layers=12)
    temp = {}
    for ac in ("none", "selective", "recompute"):
        program = tiny_program(model=deep, type="sft", ac=ac, rows=8, seq_len=256)
        temp[ac] = program.lower().compile().memory_analysis().temp_size_in_bytes
    assert temp["recompute"] < temp["selective"] < temp["none"]


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_a_step_applies_adamw_to_what_learns(rank):
    optimizer = OptimizerConfig(learning_rate=1e-2, max_grad_norm=0.1)
    program = tiny_program(8, type="sft", rank=rank, optimizer=optimizer)
    state, batch = tiny_state(program), tiny_batch(program)
    grads, _ = jax.jit(program.step.gradients)(state.params, state.frozen, batch)
    tx = make_optimizer(optimizer)
    updates, _ = tx.update(grads, tx.init(state.params), state.params)
    expected = jax.device_get(optax.apply_updates(state.params, updates))
    frozen = jax.device_get(state.frozen)
    state, metrics = program.step(state, batch)
    assert relative_error(state.params, expected) < 1e-5
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.frozen), frozen)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-5)
    assert int(state.step) == 1


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_training_learns_the_batch(rank):
    program = tiny_program(type="sft", rank=rank)
    state, batch = program.layout.initialize(jax.random.key(0)), tiny_batch(program)
    losses = []
    for _ in range(10):
        state, metrics = program.step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.05


def test_bf16_compute_keeps_fp32_masters():
    program = tiny_program(type="sft", compute_dtype="bfloat16")
    state = tiny_state(program)
    wide = tiny_program(type="sft")
    batch = tiny_batch(program)
    grads, _ = jax.jit(program.step.gradients)(state.params, state.frozen, batch)
    expected, _ = jax.jit(wide.step.gradients)(state.params, state.frozen, batch)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    assert 1e-5 < relative_error(grads, expected) < 0.05


def test_no_trained_token_gives_zero_not_nan():
    program = tiny_program(type="rl")
    batch = tiny_batch(program)
    batch = dataclasses.replace(batch, loss_mask=jnp.zeros_like(batch.loss_mask))
    state = tiny_state(program)
    grads, metrics = jax.jit(program.step.gradients)(state.params, state.frozen, batch)
    assert all(not np.any(np.asarray(g)) for g in jax.tree.leaves(grads))
    assert float(metrics["loss"]) == 0.0


def test_state_is_donated():
    program = tiny_program(type="sft")
    state = program.layout.initialize(jax.random.key(0))
    old = jax.tree.leaves(state.params)[0]
    program.step(state, tiny_batch(program))
    assert old.is_deleted()
