"""Rollouts and their advantages into rows of one length, and the rows into micro-batches."""

import collections
import dataclasses
from collections.abc import Iterable, Sequence
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
    anything; lengths: of the documents, row by row, prefixes: tokens that each goes on from."""

    tokens: np.ndarray
    loss_mask: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    family_ids: np.ndarray
    advantages: np.ndarray
    sampler_logprobs: np.ndarray
    used: int
    lengths: tuple[int, ...]
    prefixes: tuple[int, ...]

    @property
    def shared(self) -> bool:
        """Whether any document goes on from another."""
        return any(self.prefixes)


@dataclasses.dataclass(frozen=True)
class Document:
    """Tokens [begin, end) of a rollout, which go on from the tokens before them of its family's
    first document. trained: whether it is the rollout's own."""

    rollout: int
    begin: int
    end: int
    trained: bool = True

    @property
    def pairs(self) -> float:
        """Queries and keys of attention."""
        return (self.end**2 - self.begin**2) / 2


type Family = list[Document]


def pack_rollouts(
    rollouts: Sequence[Rollout],
    advantages: Sequence[float],
    *,
    seq_len: int,
    rows: int,
    micro_batches: int,
    pad_id: int,
    share_prompts: bool = False,
) -> RlRows:
    """Whole rollouts into rows, rows of like cost into one micro-batch of `rows`: its devices wait
    for each other, and attention costs the pairs of tokens that see each other.

    With `share_prompts`, and where that takes fewer micro-batches, what rollouts of a row begin
    with up to the first drawn token lies in it once, and they are documents that go on from it.
    The prompt's last token is each one's own: it predicts what they differ in.

    Every rollout has at most `seq_len` tokens. Raises ValueError where the rows do not fit into
    `micro_batches`.
    """
    bins = separate_rows(rollouts, seq_len)
    if share_prompts:
        shared = shared_rows(rollouts, seq_len)
        bins = min(bins, shared, key=lambda bins: -(-len(bins) // rows))
    if len(bins) > rows * micro_batches:
        raise ValueError(f"{len(bins)} rows, and {micro_batches} micro-batches hold {rows} each")
    bins.sort(key=lambda row: -sum(document.pairs for family in row for document in family))
    shape = (micro_batches, rows, seq_len)
    names = ("loss_mask", "positions", "segment_ids", "family_ids")
    ints = {name: np.zeros(shape, np.int32) for name in names}
    floats = {name: np.zeros(shape, np.float32) for name in ("advantages", "sampler_logprobs")}
    tokens = np.full(shape, pad_id, np.int32)
    lengths, prefixes = [], []
    for number, chosen in enumerate(bins):
        m, row, at = number // rows, number % rows, 0
        documents = [(f, d) for f, family in enumerate(chosen, 1) for d in family]
        for segment, (family, document) in enumerate(documents, 1):
            rollout, part = rollouts[document.rollout], slice(document.begin, document.end)
            length = document.end - document.begin
            here = (m, row, slice(at, at := at + length))
            tokens[here] = rollout.tokens[part]
            ints["positions"][here] = np.arange(document.begin, document.end)
            ints["segment_ids"][here] = segment
            ints["family_ids"][here] = family
            lengths.append(length)
            prefixes.append(document.begin)
            if document.trained:
                ints["loss_mask"][here] = rollout.drawn[part]
                floats["advantages"][here] = advantages[document.rollout]
                floats["sampler_logprobs"][here] = rollout.logprobs[part]
    return RlRows(
        tokens=tokens,
        **ints,
        **floats,
        used=-(-len(bins) // rows),
        lengths=tuple(lengths),
        prefixes=tuple(prefixes),
    )


def separate_rows(rollouts: Sequence[Rollout], seq_len: int) -> list[list[Family]]:
    """Every rollout a document of its own; first-fit decreasing."""
    lengths = [len(rollout.tokens) for rollout in rollouts]
    bins = first_fit_decreasing(lengths, seq_len)
    return [[[Document(i, 0, lengths[i])] for i in chosen] for chosen in bins]


def shared_rows(rollouts: Sequence[Rollout], seq_len: int) -> list[list[Family]]:
    """Rollouts that begin alike as families, the largest first: whole into the first row with room,
    or, where none has, one by one to where their prompt is, or there is room for it as well."""
    groups: dict[tuple[int, ...], list[int]] = collections.defaultdict(list)
    for i, rollout in enumerate(rollouts):
        groups[tuple(rollout.tokens[: shared_length(rollout)])].append(i)
    room: list[int] = []
    rows: list[list[Family]] = []

    def first(cost: int, among: Iterable[int]) -> int:
        """The first row with so much room; a new one, if there is none."""
        return next((row for row in among if room[row] >= cost), len(rows))

    def place(prompt: int, chosen: Sequence[int]) -> None:
        """These rollouts of a group, with a prompt of so many tokens."""
        rest = {i: len(rollouts[i].tokens) - prompt for i in chosen}
        cost = prompt + sum(rest.values())
        held: dict[int, list[int]] = {}  # of each row, those of the group
        if (row := first(cost, range(len(rows)))) < len(rows):
            held[row] = list(chosen)
            room[row] -= cost
        else:
            for i in sorted(chosen, key=lambda i: -rest[i]):
                cost = rest[i]
                if (row := first(cost, held)) == len(rows):
                    cost = prompt + rest[i]
                    row = first(cost, range(len(rows)))
                if row == len(rows):
                    rows.append([])
                    room.append(seq_len)
                held.setdefault(row, []).append(i)
                room[row] -= cost
        for row, members in held.items():
            rows[row] += families(rollouts, prompt, members)

    sizes = {
        p: len(p) + sum(len(rollouts[i].tokens) - len(p) for i in g) for p, g in groups.items()
    }
    for prompt, chosen in sorted(groups.items(), key=lambda item: -sizes[item[0]]):
        place(len(prompt), chosen)
    return rows


def families(rollouts: Sequence[Rollout], prompt: int, chosen: Sequence[int]) -> list[Family]:
    """Of these rollouts of a row, which begin with the same `prompt` tokens."""
    ends = [(i, len(rollouts[i].tokens)) for i in chosen]
    if len(chosen) == 1 or not prompt:
        return [[Document(i, 0, end)] for i, end in ends]
    shared = Document(chosen[0], 0, prompt, trained=False)
    return [[shared, *(Document(i, prompt, end) for i, end in ends)]]


def shared_length(rollout: Rollout) -> int:
    """Tokens before the one that predicts the first drawn token: what other rollouts may share."""
    drawn = rollout.drawn.index(True) if True in rollout.drawn else 0
    return max(drawn - 1, 0)


def device_batch(program: Program, rows: RlRows) -> Batch:
    """The rows on the devices; each process moves its own. Rows that share no prompts are a batch
    of the program without them."""
    program = dataclasses.replace(program, shared_prompts=rows.shared)

    def make(here: slice) -> Batch:
        def part(a: np.ndarray) -> Any:
            return a[:, here]

        return Batch(
            tokens=part(rows.tokens),
            loss_mask=part(rows.loss_mask),
            positions=part(rows.positions),
            segment_ids=part(rows.segment_ids),
            family_ids=part(rows.family_ids) if rows.shared else None,
            advantages=part(rows.advantages),
            sampler_logprobs=part(rows.sampler_logprobs),
        )

    return global_batch(program.abstract_batch(), make)
