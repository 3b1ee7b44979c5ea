"""The frozen description of a decoder: everything that decides its shapes and its arithmetic."""

import dataclasses
from typing import Literal


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
    F `intermediate_size` (in experts `moe_intermediate_size`), E `num_experts`, V `vocab_size`,
    L `num_layers`.

    num_experts 0: every layer's MLP is dense. Else the layers behind the `first_k_dense` first
    ones send each token to `num_experts_per_tok` of their experts, weighted by the softmax of the
    router's scores, or by their sigmoid, chosen after a correction bias was added
    (arXiv:2412.19437, section 2.1.2); `norm_topk_prob` makes the chosen weights sum to 1, and
    `routed_scaling_factor` multiplies them. `num_shared_experts` serve every token besides.
    partial_rotary_factor: the share of each head that rotary embeddings turn.
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
    attention_out_bias: bool = True  # whether attention_bias holds for the output projection too
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 131072
    partial_rotary_factor: float = 1.0
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    num_shared_experts: int = 0
    first_k_dense: int = 0
    router: Literal["softmax", "sigmoid"] = "softmax"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0

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
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise ValueError(
                f"{self.name}: rotary embeddings would turn {self.rotary_dim} of head_dim "
                f"{self.head_dim} (partial_rotary_factor {self.partial_rotary_factor}); they turn "
                "pairs: use an even number"
            )
        if self.num_experts:
            self._check_experts()

    def _check_experts(self) -> None:
        for field, low, high in (
            ("num_experts_per_tok", 1, self.num_experts),
            ("first_k_dense", 0, self.num_layers - 1),
            ("num_shared_experts", 0, None),
            ("moe_intermediate_size", 1, None),
        ):
            value = getattr(self, field)
            if value < low or (high is not None and value > high):
                bounds = f"at least {low}" if high is None else f"{low} to {high}"
                raise ValueError(f"{self.name}: {field} is {value}; it must be {bounds}")

    @property
    def rotary_dim(self) -> int:
        """How many of a head's H features rotary embeddings turn."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def num_sparse_layers(self) -> int:
        """Layers with experts: the last ones."""
        return self.num_layers - self.first_k_dense if self.num_experts else 0

    def replace(self, **changes) -> "ModelConfig":
        """A copy with some fields changed; checked again."""
        return dataclasses.replace(self, **changes)
