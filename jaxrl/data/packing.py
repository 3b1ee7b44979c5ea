"""Documents of many lengths into rows of one length: first-fit decreasing."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxrl.data.template import Encoded


@dataclasses.dataclass(frozen=True)
class Rows:
    """R rows of T tokens, all int32 [R, T].

    positions: within the document, from 0. segment_ids: 1, 2, ... by document, 0 for padding.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of document numbers: documents by falling length, each into the first bin with room.

    O(n log n): a tree over the bins knows the most room among those below it. Bins are in the order
    of their first document, documents of a bin in their order. Raises ValueError for a document
    that is longer than `capacity`.
    """
    size = 1 << max(len(lengths) - 1, 0).bit_length()
    room = [capacity] * (2 * size)  # node n has the children 2 n and 2 n + 1; bins are the leaves
    bins: list[list[int]] = [[] for _ in lengths]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[i]
        if not 0 < length <= capacity:
            raise ValueError(f"document {i} has {length} tokens; a row takes 1 to {capacity}")
        node = 1
        while node < size:
            node = 2 * node if room[2 * node] >= length else 2 * node + 1
        bins[node - size].append(i)
        room[node] -= length
        while node := node // 2:
            room[node] = max(room[2 * node], room[2 * node + 1])
    return sorted(sorted(one) for one in bins if one)


def bins_of(documents: Sequence[Encoded], seq_len: int, *, several: bool = True) -> list[list[int]]:
    """Which documents each row gets; with `several` False each has a row of its own."""
    if several:
        return first_fit_decreasing([len(document.tokens) for document in documents], seq_len)
    return [[i] for i in range(len(documents))]


def fill_rows(
    documents: Sequence[Encoded], bins: Sequence[Sequence[int]], seq_len: int, pad_id: int
) -> Rows:
    """One row per bin, of its documents one after the other, and padding."""
    shape = (len(bins), seq_len)
    tokens = np.full(shape, pad_id, np.int32)
    mask, positions, segments = (np.zeros(shape, np.int32) for _ in range(3))
    for row, chosen in enumerate(bins):
        begin = 0
        for number, i in enumerate(chosen, 1):
            length = len(documents[i].tokens)
            here = slice(begin, begin := begin + length)
            tokens[row, here] = documents[i].tokens
            mask[row, here] = documents[i].mask
            positions[row, here] = np.arange(length)
            segments[row, here] = number
    return Rows(tokens, mask, positions, segments)
