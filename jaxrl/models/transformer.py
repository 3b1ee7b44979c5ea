"""The one decoder: embedding, scanned blocks, final norm, head."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxrl.models.attention import Attention, LayerContext
from jaxrl.models.config import ModelConfig
from jaxrl.models.layers import MLP, RMSNorm, rope_tables
from jaxrl.models.params import Scope, initial_value, nest, specs
from jaxrl.ops.attention import resolve_attention
from jaxrl.ops.registry import Target
from jaxrl.ops.tokenwise import tokenwise


class Block(nnx.Module):
    """One pre-norm transformer layer. Called with parameters of one layer (no leading L)."""

    def __init__(self, config: ModelConfig, scope: Scope):
        D, eps = config.hidden_size, config.rms_norm_eps
        self.attention_norm = RMSNorm(scope, D, eps, hf="input_layernorm")
        self.attention = Attention(config, scope)
        self.mlp_norm = RMSNorm(scope, D, eps, hf="post_attention_layernorm")
        self.mlp = MLP(config, scope)

    def __call__(self, x: Float[Array, "B T D"], ctx: LayerContext) -> Float[Array, "B T D"]:
        x = checkpoint_name(x, "layer_input")
        with jax.named_scope("attention"):
            h = x + self.attention(self.attention_norm(x), ctx)
        h = checkpoint_name(h, "mlp_input")
        with jax.named_scope("mlp"):
            # With LoRA only the adapters learn; without, everything does.
            graphdef, lora, rest = nnx.split((self.mlp_norm, self.mlp), nnx.LoRAParam, ...)
            lora, rest = nnx.to_pure_dict(lora), nnx.to_pure_dict(rest)
            trainable, frozen = (lora, rest) if jax.tree.leaves(lora) else (rest, {})

            def norm_and_mlp(trainable, frozen, x):
                norm, mlp = nnx.merge(graphdef, merge_trees(trainable, frozen))
                return x + mlp(norm(x))

            rows = h.reshape(-1, h.shape[-1])  # [B, T, D] -> [B*T, D]
            y = tokenwise(norm_and_mlp, trainable, frozen, rows, chunk=ctx.mlp_chunk)
        return y.reshape(h.shape)


class Transformer(nnx.Module):
    """`model(tokens)` -> logits. Built abstract: no parameter holds memory until it is filled in.

    `layers` holds each block parameter stacked over layers, [L, ...]. Fill with
    `initialize(model, key)` or `jaxrl.load_pretrained`.
    """

    def __init__(self, config: ModelConfig, *, attention: str = "auto"):
        V, D = config.vocab_size, config.hidden_size
        top = Scope()
        self.config, self.attention = config, attention
        self.embed = top.declare((V, D), ("vocab", "vocab_embed"), hf="model.embed_tokens.weight")
        self.layers = Block(config, Scope("model.layers.{i}.", config.num_layers))
        self.final_norm = RMSNorm(top, D, config.rms_norm_eps, hf="model.norm")
        self.head = (
            None
            if config.tie_embeddings
            else top.declare((V, D), ("vocab", "vocab_embed"), hf="lm_head.weight")
        )

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits (fp32) of each next token.

        positions: for the rotary embedding, default 0..T-1. segment_ids: tokens attend within
        their own id only (packed documents); default one document per row.
        """
        x = self.embed[...][tokens]
        ctx = self.context(tokens.shape, positions, segment_ids, x.dtype)
        graphdef, params = nnx.split(self.layers)
        x, _ = jax.lax.scan(
            lambda x, layer: (nnx.merge(graphdef, layer)(x, ctx), None),
            x,
            nnx.to_pure_dict(params),
        )
        x = self.final_norm(x)
        head = self.embed if self.head is None else self.head
        return jnp.einsum("BTD,VD->BTV", x, head[...], preferred_element_type=jnp.float32)

    def context(
        self,
        shape,
        positions,
        segment_ids,
        dtype,
        *,
        target: Target | None = None,
        mlp_chunk: int = 0,
    ) -> LayerContext:
        """The layers' shared inputs for a [B, T] batch; resolves the attention implementation."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
        attend = resolve_attention(
            self.attention,
            target=target or Target.here(),
            dtype=dtype,
            head_dim=self.config.head_dim,
            packed=segment_ids is not None,
            seq_len=shape[1],
        )
        cos, sin = rope_tables(self.config, positions)
        return LayerContext(cos, sin, segment_ids, attend.fn, mlp_chunk)


def merge_trees(a: dict, b: dict) -> dict:
    """The union of two nested dicts with no leaf in common."""
    both = {k: merge_trees(a[k], b[k]) for k in a.keys() & b.keys()}
    return a | b | both


def initialize(
    model: Transformer, key: jax.Array, dtype=jnp.float32, shardings=None
) -> Transformer:
    """Fill an abstract model with random parameters, made sharded where they will live.

    shardings: nested dict of `NamedSharding`s with the parameters' paths, or None.
    """

    def make():
        return nest({p: initial_value(p, s, key, dtype) for p, s in specs(model).items()})

    graphdef, _ = nnx.split(model)
    return nnx.merge(graphdef, jax.jit(make, out_shardings=shardings)())
