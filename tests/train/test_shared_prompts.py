"""Training on a prompt once is training on it with every rollout."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny import TINY, TINY_MOE, relative_error, tiny_program, tiny_state

from jaxrl.config import LossConfig
from jaxrl.envs.protocol import Task
from jaxrl.models.config import ModelConfig
from jaxrl.options import ConfigError, default_config, from_config
from jaxrl.rl_config import RlConfig
from jaxrl.rollout.rollouts import Rollout
from jaxrl.train.program import rl_program
from jaxrl.train.rl_batch import device_batch, pack_rollouts

# Clipped loosely: no token is at the edge, where rounding would decide.
GSPO = LossConfig(name="gspo", sequence_clip_low=0.9, sequence_clip_high=9)
CASES = {
    "one_device": (1, {}),
    "recompute": (1, {"ac": "recompute", "head_chunk": 24}),
    "lora": (1, {"rank": 4, "ac": "selective"}),
    "gspo": (1, {"loss": GSPO}),
    "fsdp": (4, {}),
    "ulysses": (4, {"context": 2, "context_method": "ulysses"}),
    "experts": (4, {"model": TINY_MOE, "expert": 2}),
}


def rollouts() -> list[Rollout]:
    """Three tasks; one rollout of the second has several turns, the third has only one."""
    rng, made = np.random.default_rng(0), []
    for prompt, turns in ((35, (5, 3, 8, 1)), (40, (4, 3, 2)), (6, (7,))):
        said = rng.integers(0, 128, prompt).tolist()
        for number, turn in enumerate(turns):
            made.append(Rollout(Task(f"{prompt}", ())))
            made[-1].say(said)
            for _ in range(2 if (prompt, number) == (40, 1) else 1):
                near = (-np.log(128) + 0.1 * rng.standard_normal(turn)).tolist()
                made[-1].draw(rng.integers(0, 128, turn).tolist(), near, [0] * turn)
                made[-1].say(rng.integers(0, 128, 2).tolist())
    return made


@pytest.mark.parametrize("name", CASES)
def test_gradient_is_that_of_whole_rollouts(name):
    devices, options = CASES[name]
    found = []
    for shared in (False, True):
        program = tiny_program(devices, type="rl", skip_empty=True, seq_len=64, rows=4, **options)
        program = dataclasses.replace(program, packed=True, shared_prompts=shared)
        drawn = rollouts()
        rows = pack_rollouts(
            drawn,
            np.random.default_rng(1).standard_normal(len(drawn)).tolist(),
            seq_len=program.seq_len,
            rows=program.rows,
            micro_batches=program.micro_batches,
            pad_id=0,
            share_prompts=shared,
        )
        assert (sum(rows.lengths) < sum(len(r.tokens) for r in drawn)) == shared
        state, batch = tiny_state(program), device_batch(program, rows)
        grads, metrics = jax.jit(program.step.gradients)(state.params, state.frozen, batch)
        metrics.pop("expert_load", None)  # of all tokens, repeated prompts among them
        found.append(jax.device_get((grads, metrics)))
    (whole, expected), (once, got) = found
    assert relative_error(once, whole) < 2e-5
    assert expected["tokens"] == sum(r.length for r in rollouts()) and expected["loss"] != 0
    for metric, value in expected.items():
        np.testing.assert_allclose(got[metric], value, rtol=2e-5, atol=1e-7, err_msg=metric)


def program(share: str, model: ModelConfig = TINY, **mesh) -> bool:
    config = default_config(RlConfig)
    config.share_prompts, config.seq_len = share, 128
    config.mesh.update(mesh)
    return rl_program(from_config(RlConfig, config), model, jax.devices()[:4]).shared_prompts


def test_prompts_are_shared_where_attention_can():
    assert program("auto") and program("yes") and not program("no")
    assert program("auto", context=2, context_method="ulysses")
    assert not program("auto", context=2, context_method="ring")
    with pytest.raises(
        ConfigError, match=r"share_prompts is 'yes', and context axis 2 \(ring\) has"
    ):
        program("yes", context=2, context_method="ring")
