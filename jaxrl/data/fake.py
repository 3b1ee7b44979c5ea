"""Random batches of the published benchmark's kind: full rows, one document each."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.train.step import Batch


def batch_shapes(kind: str, micro_batches: int, rows: int, seq_len: int) -> Batch:
    """The abstract batch [M, B, T] of training type `kind` ("rl" or "sft")."""
    shape = (micro_batches, rows, seq_len)
    ints: Any = jax.ShapeDtypeStruct(shape, jnp.int32)
    floats: Any = jax.ShapeDtypeStruct(shape, jnp.float32) if kind == "rl" else None
    return Batch(tokens=ints, loss_mask=ints, advantages=floats, sampler_logprobs=floats)


def fake_batch(kind: str, micro_batches: int, rows: int, seq_len: int, seed: int = 0) -> Batch:
    """What the published rows were fed, as numpy arrays [M, B, T].

    rl: ids uniform in [0, 100), advantages and sampler log-probs standard normal. sft: one
    constant id per row. Every token is trained.
    """
    rng = np.random.default_rng(seed)
    shape = (micro_batches, rows, seq_len)
    mask: Any = np.ones(shape, np.int32)
    tokens: Any
    if kind == "sft":
        tokens = np.broadcast_to(rng.integers(0, 100, (*shape[:2], 1), np.int32), shape).copy()
        return Batch(tokens=tokens, loss_mask=mask)
    tokens = rng.integers(0, 100, shape, np.int32)
    advantages: Any = rng.standard_normal(shape, np.float32)
    sampler: Any = rng.standard_normal(shape, np.float32)
    return Batch(tokens=tokens, loss_mask=mask, advantages=advantages, sampler_logprobs=sampler)
