"""The step of models with experts: against the plain loss, and over every mesh that divides."""

import functools

import jax
import numpy as np
import pytest
from test_step import plain_loss
from tiny import TINY, TINY_GLM, TINY_MOE, relative_error, tiny_batch, tiny_program, tiny_state

# One micro-batch where accumulation is not the point: these programs are slow to compile.
CASES = {
    "moe_lora_chunks": {"type": "rl", "model": TINY_MOE, "rank": 4, "experts_chunk": 40},
    "glm": {"type": "rl", "model": TINY_GLM, "micro_batches": 1},
    "glm_lora": {"type": "sft", "model": TINY_GLM, "rank": 4, "micro_batches": 1},
    "glm_chunks": {"type": "sft", "model": TINY_GLM, "experts_chunk": 48, "mlp_chunk": 40},
}


@functools.cache
def gradients(name: str, devices: int = 1, **mesh):
    """(gradient, metrics, the batch they are of) of a case on so many devices."""
    program = tiny_program(devices, **CASES[name] | mesh)
    state, batch = tiny_state(program), tiny_batch(program, packed=True)
    grads, metrics = jax.jit(program.step.gradients)(state.params, state.frozen, batch)
    return jax.device_get((grads, metrics)), batch


@pytest.mark.parametrize("name", CASES)
def test_gradient_is_that_of_the_plain_loss(name):
    (grads, metrics), batch = gradients(name)
    program = tiny_program(**CASES[name])
    state = tiny_state(program)
    plain = functools.partial(plain_loss, program=program, frozen=state.frozen, batch=batch)
    loss, expected = jax.jit(jax.value_and_grad(plain))(state.params)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    assert relative_error(grads, expected) < 2e-5
    assert all(np.any(np.asarray(g)) for g in jax.tree.leaves(grads))


# Every mesh of eight, in turns by both context methods; four query heads are not for eight devices.
MESHES = [("glm", e, c, "ring") for e in (1, 2, 4, 8) for c in (1, 2, 4, 8) if e * c <= 8]
MESHES += [("moe_lora_chunks", e, c, "ulysses") for e, c in ((1, 4), (2, 2), (8, 1))]


@pytest.mark.parametrize(("name", "expert", "context", "method"), MESHES)
def test_every_mesh_equals_one_device(name, expert, context, method):
    (one, one_metrics), _ = gradients(name)
    mesh = {"expert": expert, "context": context, "context_method": method}
    (eight, eight_metrics), _ = gradients(name, 8, **mesh)
    assert relative_error(eight, one) < 2e-5
    for key, value in one_metrics.items():
        np.testing.assert_allclose(eight_metrics[key], value, rtol=1e-4, err_msg=key)


@pytest.mark.parametrize("ac", ["none", "offload"])
def test_checkpointing_does_not_change_the_gradient(ac):
    (expected, _), batch = gradients("glm")
    program = tiny_program(**CASES["glm"], ac=ac)
    state = tiny_state(program)
    got, _ = jax.jit(program.step.gradients)(state.params, state.frozen, batch)
    assert relative_error(got, expected) < 2e-6


def test_the_load_counts_every_choice():
    (_, metrics), batch = gradients("glm")
    load = metrics["expert_load"]
    assert load.shape == (1, 8)
    np.testing.assert_allclose(load.sum(axis=-1), 1.0, rtol=1e-6)
    choices = batch.tokens.size * TINY_GLM.num_experts_per_tok
    counts = load * choices
    np.testing.assert_allclose(counts, np.round(counts), atol=1e-3)
    assert load.max() > 1.2 / 8  # the batch is uneven: or the test below would prove nothing


def test_the_bias_moves_towards_an_even_load():
    program = tiny_program(type="sft", model=TINY_GLM, router_bias_rate=0.25)
    state, batch = tiny_state(program), tiny_batch(program)
    before = np.asarray(state.frozen["layers"]["mlp"]["router"]["bias"])
    state, metrics = program.step(state, batch)
    after = np.asarray(state.frozen["layers"]["mlp"]["router"]["bias"])
    load = np.asarray(metrics["expert_load"])
    np.testing.assert_allclose(after - before, 0.25 * np.sign(1 / 8 - load), atol=1e-6)
    assert float(metrics["expert_load_max"]) == pytest.approx(8 * load.max(), rel=1e-6)


def test_without_a_rate_the_bias_stays():
    program = tiny_program(type="sft", model=TINY_GLM)
    state = tiny_state(program)
    before = np.asarray(state.frozen["layers"]["mlp"]["router"]["bias"])
    state, _ = program.step(state, tiny_batch(program))
    np.testing.assert_array_equal(state.frozen["layers"]["mlp"]["router"]["bias"], before)


def test_a_mesh_that_does_not_divide_is_refused_with_what_would():
    with pytest.raises(ValueError, match=r"expert axis 2 needs experts, and tiny is dense; use 1"):
        tiny_program(8, model=TINY, expert=2)
    six = TINY_MOE.replace(num_experts=6)
    with pytest.raises(ValueError, match=r"8 devices do not divide .*use one of \[1, 2, 3, 6\]"):
        tiny_program(8, model=six, expert=2)
    with pytest.raises(ValueError, match=r"context axis 8 \(ulysses\) does not split num_heads 4"):
        tiny_program(8, model=TINY, context=8)
    with pytest.raises(ValueError, match=r"router_bias_rate 0.1 .*tiny-moe does not have; use 0"):
        tiny_program(model=TINY_MOE, router_bias_rate=0.1)
    with pytest.raises(ValueError, match=r"expert axis 3 does not divide 8 devices"):
        tiny_program(8, model=TINY_MOE, expert=3)


@pytest.mark.parametrize("mode", ["balanced", "zipf"])
def test_forced_routing_loads_experts_as_it_says(mode):
    program = tiny_program(8, type="sft", model=TINY_GLM, expert=2, routing=mode)
    state, batch = tiny_state(program), tiny_batch(program)
    _, metrics = jax.jit(program.step.gradients)(state.params, state.frozen, batch)
    load = np.asarray(metrics["expert_load"])
    if mode == "balanced":
        np.testing.assert_allclose(load, 1 / 8, rtol=1e-6)
    else:
        assert load.max() > 2 * load.min()
