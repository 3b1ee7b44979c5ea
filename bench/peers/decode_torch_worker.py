"""The peer of decode.py: transformers' `generate`. Runs in the torch environment."""

import time

import numpy as np
import torch
import transformers
from protocol import serve

STATE = {}


def start(model, options, threads, sequences, prompt, tokens):
    del options
    torch.set_num_threads(threads)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="sdpa"
    )
    loaded.generation_config.eos_token_id = None  # nothing ends early
    STATE.update(model=loaded.eval(), sizes=(sequences, prompt, tokens))
    return {}


def drawn(seed, sample):
    sequences, prompt, tokens = STATE["sizes"]
    prompts = np.random.default_rng(seed).integers(100, 40000, (sequences, prompt))
    how = {"do_sample": True, "temperature": 1.0, "top_k": 0} if sample else {"do_sample": False}
    torch.manual_seed(seed)
    begin = time.perf_counter()
    with torch.inference_mode():
        found = STATE["model"].generate(
            torch.tensor(prompts),
            attention_mask=torch.ones(prompts.shape, dtype=torch.long),
            max_new_tokens=tokens,
            pad_token_id=0,
            **how,
        )
    seconds = time.perf_counter() - begin
    assert found.shape == (sequences, prompt + tokens)
    return found[:, prompt:].tolist(), seconds


serve(
    {
        "start": start,
        "greedy": lambda seed: {"tokens": drawn(seed, False)[0]},
        "draw": lambda seed: {"seconds": drawn(seed, True)[1]},
    }
)
