"""Rollouts and their advantages into rows of one length, and the rows into micro-batches."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxrl.data.packing import first_fit_decreasing
from jaxrl.parallel.distributed import global_batch
from jaxrl.rollout.rollouts import Rollout
from jaxrl.train.batch import Batch
from jaxrl.train.program import Program


@dataclasses.dataclass(frozen=True)
class RlRows:
    """Arrays [M, B, T] as `train.batch.Batch` has them, and how many of the M micro-batches hold
    anything; lengths: of the documents, row by row."""

    tokens: np.ndarray
    loss_mask: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    advantages: np.ndarray
    sampler_logprobs: np.ndarray
    used: int
    lengths: tuple[int, ...]


def pack_rollouts(
    rollouts: Sequence[Rollout],
    advantages: Sequence[float],
    *,
    seq_len: int,
    rows: int,
    micro_batches: int,
    pad_id: int,
) -> RlRows:
    """Whole rollouts into rows (first-fit decreasing), rows of like cost into one micro-batch of
    `rows`: its devices wait for each other, and attention costs the sum of squared lengths.

    Every rollout has at most `seq_len` tokens. Raises ValueError where the rows do not fit into
    `micro_batches`.
    """
    lengths = [len(rollout.tokens) for rollout in rollouts]
    bins = first_fit_decreasing(lengths, seq_len)
    if len(bins) > rows * micro_batches:
        raise ValueError(f"{len(bins)} rows, and {micro_batches} micro-batches hold {rows} each")
    bins.sort(key=lambda chosen: -sum(lengths[i] ** 2 for i in chosen))
    shape = (micro_batches, rows, seq_len)
    ints = {name: np.zeros(shape, np.int32) for name in ("loss_mask", "positions", "segment_ids")}
    floats = {name: np.zeros(shape, np.float32) for name in ("advantages", "sampler_logprobs")}
    tokens = np.full(shape, pad_id, np.int32)
    for number, chosen in enumerate(bins):
        m, row, begin = number // rows, number % rows, 0
        for segment, i in enumerate(chosen, 1):
            rollout = rollouts[i]
            here = (m, row, slice(begin, begin := begin + lengths[i]))
            tokens[here] = rollout.tokens
            ints["loss_mask"][here] = rollout.drawn
            ints["positions"][here] = np.arange(lengths[i])
            ints["segment_ids"][here] = segment
            floats["advantages"][here] = advantages[i]
            floats["sampler_logprobs"][here] = rollout.logprobs
    in_rows = tuple(lengths[i] for chosen in bins for i in chosen)
    used = -(-len(bins) // rows)
    return RlRows(tokens=tokens, **ints, **floats, used=used, lengths=in_rows)


def device_batch(program: Program, rows: RlRows) -> Batch:
    """The rows on the devices; each process moves its own."""

    def make(here: slice) -> Batch:
        def part(a: np.ndarray) -> Any:
            return a[:, here]

        return Batch(
            tokens=part(rows.tokens),
            loss_mask=part(rows.loss_mask),
            positions=part(rows.positions),
            segment_ids=part(rows.segment_ids),
            advantages=part(rows.advantages),
            sampler_logprobs=part(rows.sampler_logprobs),
        )

    return global_batch(program.abstract_batch(), make)
