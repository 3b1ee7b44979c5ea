"""The stream of global batches: all samples, the same stream again, and what could not be used."""

import collections
import itertools
import json
import multiprocessing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.data.chat import SampleError
from jaxrl.data.pipeline import batches, validation_batches
from jaxrl.data.sources import hold_out, open_samples
from jaxrl.options import ConfigError
from jaxrl.sft_config import DataConfig

ARRAYS = ("tokens", "loss_mask", "positions", "segment_ids")
CONFIG = {"seq_len": 128, "window": 16}
LONG = "a long answer " * 50


def chat(number, answer=None):
    says = "so much " * (number % 7) + f"it is {number}" if answer is None else answer
    question = {"role": "user", "content": f"question {number}"}
    return {"messages": [question, {"role": "assistant", "content": says}]}


def write(file, samples):
    file.write_text("".join(json.dumps(s) + "\n" for s in samples), encoding="utf-8")
    return open_samples([str(file)])


@pytest.fixture
def samples(tmp_path):
    return write(tmp_path / "a.jsonl", [chat(n) for n in range(50)])


@pytest.fixture
def make(samples, tokenizers):
    def make(data=samples, *, batch_size=3, seed=0, epochs=1, **options):
        config = DataConfig(**CONFIG | options)
        tokenizer = tokenizers["smollm2"]
        return batches(config, data, tokenizer, batch_size=batch_size, seed=seed, epochs=epochs)

    return make


def documents(batch):
    """Of each row the tokens of its documents."""
    rows = []
    for tokens, ids in zip(batch.tokens, batch.segment_ids, strict=True):
        rows.append([tokens[ids == i].tolist() for i in range(1, ids.max() + 1)])
    return rows


def numbers(stream, pack):
    """The samples' numbers in the order of the stream."""
    known = {tuple(pack.encode(i).tokens.tolist()): i for i in range(len(pack.samples))}
    return [known[tuple(d)] for batch in stream for row in documents(batch) for d in row]


def same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        for name in ARRAYS:
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        assert (a.doc_lengths, a.counts, a.epoch) == (b.doc_lengths, b.counts, b.epoch)


@pytest.mark.parametrize("options", [{}, {"pack": False}, {"shuffle": False}])
def test_an_epoch_has_every_sample_once_and_counts_what_it_has(options, make):
    stream = make(**options)
    found = list(stream)
    assert sorted(numbers(found, stream.pack)) == list(range(50))
    assert all(getattr(b, name).shape == (3, 128) for b in found for name in ARRAYS)
    lengths = [len(d) for batch in found for row in documents(batch) for d in row]
    assert [n for b in found for n in b.doc_lengths] == lengths
    counts = sum((b.counts for b in found), collections.Counter())
    trained = sum(int(b.loss_mask.sum()) for b in found)
    expected = {"samples": 50, "documents": 50, "tokens": sum(lengths), "trained_tokens": trained}
    assert counts == expected and trained > 50
    assert found[-1].epoch == 1 and all(a.epoch < b.epoch for a, b in itertools.pairwise(found))
    per_row = {len(row) for batch in found[:-1] for row in documents(batch)}
    assert per_row == {1} if options.get("pack") is False else max(per_row) > 1


def test_the_last_batch_is_filled_up_with_padding(make):
    *_, last = make(batch_size=7, pack=False)
    assert [len(row) for row in documents(last)] == [1] + [0] * 6  # 50 rows
    assert (last.tokens[1:] == last.tokens[1, 0]).all() and not last.loss_mask[1:].any()


def test_every_epoch_and_every_seed_has_an_order_of_its_own(make):
    stream = make(epochs=3)
    order = numbers(stream, stream.pack)
    epochs = [order[i : i + 50] for i in (0, 50, 100)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(50))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    for seed, equal in ((0, True), (1, False), (2**40, False)):
        assert (numbers(make(seed=seed), stream.pack) == epochs[0]) == equal


def test_long_rows_lie_anywhere_in_a_window(make, tmp_path):
    """In the order of first-fit decreasing they would come first."""
    data = write(tmp_path / "b.jsonl", [chat(n, "ab " * (16 if n == 3 else 1)) for n in range(30)])
    places = set()
    for seed in range(5):
        stream = make(data, seed=seed, pack=False, window=64, batch_size=1)
        places.add(np.argmax([batch.doc_lengths[0] for batch in stream]))
    assert len(places) > 1


def test_every_window_has_an_order_of_rows_of_its_own(make):
    stream = make(pack=False, window=25, batch_size=25)  # a window's rows: by number, then mixed
    order = numbers(stream, stream.pack)
    assert not np.array_equal(np.argsort(order[:25]), np.argsort(order[25:]))


def test_validation_is_one_pass_in_order(samples, tokenizers):
    config = DataConfig(**CONFIG | {"pack": False})
    stream = validation_batches(config, samples, tokenizers["smollm2"], batch_size=4)
    assert numbers(stream, stream.pack) == list(range(50))


def test_held_out_samples_are_in_no_training_batch(make, samples):
    train, held = hold_out(samples, 9, seed=0)
    kept, out = make(train), make(held)
    texts = [{tuple(d) for b in s for r in documents(b) for d in r} for s in (kept, out)]
    assert [len(t) for t in texts] == [41, 9] and not texts[0] & texts[1]


def test_the_stream_goes_on_where_it_was_left(make):
    options = {"epochs": 3, "batch_size": 5}
    whole = list(make(**options))

    @settings(max_examples=15, deadline=None)
    @given(st.integers(0, len(whole)))
    def check(taken):
        stream = make(**options)
        same(list(itertools.islice(stream, taken)), whole[:taken])
        state = json.loads(json.dumps(stream.get_state()))
        other = make(**options)
        next(other, None)  # wherever it is
        other.set_state(state)
        same(list(other), whole[taken:])

    check()


def test_workers_make_the_same_stream_and_take_over_from_the_thread_and_back(make):
    whole = list(make(epochs=2))
    thread = make(epochs=2)
    same(list(itertools.islice(thread, 3)), whole[:3])
    stream = make(epochs=2, workers=2)
    stream.set_state(thread.get_state())
    same(list(itertools.islice(stream, 4)), whole[3:7])
    thread.set_state(stream.get_state())
    same(list(thread), whole[7:])
    stream.close()
    assert not multiprocessing.active_children()


BAD = {
    "refused": ({"messages": [{"role": "user", "content": "a"}]}, "nothing trained", "no message"),
    "malformed": ({"messages": [{"role": "x", "content": "a"}]}, "malformed", "role 'x'"),
    "empty": ({"messages": []}, "empty", "messages is empty"),
}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_cannot_be_used_stops_the_stream_by_its_place(workers, make, tmp_path):
    data = write(tmp_path / "b.jsonl", [*map(chat, range(16)), BAD["malformed"][0]])
    stream = make(data, workers=workers, shuffle=False, batch_size=1)
    next(stream)
    with pytest.raises(SampleError, match=r"b.jsonl:17: messages\[0\] has role 'x'") as caught:
        list(stream)
    assert (caught.value.reason, "\n" in str(caught.value)) == ("malformed", False)
    stream.close()


def test_or_is_counted_by_its_reason(make, tmp_path):
    bad = [sample for sample, _, _ in BAD.values()]
    data = write(tmp_path / "b.jsonl", [*map(chat, range(40)), *bad, *bad[:1]])
    stream = make(data, bad_samples="skip")
    counts = sum((b.counts for b in stream), collections.Counter())
    assert (counts["samples"], counts["documents"]) == (44, 40)
    skipped = {k: n for k, n in counts.items() if k.startswith("skipped")}
    assert skipped == {"skipped: nothing trained": 2, "skipped: malformed": 1, "skipped: empty": 1}


def test_long_samples_are_dropped_or_truncated_and_counted(make, tmp_path):
    unseen = chat(0) | {}
    unseen["messages"] = [{"role": "user", "content": LONG}, unseen["messages"][1]]
    data = write(tmp_path / "b.jsonl", [chat(1), chat(2, LONG), chat(3, LONG), unseen])
    counts = sum((b.counts for b in make(data)), collections.Counter())
    assert (counts["documents"], counts["dropped"], counts["truncated"]) == (1, 3, 0)
    found = list(make(data, overlong="truncate", shuffle=False))
    counts = sum((b.counts for b in found), collections.Counter())
    assert (counts["documents"], counts["dropped"], counts["truncated"]) == (3, 0, 2)
    assert counts["skipped: trained beyond seq_len"] == 1
    assert sorted(n for b in found for n in b.doc_lengths)[1:] == [128, 128]


@pytest.mark.parametrize("epochs", [0, 1, 2])
def test_data_of_which_nothing_can_be_used_is_an_error(epochs, make, tmp_path):
    data = write(tmp_path / "b.jsonl", [chat(n, LONG) for n in range(40)])
    with pytest.raises(ConfigError, match=r"none of the 40 samples can be used \(the last: 8 sam"):
        next(make(data, epochs=epochs))


def test_one_sample_that_can_be_used_is_enough(make, tmp_path):
    """Windows without rows may lie in a row, over the end of an epoch, too."""
    data = write(tmp_path / "b.jsonl", [chat(n, None if n == 17 else LONG) for n in range(60)])
    for seed in range(4):
        stream = make(data, epochs=0, window=4, batch_size=1, seed=seed)
        for _ in range(3):
            assert next(stream).counts["documents"] == 1


def test_a_place_in_other_data_is_refused(make, samples, tmp_path):
    stream = make()
    next(stream)
    state = stream.get_state()
    changed = make(write(tmp_path / "a.jsonl", [chat(n) for n in range(45)]))
    with pytest.raises(ConfigError, match=r"a.jsonl had 50 samples .* and has 45 now"):
        changed.set_state(state)


def test_a_file_that_shrinks_while_it_is_read_is_named(make, samples):
    stream = make(epochs=0)
    next(stream)
    samples.file.write_bytes(samples.file.read_bytes()[:100])
    with pytest.raises(ConfigError, match=r"a.jsonl had [\d,]+ bytes .* and has 100 now"):
        for _ in range(50):
            next(stream)


def test_the_number_of_steps_is_known_beforehand(make):
    for options in ({"epochs": 1}, {"epochs": 3, "pack": False}, {"shuffle": False, "epochs": 2}):
        assert make(**options).estimated_steps() == len(list(make(**options)))
    assert make(epochs=0).estimated_steps() is None


def test_rows_are_97_percent_full(make, tmp_path):
    words = np.random.default_rng(0).lognormal(np.log(40), 1.0, 1024).astype(int) + 1
    data = write(tmp_path / "b.jsonl", [chat(n, "ab " * w) for n, w in enumerate(words)])
    *found, _ = make(data, window=1024, seq_len=1024, overlong="truncate")
    assert sum(b.counts["tokens"] for b in found) / sum(b.tokens.size for b in found) >= 0.97
