"""Options: what is refused, in which words, and what is converted."""

import dataclasses

import pytest

from jaxrl.config import BenchConfig, ConfigError, TrainConfig, default_config, from_config
from jaxrl.options import field_type, options, options_table


def test_defaults_survive_the_round_trip():
    config = from_config(BenchConfig, default_config(BenchConfig, model="Qwen3-0.6B"))
    assert config == BenchConfig(model="Qwen3-0.6B")
    assert from_config(BenchConfig, dataclasses.asdict(config)) == config


def test_values_are_converted_only_without_loss():
    config = from_config(BenchConfig, {"time_limit_s": 3, "table": ["a", "b"]})
    assert config.time_limit_s == 3.0 and isinstance(config.time_limit_s, float)
    assert config.table == ("a", "b")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stps": 3}, "unknown key config.stps; did you mean config.steps?"),
        (
            {"learning_rate": 1.0},
            "unknown key config.learning_rate; did you mean config.train.optimizer.learning_rate?",
        ),
        (
            {"train": {"optimizer": {"b3": 0.9}}},
            "unknown key config.train.optimizer.b3; did you mean config.train.optimizer.b2?",
        ),
        ({"zzz": 1}, "unknown key config.zzz; --help lists the keys"),
        ({"steps": "ten"}, "config.steps is 'ten'; it takes a whole number"),
        ({"steps": 10.5}, "config.steps is 10.5; it takes a whole number"),
        ({"resume": 1}, "config.resume is 1; it takes true or false"),
        ({"steps": True}, "config.steps is True; it takes a whole number"),
        ({"table": "rl"}, "config.table is 'rl'; it takes a tuple of strings"),
        ({"steps": 3}, "config.steps is 3; it must be at least 10"),
        ({"time_limit_s": float("nan")}, "config.time_limit_s is nan; it takes a finite number"),
        (
            {"mode": "plan"},
            "config.mode is 'plan'; choose one of auto, planned, measured, proxy; "
            "did you mean planned?",
        ),
        ({"train": 3}, "config.train is 3; it is a section of options, set config.train.<option>"),
        (
            {"proxy": {"seq_len": 200}},
            "config.proxy.seq_len 200 is no positive multiple of 128; use 256",
        ),
        (
            {"train": {"lora": {"targets": ("q", "z")}}},
            "config.train.lora.targets has 'z'; choose among q, k, v, o, gate, up, down",
        ),
        (
            {"train": {"optimizer": {"b1": 1.0}}},
            "config.train.optimizer.b1 is 1.0; it must be below 1",
        ),
        (
            {"train": {"loss": {"token_ratio_low": 9.0}}},
            "config.train.loss.token_ratio_low is 9.0, not below token_ratio_high 8.0; "
            "every token would be dropped",
        ),
    ],
)
def test_bad_values_are_one_line(values, message):
    with pytest.raises(ConfigError) as error:
        from_config(BenchConfig, values)
    assert str(error.value) == message


def test_step_takes_the_rows_choices_and_the_shared_options():
    train = from_config(TrainConfig, {"head_chunk": 512, "temperature": 0.7})
    step = train.step(type="sft", ac="offload", attention="cudnn")
    assert (step.type, step.ac, step.attention) == ("sft", "offload", "cudnn")
    assert (step.head_chunk, step.temperature, step.loss) == (512, 0.7, train.loss)


def test_every_option_is_documented_and_in_the_table():
    table = options_table(BenchConfig)
    for key, _, doc in options(BenchConfig):
        assert doc.endswith("."), key
        assert f"| `{key}` |" in table
    assert "| `train.optimizer.learning_rate` | `1e-06` |" in table
    assert field_type(BenchConfig, "train.optimizer.b1") is float
