"""The frozen description of a decoder: everything that decides its shapes and its arithmetic."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama-3's frequency scaling of rotary embeddings (arXiv:2407.21783, section 3.2)."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer; field names are Hugging Face's where they name the same thing.

    Axis letters used throughout: D `hidden_size`, N `num_heads`, K `num_kv_heads`, H `head_dim`,
    F `intermediate_size`, V `vocab_size`, L `num_layers`.
    """

    name: str
    architecture: str  # the `architectures` entry of config.json, e.g. "Qwen3ForCausalLM"
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rope_theta: float
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = False
    qk_norm: bool = False
    attention_bias: bool = False
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 131072

    def __post_init__(self):
        for field in (
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "intermediate_size",
        ):
            if getattr(self, field) < 1:
                raise ValueError(
                    f"{self.name}: {field} is {getattr(self, field)}; it must be at least 1"
                )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.name}: num_heads {self.num_heads} is no multiple of num_kv_heads "
                f"{self.num_kv_heads}; each kv head serves a whole number of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"{self.name}: head_dim {self.head_dim} is odd; rotary embeddings turn pairs"
            )

    def replace(self, **changes) -> "ModelConfig":
        """A copy with some fields changed; checked again."""
        return dataclasses.replace(self, **changes)
