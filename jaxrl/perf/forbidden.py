"""Arrays that no program of this project may hold: logits of all tokens, and a product of every
expert with every token."""

import math
from collections.abc import Sequence

from jaxrl.perf import hlo
from jaxrl.perf.hlo_text import shapes_of


def forbidden_arrays(
    text: str,
    *,
    tokens: int,
    vocab: int,
    vocab_shards: int = 1,
    experts: int = 0,
    rows: int = 0,
    features: Sequence[int] = (),
) -> dict[str, list[hlo.HloArray]]:
    """Held arrays of a compiled program by what is wrong with them; {} if nothing is.

    "logits": as many elements as [tokens, vocab] or more, one dimension of which is the vocabulary
    or a device's share of it, or a multiple of either (flattened). tokens: a device's, of one
    micro-batch. "experts": [experts, rows, feature] in any order and with any two of them, or all,
    flattened. experts: a device's own; rows: tokens that the experts work on at a time; features:
    the sizes that an expert's matrices map between.

    Arrays shaped like the program's arguments (weights, optimizer state), in any dtype, are none
    of these. A dimension that equals another by chance is taken for either: `rows` that equal one
    of `features` cannot be told from an expert's weights, and pass.
    """
    module = hlo.Module(text)
    entry = module.computations[module.entry].values()
    arguments = {
        _plain(dims) for i in entry if i.op == "parameter" for _, dims in shapes_of(i.shape)
    }
    found: dict[str, list[hlo.HloArray]] = {}
    for array in module.arrays():
        dims = _plain(array.dims)
        if dims in arguments:
            continue
        if _is_logits(dims, tokens, vocab, vocab_shards):
            found.setdefault("logits", []).append(array)
        if experts and rows and _is_dense_product(dims, experts, rows, features, tokens):
            found.setdefault("experts", []).append(array)
    return found


def _plain(dims: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(d for d in dims if d != 1))


def _is_logits(dims: Sequence[int], tokens: int, vocab: int, shards: int) -> bool:
    sizes = (vocab, -(-vocab // shards))
    wide = any(d % size == 0 for d in dims for size in sizes)
    return wide and math.prod(dims) >= tokens * vocab


def _is_dense_product(
    dims: Sequence[int], experts: int, rows: int, features: Sequence[int], tokens: int
) -> bool:
    """Whether `dims` are experts, rows (or more of them) and a feature, some of them flattened."""
    return any(
        _leaves_rows(dims, (experts, f), rows, features)
        or _leaves_rows(dims, (experts * f,), rows, features)
        or (experts in dims and any(d % (rows * f) == 0 for d in dims))
        # All rows of the micro-batch may happen to be as many as experts x `rows`.
        or (f in dims and any(d % (experts * rows) == 0 for d in dims if d != tokens))
        or any(d % (experts * rows * f) == 0 for d in dims)
        for f in features
    )


def _leaves_rows(
    dims: Sequence[int], sizes: Sequence[int], rows: int, features: Sequence[int]
) -> bool:
    """Whether `dims` hold all `sizes`, and what is left, without other features, is `rows`."""
    left = list(dims)
    for size in sizes:
        if size not in left:
            return False
        left.remove(size)
    for feature in set(features) - set(sizes):
        if feature in left:  # of a weight: [experts, feature, feature]
            left.remove(feature)
    return math.prod(left) >= rows
