"""A tokenizer that does not fit the model is refused; what ends a turn is found."""

import json
import shutil

import pytest

from jaxrl.data.tokenizer import load_tokenizer
from jaxrl.options import ConfigError


def test_stop_tokens_are_eos_and_those_of_the_generation_config(tokenizers):
    assert set(tokenizers["smollm2"].stop_texts) == {"<|im_end|>"}
    assert set(tokenizers["qwen3"].stop_texts) == {"<|im_end|>", "<|endoftext|>"}
    found = tokenizers["glm45"]
    assert set(found.stop_texts) == {"<|endoftext|>", "<|user|>", "<|observation|>"}
    assert found.hf.convert_ids_to_tokens(found.pad_id) == "<|endoftext|>"


def test_without_a_generation_config_eos_ends_a_turn(tokenizer_folders, tmp_path):
    folder = shutil.copytree(tokenizer_folders["qwen3"], tmp_path / "q")
    (folder / "generation_config.json").unlink()
    assert load_tokenizer(folder, 700).stop_texts == ("<|im_end|>",)


def test_more_tokens_than_the_model_has_are_refused(tokenizer_folders):
    largest = max(load_tokenizer(tokenizer_folders["qwen3"], 700).hf.get_vocab().values())
    load_tokenizer(tokenizer_folders["qwen3"], largest + 1)
    with pytest.raises(ConfigError, match=rf"has token {largest} .*the model {largest} tokens"):
        load_tokenizer(tokenizer_folders["qwen3"], largest)


def test_a_template_of_ones_own_replaces_the_tokenizers(tokenizer_folders, tmp_path):
    file = tmp_path / "t.jinja"
    file.write_text("{{ messages[0].content }}", encoding="utf-8")
    hf = load_tokenizer(tokenizer_folders["qwen3"], 700, str(file)).hf
    assert hf.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a"
    with pytest.raises(ConfigError, match=r"chat_template 'nowhere.jinja' is no file"):
        load_tokenizer(tokenizer_folders["qwen3"], 700, "nowhere.jinja")


def test_what_is_no_tokenizer_is_refused_in_one_line(tokenizer_folders, tmp_path):
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"^no tokenizer in [^\n]*$"):
        load_tokenizer(tmp_path, 700)
    folder = shutil.copytree(tokenizer_folders["qwen3"], tmp_path / "q")
    (folder / "generation_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"generation_config.json is no JSON"):
        load_tokenizer(folder, 700)
    (folder / "generation_config.json").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings.pop("eos_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(ConfigError, match="no eos_token: nothing would end a turn"):
        load_tokenizer(folder, 700)
