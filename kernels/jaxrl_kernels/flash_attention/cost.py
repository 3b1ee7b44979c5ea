"""FLOPs, bytes and visited blocks of the attention kernels, from shapes and document lengths."""

import math
from collections.abc import Iterable, Sequence

# Products over the scores' blocks, each 2 H FLOPs per head and (query, key) pair. Scores are made
# again in both backward kernels, and dp too.
PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4}


def pairs(doc_lengths: Iterable[int], *, causal: bool = True) -> int:
    """(query, key) pairs that see each other in documents of these lengths."""
    return sum(n * (n + 1) // 2 if causal else n * n for n in doc_lengths)


def flops(
    which: str, B: int, N: int, H: int, doc_lengths: Sequence[int], *, causal: bool = True
) -> int:
    """FLOPs of one kernel ("forward", "dq", "dkv") over B equal rows of such documents.

    Counts visible pairs only: what the masks of the blocks on the border throw away is not work.
    """
    return PRODUCTS[which] * 2 * B * N * H * pairs(doc_lengths, causal=causal)


def bytes_accessed(which: str, B: int, T: int, N: int, K: int, H: int, itemsize: int) -> int:
    """Least bytes a kernel moves: each array read or written once."""
    queries, keys, rows = B * T * N * H * itemsize, B * T * K * H * itemsize, 4 * B * T * N
    return {
        "forward": 2 * queries + 2 * keys + rows,
        "dq": 3 * queries + 2 * keys + 2 * rows,
        "dkv": 2 * queries + 4 * keys + 2 * rows,
    }[which]


def visited_blocks(
    doc_lengths: Sequence[int], block_q: int, block_k: int, *, causal: bool = True
) -> int:
    """Blocks of scores that each kernel makes for one head of a row of such documents."""
    T, total, starts, ends = sum(doc_lengths), 0, [], []
    position = 0
    for n in doc_lengths:
        starts += [position] * n
        ends += [position + n] * n
        position += n
    for first in range(0, T, block_q):
        last = min(first + block_q, T) - 1
        end = last + 1 if causal else ends[last]
        total += math.ceil(end / block_k) - starts[first] // block_k
    return total
