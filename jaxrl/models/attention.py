"""Grouped-query causal self-attention with rotary embeddings."""

import dataclasses
from collections.abc import Callable

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxrl.models.config import ModelConfig
from jaxrl.models.layers import Linear, RMSNorm, apply_rope
from jaxrl.models.moe import ExpertOps
from jaxrl.models.params import Scope
from jaxrl.ops.shared_prefix import Families


@dataclasses.dataclass(frozen=True)
class LayerContext:
    """What every layer of one forward pass shares.

    `attend(q, k, v, documents)` is a resolved attention implementation (`ops.attention`), and
    `documents` what it takes them as: segment ids, for shared prompts `Families`, None for one;
    `mlp_chunk` the number of tokens the MLP works on at a time (0: all of them); `experts` how the
    products of expert layers run, and how tokens reach experts on other devices; `chosen` the
    experts that every layer's router chooses, whatever its scores (benchmarks).
    """

    cos: Float[Array, "B T P"]
    sin: Float[Array, "B T P"]
    documents: Int[Array, "B T"] | Families | None
    attend: Callable
    mlp_chunk: int = 0
    experts: ExpertOps | None = None
    chosen: Int[Array, "B*T k"] | None = None


class Attention(nnx.Module):
    """q, k, v projections, optional q/k norm, rotary embeddings, attention, output projection."""

    def __init__(self, config: ModelConfig, scope: Scope):
        D, H = config.hidden_size, config.head_dim
        q, kv, bias = config.num_heads * H, config.num_kv_heads * H, config.attention_bias
        scope = scope.child("self_attn.")
        self.config = config
        self.q = Linear(scope, (D, q), ("embed", "heads"), hf="q_proj", bias=bias)
        self.k = Linear(scope, (D, kv), ("embed", "kv_heads"), hf="k_proj", bias=bias)
        self.v = Linear(scope, (D, kv), ("embed", "kv_heads"), hf="v_proj", bias=bias)
        self.o = Linear(
            scope,
            (q, D),
            ("attention_out", "residual"),
            hf="o_proj",
            bias=bias and config.attention_out_bias,
        )
        norm = config.qk_norm
        self.q_norm = RMSNorm(scope, H, config.rms_norm_eps, hf="q_norm") if norm else None
        self.k_norm = RMSNorm(scope, H, config.rms_norm_eps, hf="k_norm") if norm else None

    def __call__(self, x: Float[Array, "B T D"], ctx: LayerContext) -> Float[Array, "B T D"]:
        B, T, _ = x.shape
        N, K, H = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        q = self.q(x).reshape(B, T, N, H)  # [B, T, N*H] -> heads apart
        k = self.k(x).reshape(B, T, K, H)
        v = self.v(x).reshape(B, T, K, H)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, ctx.cos, ctx.sin), apply_rope(k, ctx.cos, ctx.sin)
        with jax.named_scope("attend"):
            out = ctx.attend(q, k, v, ctx.documents)
        return self.o(out.reshape(B, T, N * H))
