"""`jaxrl.sft` as one program over two processes: what one process trains, written once."""

import pathlib
import re
import signal

import pytest
from processes import outputs, start
from tiny_run import metrics, write_config, write_inputs

from jaxrl.sft import main
from jaxrl.train.checkpoint import Checkpoints

# What the collectives' library prints, several threads at once and within each other's lines.
GLOO = {"Gloo", "Rank", "is", "connected", "to", "peer", "ranks", "Expected", "number", "of"}
HOST = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4", "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> pathlib.Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def command(inputs: pathlib.Path, folder: pathlib.Path, *flags: str) -> list[str]:
    """The flags of a run into folder/run, with a validation every three steps."""
    folder.mkdir(exist_ok=True)
    names = {"model": inputs / "model", "train": inputs / "train.jsonl"}
    options = (f"data.validation={inputs / 'validation.jsonl'}", "eval_every=3", *flags)
    config = write_config(folder, **names, output=folder / "run")
    return [config, *(f"--config.{option}" for option in options)]


def words(text: str) -> set[str]:
    return set(re.findall("[A-Za-z]+", text))


@pytest.mark.slow
def test_two_processes_train_save_and_resume_as_one(inputs, tmp_path):
    for flags in (("max_steps=3",), ()):  # the second goes on from the first
        run = ["-m", "jaxrl.sft", *command(inputs, tmp_path / "two", *flags)]
        first, other = outputs(start(run, **HOST))
        assert first[0] == other[0] == 0, (first, other)
        assert not words(other[1]) - GLOO, other[1]
        assert "8 cpu (fsdp 8" in first[1]
    assert main(["sft", *command(inputs, tmp_path / "one")]) == 0
    one, both = metrics(tmp_path / "one/run"), metrics(tmp_path / "two/run")
    assert [line["step"] for line in both] == [0, 1, 2, 3, 4, 5, 6]
    for a, b in zip(both, one, strict=True):
        for key in ("loss", "eval_loss", "grad_norm"):
            assert (key in a) == (key in b), (a["step"], key)
            if key in a:
                assert a[key] == pytest.approx(b[key], rel=1e-4), (a["step"], key)
    with Checkpoints(tmp_path / "two/run/checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps() == [4, 6]


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both(inputs, tmp_path):
    flags = ("max_steps=2000", "eval_every=0", "checkpoint.every=0")
    first, other = processes = start(
        ["-m", "jaxrl.sft", *command(inputs, tmp_path, *flags)], **HOST
    )
    assert first.stdout is not None
    for line in first.stdout:
        if line.startswith("step 3/"):
            other.send_signal(signal.SIGTERM)
            break
    (code, printed, _), (other_code, _, _) = outputs(processes)
    with Checkpoints(tmp_path / "run/checkpoints", read_only=True) as checkpoints:
        (step,) = checkpoints.steps()
    assert (code, other_code) == (0, 0) and 3 <= step < 2000
    assert f"stopped at step {step}, which is saved" in printed
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(step + 1))
    assert ["eval_loss" in line for line in lines] == [True, *[False] * step]  # only before
