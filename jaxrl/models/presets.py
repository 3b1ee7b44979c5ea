"""The shapes of the published models that the benchmark covers (values of their config.json)."""

import difflib

from jaxrl.models.config import ModelConfig, RopeScaling

PRESETS = {
    c.name: c
    for c in (
        ModelConfig(
            name="Qwen3-0.6B",
            architecture="Qwen3ForCausalLM",
            vocab_size=151936,
            hidden_size=1024,
            num_layers=28,
            num_heads=16,
            num_kv_heads=8,
            head_dim=128,
            intermediate_size=3072,
            rope_theta=1e6,
            tie_embeddings=True,
            qk_norm=True,
            max_position_embeddings=40960,
        ),
        ModelConfig(
            name="Qwen3-4B-Instruct-2507",
            architecture="Qwen3ForCausalLM",
            vocab_size=151936,
            hidden_size=2560,
            num_layers=36,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            intermediate_size=9728,
            rope_theta=5e6,
            tie_embeddings=True,
            qk_norm=True,
            max_position_embeddings=262144,
        ),
        ModelConfig(
            name="Llama-3.1-8B-Instruct",
            architecture="LlamaForCausalLM",
            vocab_size=128256,
            hidden_size=4096,
            num_layers=32,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            intermediate_size=14336,
            rope_theta=5e5,
            rms_norm_eps=1e-5,
            rope_scaling=RopeScaling(factor=8.0),
        ),
        ModelConfig(
            name="Llama-3.2-1B-Instruct",
            architecture="LlamaForCausalLM",
            vocab_size=128256,
            hidden_size=2048,
            num_layers=16,
            num_heads=32,
            num_kv_heads=8,
            head_dim=64,
            intermediate_size=8192,
            rope_theta=5e5,
            rms_norm_eps=1e-5,
            tie_embeddings=True,
            rope_scaling=RopeScaling(factor=32.0),
        ),
        ModelConfig(
            name="Llama-3.2-3B-Instruct",
            architecture="LlamaForCausalLM",
            vocab_size=128256,
            hidden_size=3072,
            num_layers=28,
            num_heads=24,
            num_kv_heads=8,
            head_dim=128,
            intermediate_size=8192,
            rope_theta=5e5,
            rms_norm_eps=1e-5,
            tie_embeddings=True,
            rope_scaling=RopeScaling(factor=32.0),
        ),
    )
}


def preset(name: str) -> ModelConfig:
    """The preset called `name`; an unknown name is a `ValueError` that lists the nearest ones."""
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, n=2, cutoff=0.3) or sorted(PRESETS)
    raise ValueError(f"unknown model {name!r}; did you mean {' or '.join(near)}?")
