"""The worked answers that the example recipe trains on."""

import json
import sys

import pytest

from jaxrl.data.gsm_symbolic import final_answer, main, write


def lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_same_seed_same_samples_and_no_question_in_both_files(tmp_path):
    folders = [
        write(tmp_path / str(i), train=60, held_out=20, seed=s) for i, s in enumerate((7, 7, 1))
    ]
    train, held_out = (lines(folders[0] / f"{name}.jsonl") for name in ("train", "held_out"))
    assert (len(train), len(held_out)) == (60, 20)
    questions = [sample["messages"][0]["content"] for sample in train + held_out]
    assert len(set(questions)) == 80
    assert lines(folders[1] / "train.jsonl") == train
    assert lines(folders[2] / "train.jsonl") != train
    for sample in train:
        assert [m["role"] for m in sample["messages"]] == ["user", "assistant"]
        assert final_answer(sample["messages"][1]["content"]) == sample["answer"]


def test_final_answer_is_what_follows_the_last_mark():
    assert final_answer("6 * 2 = 12\n#### 1\nno:\n#### 1,200.\n") == "1200"
    assert final_answer("It is 12.") == final_answer("####") == ""


def test_bad_input_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    monkeypatch.setattr(sys, "argv", ["gsm_symbolic", str(tmp_path / "full"), "--train", "3"])
    with pytest.raises(SystemExit, match=r"error: .*full already exists and is not an empty"):
        main()
