"""Loss and gradient of a batch on one device of the mesh: the body of the step's `shard_map`."""

import dataclasses
import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxrl.data.routing import expert_choices
from jaxrl.models.attention import LayerContext
from jaxrl.models.layers import rope_tables
from jaxrl.models.moe import ExpertOps
from jaxrl.models.transformer import merge_trees
from jaxrl.ops.linear import cast_params
from jaxrl.ops.logprob import token_logprob
from jaxrl.ops.shared_prefix import Families
from jaxrl.ops.tokenwise import pull_back, tokenwise, values_of_first
from jaxrl.parallel import vocab
from jaxrl.parallel.context import AXIS as CONTEXT
from jaxrl.parallel.expert import make_exchange
from jaxrl.parallel.sharding import EVERYWHERE, gather, reduce_gradient, sharded_dim
from jaxrl.train.backprop import LayerStack
from jaxrl.train.batch import Predictions
from jaxrl.train.losses import RLTokens, rl_loss

if TYPE_CHECKING:
    from jaxrl.train.step import TrainStep


class Gradients:
    """The body of the `shard_map`: everything here sees one device's shards.

    Rows of `seq_len` tokens lie on the context axis in `order` (None: as they are).
    """

    def __init__(self, step: "TrainStep", seq_len: int, order: np.ndarray | None):
        self.seq_len, self.order = seq_len, order
        layout, self.config, self.dtype = step.layout, step.config, step.dtype
        self.model = layout.model
        self.size, self.mesh_shape = layout.mesh.size, layout.mesh.shape
        self.attention = step.attention
        self.trainable_spec, self.frozen_spec = layout.param_partition()
        self.is_fp32 = layout.is_fp32()
        self.norm_def = nnx.graphdef(self.model.final_norm)
        self.experts = None
        if self.model.config.num_experts:
            expert_axis = self.mesh_shape["expert"]
            exchange = make_exchange(expert_axis, step.target.backend) if expert_axis > 1 else None
            self.experts = ExpertOps(step.grouped_matmul(), exchange, self.config.experts_chunk)

    def __call__(self, params, frozen, batch: Predictions):
        total = self.sum_devices(jnp.sum(batch.mask, dtype=jnp.float32))
        scale = 1.0 / jnp.maximum(total, 1.0)
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        micro = functools.partial(self.micro_batch, params, frozen, scale)
        if batch.tokens.shape[0] == 1:
            grads, metrics = micro(zeros, jax.tree.map(lambda a: a[0], batch))
        elif self.config.skip_empty:
            grads, metrics = self.over_used(micro, zeros, batch)
        else:
            grads, metrics = jax.lax.scan(micro, zeros, batch)
            metrics = jax.tree.map(lambda m: jnp.sum(m, axis=0), metrics)
        # Sharded parameters were reduced layer by layer; replicated ones are now, once.
        grads = jax.tree.map(
            lambda g, s: self.sum_devices(g) if sharded_dim(s) is None else g,
            grads,
            self.trainable_spec,
        )
        load = metrics.pop("expert_load", None)
        metrics = {k: self.sum_devices(m) * scale for k, m in metrics.items()}
        metrics["tokens"] = total
        if load is not None:
            load = self.sum_devices(load)
            metrics["expert_load"] = load / jnp.sum(load, axis=-1, keepdims=True)
        return grads, metrics

    def over_used(self, micro, zeros, batch: Predictions):
        """(gradients, summed metrics) of the micro-batches up to the last with a trained token."""

        def body(i, carry):
            grads, found = micro(carry[0], one(batch, i))
            return grads, jax.tree.map(jnp.add, carry[1], found)

        _, shapes = jax.eval_shape(micro, zeros, one(batch, 0))
        nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.fori_loop(0, self.used(batch), body, (zeros, nothing))

    def used(self, batch: Predictions) -> Int[Array, ""]:
        """The number of micro-batches up to the last that any device has a trained token in."""
        count = jnp.arange(1, batch.mask.shape[0] + 1)
        used = jnp.max(jnp.where(jnp.any(batch.mask, axis=(1, 2)), count, 0))
        return jax.lax.pmax(used, EVERYWHERE) if self.size > 1 else used

    def micro_batch(self, params, frozen, scale, grads, batch: Predictions):
        """(grads + this micro-batch's, summed metrics); arrays of the batch are [B, T]."""
        x, load, constants, done = self.forward(params, frozen, batch)
        with jax.named_scope("head"):
            grads, dx, metrics = self.head(params, frozen, scale, grads, batch, x)
        dx = dx.reshape(x.shape)
        for name, stack, layers, saved in reversed(done):
            layer_grads, dx = stack.backward(*layers, constants, saved, dx, grads.get(name, {}))
            grads = grads | {name: layer_grads}
        if load is not None:
            metrics["expert_load"] = load
        if "embed" in params:
            with jax.named_scope("embed"):
                grads["embed"] = vocab.add_embed_gradient(
                    grads["embed"],
                    batch.tokens.reshape(-1),
                    dx.reshape(-1, dx.shape[-1]),
                    axis_size=self.size,
                )
        return grads, metrics

    def forward(self, params, frozen, batch: Predictions):
        """(x [B, T, D] behind the layers, the last stack's expert load, the layers' shared inputs,
        and what backward needs of each stack)."""
        B, T = batch.tokens.shape
        table = (params if "embed" in params else frozen)["embed"]
        with jax.named_scope("embed"):
            flat = batch.tokens.reshape(-1)
            x = vocab.embed(table, flat, axis_size=self.size, dtype=self.dtype)
        documents = batch.segment_ids
        if documents is not None and batch.family_ids is not None:
            documents = Families(documents, batch.family_ids)
        attend = self.attention(
            packed=documents is not None,
            seq_len=self.seq_len,
            shared_prefix=isinstance(documents, Families),
        )
        tables = rope_tables(self.model.config, batch.positions)
        constants = (tables, documents, self.chosen(B * T))
        x, load, done = x.reshape(B, T, -1), None, []
        for name in ("dense_layers", "layers"):
            if getattr(self.model, name) is not None:
                stack = self.stack(name, attend.fn)
                layers = (params.get(name, {}), frozen.get(name, {}))
                x, saved, load = stack.forward(*layers, constants, x)
                done.append((name, stack, layers, saved))
        return x, load, constants, done

    def chosen(self, tokens: int) -> Int[Array, "T k"] | None:
        """The experts of this device's tokens in every layer, where routers are not to choose."""
        model, mode = self.model.config, self.config.routing
        if mode == "model" or not model.num_experts:
            return None
        shape = (tokens, model.num_experts, model.num_experts_per_tok)
        device = jax.lax.axis_index(EVERYWHERE)
        return expert_choices(mode, *shape, jax.random.key(0), device)

    def stack(self, name: str, attend) -> LayerStack:
        """The stack of equal layers that the model calls `name`."""
        block_def = nnx.graphdef(getattr(self.model, name))
        # Inside the loop over layers the parameters have lost their first dimension.
        specs = tuple(
            jax.tree.map(lambda s: PartitionSpec(*s[1:]), tree.get(name, {}))
            for tree in (self.trainable_spec, self.frozen_spec)
        )
        is_fp32 = tuple(tree.get(name, {}) for tree in self.is_fp32)

        def layer(trainable, constants, x):
            frozen, ((cos, sin), documents, chosen) = constants
            block = nnx.merge(block_def, merge_trees(trainable, frozen))
            chunk = self.config.mlp_chunk
            ctx = LayerContext(cos, sin, documents, attend, chunk, self.experts, chosen)
            return block(x, ctx)

        def fetch(trainable, frozen):
            """One layer's parameters, whole, in the compute dtype; trainable ones fp32 by type."""
            whole = jax.tree.map(
                lambda p, s, fp32: gather(p if fp32 else p.astype(self.dtype), s, self.mesh_shape),
                (trainable, frozen),
                specs,
                is_fp32,
            )
            return cast_params(whole[0], jnp.float32), whole[1]

        def reduce(grads):
            """One layer's gradients -> this device's shards, summed over devices in fp32."""
            return jax.tree.map(
                lambda g, s: (
                    g if sharded_dim(s) is None else reduce_gradient(g, s, self.mesh_shape)
                ),
                grads,
                specs[0],
            )

        return LayerStack(layer, ac=self.config.ac, fetch=fetch, reduce=reduce)

    def head(self, params, frozen, scale, grads, batch: Predictions, x):
        """Loss and its pull-back through final norm and head.

        Returns (grads, dx, metrics) with the head's gradients added; x [B, T, D].
        """
        name, (trainable, fixed) = self.head_params(params, frozen)
        full = bool(trainable)
        logprobs = self.logprobs
        inputs = (x.reshape(-1, x.shape[-1]), batch.targets.reshape(-1))
        chunk = self.config.head_chunk
        mask = batch.mask
        first = self.trained_first(mask) if self.config.skip_empty else None
        if first is not None:
            inputs = jax.tree.map(first.take, inputs)
        if self.config.type == "sft":
            weight = -scale * mask.astype(jnp.float32)
            metrics = {}
        else:
            if first is None:
                values, _ = tokenwise(logprobs, trainable, fixed, inputs, chunk=chunk)
            else:
                found, _ = values_of_first(
                    logprobs, trainable, fixed, inputs, used=first.used, chunk=chunk
                )
                values = first.put_back(found)
            if batch.sampler_logprobs is None or batch.advantages is None:
                raise ValueError("an RL batch needs advantages and sampler_logprobs [M, B, T]")
            rl = RLTokens(
                batch.sampler_logprobs,
                batch.advantages,
                mask,
                batch.segment_ids,
                batch.ref_logprobs,
            )
            weight, metrics = self.rl_weights(values.reshape(mask.shape), rl)
            weight = weight * scale
        weight, flat_mask = weight.reshape(-1), mask.reshape(-1)
        if first is not None:
            weight, flat_mask = first.take(weight), first.take(flat_mask)
        head_grads = {"norm": grads["final_norm"], "w": grads[name]} if full else {}
        # A replicated parameter's accumulator is this device's own sum until the step's end.
        head_grads, (dx, _), (values, entropy) = pull_back(
            logprobs,
            trainable,
            fixed,
            inputs,
            (weight, jnp.zeros_like(weight)),
            head_grads,
            chunk=chunk,
            used=None if first is None else first.used,
        )
        if first is not None:
            dx = first.put_back(dx)
        if full:
            grads = grads | {"final_norm": head_grads["norm"], name: head_grads["w"]}
        if self.config.type == "sft":
            metrics["loss"] = -jnp.sum(jnp.where(flat_mask, values, 0.0))
        metrics["entropy"] = jnp.sum(jnp.where(flat_mask, entropy, 0.0))
        return grads, dx, metrics

    def trained_first(self, mask: Bool[Array, "B T"]) -> "First":
        """This device's tokens with the trained ones first, which are what the head computes."""
        flat = mask.reshape(-1)
        used = jnp.sum(flat, dtype=jnp.int32)
        if self.size > 1:  # they share out the vocabulary, chunk by chunk
            used = jax.lax.pmax(used, EVERYWHERE)
        return First(jnp.argsort(~flat, stable=True), used)

    def token_logprobs(self, params, frozen, batch: Predictions):
        """Log-prob of each of a micro-batch's targets [B, T], without a gradient."""
        x, *_ = self.forward(params, frozen, batch)
        _, (trainable, fixed) = self.head_params(params, frozen)
        inputs = (x.reshape(-1, x.shape[-1]), batch.targets.reshape(-1))
        with jax.named_scope("head"):
            chunk = self.config.head_chunk
            values, _ = tokenwise(self.logprobs, trainable, fixed, inputs, chunk=chunk)
        return values.reshape(batch.targets.shape)

    def head_params(self, params, frozen):
        """(name of the head's matrix, (trainable, frozen) parameters of final norm and head)."""
        name = "embed" if self.model.config.tie_embeddings else "head"
        tree = params if name in params else frozen
        picked = {"norm": tree["final_norm"], "w": tree[name]}
        return name, (picked, {}) if name in params else ({}, picked)

    def logprobs(self, trainable, fixed, inputs):
        """(log-prob, entropy) of each token; inputs: x [T, D] behind the layers, targets [T]."""
        x, targets = inputs
        weights = trainable or fixed
        x = nnx.merge(self.norm_def, weights["norm"])(x)
        axis = EVERYWHERE if self.size > 1 else None
        return token_logprob(x, weights["w"], targets, self.config.temperature, axis)

    def rl_weights(self, values: Float[Array, "B T"], tokens: RLTokens):
        """(d loss / d log-prob of this device's tokens [B, T], the summed metrics).

        Losses look at whole sequences, so where those lie on several devices each computes the loss
        of all their tokens, and counts its share of it.
        """
        loss = jax.value_and_grad(
            lambda values, tokens: rl_loss(values, tokens, self.config.loss), has_aux=True
        )
        devices = self.mesh_shape[CONTEXT]
        if devices == 1:
            (value, metrics), weight = loss(values, tokens)
            return weight, metrics | {"loss": value}
        order = np.arange(self.seq_len) if self.order is None else self.order

        def whole(a):
            return jax.lax.all_gather(a, CONTEXT, axis=1, tiled=True)[:, np.argsort(order)]

        (value, metrics), weight = loss(*jax.tree.map(whole, (values, tokens)))
        T = values.shape[1]
        start = jax.lax.axis_index(CONTEXT) * T
        weight = jax.lax.dynamic_slice_in_dim(weight[:, order], start, T, axis=1)
        return weight, jax.tree.map(lambda m: m / devices, metrics | {"loss": value})

    def sum_devices(self, x):
        return jax.lax.psum(x, EVERYWHERE) if self.size > 1 else x


@dataclasses.dataclass(frozen=True)
class First:
    """An order of tokens, of which the first `used` matter."""

    order: Int[Array, " T"]
    used: Int[Array, ""]

    def take(self, values: Shaped[Array, "T ..."]) -> Shaped[Array, "T ..."]:
        """In this order."""
        return values[self.order]

    def put_back(self, values: Shaped[Array, "T ..."]) -> Shaped[Array, "T ..."]:
        """From this order into the tokens' own."""
        return jnp.zeros_like(values).at[self.order].set(values, unique_indices=True)


def one(batch: Predictions, i) -> Predictions:
    """Micro-batch number `i`."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), batch)
