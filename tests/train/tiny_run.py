"""A checkpoint folder with a tokenizer, and chats, small enough to train in a test."""

import json
import pathlib
import random

import jax
import pytest
from tiny import TINY

from jaxrl.models.hf import save_pretrained
from jaxrl.models.transformer import Transformer, initialize

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB = 259  # bytes and the special tokens


def tiny_checkpoint(folder: pathlib.Path, vocab_size: int = VOCAB + 5, **changes) -> pathlib.Path:
    """A Hugging Face folder: a random model, one token per byte, a ChatML template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    config = TINY.replace(vocab_size=vocab_size + -vocab_size % 8, num_layers=2, **changes)
    save_pretrained(initialize(Transformer(config), jax.random.key(0)), folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHATML,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_chats(file: pathlib.Path, count: int, seed: int = 0) -> pathlib.Path:
    """So many sums of two numbers, questions and answers."""
    rng = random.Random(seed)
    lines = []
    for _ in range(count):
        a, b = rng.randrange(100), rng.randrange(100)
        question = {"role": "user", "content": f"{a} + {b}?"}
        answer = {"role": "assistant", "content": f"It is {a + b}." + " So it is." * (a % 3)}
        lines.append(json.dumps({"messages": [question, answer]}) + "\n")
    file.write_text("".join(lines))
    return file


def write_inputs(folder: pathlib.Path) -> pathlib.Path:
    """model, train.jsonl and validation.jsonl in `folder`."""
    tiny_checkpoint(folder / "model")
    write_chats(folder / "train.jsonl", 60)
    write_chats(folder / "validation.jsonl", 20, seed=1)
    return folder


CONFIG = """
from jaxrl.config import default_config
from jaxrl.sft_config import SftConfig


def get_config():
    config = default_config(SftConfig)
    config.model, config.data.train, config.output = {model!r}, ({train!r},), {output!r}
    config.data.seq_len, config.data.window, config.batch_size = 128, 16, 8
    config.max_steps, config.epochs = 6, 0
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 1e-2, 2
    config.train.compute_dtype, config.tensorboard = "float32", False
    config.checkpoint.every = 2
    return config
"""


def write_config(folder: pathlib.Path, **names: pathlib.Path) -> str:
    """A config file for these: model, train, output. Returns the flag that names it."""
    file = folder / "config.py"
    file.write_text(CONFIG.format(**{name: str(path) for name, path in names.items()}))
    return f"--config={file}"


def metrics(output: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def assert_alike(one: pathlib.Path, other: pathlib.Path) -> None:
    """Two outputs of RL runs hold the same run, drawn by different engines."""
    for a, b in zip(metrics(one), metrics(other), strict=True):
        for key in ("reward_mean", "loss", "grad_norm", "eval/reward_mean", "mismatch_kl"):
            assert (key in a) == (key in b)
            if key in a:
                assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-5), key
