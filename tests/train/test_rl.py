"""`jaxrl.rl`, from a checkpoint and tasks to a checkpoint: learns, resumes, survives what fails."""

import collections
import contextlib
import json
import os
import pathlib
import signal

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import metrics, tiny_checkpoint

from jaxrl.cli import HostLostError
from jaxrl.envs.protocol import SingleTurn, Task, last_turn
from jaxrl.options import ConfigError
from jaxrl.rl import main
from jaxrl.train import rl as train_rl
from jaxrl.train.checkpoint import Checkpoints

CONFIG = """
from jaxrl.config import default_config
from jaxrl.rl_config import RlConfig


def get_config():
    config = default_config(RlConfig)
    config.model, config.output = {model!r}, {output!r}
    config.env.name = "test_rl:Letters"
    config.seq_len, config.tasks_per_step, config.algorithm.group_size = 128, 4, 4
    config.rollout.max_tokens, config.rollout.slots = 8, 8
    config.max_steps, config.checkpoint.every = 4, 2
    config.eval.tasks, config.eval.options = 8, '{{"seed": 1}}'
    config.optimizer.learning_rate = 1e-2
    config.train.compute_dtype, config.tensorboard = "float32", False
    return config
"""


class Letters(SingleTurn):
    """The more of a turn's characters are small letters, the better."""

    def __init__(self, seed=0, fails="", count=40, at="", stops="", how="SIGTERM", kills=0):
        self.seed, self.fails, self.count = seed, fails, count
        self.at, self.stops, self.how, self.kills = at, stops, signal.Signals[how], kills

    def __len__(self):
        return self.count

    def task(self, index):
        return Task(f"{self.seed}/{index}", ({"role": "user", "content": f"write {index}"},))

    def score(self, task, messages):
        said = last_turn(messages)
        if task.id == self.at:
            self.happens()
        if self.fails == "all" or (self.fails == "some" and sum(map(ord, said)) % 3 == 0):
            raise OSError("no reward")
        if self.fails == "equal" or (self.fails == "flat" and not task.id.endswith("0")):
            return 0.5
        return sum(c.islower() and c.isascii() for c in said) / 8

    def happens(self):
        """The run is told to stop, or killed, once; or another process dies."""
        with contextlib.suppress(FileExistsError, ProcessLookupError):
            if self.stops:
                pathlib.Path(self.stops).touch(exist_ok=False)
                os.kill(os.getppid(), self.how)
            if self.kills:
                os.kill(self.kills, signal.SIGKILL)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> pathlib.Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("inputs") / "model")


def command(model, output, *flags) -> list[str]:
    """The flags of a run into `output`."""
    output.parent.mkdir(parents=True, exist_ok=True)
    file = output.parent / "config.py"
    file.write_text(CONFIG.format(model=str(model), output=str(output)))
    return [f"--config={file}", *(f"--config.{f}" for f in flags)]


def rl(model, output, *flags) -> int:
    """Run in this process, on eight devices."""
    return main(["rl", *command(model, output, *flags)])


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> pathlib.Path:
    """The output of an uninterrupted run of four steps."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert rl(model, output) == 0
    return output


def task_of(output, step: int) -> str:
    """The id of a task that was drawn for a step."""
    lines = map(json.loads, (output / "rollouts.jsonl").open())
    return next(line["task"] for line in lines if line["step"] == step)


def test_writes_a_line_per_step_and_every_rollout(whole):
    lines = metrics(whole)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert [line["step"] for line in lines if "eval/reward_mean" in line] == [0, 4]
    keys = "reward_mean reward_std mismatch_kl entropy loss grad_norm staleness " + (
        "tokens_per_s_rollout tokens_per_s_train rollout_s wait_s train_s sync_s total_s"
    )
    for line in lines[1:]:
        assert set(keys.split()) <= line.keys()
        assert abs(line["mismatch_kl"]) < 1e-6  # fp32: the sampler is the trainer
        assert line["staleness"] == 0 and line["rollouts_trained"] <= 16
        assert 0 <= line["shared_pct"] < 100
    rollouts = [json.loads(line) for line in (whole / "rollouts.jsonl").read_text().splitlines()]
    first = [r for r in rollouts if r["step"] == 1]
    rewards = [r["reward"] for r in first]
    assert lines[1]["reward_mean"] == pytest.approx(np.mean(rewards))
    assert first[0]["messages"][1]["role"] == "assistant" and len(rewards) >= 16


def test_a_resumed_run_takes_every_task_once(model, whole, tmp_path):
    assert rl(model, tmp_path / "run", "max_steps=2", "profile=2:2") == 0
    assert list((tmp_path / "run/profile").rglob("*.xplane.pb"))
    with (tmp_path / "run/rollouts.jsonl").open("a") as file:
        file.write('{"step": 3, "group": 9}\n{"step": 3, "gro')  # killed in the step that follows
    assert rl(model, tmp_path / "run") == 0

    def groups(output):
        lines = map(json.loads, (output / "rollouts.jsonl").read_text().splitlines())
        return [(r["step"], r["group"], r["task"], r["messages"]) for r in lines]

    assert sorted(map(str, groups(tmp_path / "run"))) == sorted(map(str, groups(whole)))
    for a, b in zip(metrics(tmp_path / "run"), metrics(whole), strict=True):
        for key in ("loss", "reward_mean", "grad_norm"):
            assert a.get(key) == b.get(key), (a["step"], key)


def test_a_signal_while_rollouts_are_drawn_loses_none_and_takes_none_twice(model, whole, tmp_path):
    at = task_of(whole, step=2)
    options = json.dumps({"at": at, "stops": str(tmp_path / "stopped")})
    flags = (f"env.options={options}", "checkpoint.every=0")
    assert rl(model, tmp_path / "run", *flags) == 0
    assert (tmp_path / "stopped").exists()
    assert [line["step"] for line in metrics(tmp_path / "run")] == [0, 1]
    assert rl(model, tmp_path / "run", *flags) == 0
    for a, b in zip(metrics(tmp_path / "run"), metrics(whole), strict=True):
        for key in ("loss", "reward_mean", "total/groups"):
            assert a.get(key) == b.get(key), (a["step"], key)


def test_drawn_beside_the_trainer_it_learns_within_its_staleness(model, tmp_path):
    flags = ("max_steps=12", "rollout.max_staleness=1", "algorithm.advantage=grpo")
    assert rl(model, tmp_path / "run", "eval.every=4", "checkpoint.every=5", *flags) == 0
    lines = metrics(tmp_path / "run")
    found = [line["eval/reward_mean"] for line in lines if "eval/reward_mean" in line]
    assert found[-1] > found[0] + 0.2
    late = [line["staleness_max"] for line in lines[1:]]
    assert max(late) >= 1 and lines[-1]["wait_s"] >= 0
    groups = [json.loads(line) for line in (tmp_path / "run/rollouts.jsonl").open()]
    numbers = {(r["step"], r["group"]) for r in groups}
    assert len({group for _, group in numbers}) == len(numbers)  # none twice
    trained = sum(line["groups_trained"] for line in lines[1:])
    counted = {k.removeprefix("total/"): v for k, v in lines[-1].items() if k.startswith("total/")}
    dropped = sum(counted.get(f"groups_{why}", 0) for why in ("stale", "flat", "failed"))
    assert counted["groups"] == trained + dropped


def test_a_reference_holds_the_policy_back(model, tmp_path):
    moved = {}
    for coef in (1e-9, 10.0):
        output = tmp_path / str(coef) / "run"
        flags = (f"loss.ref_kl_coef={coef}", "max_steps=6", "eval.tasks=0")
        assert rl(model, output, *flags) == 0
        moved[coef] = metrics(output)[-1]["ref_kl"]
    assert metrics(output)[0]["ref_kl"] < 1e-8
    assert moved[10.0] < 0.5 * moved[1e-9]


def test_the_exported_model_scores_as_the_run_did(model, tmp_path):
    from jaxrl.export import main as export

    greedy = ("eval.temperature=0.0", "max_steps=4")
    assert rl(model, tmp_path / "run", *greedy) == 0
    assert export(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--dtype=float32"]) == 0
    assert rl(tmp_path / "out", tmp_path / "again/run", *greedy[:1], "max_steps=1") == 0
    scored = [
        [line["eval/reward_mean"] for line in metrics(run) if "eval/reward_mean" in line]
        for run in (tmp_path / "run", tmp_path / "again/run")
    ]
    assert scored[0][-1] == scored[1][0] != scored[0][0]


def test_rollouts_that_fail_are_counted_and_the_others_trained(model, tmp_path):
    assert rl(model, tmp_path / "run", 'env.options={"fails": "some"}', "max_steps=2") == 0
    (line,) = metrics(tmp_path / "run")[-1:]
    assert 0 < line["failed"] < 1 and line["total/failed_reward"] > 0
    assert line["rollouts_trained"] < 16


def test_waits_for_rewards_that_differ(model, tmp_path, capsys):
    flags = (
        'env.options={"fails": "flat", "count": 100}',
        "max_steps=1",
        "tensorboard=True",
        "eval.tasks=0",
    )
    assert rl(model, tmp_path / "run", *flags) == 0
    (line,) = metrics(tmp_path / "run")
    assert line["groups_trained"] == 4 and line["total/groups_flat"] > 20
    assert line["groups_flat"] == line["total/groups_flat"] / line["total/groups"]
    assert "groups have rewards that differ; waiting for more" in capsys.readouterr().out
    drawn = [json.loads(line) for line in (tmp_path / "run/rollouts.jsonl").open()]
    assert len(drawn) == line["total/rollouts"] and all(r["messages"] for r in drawn)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    text = events.Tensors("rollouts/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.count("**user**: write ") == text.count("**assistant**:") == 2


def test_longer_turns_are_worth_less(model, tmp_path):
    penalty = ("algorithm.length_penalty=1.0", "algorithm.length_margin=8")
    flags = ('env.options={"fails": "equal"}', *penalty, "max_steps=4", "eval.tasks=0")
    assert rl(model, tmp_path / "run", *flags, "checkpoint.every=0") == 0
    lines = metrics(tmp_path / "run")
    assert all(line["reward_std"] == 0 and line["groups_trained"] == 4 for line in lines)
    assert lines[-1]["length_mean"] < lines[0]["length_mean"]


def test_easy_tasks_are_put_aside(model, tmp_path):
    easy = ("curriculum.use=easy", "curriculum.easy=0.5", "algorithm.keep_flat=True")
    flags = ('env.options={"fails": "flat", "count": 6}', "max_steps=3", "eval.tasks=0")
    assert rl(model, tmp_path / "run", *easy, *flags, "optimizer.learning_rate=1e-6") == 0
    drawn = [json.loads(line) for line in (tmp_path / "run/rollouts.jsonl").open()]
    tasks = collections.Counter({r["group"]: r["task"] for r in drawn}.values())
    assert tasks.pop("0/0") >= 5 and max(tasks.values()) <= 2  # each is asked twice without it


def test_a_signal_in_the_last_step_leaves_its_evaluation_to_the_next_run(
    model, tmp_path, monkeypatch
):
    update = train_rl.update

    def told(run, state, version):
        update(run, state, version)
        # In turns the engine draws with the trainer's own arrays, not with a copy.
        drawn_with = jax.tree.leaves(run.generation.collector.engine.weights)
        assert {id(a) for a in drawn_with} == {id(a) for a in jax.tree.leaves(state.params)}
        if version == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(train_rl, "update", told)
        assert rl(model, tmp_path / "run", "max_steps=2") == 0
    assert "eval/reward_mean" not in metrics(tmp_path / "run")[-1]
    assert rl(model, tmp_path / "run", "max_steps=2") == 0
    lines = metrics(tmp_path / "run")
    assert [(x["step"], "eval/reward_mean" in x) for x in lines[1:]] == [
        (1, False),
        (2, False),
        (2, True),
    ]


@pytest.mark.parametrize(
    ("what", "call", "step"),
    [("gather", 3, 2), ("update", 3, 2), ("evaluate", 2, 2), ("tell", 3, 2)],
)
def test_what_was_learned_is_saved_where_those_who_draw_are_lost(
    model, tmp_path, monkeypatch, what, call, step
):
    """At the call of a number: but for gathering, the first is before the first step."""
    real, calls = getattr(train_rl, what), []

    def lost(*args):
        calls.append(args)
        if len(calls) == call:
            raise HostLostError("none of the rollout workers answers")
        return real(*args)

    flags = ("checkpoint.every=0", "max_steps=3" if what == "gather" else "max_steps=2")
    with monkeypatch.context() as patch:
        patch.setattr(train_rl, what, lost)
        with pytest.raises(HostLostError):
            rl(model, tmp_path / "run", *flags)
    with Checkpoints(tmp_path / "run/checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps() == [step]
    told = [0, 1] if what == "tell" else [0, 1, 2]
    assert [line["step"] for line in metrics(tmp_path / "run")] == told
    assert rl(model, tmp_path / "run", *flags) == 0  # and goes on, or is evaluated
    last = metrics(tmp_path / "run")[-1]
    assert last["step"] == (3 if what == "gather" else 2) and "eval/reward_mean" in last


def test_where_every_rollout_fails_the_run_says_why_and_ends(model, tmp_path):
    options = 'env.options={"fails": "all", "count": 8}'
    with pytest.raises(ConfigError, match=r"20 groups in a row failed.*reward"):
        rl(model, tmp_path / "run", options)


def test_learns(model, tmp_path):
    flags = ("max_steps=12", "eval.every=4", "checkpoint.every=0", "algorithm.advantage=grpo")
    assert rl(model, tmp_path / "run", *flags) == 0
    lines = metrics(tmp_path / "run")
    found = [line["eval/reward_mean"] for line in lines if "eval/reward_mean" in line]
    assert found[-1] > found[0] + 0.2
    with Checkpoints(tmp_path / "run/checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps() == [12]


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (("model=nowhere",), r"config.model 'nowhere' is no folder"),
        (("env.name=nothing",), r"unknown environment 'nothing'; use reverse_text"),
        (("env.options={",), r"config.env.options is '{', no JSON"),
        (("env.options=[1]",), r"config.env.options is '\[1\]', no JSON object; write e.g."),
        (('env.options={"x": 1}',), r"unexpected keyword argument 'x'; it takes seed, fails"),
        (('env.options={"count": 0}',), r"environment test_rl:Letters has no tasks with config"),
        (("eval.tasks=50",), r"config.eval.tasks is 50, and the held-out environment has 40"),
        (("algorithm.group_size=1",), r"config.algorithm.group_size is 1"),
        (("rollout.temperature=0.0",), r"config.rollout.temperature is 0.0"),
        (("rollout.max_staleness=-1",), r"config.rollout.max_staleness is -1"),
        (("curriculum.use=hardest",), r"config.curriculum.use is 'hardest'; choose one of none"),
        (("seq_len=100",), r"config.seq_len 100 is no positive multiple of 128; use 128"),
    ],
)
def test_bad_input_is_one_line(model, tmp_path, flags, problem):
    with pytest.raises(ConfigError, match=problem) as error:
        rl(model, tmp_path / "run", *flags)
    assert "\n" not in str(error.value)
