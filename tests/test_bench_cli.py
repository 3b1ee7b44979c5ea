"""`python -m jaxrl.bench` from the outside: files, exit codes, resuming, and every refusal."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from jaxrl import bench, cli
from jaxrl.config import ConfigError
from jaxrl.perf import results
from jaxrl.perf.results import KEYS, Store
from jaxrl.sft_config import SftConfig

ROOT = pathlib.Path(__file__).parents[1]
FAKE = (sys.executable, str(ROOT / "tests/perf/fake_worker.py"))
CONFIG = f"--config={ROOT}/configs/qwen3_0_6b.py"
MAIN = f"""
import functools, signal, sys
from jaxrl import bench, cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background inherit "ignore"
cli.run(functools.partial(bench.main, worker_command={FAKE!r}))
"""
SMALL = "--config.rows=gpu=H100,seq_len=16384"  # 3 rows, and the proxy


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the bench with fake workers: exit code, results by (type, rank, gpu), their log."""
    log = tmp_path / "ran"
    monkeypatch.setenv("FAKE_WORKER_LOG", str(log))
    monkeypatch.setattr(bench, "local_gpus", lambda: [])

    def run(*args, plan=None, output="out"):
        monkeypatch.setenv("FAKE_WORKER", json.dumps(plan or {}))
        log.write_text("")
        output = tmp_path / output
        argv = ["bench", CONFIG, SMALL, f"--config.output={output}", *args]
        code = bench.main(argv, worker_command=FAKE)
        lines = (output / "results.jsonl").read_text().splitlines()
        return code, [json.loads(line) for line in lines], log.read_text().splitlines()

    run.output = tmp_path / "out"
    run.text = capsys.readouterr
    return run


def test_results_table_and_files(run):
    code, rows, ran = run()
    assert code == 0 and len(rows) == len(ran) == 4
    assert [(r["type"], r["lora_rank"], r["mode"]) for r in rows] == [
        ("rl", 0, "planned"),
        ("rl", 16, "planned"),
        ("sft", 0, "planned"),
        ("rl", 16, "proxy"),
    ]
    assert all(tuple(r)[: len(KEYS)] == KEYS and r["status"] == "ok" for r in rows)
    first, proxy = rows[0], rows[-1]
    assert (first["peak_mem_gib"], first["baseline_peak_mem_gib"], first["tps"]) == (
        11.5,
        12.5,
        None,
    )
    assert {"versions", "flags", "commit", "date", "host", "fingerprint"} <= set(first)
    assert (proxy["gpu"], proxy["num_layers"], proxy["hfu_pct"]) == ("CPU", 2, None)
    assert "| RL Full | 16384 |" in (run.output / "BENCHMARKS.md").read_text()
    out = run.text().out
    assert "4/4" in out and "11.5 GiB (-8.0%)" in out and "Results: " in out
    events = list((run.output / "tensorboard").glob("*proxy/events*"))
    metrics = [json.loads(x) for x in (events[0].parent / "metrics.jsonl").open()]
    assert metrics[0] == {"step": 1, "step_time_s": 0.401} and metrics[-1]["row/tps"] == 640.0


def test_finished_rows_are_reused_and_failed_ones_retried(run):
    code, rows, _ = run(plan={"rl-16-16384": "error"})
    assert code == 1 and [r["status"] for r in rows] == ["ok", "failed", "ok", "ok"]
    assert rows[1]["error"] == "XlaRuntimeError: RESOURCE_EXHAUSTED: out of memory"
    page = (run.output / "BENCHMARKS.md").read_text()
    assert "lora16 16384 recompute fa3 1xH100 (planned): XlaRuntimeError" in page
    code, rows, ran = run()
    assert code == 0 and ran == ["rl-16-16384-recompute-H100-planned"]
    assert len(rows) == 4 and "(reused)" in run.text().out
    assert run()[2] == []
    assert len(run("--config.resume=false")[2]) == 4
    assert len(run("--config.train.head_chunk=512")[2]) == 4  # other settings, other numbers
    assert len(run("--config.train.head_chunk=512", "--config.steps=11")[2]) == 1  # the proxy
    assert len(run("--config.mode=planned", "--config.rows=seq_len=8192")[1]) == 6  # others stay


def test_modes(run, monkeypatch):
    assert run("--config.mode=proxy")[2] == ["rl-16-128-recompute-CPU-proxy"]
    assert len(run("--config.mode=planned", output="b")[2]) == 3
    with pytest.raises(ConfigError, match="needs 1xH100, and this host has none; use auto"):
        run("--config.mode=measured")
    monkeypatch.setattr(bench, "local_gpus", lambda: ["NVIDIA H100 80GB HBM3", "Some GPU"])
    modes = [r["mode"] for r in run(output="c")[1]]
    assert modes == ["measured"] * 3 + ["proxy"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "no --config given; e.g. --config=configs/qwen3_4b.py (--help for more)"),
        (["--config=no.py"], "no config file 'no.py'; there are configs/intellect_3.py, "),
        ([CONFIG, "--config.stps=3"], "unknown key config.stps; did you mean config.steps?"),
        ([CONFIG, "--config.steps=x"], "config.steps is 'x'; it takes a whole number"),
        ([CONFIG, "--config.output"], "--config.output has no value"),
        ([CONFIG, "--confg.steps=3"], "unexpected argument '--confg.steps=3'"),
        ([CONFIG, "--config.rows=gpu=H300"], "gpu of the rows: A6000, H100"),
        ([CONFIG, "--config.model=Qwen4"], "unknown model 'Qwen4'; did you mean"),
        ([CONFIG, "--config.baseline=x"], "config.baseline 'x' is no CSV file; tables at hand: "),
        ([CONFIG, "--config.table=rl full 99 none xla 1xH100"], "seq_len 99 is no positive"),
        ([CONFIG, "--config.table=rl full 128 none fa3 1xB200"], "needs Hopper (sm_90)"),
        ([CONFIG, f"--config.output={__file__}"], f"{__file__} is a file; name a folder"),
        ([CONFIG, f"--config.output={__file__}/x"], f"{__file__} is a file; name a folder"),
    ],
)
def test_bad_input_is_one_line_before_anything_runs(args, words, tmp_path):
    command = [sys.executable, "-m", "jaxrl.bench", *args]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1
    assert words in ended.stderr


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def get_config(:", "SyntaxError: "),
        (
            "import nonexistent_module",
            ":1: ModuleNotFoundError: No module named 'nonexistent_module'",
        ),
        ("x = 1", "it defines no get_config(arg)"),
        ("def get_config(): return 3", "get_config returned 3, no ConfigDict"),
        (
            "from jaxrl.config import *\n"
            "def get_config(): return default_config(BenchConfig, stepz=3)",
            "unknown key config.stepz; did you mean config.steps?",
        ),
    ],
)
def test_bad_config_files(source, words, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(source.replace("import *", "import BenchConfig, default_config"))
    with pytest.raises(ConfigError) as error:
        cli.parse(bench.BenchConfig, ["bench", f"--config={path}"], "")
    assert words in str(error.value) and "\n" not in str(error.value)


def test_help_and_parent_import_no_jax():
    code = (
        "import sys\nfrom jaxrl import bench\n"
        "try: bench.main(['bench', '--help'])\n"
        "finally: print('jax' in sys.modules, 'flax' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0 and ended.stdout.splitlines()[-1] == "False False"
    assert "--config.train.optimizer.learning_rate" in ended.stdout


def test_ctrl_c_keeps_finished_rows_and_ends_the_workers(tmp_path):
    env = os.environ | {"FAKE_WORKER": '{"rl-16": "hang"}'}
    argv = [CONFIG, SMALL, f"--config.output={tmp_path}", "--config.jobs=1"]
    # The workers carry this test's folder in their arguments, to be told from other tests'.
    main = MAIN.replace(repr(FAKE), repr((*FAKE, str(tmp_path))))
    process = subprocess.Popen(
        [sys.executable, "-c", main, *argv], stderr=subprocess.PIPE, text=True, env=env, cwd=ROOT
    )
    path, workers = tmp_path / "results.jsonl", set()
    deadline = time.monotonic() + 60
    while not (workers and path.exists() and path.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
        workers = _processes(str(tmp_path)) - {process.pid}
    process.send_signal(signal.SIGINT)
    try:
        stderr = process.communicate(timeout=30)[1]
    finally:
        process.kill()
    assert workers and not _processes(str(tmp_path))
    assert process.returncode == 130
    assert stderr.startswith("interrupted; finished rows are in ") and stderr.count("\n") == 1
    assert [json.loads(x)["status"] for x in path.read_text().splitlines()] == ["ok"]


def _processes(argument: str) -> set[int]:
    """Ids of the processes with this argument."""
    ps = subprocess.run(
        ["ps", "-ww", "-eo", "pid=,args="], capture_output=True, text=True, check=True
    )
    return {int(x.split()[0]) for x in ps.stdout.splitlines() if argument in x}


def test_two_benches_do_not_share_a_folder(tmp_path):
    with Store(tmp_path), pytest.raises(ConfigError, match="another bench is writing there"):
        Store(tmp_path).__enter__()
    with Store(tmp_path):
        pass


def test_results_of_another_kind_are_left_alone(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"model": 3}\n')
    with pytest.raises(ConfigError, match="line 1 is no result of a bench"):
        Store(tmp_path).__enter__()
    assert path.read_text() == '{"model": 3}\n'


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_full_disk_leaves_earlier_results_intact(run, monkeypatch, where):
    run("--config.mode=planned")
    before = (run.output / "results.jsonl").read_text()
    real = getattr(os, where)
    calls = []

    def full(*args):
        calls.append(args)
        if len(calls) > 1:  # the start of the second run may write, its first row not
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(results.os, where, full)
    with pytest.raises(cli.OutputError, match="No space left on device; earlier results are int"):
        run("--config.mode=planned", "--config.resume=false")
    assert (run.output / "results.jsonl").read_text() == before
    assert not list(run.output.glob("*.tmp")) + list(run.output.glob(".*.tmp"))


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 64 KiB, where this user may mount one."""
    path = tmp_path / "tiny"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(path)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("no right to mount a tmpfs")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_disk_that_is_really_full(tiny_disk):
    argv = [CONFIG, f"--config.output={tiny_disk}/out", "--config.jobs=1"]
    ended = subprocess.run(
        [sys.executable, "-c", MAIN, *argv], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1
    assert "No space left on device" in ended.stderr
    lines = (tiny_disk / "out/results.jsonl").read_text().splitlines()
    assert lines and all(json.loads(line)["status"] == "ok" for line in lines)
    again = subprocess.run(
        [sys.executable, "-c", MAIN, *argv], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert again.returncode == 2 and again.stderr.count("\n") == 1
    assert (tiny_disk / "out/results.jsonl").read_text().splitlines()[: len(lines)] == lines


def test_a_flag_gives_what_the_file_leaves_open(tmp_path):
    """Also where the file alone would be refused, and in a section that it does not have."""
    path = tmp_path / "config.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(): return ConfigDict({'max_steps': 0, 'epochs': 0})\n"
    )
    flags = [f"--config={path}", "--config.max_steps=3", "--config.optimizer.b1=0.5"]
    config = cli.parse(SftConfig, ["sft", *flags], "")
    assert (config.max_steps, config.epochs, config.optimizer.b1) == (3, 0, 0.5)
    with pytest.raises(ConfigError, match="max_steps and epochs are both 0"):
        cli.parse(SftConfig, ["sft", *flags[:1]], "")
    path.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(): return ConfigDict({'optimizer': 3})\n"
    )
    with pytest.raises(ConfigError, match=r"config.optimizer is 3; it is a section of options"):
        cli.parse(SftConfig, ["sft", *flags], "")
