"""The table: differences and warnings by the published page's rules, terminal and markdown."""

import io

import pytest
from rich.console import Console

from jaxrl.perf import report
from jaxrl.perf.baseline import NO_BASELINE, Baseline
from jaxrl.perf.results import KEYS, job_of, make_result
from jaxrl.perf.rows import parse_row, proxy_row
from jaxrl.perf.runner import Job

GPU_NAMES = ("H200", "A6000", "H100")
ROW = parse_row("Qwen3-0.6B", "rl full 16384 recompute fa3 1xH100")
BASE = Baseline(mfu_pct=15.3, tps=16447, step_time_s=1.0, peak_mem_gib=12.5)


def result(mode="planned", row=ROW, error=None, base=BASE, **numbers):
    extra = {"commit": "abc", "date": "2026-11-24T00:00:00Z", "versions": {"jax": "0.11.2"}}
    return make_result(Job(row, mode), None if error else numbers, error, **extra, **base.keys())


def shown(r):
    return dict(zip(report.COLUMNS, report.cells(r), strict=True))


def text(*results, width=200):
    out = io.StringIO()
    console = Console(file=out, width=width)
    for part in report.terminal("Qwen3-0.6B", results, width):
        console.print(part)
    return out.getvalue()


@pytest.mark.parametrize(
    ("peak", "expected", "warn"),
    [
        (11.0, "11.0 GiB (-12.0%)", False),
        (12.45, "12.4 GiB", False),
        (12.5, "12.5 GiB", False),
        (12.9, "12.9 GiB (+3.2%)", False),
        (13.2, "13.2 GiB (+5.6%)", True),
    ],
)
def test_peak_memory_against_the_page(peak, expected, warn):
    cell = shown(result(peak_mem_gib=peak))["Peak Mem"]
    assert (cell.text, cell.warn) == (expected, warn)


def test_planned_rows_show_no_speed():
    row = shown(result(peak_mem_gib=11.0, floor_mem_gib=10.1, attn_compiled="cudnn"))
    for column in ("MFU", "TPS", "Step Time", "MFU (causal)", "HFU"):
        assert row[column].text == "-"
    assert (row["Floor"].text, row["Compiled Attn"].text) == ("10.1 GiB", "cudnn")


def test_measured_rows_compare_speed():
    numbers = {"tps": 15000.0, "step_time_s": 1.09, "step_time_iqr_s": 0.012, "mfu_pct": 14.0}
    row = shown(result("measured", mfu_primerl_pct=16.0, peak_mem_gib=11.0, **numbers))
    assert (row["TPS"].text, row["TPS"].warn) == ("15.00k (-8.8%)", True)
    assert row["Step Time"].text == "1.09s (+9.0%), IQR 0.012s" and row["Step Time"].warn
    assert (row["MFU"].text, row["MFU"].warn) == ("16.0% (+4.6%)", False)
    assert row["MFU (causal)"].text == "14.0%"  # another convention: nothing to compare with


def test_proxy_is_named_as_such():
    r = result("proxy", proxy_row(ROW, 256), base=NO_BASELINE, num_layers=2, tps=640.0)
    assert shown(r)["Type"].text == "RL Full, 2 of 28 layers"
    assert shown(r)["Hardware"].text == "1xCPU"
    assert shown(r)["TPS"].text == "640"


def test_impossible_utilisation_is_called_that():
    numbers = {"num_layers": 2, "mfu_pct": 94.0, "peak_flops": 61e9}
    r = result("proxy", proxy_row(ROW, 256), base=NO_BASELINE, **numbers)
    assert report.notes([r]) == [
        "The proxy's MFU is relative to 61 GFLOP/s, this host's matmul peak as measured beside it."
    ]
    assert "above 100 % is no result" in report.notes([r | {"hfu_pct": 107.0}])[1]


def test_failed_rows_stay_with_their_reason():
    page = report.markdown([result(error="XlaRuntimeError: a | b <c>")])
    assert "| RL Full | 16384 | Recompute | FA3 | 1 | 1 | 1xH100 | - | - | - | failed |" in page
    assert "- rl full 16384 recompute fa3 1xH100 (planned): XlaRuntimeError: a \\| b &lt;c>" in page
    assert report.brief(result(error="boom")) == "failed: boom"


def test_markdown():
    results = [
        result("proxy", proxy_row(ROW, 256), num_layers=2),
        result(peak_mem_gib=13.9, floor_mem_gib=10.0),
        result(row=parse_row("Qwen3-0.6B", "rl full 65536 none xla 1xH100"), peak_mem_gib=99.0),
    ]
    page = report.markdown(results)
    lines = [line for line in page.splitlines() if line.startswith("| RL")]
    assert "13.9 GiB (+11.2%) :warning:" in lines[0] and "256" in lines[-1]
    assert "Does not fit: rl full 65536 none xla 1xH100 needs 99.0 GiB of the 79.1 GiB" in page
    assert "use 2.97 x the published peak in geometric mean, at worst 7.92 x" in page
    assert "1 rows are at 1.39 x the floor" in page
    assert "| 3 | abc | 2026-11-24 | jax 0.11.2 |" in page
    assert all(line.count("|") == len(report.COLUMNS) + 1 for line in lines)


def test_rows_of_different_commits_are_told_apart():
    other = result(peak_mem_gib=11.0) | {"commit": "def", "seq_len": 8192}
    page = report.markdown([result(peak_mem_gib=11.0), other])
    assert "| 1 | abc |" in page and "| 1 | def |" in page


@pytest.mark.parametrize("width", [80, 110, 220])
def test_terminal_table_fits_and_says_the_same(width):
    results = [result(peak_mem_gib=13.9, floor_mem_gib=10.0, attn_compiled="cudnn")]
    row = parse_row("Qwen3-0.6B", "rl lora16 65536 offload fa3 1xH100")
    results += [result(row=row, peak_mem_gib=10.0, attn_compiled="cudnn")]
    results += [result("proxy", proxy_row(ROW, 256), num_layers=2, tps=640.0)]
    output = text(*results, width=width)
    assert all(len(line.rstrip()) <= width for line in output.splitlines())
    assert "13.9" in output and "(+11.2%) !" in output and "…" not in output
    assert "2 of 28 layers" in output and "640" in output and "cudnn" in output


def test_results_have_the_promised_keys_first_and_no_nan():
    r = result(hfu_pct=float("nan"), num_layers=3)
    assert tuple(r)[: len(KEYS)] == KEYS
    assert r["hfu_pct"] is None and r["num_layers"] == 3 and r["status"] == "ok"
    failed = result(error="boom")
    assert (failed["status"], failed["error"], failed["tps"]) == ("failed", "boom", None)


def test_results_from_before_a_row_had_all_its_keys_are_read():
    old = {k: v for k, v in result().items() if k != "cp_method"}
    assert job_of(old) == Job(ROW, "planned")


def test_a_page_of_several_models_is_grouped_by_them_in_their_order():
    models = ("Qwen3-4B-Instruct-2507", "Qwen3-0.6B")
    texts = (f"{models[i]} rl full {n} none fa3 8xH100" for i, n in ((0, 128), (1, 256), (0, 384)))
    rows = [parse_row("", text) for text in texts]
    page = report.markdown([result(row=row) for row in rows])
    lines = [line for line in page.splitlines() if line.startswith(("## ", "| RL"))]
    found = [line.removeprefix("## ") if line[0] == "#" else line.split("|")[2] for line in lines]
    assert found == [models[0], " 128 ", " 384 ", models[1], " 256 "]


def test_context_method_is_shown_where_it_is_no_default():
    rows = (f"rl full 16384 recompute fa2 8xH100 {axes}" for axes in ("cp2", "cp2 ring"))
    cells = [shown(result(row=parse_row("Qwen3-0.6B", row)))["CP"].text for row in rows]
    assert cells == ["2", "2 ring"]


def test_kernels_that_their_gpu_has_not_validated_are_named(monkeypatch):
    known = {("attention triton", "NVIDIA H200")}
    monkeypatch.setattr(report, "is_validated", lambda *key: key in known)
    rows = {gpu: parse_row("Qwen3-0.6B", f"rl full 16384 none fa2 1x{gpu}") for gpu in GPU_NAMES}
    results = [result(row=row, attn_compiled="triton") for row in rows.values()]
    (said,) = (note for note in report.notes(results) if "validated" in note)
    assert said.startswith("Attention not yet validated: triton on A6000, triton on H100; its ")
    assert not report.notes([result(row=rows["A6000"], attn_compiled="cudnn")])
