"""Write the golden files beside this script: what transformers computes, in fp32 with torch.

They are committed; tests only read them. jaxrl does not depend on torch, so making them again
takes an environment of its own (Python 3.11):

    pip install torch==2.13.0 transformers==5.23.0 safetensors==0.8.0 jinja2==3.1.6
    python tests/golden/generate.py [SMOLLM2_DIR]

Each case is a folder: a tiny random checkpoint (config.json, model.safetensors) and
golden.safetensors with `tokens` and `labels` [B, T], `logits` [B, T, V] of the tokens, and
`grad.<tensor name>`, the gradient of the mean cross-entropy of `labels`.

With SMOLLM2_DIR (made by `python -m jaxrl.models.smollm2 SMOLLM2_DIR`) it also writes
smollm2_greedy.json: the model's greedy continuations of chat prompts.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen3Config

HERE = Path(__file__).parent
V, B, T = 96, 2, 48
SMALL = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    # The pairs' wavelengths are 6 to 1,800 tokens: some are kept, some blended, some divided by
    # the factor.
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES = {
    # 4 heads of 16 make 64, not hidden_size.
    "qwen3_tied": Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=True),
    "qwen3_untied": Qwen3Config(
        **SMALL, head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 1e6}
    ),
    "llama_untied": LlamaConfig(**SMALL | {"num_key_value_heads": 4}, rms_norm_eps=1e-5),
    "llama_bias": LlamaConfig(**SMALL, attention_bias=True),
    "llama3_rope_tied": LlamaConfig(
        **SMALL, head_dim=16, tie_word_embeddings=True, rope_parameters=LLAMA3
    ),
}
PROMPTS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "What is 17 + 25? Think step by step.",
    "Explain in two sentences why the sky is blue.",
    "List three fruits that are red.",
)
NEW_TOKENS = 64


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Weights large enough that every term of the forward pass shows in the logits."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.copy_(1.0 + 0.3 * torch.randn_like(p))
            else:
                p.copy_((0.5 if "embed" in name else 0.25) * torch.randn_like(p))


def write_case(name: str, config, seed: int) -> None:
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    randomize(model, seed)
    tokens, labels = torch.randint(V, (2, B, T))
    logits = model(tokens).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    golden = {"tokens": tokens.int(), "labels": labels.int(), "logits": logits.detach()}
    for tensor, p in model.named_parameters():
        golden[f"grad.{tensor}"] = p.grad
    model.save_pretrained(HERE / name)
    (HERE / name / "generation_config.json").unlink(missing_ok=True)
    save_file(golden, HERE / name / "golden.safetensors")


def write_smollm2(folder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None  # all 64 tokens, past the end of the answer
    rows = []
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt").input_ids
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
        new = out[0, ids.shape[1] :].tolist()
        assert len(new) == NEW_TOKENS, len(new)
        rows.append({"text": text, "prompt": ids[0].tolist(), "continuation": new})
        print(tokenizer.decode(new))
    lines = ",\n".join(json.dumps(row) for row in rows)
    (HERE / "smollm2_greedy.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    torch.set_num_threads(2)
    for seed, (name, config) in enumerate(CASES.items()):
        write_case(name, config, seed)
    if len(sys.argv) > 1:
        write_smollm2(sys.argv[1])
