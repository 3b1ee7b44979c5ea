"""Random batches of the published benchmark's kind: full rows, one document each."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.train.batch import Batch


def batch_shapes(
    kind: str,
    micro_batches: int,
    rows: int,
    seq_len: int,
    *,
    packed: bool = False,
    shared_prompts: bool = False,
) -> Batch:
    """The abstract batch [M, B, T] of training type `kind` ("rl" or "sft"); `packed`: with
    positions and segment ids, shared_prompts: with family ids, too."""
    shape = (micro_batches, rows, seq_len)
    ints: Any = jax.ShapeDtypeStruct(shape, jnp.int32)
    floats: Any = jax.ShapeDtypeStruct(shape, jnp.float32) if kind == "rl" else None
    documents: Any = {"positions": ints, "segment_ids": ints} if packed else {}
    if shared_prompts:
        documents["family_ids"] = ints
    return Batch(
        tokens=ints, loss_mask=ints, advantages=floats, sampler_logprobs=floats, **documents
    )


def fake_batch(
    kind: str,
    micro_batches: int,
    rows: int,
    seq_len: int,
    seed: int = 0,
    only: slice = slice(None),
) -> Batch:
    """What the published rows were fed, as numpy arrays [M, B, T].

    rl: ids uniform in [0, 100), advantages and sampler log-probs standard normal. sft: one
    constant id per row. Every token is trained. `only` of the B rows are made; a row is the same
    whichever others are made with it, so that each host can make its own.
    """
    made = [_row(kind, micro_batches, seq_len, (seed, row)) for row in range(rows)[only]]
    arrays: list[Any] = [np.stack(pieces, axis=1) for pieces in zip(*made, strict=True)]
    tokens, advantages, sampler = arrays if kind == "rl" else (*arrays, None, None)
    mask: Any = np.ones(tokens.shape, np.int32)
    return Batch(tokens=tokens, loss_mask=mask, advantages=advantages, sampler_logprobs=sampler)


def _row(kind: str, micro_batches: int, seq_len: int, seed: tuple[int, int]) -> tuple:
    """One row of every micro-batch, arrays [M, T]: tokens, and for rl advantages and log-probs."""
    rng, shape = np.random.default_rng(seed), (micro_batches, seq_len)
    if kind == "sft":
        return (np.broadcast_to(rng.integers(0, 100, (micro_batches, 1), np.int32), shape),)
    tokens = rng.integers(0, 100, shape, np.int32)
    return tokens, *(rng.standard_normal(shape, np.float32) for _ in range(2))
