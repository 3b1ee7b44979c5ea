"""What a run writes of its scalars, and what a resumed one keeps of them."""

import json
import math
import sys
import types

import pytest

from jaxrl.cli import OutputError
from jaxrl.envs.protocol import Task
from jaxrl.monitor import Monitor
from jaxrl.options import ConfigError
from jaxrl.rollout.rollouts import Group, Rollout
from jaxrl.trackers import Mlflow, Wandb, start
from jaxrl.train.rl_metrics import trace


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_line_per_step_and_null_for_what_json_cannot_say(tmp_path):
    with Monitor(tmp_path, tensorboard=False) as monitor:
        monitor.log(1, {"loss": 0.5})
        assert lines(tmp_path) == [{"step": 1, "loss": 0.5}]  # at once, not at the end
        monitor.log(2, {"loss": math.nan, "norm": math.inf})
    assert lines(tmp_path)[1] == {"step": 2, "loss": None, "norm": None}


def test_a_resumed_run_drops_what_it_will_write_again(tmp_path):
    with Monitor(tmp_path, tensorboard=False) as monitor:
        for step in range(5):
            monitor.log(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # killed while writing
    said = "".join(json.dumps({"step": step, "said": "\u00e4"}) + "\n" for step in (1, 2, 3, 2))
    (tmp_path / "rollouts.jsonl").write_bytes(
        said.encode() + '{"step": 2, "said": "ä'.encode()[:-1]
    )
    with Monitor(tmp_path, tensorboard=False, resumed_at=2) as monitor:
        monitor.log(3, {"loss": -3.0})
    assert [(x["step"], x["loss"]) for x in lines(tmp_path)] == [(0, 0), (1, 1), (2, 2), (3, -3)]
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "rollouts.jsonl"}
    kept = [json.loads(line)["step"] for line in (tmp_path / "rollouts.jsonl").open()]
    assert kept == [1, 2, 2]


def test_a_disk_that_is_full_is_one_line(tmp_path):
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        (tmp_path / name).symlink_to("/dev/full")
    with Monitor(tmp_path, tensorboard=False) as monitor:
        with pytest.raises(OutputError, match=r"metrics.jsonl cannot be written: No space left"):
            monitor.log(1, {"loss": 0.5})
        with pytest.raises(OutputError, match=r"rollouts.jsonl cannot be written: No space left"):
            trace(str(tmp_path), Group(0, [Rollout(Task("a", ()))]), 1)
    with pytest.raises(OutputError, match="cannot be written: "):
        Monitor(tmp_path / "metrics.jsonl" / "under")


def test_tensorboard_forgets_later_steps_too(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Monitor(tmp_path) as monitor:
        for step in (1, 2, 3):
            monitor.log(step, {"loss": float(step)})
        monitor.options({"data.seq_len": 128})
    with Monitor(tmp_path, resumed_at=1) as monitor:
        monitor.log(2, {"loss": 20.0})
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 20.0)]
    text = events.Tensors("options/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| data.seq_len | 128 |" in text


class Recorder:
    """Notes calls by name, as a module that is not installed here would get them."""

    def __init__(self, monkeypatch, name):
        self.calls = []
        module = types.ModuleType(name)
        module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
        for function in (
            "init",
            "set_experiment",
            "start_run",
            "log_params",
            "log_metrics",
            "end_run",
        ):
            setattr(module, function, self._noting(function))
        monkeypatch.setitem(sys.modules, name, module)

    def _noting(self, function):
        def call(*args, **kwargs):
            self.calls.append((function, args, kwargs))
            run = types.SimpleNamespace(id="run1", info=types.SimpleNamespace(run_id="run1"))
            run.log = self._noting("log")
            run.finish = self._noting("finish")
            return run

        return call


def test_wandb_gets_scalars_and_a_resumed_run_goes_on_there(tmp_path, monkeypatch):
    recorder = Recorder(monkeypatch, "wandb")
    for resumed_at in (None, 1):
        tracker = Wandb("project", tmp_path, {"seed": 0})
        with Monitor(
            tmp_path, tensorboard=False, trackers=[tracker], resumed_at=resumed_at
        ) as monitor:
            monitor.log(1 if resumed_at is None else 2, {"loss": 0.5})
    names = [name for name, _, _ in recorder.calls]
    assert names == ["init", "log", "finish"] * 2
    first, second = (kwargs for name, _, kwargs in recorder.calls if name == "init")
    assert (first["project"], first["config"], first["id"]) == ("project", {"seed": 0}, None)
    assert second["id"] == "run1"
    assert recorder.calls[1][1:] == (({"loss": 0.5},), {"step": 1})


def test_mlflow_gets_scalars_and_a_resumed_run_goes_on_there(tmp_path, monkeypatch):
    recorder = Recorder(monkeypatch, "mlflow")
    for _ in range(2):
        tracker = Mlflow("experiment", tmp_path, {"seed": 0})
        tracker.log(3, {"loss": 0.5})
        tracker.close()
    names = [name for name, _, _ in recorder.calls]
    once = ["set_experiment", "start_run", "log_params", "log_metrics", "end_run"]
    assert names == [*once, *(n for n in once if n != "log_params")]
    starts = [kwargs for name, _, kwargs in recorder.calls if name == "start_run"]
    assert [kwargs["run_id"] for kwargs in starts] == [None, "run1"]


def test_a_tracker_that_fails_is_told_once_and_the_run_goes_on(tmp_path, caplog):
    class Down:
        def log(self, step, scalars):
            raise ConnectionError("no route")

        def close(self):
            raise AssertionError("closed")

    with Monitor(tmp_path, tensorboard=False, trackers=[Down()]) as monitor:
        for step in range(3):
            monitor.log(step, {"loss": 1.0})
    assert [record.getMessage() for record in caplog.records] == [
        "Down gets nothing from step 0 on: no route"
    ]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_tracker_that_does_not_start_is_one_line(tmp_path):
    def refuses(*_):
        raise RuntimeError("no login;\n run wandb login")

    with pytest.raises(ConfigError, match=r"refuses does not start: no login; run wandb login"):
        start(refuses, "project", tmp_path, {})


def test_a_tracker_that_is_not_installed_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ConfigError, match=r"mlflow is 'x', and the package is not installed: pip"):
        Mlflow("x", tmp_path, {})
