"""The one decoder: embedding, scanned blocks, final norm, head."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxrl.models.attention import Attention, LayerContext
from jaxrl.models.config import ModelConfig
from jaxrl.models.layers import MLP, RMSNorm, rope_tables
from jaxrl.models.moe import ExpertOps, MoE, expert_load, mix
from jaxrl.models.params import Buffer, Scope, initial_value, nest, specs
from jaxrl.ops.attention import resolve_attention
from jaxrl.ops.grouped_matmul import resolve_grouped_matmul
from jaxrl.ops.linear import at_hand
from jaxrl.ops.registry import Target
from jaxrl.ops.tokenwise import tokenwise


class Block(nnx.Module):
    """One pre-norm transformer layer. Called with parameters of one layer (no leading L)."""

    def __init__(self, config: ModelConfig, scope: Scope, *, sparse: bool):
        D, eps = config.hidden_size, config.rms_norm_eps
        self.attention_norm = RMSNorm(scope, D, eps, hf="input_layernorm")
        self.attention = Attention(config, scope)
        self.mlp_norm = RMSNorm(scope, D, eps, hf="post_attention_layernorm")
        self.mlp = (
            MoE(config, scope) if sparse else MLP(D, config.intermediate_size, scope.child("mlp."))
        )

    def __call__(
        self, x: Float[Array, "B T D"], ctx: LayerContext
    ) -> tuple[Float[Array, "B T D"], Float[Array, " E"] | None]:
        """(the layer's output; how many choices of experts fell on each, None in a dense layer)."""
        x = checkpoint_name(x, "layer_input")
        with jax.named_scope("attention"):
            h = x + self.attention(self.attention_norm(x), ctx)
        h = checkpoint_name(h, "mlp_input")
        rows = h.reshape(-1, h.shape[-1])  # [B, T, D] -> [B*T, D]
        with jax.named_scope("mlp"):
            if isinstance(self.mlp, MoE):
                y, load = self._experts(self.mlp, rows, ctx)
            else:
                y, load = self._dense(rows, ctx), None
        return y.reshape(h.shape), load

    def _dense(self, rows: Float[Array, "T D"], ctx: LayerContext) -> Float[Array, "T D"]:
        def norm_and_mlp(modules, x):
            norm, mlp = modules
            return x + mlp(norm(x))

        return _tokenwise(norm_and_mlp, (self.mlp_norm, self.mlp), rows, chunk=ctx.mlp_chunk)

    def _experts(self, moe: MoE, rows: Float[Array, "T D"], ctx: LayerContext):
        assert ctx.experts is not None
        ops = ctx.experts
        graphdef, weights = nnx.split(moe.experts)
        weights, rows = at_hand(nnx.to_pure_dict(weights), rows)
        experts = nnx.merge(graphdef, weights)

        def norm_and_score(modules, x):
            norm, router = modules
            return router.scores(norm(x))

        def norm_and_mix(modules, inputs):
            norm, experts, shared = modules
            x, weights, chosen = inputs
            return x + mix(experts, shared, norm(x), weights, chosen, ops)

        with jax.named_scope("router"):
            # In chunks of their own: the choice is made, and kept, for all tokens at once.
            modules = (self.mlp_norm, moe.router)
            scores = _tokenwise(
                norm_and_score, modules, rows, chunk=ctx.mlp_chunk, dtype=jnp.float32
            )
            chosen = moe.router.choose(scores) if ctx.chosen is None else ctx.chosen
            chosen = checkpoint_name(chosen, "experts_chosen")
            weights = moe.router.weigh(scores, chosen)
            load = expert_load(chosen, moe.experts.num_experts)
        modules = (self.mlp_norm, experts, moe.shared)
        y = _tokenwise(norm_and_mix, modules, (rows, weights, chosen), chunk=ops.chunk)
        return y, load


def _tokenwise(fn, modules, x, *, chunk: int, dtype=None):
    """`fn(modules, x)` in chunks of tokens (`ops.tokenwise`), with a gradient of what learns: the
    adapters where there are some, else every parameter."""
    graphdef, lora, fixed, rest = nnx.split(modules, nnx.LoRAParam, Buffer, ...)
    lora, fixed, rest = (nnx.to_pure_dict(s) for s in (lora, fixed, rest))
    trainable, frozen = (lora, rest) if jax.tree.leaves(lora) else (rest, {})
    frozen = merge_trees(frozen, fixed)

    def pure(trainable, frozen, x):
        return fn(nnx.merge(graphdef, merge_trees(trainable, frozen)), x)

    return tokenwise(pure, trainable, frozen, x, chunk=chunk, dtype=dtype)


class Transformer(nnx.Module):
    """`model(tokens)` -> logits. Built abstract: no parameter holds memory until it is filled in.

    `layers` holds each block parameter stacked over layers, [L, ...]; where the first layers are
    dense and the others have experts, `dense_layers` holds the first ones. Fill with
    `initialize(model, key)` or `jaxrl.load_pretrained`.
    """

    def __init__(
        self, config: ModelConfig, *, attention: str = "auto", grouped_matmul: str = "auto"
    ):
        V, D = config.vocab_size, config.hidden_size
        top = Scope()
        self.config, self.attention, self.grouped_matmul = config, attention, grouped_matmul
        self.embed = top.declare((V, D), ("vocab", "vocab_embed"), hf="model.embed_tokens.weight")
        sparse = config.num_sparse_layers
        dense = config.num_layers - sparse
        hf = "model.layers.{i}."
        self.dense_layers = (
            Block(config, Scope(hf, dense), sparse=False) if sparse and dense else None
        )
        self.layers = Block(
            config, Scope(hf, sparse or dense, dense if sparse else 0), sparse=bool(sparse)
        )
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
        for stack in (self.dense_layers, self.layers):
            if stack is not None:
                graphdef, params = nnx.split(stack)
                x, _ = jax.lax.scan(
                    lambda x, layer, graphdef=graphdef: nnx.merge(graphdef, layer)(x, ctx),
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
    ) -> LayerContext:
        """The layers' shared inputs for a [B, T] batch on the default device; resolves the
        implementations of attention and of the experts' products."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
        attend = resolve_attention(
            self.attention,
            target=Target.here(),
            dtype=dtype,
            head_dim=self.config.head_dim,
            packed=segment_ids is not None,
            seq_len=shape[1],
        )
        cos, sin = rope_tables(self.config, positions)
        experts = None
        if self.config.num_experts:
            features = (self.config.hidden_size, self.config.moe_intermediate_size)
            experts = ExpertOps(
                resolve_grouped_matmul(
                    self.grouped_matmul, target=Target.here(), dtype=dtype, features=features
                )
            )
        return LayerContext(cos, sin, segment_ids, attend.fn, experts=experts)


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
        return nest({p: initial_value(p, s, key, s.dtype(dtype)) for p, s in specs(model).items()})

    graphdef, _ = nnx.split(model)
    return nnx.merge(graphdef, jax.jit(make, out_shardings=shardings)())
