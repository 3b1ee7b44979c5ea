"""Log-probs of the reference model are those of the weights that a run began with."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from tiny import TINY, TINY_GLM, tiny_batch, tiny_program, tiny_state

from jaxrl import save_pretrained
from jaxrl.config import LossConfig
from jaxrl.models.transformer import Transformer, initialize
from jaxrl.train.evaluate import Evaluation
from jaxrl.train.pretrained import load_state
from jaxrl.train.reference import Reference

CASES = {
    "full": {"model": TINY},
    "lora": {"model": TINY, "rank": 4},
    "chunks": {"model": TINY.replace(tie_embeddings=False), "head_chunk": 48},
    "ring": {"model": TINY, "context": 2, "context_method": "ring"},
    "experts": {"model": TINY_GLM, "expert": 2, "context": 2},
}
LOSS = LossConfig(ref_kl_coef=0.1)


@pytest.mark.parametrize("name", CASES)
def test_they_are_the_first_states_and_stay_so(name, tmp_path):
    program = tiny_program(8, type="rl", loss=LOSS, skip_empty=True, **CASES[name])
    model = Transformer(CASES[name]["model"])
    save_pretrained(initialize(model, jax.random.key(3)), tmp_path / "model")
    state = load_state(program.layout, tmp_path / "model", jax.random.key(0))
    batch = tiny_batch(program, packed=True)
    reference = Reference(program.step, tmp_path / "model")
    first = np.asarray(reference(state, batch))
    # Of each trained token, at its own place.
    loss = Evaluation(program.step)(state, batch)
    counted = np.asarray(batch.loss_mask).astype(bool)
    begins = np.diff(np.asarray(batch.segment_ids), axis=-1, prepend=-1) != 0
    total = -first[counted & ~begins].sum()
    np.testing.assert_allclose(total, float(loss["loss"]), rtol=1e-5)
    batch = dataclasses.replace(batch, sampler_logprobs=first, ref_logprobs=first)
    state, metrics = program.step(state, batch)
    assert abs(float(metrics["mismatch_kl"])) < 1e-8 and abs(float(metrics["ref_kl"])) < 1e-8
    again = np.asarray(reference(state, batch))
    state, metrics = program.step(state, batch)
    assert float(metrics["ref_kl"]) > 1e-6  # the policy has moved
    np.testing.assert_array_equal(again, first)  # and the reference has not


def test_what_adapters_say_is_no_part_of_it():
    program = tiny_program(1, type="rl", loss=LOSS, rank=4)
    state, batch = tiny_state(program), tiny_batch(program)
    found = Reference(program.step, "")(state, batch)
    base = tiny_program(1, type="rl", loss=LOSS)
    params = nnx.to_pure_dict(nnx.state(Transformer(TINY)))
    plain = dataclasses.replace(tiny_state(base), params=_picked(state.frozen, params))
    expected = Evaluation(base.step)(plain, batch)
    mask = np.asarray(batch.loss_mask).astype(bool)
    mask[..., 0] = False  # nothing comes before it
    np.testing.assert_allclose(-np.asarray(found)[mask].sum(), float(expected["loss"]), rtol=1e-5)


def _picked(values, like):
    return {k: _picked(values[k], v) if isinstance(v, dict) else values[k] for k, v in like.items()}


def test_micro_batches_that_nothing_is_trained_in_are_left_out(tmp_path):
    program = tiny_program(1, type="rl", loss=LOSS, skip_empty=True)
    save_pretrained(initialize(Transformer(TINY), jax.random.key(3)), tmp_path / "model")
    state = load_state(program.layout, tmp_path / "model", jax.random.key(0))
    batch = tiny_batch(program)
    mask = np.array(batch.loss_mask)
    mask[1] = 0
    found = Reference(program.step, tmp_path / "model")(
        state, dataclasses.replace(batch, loss_mask=mask)
    )
    assert np.all(np.asarray(found)[1] == 0) and np.all(np.asarray(found)[0, :, 1:] < 0)
