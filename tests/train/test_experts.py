"""The step of models with experts: against the plain loss, and over every mesh that divides."""

import functools

import jax
import numpy as np
import pytest
from test_step import plain_loss
from tiny import TINY_GLM, TINY_MOE, relative_error, tiny_batch, tiny_program, tiny_state

CASES = {
    "moe": {"type": "sft", "model": TINY_MOE},
    "moe_lora_chunks": {"type": "rl", "model": TINY_MOE, "rank": 4, "experts_chunk": 40},
    "glm": {"type": "rl", "model": TINY_GLM},
    "glm_lora": {"type": "sft", "model": TINY_GLM, "rank": 4},
    "glm_chunks": {"type": "sft", "model": TINY_GLM, "experts_chunk": 48, "mlp_chunk": 40},
}


@functools.cache
def gradients(name: str, devices: int = 1, **mesh):
    """(gradient, metrics, the batch they are of) of a case on so many devices."""
    program = tiny_program(devices, **CASES[name] | mesh)
    state, batch = tiny_state(program), tiny_batch(program, packed=name != "moe")
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


MESHES = [(e, c) for e in (1, 2, 4, 8) for c in (1, 2, 4, 8) if e * c <= 8]


@pytest.mark.parametrize(("expert", "context"), MESHES)
@pytest.mark.parametrize("name", ["glm", "moe_lora_chunks"])
def test_every_mesh_equals_one_device(name, expert, context):
    (one, one_metrics), _ = gradients(name)
    # Four query heads: eight devices cannot share them out.
    method = "ring" if name == "glm" or context == 8 else "ulysses"
    mesh = {"expert": expert, "context": context, "context_method": method}
    (eight, eight_metrics), _ = gradients(name, 8, **mesh)
    assert relative_error(eight, one) < 2e-5
    for key, value in one_metrics.items():
        np.testing.assert_allclose(eight_metrics[key], value, rtol=1e-4, err_msg=key)
