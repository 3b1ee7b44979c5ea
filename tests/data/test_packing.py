"""Documents into rows: all of them, whole, apart, and with little padding."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.data.packing import bins_of, fill_rows, first_fit_decreasing
from jaxrl.data.template import Encoded

PAD = 99


def document(length, number):
    """Tokens that say which document they are of, and where in it."""
    mask = np.arange(length) % 3 == number % 3
    return Encoded(np.arange(length, dtype=np.int32) + 1000 * (number + 1), mask)


def documents_of(rows):
    """(row, tokens, mask, positions) of every segment."""
    for row in range(len(rows)):
        ids = rows.segment_ids[row]
        edges = np.flatnonzero(np.diff(ids, prepend=-1, append=-1))
        for a, b in itertools.pairwise(edges):
            if ids[a]:
                found = (rows.tokens, rows.loss_mask, rows.positions)
                yield row, *(part[row, a:b] for part in found)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 64), max_size=40), st.booleans())
def test_every_document_once_whole_and_apart(lengths, several):
    documents = [document(n, i) for i, n in enumerate(lengths)]
    rows = fill_rows(documents, bins_of(documents, 64, several=several), 64, PAD)
    seen = []
    for row, tokens, mask, positions in documents_of(rows):
        number = tokens[0] // 1000 - 1
        np.testing.assert_array_equal(tokens, documents[number].tokens)
        np.testing.assert_array_equal(mask, documents[number].mask)
        np.testing.assert_array_equal(positions, np.arange(len(tokens)))
        seen.append((row, number))
    assert sorted(number for _, number in seen) == list(range(len(lengths)))
    if not several:
        assert [number for _, number in seen] == list(range(len(lengths))) == list(range(len(rows)))
    padding = rows.segment_ids == 0
    assert (rows.tokens[padding] == PAD).all() and padding.sum() == 64 * len(rows) - sum(lengths)
    assert not rows.loss_mask[padding].any() and not rows.positions[padding].any()
    for name in ("tokens", "loss_mask", "positions", "segment_ids"):
        array = getattr(rows, name)
        assert array.dtype == np.int32 and array.shape == (len(rows), 64)


def naive(lengths, capacity):
    """First-fit decreasing as its name says."""
    bins = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = (b for b in bins if sum(lengths[j] for j in b) + lengths[i] <= capacity)
        bin = next(fits, None)
        if bin is None:
            bins.append([i])
        else:
            bin.append(i)
    return sorted(sorted(b) for b in bins)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=60))
def test_it_is_first_fit_decreasing(lengths):
    assert first_fit_decreasing(lengths, 20) == naive(lengths, 20)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("median, sigma", [(300, 1.0), (600, 0.8)])
def test_rows_of_a_window_are_97_percent_full(median, sigma, seed):
    drawn = np.random.default_rng(seed).lognormal(np.log(median), sigma, 1024).astype(int)
    lengths = np.clip(drawn, 16, 2048).tolist()
    bins = first_fit_decreasing(lengths, 2048)
    assert sum(lengths) / (2048 * len(bins)) >= 0.97


@pytest.mark.parametrize("length", [0, 65])
def test_a_document_that_fits_no_row_is_refused(length):
    with pytest.raises(ValueError, match=rf"document 1 has {length} tokens; a row takes 1 to 64"):
        first_fit_decreasing([3, length], 64)


def test_empty_rows_are_padding_alone():
    rows = fill_rows([], [[]] * 3, 8, PAD)
    assert rows.tokens.tolist() == [[PAD] * 8] * 3
    assert not (rows.segment_ids.any() or rows.loss_mask.any() or rows.positions.any())
