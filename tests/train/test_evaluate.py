"""A validation's loss is the training step's, without the gradient."""

import dataclasses

import numpy as np
import pytest
from tiny import TINY, TINY_GLM, tiny_batch, tiny_program, tiny_state

from jaxrl.train.evaluate import Evaluation

CASES = {
    "full": {"model": TINY},
    "lora": {"model": TINY, "rank": 4},
    "chunks": {"model": TINY.replace(tie_embeddings=False), "head_chunk": 48},
    "experts": {"model": TINY_GLM, "expert": 2, "context": 2},
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("name", CASES)
def test_loss_is_the_steps(name, packed):
    program = tiny_program(8, type="sft", **CASES[name])
    state, batch = tiny_state(program), tiny_batch(program, packed=packed)
    found = Evaluation(program.step)(state, batch)
    _, metrics = program.step(state, batch)  # which donates the state: after its evaluation
    assert float(found["tokens"]) == float(metrics["tokens"]) > 0
    mean = float(found["loss"]) / float(found["tokens"])
    np.testing.assert_allclose(mean, float(metrics["loss"]), rtol=1e-6)


def test_layers_outputs_are_not_kept_for_backward():
    """Of 3 layers' inputs, which the step keeps, the program holds no stack."""
    program = tiny_program(1, type="sft", seq_len=256)
    abstract = program.layout.abstract()
    lowered = Evaluation(program.step).jitted.lower(
        abstract.params, abstract.frozen, program.abstract_batch()
    )
    rows, T, D = program.rows, program.seq_len, TINY.hidden_size
    assert f"f32[3,{rows},{T},{D}]" not in lowered.compile().as_text()
    step = program.lower().compile().as_text()
    assert f"f32[3,{rows},{T},{D}]" in step


def test_batch_without_trained_tokens_counts_none():
    program = tiny_program(1, type="sft")
    batch = tiny_batch(program)
    batch = dataclasses.replace(batch, loss_mask=np.zeros_like(batch.loss_mask))
    found = Evaluation(program.step)(tiny_state(program), batch)
    assert float(found["tokens"]) == float(found["loss"]) == 0.0
