"""The config files list exactly the published rows of their model."""

import csv
import pathlib
import runpy

import pytest

from jaxrl import bench
from jaxrl.config import BenchConfig, ConfigError, from_config
from jaxrl.models.presets import PRESETS
from jaxrl.perf.baseline import load_baselines
from jaxrl.perf.provenance import fingerprint
from jaxrl.perf.rows import check_rows, filter_rows, parse_row
from jaxrl.perf.runner import Job

ROOT = pathlib.Path(__file__).parents[1]
COUNTS = {
    "qwen3_0_6b": 14,
    "qwen3_4b": 21,
    "llama3_1_8b": 2,
    "llama3_2_1b": 2,
    "llama3_2_3b": 2,
    "qwen3_30b_a3b": 18,
    "qwen3_235b_a22b": 2,
    "intellect_3": 9,
}
EXTRA = {"qwen3_4b": 4, "qwen3_30b_a3b": 3, "qwen3_235b_a22b": 3, "intellect_3": 1}


def read(name, *args):
    return from_config(
        BenchConfig, runpy.run_path(str(ROOT / f"configs/{name}.py"))["get_config"](*args)
    )


@pytest.mark.parametrize("name", COUNTS)
def test_rows_are_the_published_ones(name):
    config = read(name)
    rows = [parse_row(config.model, text) for text in config.table]
    published = [row for row in load_baselines("prime_rl") if row.model == config.model]
    assert len(rows) == len(set(rows)) == COUNTS[name]
    assert rows == published
    assert config.model in PRESETS
    check_rows(rows)


def test_the_argument_filters():
    config = read("qwen3_4b", "gpu=H100,num_gpus=1")
    rows = [parse_row(config.model, text) for text in config.table]
    assert {row.hardware for row in filter_rows(rows, config.rows)} == {"1xH100"}


@pytest.mark.parametrize("name", EXTRA)
def test_extra_rows_come_when_asked_for_and_were_never_published(name):
    config = read(name, "extra")
    rows = [parse_row(config.model, text) for text in config.table]
    assert len(rows) == len(set(rows)) == EXTRA[name]
    assert config.rows == "" and not set(rows) & set(load_baselines("prime_rl"))
    check_rows(rows)


def test_extra_rows_are_filtered_too():
    assert read("qwen3_4b", "extra,gpu=H100").rows == "gpu=H100"
    assert read("qwen3_4b", "extra, cp=8").table == read("qwen3_4b", "extra").table
    with pytest.raises(ConfigError, match=r"Qwen3-0\.6B has no extra rows; leave 'extra' out"):
        read("qwen3_0_6b", "extra")


def test_published_is_the_whole_page_in_its_order():
    config = read("published")
    rows = bench.table_rows(config)
    assert config.model == ""
    assert rows == list(load_baselines("prime_rl"))
    assert len(rows) == 70 and len({row.model for row in rows}) == len(COUNTS)
    assert len(bench.table_rows(read("published", "extra"))) == sum(EXTRA.values())
    one = bench.table_rows(read("published", "model=Qwen3-0.6B,gpu=H100"))
    assert one == bench.table_rows(read("qwen3_0_6b", "gpu=H100"))


def test_every_config_is_counted_here():
    texts = {path.stem: path.read_text() for path in (ROOT / "configs").glob("*.py")}
    assert {name for name, text in texts.items() if "table_config" in text} == {
        *COUNTS,
        "published",
        "rl_e2e",
    }


def test_the_rows_with_rollouts_are_ones_that_can_run():
    rows = bench.table_rows(read("rl_e2e"))  # refuses those that cannot
    assert rows and all(row.is_e2e for row in rows)


def test_a_run_over_several_models_has_one_proxy_of_the_smallest():
    jobs = bench.plan_jobs(read("published"), [])
    (proxy,) = (job.row for job in jobs if job.mode == "proxy")
    assert (proxy.model, proxy.lora_rank) == ("Qwen3-0.6B", 16)


def test_a_result_is_reused_whichever_config_named_its_row():
    (row,) = bench.table_rows(read("llama3_2_1b", "seq_len=16384"))
    prints = {fingerprint(Job(row, "planned"), read(name)) for name in ("published", "llama3_2_1b")}
    assert len(prints) == 1


def test_baseline_counts_the_training_step_of_rl_full_alone():
    with (ROOT / "bench/baselines/prime_rl.csv").open() as file:
        lines = list(csv.DictReader(file))
    baselines = load_baselines("prime_rl")
    assert len(baselines) == len(lines) == 70
    full = baselines[parse_row("Qwen3-0.6B", "rl full 16384 recompute fa3 1xH100")]
    assert (full.tps, full.step_time_s, full.peak_mem_gib) == (16447, 1.0, 12.5)
    assert full.mfu_pct == pytest.approx(11.1 * 16447 / 11900, abs=0.01)
    lora = baselines[parse_row("Qwen3-0.6B", "rl lora16 16384 recompute fa3 1xH100")]
    assert (lora.tps, lora.mfu_pct) == (13340, 10.9)
