"""Samples stay on disk, say where they lie, and a change of their files is noticed."""

import json
import pickle
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxrl.data.sources import check_fingerprint, hold_out, open_samples
from jaxrl.options import ConfigError


def write_jsonl(file, count, first=0):
    lines = [json.dumps({"n": n, "text": "é" * n}, ensure_ascii=False) for n in range(count)]
    file.write_text("\n".join(lines[first:]) + "\n", encoding="utf-8")
    return str(file)


def write_parquet(file, count, first=0, row_group_size=4):
    rows = [{"n": n, "m": [{"a": n, "b": None if n % 2 else "x"}]} for n in range(first, count)]
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=row_group_size)
    return str(file)


def test_any_line_of_a_jsonl_file(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes('{"n": 0, "t": "é"}\r\n\n{"n": 1}\n{"n": 2}\n \n\n'.encode())
    samples = open_samples([str(file)])
    assert [samples[i]["n"] for i in (2, 0, 1)] == [2, 0, 1]
    assert [samples.where(i) for i in range(len(samples))] == [f"{file}:{n}" for n in (1, 3, 4)]


def test_the_last_line_needs_no_newline(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"n": 0}\n{"n": 1}', encoding="utf-8")
    assert open_samples([str(file)])[1] == {"n": 1}


@pytest.mark.parametrize(
    "line, problem",
    [
        (b'{"n": 1', "no JSON .*; mend or delete the line"),
        (b"[1]", r"list '\[1\]', no JSON object"),
        (b'"a"', "str 'a', no JSON object"),
        (b'{"n": "\xff"}', "no JSON"),
    ],
)
def test_a_malformed_line_is_named(line, problem, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"n": 0}\n\n' + line + b'\n{"n": 2}\n')
    with pytest.raises(ConfigError, match=rf"a\.jsonl:3: {problem}"):
        open_samples([str(file)])


def test_rows_of_parquet_files_across_their_groups_and_without_nulls(tmp_path):
    samples = open_samples([write_parquet(tmp_path / "a.parquet", 10)])
    assert len(samples) == 10
    for i in (9, 0, 5, 4, 3, 8):
        assert samples[i] == {"n": i, "m": [{"a": i} if i % 2 else {"a": i, "b": "x"}]}
    assert samples.where(7) == f"{tmp_path / 'a.parquet'} row 7"


def test_patterns_are_filled_in_sorted_and_sources_follow_one_another(tmp_path):
    for name in "bac":
        write_parquet(tmp_path / f"{name}.parquet", 3)
    last = write_jsonl(tmp_path / "z[1].jsonl", 2)  # brackets are no pattern where there is a file
    samples = open_samples([str(tmp_path / "*.parquet"), last])
    places = [samples.where(i).rsplit("/", 1)[1] for i in range(len(samples))]
    expected = [f"{name}.parquet row {i}" for name in "abc" for i in range(3)]
    assert places == [*expected, "z[1].jsonl:1", "z[1].jsonl:2"]
    assert [samples[i]["n"] for i in range(len(samples))] == [0, 1, 2] * 3 + [0, 1]


@pytest.mark.parametrize(
    "name, problem",
    [
        ("nowhere.jsonl", "no data file 'nowhere.jsonl'; give JSONL or Parquet"),
        ("data/nowhere.jsonl", "no data file"),
        ("a/b/c", "no data file"),
        ("*.jsonl", "no data file"),
    ],
)
def test_names_that_are_nothing_are_refused(name, problem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=problem):
        open_samples([name])


def test_files_without_samples_or_of_another_kind_are_refused(tmp_path):
    for name, problem in {
        "a.jsonl": "holds no samples",
        "a.parquet": "is no Parquet file that can be read",
        "a.csv": r"is neither .jsonl nor .parquet",
    }.items():
        (tmp_path / name).write_text("\n", encoding="utf-8")
        with pytest.raises(ConfigError, match=problem):
            open_samples([str(tmp_path / name)])
    write_parquet(tmp_path / "b.parquet", 1)
    table = pq.read_table(tmp_path / "b.parquet").slice(0, 0)
    pq.write_table(table, tmp_path / "b.parquet")
    with pytest.raises(ConfigError, match="holds no samples"):
        open_samples([str(tmp_path / "b.parquet")])


def test_a_hub_name_needs_the_package_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"no file here; .*: pip install 'jaxrl\[hub\]'$"):
        open_samples(["owner/name"])


@pytest.mark.parametrize("write, suffix", [(write_jsonl, "jsonl"), (write_parquet, "parquet")])
def test_a_file_that_changes_during_the_run_is_named(write, suffix, tmp_path):
    file = tmp_path / f"a.{suffix}"
    samples = open_samples([write(file, 9)])
    assert samples[8]["n"] == 8
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[: size // 2])
    now = file.stat().st_size
    with pytest.raises(ConfigError, match=rf"a.{suffix}.* had {size:,} bytes .* has {now:,} now"):
        _ = samples[8]
    file.unlink()
    with pytest.raises(ConfigError, match=rf"a.{suffix} had .* is gone; restore it"):
        _ = samples[0]


def test_samples_travel_to_workers(tmp_path):
    names = [write_jsonl(tmp_path / "a.jsonl", 5), write_parquet(tmp_path / "a.parquet", 9)]
    samples, _ = hold_out(open_samples(names), 4, seed=0)
    before = [samples[i] for i in range(len(samples))]
    again = pickle.loads(pickle.dumps(samples))
    assert [again[i] for i in range(len(again))] == before
    assert again.fingerprint == samples.fingerprint


def test_held_out_samples_are_drawn_by_the_seed_and_not_trained(tmp_path):
    samples = open_samples([write_jsonl(tmp_path / "a.jsonl", 40)])
    drawn = {}
    for seed in (0, 0, 1):
        kept, held = hold_out(samples, 10, seed)
        numbers = [[part[i]["n"] for i in range(len(part))] for part in (kept, held)]
        assert sorted(numbers[0] + numbers[1]) == list(range(40)) and len(held) == 10
        assert held.where(0) == f"{tmp_path / 'a.jsonl'}:{numbers[1][0] + 1}"
        assert drawn.setdefault(seed, numbers) == numbers
    assert drawn[0] != drawn[1]
    with pytest.raises(ConfigError, match="hold_out is 40, and there are 40 samples"):
        hold_out(samples, 40, 0)


def test_the_same_data_is_recognised_wherever_it_lies(tmp_path):
    then = json.loads(json.dumps(open_samples([write_jsonl(tmp_path / "a.jsonl", 5)]).fingerprint))
    (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
    check_fingerprint(open_samples([str(tmp_path / "b.jsonl")]).fingerprint, then)


@pytest.mark.parametrize("write, suffix", [(write_jsonl, "jsonl"), (write_parquet, "parquet")])
@pytest.mark.parametrize(
    "count, first, problem",
    [
        (900, 0, "a.SUFFIX had 1,000 samples when the checkpoint was written and has 900 now"),
        (1001, 1, "a.SUFFIX has other contents than when the checkpoint was written"),
    ],
)
def test_changed_data_is_named(write, suffix, count, first, problem, tmp_path):
    file = tmp_path / f"a.{suffix}"
    then = open_samples([write(file, 1000)]).fingerprint
    now = open_samples([write(file, count, first)]).fingerprint
    with pytest.raises(ConfigError, match=problem.replace("SUFFIX", suffix)):
        check_fingerprint(now, then)


def test_other_files_are_named(tmp_path):
    a, b = (write_jsonl(tmp_path / f"{n}.jsonl", 3 + i) for i, n in enumerate("ab"))
    one, two, turned = (open_samples(n).fingerprint for n in ([a], [a, b], [b, a]))
    for now, then, problem in (
        (one, two, "b.jsonl was part of the data when .* is not now"),
        (two, one, "b.jsonl was no part of the data when .* is now"),
        (turned, two, "a.jsonl was read when .*b.jsonl, which holds something else, is now"),
    ):
        with pytest.raises(ConfigError, match=problem):
            check_fingerprint(now, then)
    samples = open_samples([a])
    halves = [hold_out(samples, 1, seed)[0].fingerprint for seed in range(9)]
    other = next(h for h in halves if h != halves[0])
    with pytest.raises(ConfigError, match="choice has other contents"):
        check_fingerprint(other, halves[0])
    np.testing.assert_equal(halves[0][0], one[0])
