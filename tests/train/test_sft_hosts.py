"""`jaxrl.sft` as one program over two processes: what one process trains, written once."""

import os
import subprocess
import sys

import pytest
from tiny_run import metrics, tiny_checkpoint, write_chats, write_config

from jaxrl.parallel import distributed
from jaxrl.sft import main
from jaxrl.train.checkpoint import Checkpoints


@pytest.mark.slow
def test_two_processes_train_save_and_resume_as_one(tmp_path):
    tiny_checkpoint(tmp_path / "model")
    write_chats(tmp_path / "train.jsonl", 60)
    write_chats(tmp_path / "validation.jsonl", 20, seed=1)

    def command(output: str, *flags: str) -> list[str]:
        folder = tmp_path / output
        folder.mkdir(exist_ok=True)
        names = {"model": tmp_path / "model", "train": tmp_path / "train.jsonl"}
        options = (f"data.validation={tmp_path / 'validation.jsonl'}", "eval_every=3", *flags)
        config = write_config(folder, **names, output=folder / "run")
        return [config, *(f"--config.{option}" for option in options)]

    def two(*flags: str) -> list[tuple[int, str, str]]:
        with distributed.reserved_port("127.0.0.1") as port:
            address = f"127.0.0.1:{port}"
        started = [
            subprocess.Popen(
                [sys.executable, "-m", "jaxrl.sft", *command("two", *flags)],
                env=os.environ
                | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
                | {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
                | {"JAX_PROCESS_ID": str(i)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for i in range(2)
        ]
        try:
            said = [process.communicate(timeout=200) for process in started]
        finally:
            for process in started:
                process.kill()
        return [(p.returncode, *s) for p, s in zip(started, said, strict=True)]

    for flags in (("max_steps=3",), ()):  # the second goes on from the first
        first, other = two(*flags)
        assert first[0] == other[0] == 0, (first, other)
        printed = [line for line in other[1].splitlines() if not line.startswith("[Gloo]")]
        assert printed == [] and "8 cpu (fsdp 8" in first[1]
    assert main(["sft", *command("one")]) == 0
    one, both = metrics(tmp_path / "one/run"), metrics(tmp_path / "two/run")
    assert [line["step"] for line in both] == [0, 1, 2, 3, 4, 5, 6]
    for a, b in zip(both, one, strict=True):
        for key in ("loss", "eval_loss", "grad_norm"):
            assert (key in a) == (key in b), (a["step"], key)
            if key in a:
                assert a[key] == pytest.approx(b[key], rel=1e-4), (a["step"], key)
    with Checkpoints(tmp_path / "two/run/checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps() == [4, 6]
