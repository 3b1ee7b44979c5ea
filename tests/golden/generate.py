"""Write the golden files beside this script: what transformers computes, in fp32 with torch.

They are committed; tests only read them. jaxrl does not depend on torch, so making them again
takes an environment of its own (Python 3.11):

    pip install torch==2.13.0 transformers==5.23.0 safetensors==0.8.0 jinja2==3.1.6 peft==0.21.2
    python tests/golden/generate.py [SMOLLM2_DIR]

Each case is a folder: a tiny random checkpoint (config.json, model.safetensors) and
golden.safetensors with `tokens` and `labels` [B, T], `logits` [B, T, V] of the tokens, and
`grad.<tensor name>`, the gradient of the mean cross-entropy of `labels`; the names are those in
model.safetensors, one per expert. Some have an adapter/ besides: random LoRA in PEFT's format, and
its own golden.safetensors, the `logits` of the same tokens that PEFT makes of it. What exists is
left as it is.

With SMOLLM2_DIR (made by `python -m jaxrl.models.smollm2 SMOLLM2_DIR`) it also writes
smollm2_greedy.json: the model's greedy continuations of chat prompts.
"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Glm4MoeConfig,
    LlamaConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

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
SMALL_MOE = SMALL | {
    "hidden_size": 24,
    "intermediate_size": 40,
    "head_dim": 8,
    "moe_intermediate_size": 8,
    "num_experts_per_tok": 3,
}
# As GLM-4.5, with 2 of 3 layers sparse; rotary embeddings turn half of each head by default.
SMALL_GLM = SMALL_MOE | {
    "num_hidden_layers": 3,
    "n_routed_experts": 8,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
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
    "qwen3_moe": Qwen3MoeConfig(**SMALL_MOE, num_experts=8, norm_topk_prob=True),
    # What the config class assumes: weights of the chosen experts that do not sum to 1.
    "qwen3_moe_unnormalized_tied": Qwen3MoeConfig(
        **SMALL_MOE, num_experts=8, tie_word_embeddings=True
    ),
    "glm4_moe": Glm4MoeConfig(**SMALL_GLM, attention_bias=True),
    "glm4_moe_qk_norm": Glm4MoeConfig(**SMALL_GLM, use_qk_norm=True),
}
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTED = {
    "qwen3_tied": ALL,
    "llama_bias": ("q_proj", "v_proj"),
    "qwen3_moe": ALL,
    "glm4_moe": ALL,
}
# PEFT 0.21 looks for the adapters of these names in GLM-4.5's experts only.
BESIDE_EXPERTS = [
    f"mlp.{module}{name}.weight"
    for module in ("", "shared_experts.")
    for name in ("down_proj", "gate_proj", "up_proj")
]
RANK, ALPHA = 3, 12
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
        for name, p in model.named_buffers():
            if "e_score_correction_bias" in name:
                p.copy_(0.2 * torch.randn_like(p))


def watch_routers(model: torch.nn.Module) -> list[torch.Tensor]:
    """A list that fills with each router's margin, when the model runs: by how much the logits (or
    corrected scores) of the experts that a token is sent to exceed those of the others."""
    margins = []

    def hook(router, inputs, outputs):
        logits = outputs[0].float()
        bias = getattr(router, "e_score_correction_bias", None)
        plain = logits if bias is None else logits.sigmoid()
        scores = plain if bias is None else plain + bias
        best = scores.topk(router.top_k + 1, -1)
        assert (best.indices[:, :-1].sort().values == outputs[2].sort().values).all()
        assert len(outputs[2].unique()) == scores.shape[-1], "an expert without a token"
        if bias is not None:
            unbiased = plain.topk(router.top_k, -1).indices
            changed = (unbiased.sort().values != outputs[2].sort().values).any(-1)
            assert changed.float().mean() > 0.2, "the correction bias changes few choices"
        margins.append((best.values[:, -2] - best.values[:, -1]).min())

    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(hook)
    return margins


def per_expert(name: str, stacked: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint that a parameter in memory, [E, out, in], stands for."""
    if "mlp.experts." not in name:
        return {name: stacked}
    prefix, kind = name.rsplit(".", 1)
    named = {"down_proj": stacked}
    if kind == "gate_up_proj":
        gate, up = stacked.chunk(2, dim=1)
        named = {"gate_proj": gate, "up_proj": up}
    return {
        f"{prefix}.{e}.{projection}.weight": tensor.contiguous()
        for projection, tensors in named.items()
        for e, tensor in enumerate(tensors)
    }


def write_case(name: str, config, seed: int) -> None:
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    randomize(model, seed)
    margins = watch_routers(model)
    tokens, labels = torch.randint(V, (2, B, T))
    logits = model(tokens).logits
    # Rounding, which moves logits by a few 1e-6, must not change a choice.
    assert min(margins, default=1.0) > 1e-4, f"{name}: experts nearly tied: {margins}"
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    golden = {"tokens": tokens.int(), "labels": labels.int(), "logits": logits.detach()}
    for tensor, p in model.named_parameters():
        golden |= {f"grad.{t}": g for t, g in per_expert(tensor, p.grad).items()}
    model.save_pretrained(HERE / name)
    (HERE / name / "generation_config.json").unlink(missing_ok=True)
    save_file(golden, HERE / name / "golden.safetensors")


def write_adapter(name: str, targets: tuple[str, ...], seed: int) -> None:
    """An adapter on every matrix of those names, with the checkpoint's names, one per expert."""
    torch.manual_seed(seed)
    tensors = {}
    for tensor, w in load_file(HERE / name / "model.safetensors").items():
        module = tensor.removesuffix(".weight")
        if module.rpartition(".")[2] in targets:
            out, into = w.shape
            # Not more: attention becomes so sharp that rounding, which differs between CPUs, shows.
            a, b = torch.randn(RANK, into) / into**0.5, 0.25 * torch.randn(out, RANK)
            tensors[f"base_model.model.{module}.lora_A.weight"] = a
            tensors[f"base_model.model.{module}.lora_B.weight"] = b
    folder = HERE / name / "adapter"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": sorted(targets),
    }
    if name == "glm4_moe":
        config["target_parameters"] = sorted(BESIDE_EXPERTS)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokens = load_file(HERE / name / "golden.safetensors")["tokens"].long()
    base = AutoModelForCausalLM.from_pretrained(
        HERE / name, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        plain = base(tokens).logits
        logits = PeftModel.from_pretrained(base, str(folder))(tokens).logits
    assert (logits - plain).abs().max() > 1.0, f"{name}: the adapter does nothing"
    save_file({"logits": logits.contiguous()}, folder / "golden.safetensors")


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
        if not (HERE / name).exists():
            write_case(name, config, seed)
        if name in ADAPTED and not (HERE / name / "adapter").exists():
            write_adapter(name, ADAPTED[name], seed)
    if len(sys.argv) > 1:
        write_smollm2(sys.argv[1])
