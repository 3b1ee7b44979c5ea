"""The training step: one jitted function of (state, batch), for RL and SFT, full and LoRA.

Layout: inside one `shard_map` over the mesh, a loop over micro-batches; each embeds, runs the
layers forward, pulls the loss back through the head in chunks of tokens, and runs the layers
backward, adding every gradient into one fp32 accumulator sharded like the parameters. The
optimizer's update follows outside, elementwise on the sharded trees.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxrl.config import StepConfig
from jaxrl.data.routing import expert_choices
from jaxrl.models.attention import LayerContext
from jaxrl.models.layers import rope_tables
from jaxrl.models.moe import ExpertOps
from jaxrl.models.params import specs
from jaxrl.models.transformer import merge_trees
from jaxrl.ops.attention import Attend
from jaxrl.ops.grouped_matmul import GroupedOps, resolve_grouped_matmul
from jaxrl.ops.linear import cast_params
from jaxrl.ops.logprob import token_logprob
from jaxrl.ops.registry import Target
from jaxrl.ops.tokenwise import pull_back, tokenwise
from jaxrl.parallel import vocab
from jaxrl.parallel.context import AXIS as CONTEXT
from jaxrl.parallel.context import context_attention, sequence_order
from jaxrl.parallel.expert import make_exchange
from jaxrl.parallel.sharding import EVERYWHERE, gather, reduce_gradient, sharded_dim
from jaxrl.train.backprop import LayerStack
from jaxrl.train.losses import RLTokens, rl_loss
from jaxrl.train.state import StateLayout, TrainState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """M micro-batches of B rows of T tokens, all [M, B, T]; B is split over the mesh.

    loss_mask: 1 where the token, as a target, is trained. positions: default 0..T-1.
    segment_ids: documents of a packed row (runs of equal ids); default one document per row.
    advantages, sampler_logprobs: of each token; RL only.
    """

    tokens: Int[Array, "M B T"]
    loss_mask: Int[Array, "M B T"]
    positions: Int[Array, "M B T"] | None = None
    segment_ids: Int[Array, "M B T"] | None = None
    advantages: Float[Array, "M B T"] | None = None
    sampler_logprobs: Float[Array, "M B T"] | None = None


# Expert groups, too, are of devices with rows of their own; sequences are divided over context.
BATCH_SPEC = PartitionSpec(None, ("fsdp", "expert"), "context")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Predictions:
    """A batch as seen from the predicting position: everything but `tokens` is the next token's."""

    tokens: jax.Array
    targets: jax.Array
    mask: jax.Array
    positions: jax.Array
    segment_ids: jax.Array | None
    advantages: jax.Array | None
    sampler_logprobs: jax.Array | None


def _predictions(batch: Batch) -> _Predictions:
    def following(a: jax.Array) -> jax.Array:
        return jnp.pad(a[..., 1:], [(0, 0)] * (a.ndim - 1) + [(0, 1)])

    mask = following(batch.loss_mask).astype(bool)
    segment_ids = batch.segment_ids
    if segment_ids is not None:  # a document's first token follows nothing
        new = segment_ids[..., 1:] != segment_ids[..., :-1]
        pad = [(0, 0)] * (new.ndim - 1)
        mask = mask & jnp.pad(~new, [*pad, (0, 1)])
        # Numbered anew, so that no two documents of a row share an id, in whatever order they lie.
        segment_ids = jnp.cumsum(jnp.pad(new, [*pad, (1, 0)]), axis=-1, dtype=jnp.int32)
    positions = batch.positions
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(mask.shape[-1], dtype=jnp.int32), mask.shape)
    return _Predictions(
        batch.tokens,
        following(batch.tokens),
        mask,
        positions,
        segment_ids,
        *(None if a is None else following(a) for a in (batch.advantages, batch.sampler_logprobs)),
    )


def head_chunk(vocab_size: int, backend: str) -> int:
    """Tokens whose fp32 logits fill about 300 MiB (GPU) or 64 MiB (CPU, near its caches)."""
    budget = (320 if backend == "gpu" else 64) * 2**20
    return max(128, 1 << (budget // (4 * vocab_size)).bit_length() - 1)


def mlp_chunk(backend: str, *, lora: bool) -> int:
    """Tokens the MLP works on at a time; 0 on CPU, where memory is not what is short.

    Full fine-tuning takes larger chunks: each one reads and writes the weights' fp32 gradient.
    """
    if backend != "gpu":
        return 0
    return 2048 if lora else 4096


def experts_chunk(backend: str, *, lora: bool, expert_axis: int) -> int:
    """Tokens that go through the experts at a time; 0 on CPU.

    A chunk reads every expert's weights (and, in full fine-tuning, reads and writes their fp32
    gradients), so it is larger than `mlp_chunk`. Devices of an expert group keep room for all of
    the group's rows: the group takes one chunk together.
    """
    if backend != "gpu":
        return 0
    return max(1, (8192 if lora else 16384) // expert_axis)


def gpu_options(layer_bytes: int) -> dict[str, bool | int | str]:
    """For XLA's GPU compiler, wherever the step is compiled: measured, planned and trained with.

    layer_bytes: of one layer's gathered weights.
    """
    return {
        # XLA's default on Hopper and Blackwell alone.
        "xla_gpu_enable_latency_hiding_scheduler": True,
        # XLA's default, but never a whole layer in one gather: there would be nothing to compute
        # beside it.
        "xla_gpu_all_gather_combine_threshold_bytes": min(30 * 2**20, layer_bytes // 2),
        # A layer's first gradients travel while its others are computed.
        "xla_gpu_reduce_scatter_combine_threshold_bytes": 64 * 2**20,
        # One at a time, a layer's gathers would use up what little there is to compute before its
        # first product, and the first would wait; and of those of the experts, which take as long
        # as attention does, only one would run beside it.
        "xla_gpu_experimental_parallel_collective_overlap_limit": 4,
    }


# In the order of the schedule: devices of a CPU that begin collectives over different groups in
# orders of their own wait for each other forever.
CPU_OPTIONS: dict[str, bool | int | str] = {"xla_cpu_enable_concurrency_optimized_scheduler": False}


class TrainStep:
    """`step(state, batch) -> (state, metrics)`, jitted and donating the state.

    metrics, fp32 scalars over the global batch: loss, grad_norm, entropy, tokens (trained
    ones); RL adds mismatch_kl and the kept and dropped fractions. Models with experts add
    expert_load [L, E], the share of each layer's choices that fell on each expert, and
    expert_load_max, the largest share as a multiple of the mean one.
    """

    def __init__(self, layout: StateLayout, config: StepConfig):
        self.layout = layout
        self.target = Target.of(layout.mesh.devices.flat[0])
        backend = self.target.backend
        lora, keep_all = layout.is_lora, config.ac == "none"
        expert_axis = layout.mesh.shape["expert"]
        if expert_axis > 1 and not layout.model.config.num_experts:
            name = layout.model.config.name
            raise ValueError(f"expert axis {expert_axis} needs experts, and {name} is dense; use 1")
        if config.router_bias_rate and layout.model.config.router != "sigmoid":
            raise ValueError(
                f"router_bias_rate {config.router_bias_rate} moves a correction bias, which "
                f"{layout.model.config.name} does not have; use 0"
            )
        self.config = dataclasses.replace(
            config,
            head_chunk=config.head_chunk or head_chunk(layout.model.config.vocab_size, backend),
            # A chunk's intermediates are recomputed: not with ac "none".
            mlp_chunk=0 if keep_all else config.mlp_chunk or mlp_chunk(backend, lora=lora),
            experts_chunk=0
            if keep_all
            else config.experts_chunk or experts_chunk(backend, lora=lora, expert_axis=expert_axis),
        )
        self.dtype = jnp.dtype(config.compute_dtype)
        state = layout.shardings()
        self.jitted = jax.jit(
            self._step,
            in_shardings=(state, NamedSharding(layout.mesh, BATCH_SPEC)),
            out_shardings=(state, NamedSharding(layout.mesh, PartitionSpec())),
            donate_argnums=0,
            compiler_options=self._compiler_options(),
        )

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
        return self.jitted(state, batch)

    def _compiler_options(self) -> dict[str, bool | int | str] | None:
        model = self.layout.model
        if self.target.backend == "gpu":
            layers = [s for p, s in specs(model).items() if p[0] == "layers"]
            layer = sum(s.size // s.shape[0] for s in layers) * self.dtype.itemsize
            return gpu_options(layer)
        return CPU_OPTIONS if self.layout.mesh.size > 1 else None

    def attention(self, *, packed: bool, seq_len: int) -> Attend:
        """The attention implementation this step resolves to, for rows of `seq_len` tokens."""
        model = self.layout.model.config
        return context_attention(
            self.config.context_method,
            size=self.layout.mesh.shape[CONTEXT],
            attention=self.config.attention,
            target=self.target,
            dtype=self.dtype,
            head_dim=model.head_dim,
            num_heads=model.num_heads,
            num_kv_heads=model.num_kv_heads,
            packed=packed,
            seq_len=seq_len,
        )

    def grouped_matmul(self) -> GroupedOps:
        """The experts' products, by the implementation that this step resolves to."""
        model = self.layout.model.config
        return resolve_grouped_matmul(
            self.config.grouped_matmul,
            target=self.target,
            dtype=self.dtype,
            features=(model.hidden_size, model.moe_intermediate_size),
        )

    def gradients(self, params, frozen, batch: Batch):
        """(gradient tree like params, fp32; metrics), summed over micro-batches and devices."""
        trainable_spec, frozen_spec = self.layout.param_partition()
        seq_len = batch.tokens.shape[-1]
        order = sequence_order(self.config.context_method, seq_len, self.layout.mesh.shape[CONTEXT])
        predictions = _predictions(batch)
        if order is not None:
            predictions = jax.tree.map(lambda a: a[..., order], predictions)
        return jax.shard_map(
            _Gradients(self, seq_len, order),
            mesh=self.layout.mesh,
            in_specs=(trainable_spec, frozen_spec, BATCH_SPEC),
            out_specs=(trainable_spec, PartitionSpec()),
            check_vma=False,
        )(params, frozen, predictions)

    def _step(self, state: TrainState, batch: Batch):
        grads, metrics = self.gradients(state.params, state.frozen, batch)
        metrics["grad_norm"] = optax.tree.norm(grads)
        frozen = state.frozen
        if (load := metrics.get("expert_load")) is not None:
            metrics["expert_load_max"] = jnp.max(load) * load.shape[-1]
            if self.config.router_bias_rate:
                frozen = _balance(frozen, load, self.config.router_bias_rate)
        with jax.named_scope("optimizer"):
            updates, opt_state = self.layout.optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, frozen, opt_state), metrics


def _balance(frozen, load: Float[Array, "L E"], rate: float):
    """The routers' correction biases moved towards an even load: up by `rate` where an expert got
    less than its share, down where more (arXiv:2408.15664)."""
    router = frozen["layers"]["mlp"]["router"]
    bias = router["bias"] + rate * jnp.sign(1.0 / load.shape[-1] - load)
    layers = frozen["layers"] | {
        "mlp": frozen["layers"]["mlp"] | {"router": router | {"bias": bias}}
    }
    return frozen | {"layers": layers}


class _Gradients:
    """The body of the `shard_map`: everything here sees one device's shards.

    Rows of `seq_len` tokens lie on the context axis in `order` (None: as they are).
    """

    def __init__(self, step: TrainStep, seq_len: int, order: np.ndarray | None):
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

    def __call__(self, params, frozen, batch: _Predictions):
        total = self._sum_devices(jnp.sum(batch.mask, dtype=jnp.float32))
        scale = 1.0 / jnp.maximum(total, 1.0)
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        micro = functools.partial(self.micro_batch, params, frozen, scale)
        if batch.tokens.shape[0] == 1:
            grads, metrics = micro(zeros, jax.tree.map(lambda a: a[0], batch))
        else:
            grads, metrics = jax.lax.scan(micro, zeros, batch)
            metrics = jax.tree.map(lambda m: jnp.sum(m, axis=0), metrics)
        # Sharded parameters were reduced layer by layer; replicated ones are now, once.
        grads = jax.tree.map(
            lambda g, s: self._sum_devices(g) if sharded_dim(s) is None else g,
            grads,
            self.trainable_spec,
        )
        load = metrics.pop("expert_load", None)
        metrics = {k: self._sum_devices(m) * scale for k, m in metrics.items()}
        metrics["tokens"] = total
        if load is not None:
            load = self._sum_devices(load)
            metrics["expert_load"] = load / jnp.sum(load, axis=-1, keepdims=True)
        return grads, metrics

    def micro_batch(self, params, frozen, scale, grads, batch: _Predictions):
        """(grads + this micro-batch's, summed metrics); arrays of the batch are [B, T]."""
        B, T = batch.tokens.shape
        table = (params if "embed" in params else frozen)["embed"]
        flat = batch.tokens.reshape(-1)
        with jax.named_scope("embed"):
            x = vocab.embed(table, flat, axis_size=self.size, dtype=self.dtype)
        attend = self.attention(packed=batch.segment_ids is not None, seq_len=self.seq_len)
        tables = rope_tables(self.model.config, batch.positions)
        constants = (tables, batch.segment_ids, self.chosen(B * T))
        x, load, done = x.reshape(B, T, -1), None, []
        for name in ("dense_layers", "layers"):
            if getattr(self.model, name) is not None:
                stack = self.stack(name, attend.fn)
                layers = (params.get(name, {}), frozen.get(name, {}))
                x, saved, load = stack.forward(*layers, constants, x)
                done.append((name, stack, layers, saved))
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
                    grads["embed"], flat, dx.reshape(B * T, -1), axis_size=self.size
                )
        return grads, metrics

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
            frozen, ((cos, sin), segment_ids, chosen) = constants
            block = nnx.merge(block_def, merge_trees(trainable, frozen))
            chunk = self.config.mlp_chunk
            ctx = LayerContext(cos, sin, segment_ids, attend, chunk, self.experts, chosen)
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

    def head(self, params, frozen, scale, grads, batch: _Predictions, x):
        """Loss and its pull-back through final norm and head.

        Returns (grads, dx, metrics) with the head's gradients added; x [B, T, D].
        """
        name = "embed" if self.model.config.tie_embeddings else "head"
        full = name in params

        def pick(tree):
            return {"norm": tree["final_norm"], "w": tree[name]}

        trainable, fixed = (pick(params), {}) if full else ({}, pick(frozen))

        def logprobs(trainable, fixed, inputs):
            x, targets = inputs
            weights = trainable or fixed
            x = nnx.merge(self.norm_def, weights["norm"])(x)
            axis = EVERYWHERE if self.size > 1 else None
            return token_logprob(x, weights["w"], targets, self.config.temperature, axis)

        inputs = (x.reshape(-1, x.shape[-1]), batch.targets.reshape(-1))
        chunk = self.config.head_chunk
        mask = batch.mask
        if self.config.type == "sft":
            weight = -scale * mask.astype(jnp.float32)
            metrics = {}
        else:
            values, _ = tokenwise(logprobs, trainable, fixed, inputs, chunk=chunk)
            if batch.sampler_logprobs is None or batch.advantages is None:
                raise ValueError("an RL batch needs advantages and sampler_logprobs [M, B, T]")
            rl = RLTokens(batch.sampler_logprobs, batch.advantages, mask, batch.segment_ids)
            weight, metrics = self.rl_weights(values.reshape(mask.shape), rl)
            weight = weight * scale
        weight = weight.reshape(-1)
        head_grads = pick(grads) if full else {}
        # A replicated parameter's accumulator is this device's own sum until the step's end.
        head_grads, (dx, _), (values, entropy) = pull_back(
            logprobs,
            trainable,
            fixed,
            inputs,
            (weight, jnp.zeros_like(weight)),
            head_grads,
            chunk=chunk,
        )
        if full:
            grads = grads | {"final_norm": head_grads["norm"], name: head_grads["w"]}
        flat_mask = mask.reshape(-1)
        if self.config.type == "sft":
            metrics["loss"] = -jnp.sum(jnp.where(flat_mask, values, 0.0))
        metrics["entropy"] = jnp.sum(jnp.where(flat_mask, entropy, 0.0))
        return grads, dx, metrics

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

    def _sum_devices(self, x):
        return jax.lax.psum(x, EVERYWHERE) if self.size > 1 else x
