"""The training step: one jitted function of (state, batch), for RL and SFT, full and LoRA.

Layout: inside one `shard_map` over the mesh, a loop over micro-batches; each embeds, runs the
layers forward, pulls the loss back through the head in chunks of tokens, and runs the layers
backward, adding every gradient into one fp32 accumulator sharded like the parameters. The
optimizer's update follows outside, elementwise on the sharded trees.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

from jaxrl.config import StepConfig
from jaxrl.models.params import specs
from jaxrl.ops.attention import Attend
from jaxrl.ops.grouped_matmul import GroupedOps, resolve_grouped_matmul
from jaxrl.ops.registry import Target
from jaxrl.options import ConfigError
from jaxrl.parallel.context import AXIS as CONTEXT
from jaxrl.parallel.context import context_attention, sequence_order
from jaxrl.parallel.dispatch import in_order
from jaxrl.parallel.mesh import CPU_OPTIONS
from jaxrl.train.batch import BATCH_SPEC, Batch, predictions
from jaxrl.train.gradients import Gradients
from jaxrl.train.guarded import chosen
from jaxrl.train.state import StateLayout, TrainState


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


class TrainStep:
    """`step(state, batch) -> (state, metrics)`, jitted and donating the state.

    Where loss or gradient is not finite, or no token is trained, parameters and optimizer state
    stay as they are, and only `step` counts on.

    metrics, fp32 scalars over the global batch: loss, grad_norm, entropy, tokens (trained
    ones), lr, skipped (1 where the update was); RL adds mismatch_kl and the kept and dropped
    fractions. Models with experts add expert_load [L, E], the share of each layer's choices that
    fell on each expert, and expert_load_max, the largest share as a multiple of the mean one.
    """

    def __init__(self, layout: StateLayout, config: StepConfig):
        self.layout = layout
        self.target = Target.of(layout.mesh.devices.flat[0])
        backend = self.target.backend
        lora, keep_all = layout.is_lora, config.ac == "none"
        expert_axis = layout.mesh.shape["expert"]
        if expert_axis > 1 and not layout.model.config.num_experts:
            name = layout.model.config.name
            raise ConfigError(
                f"expert axis {expert_axis} needs experts, and {name} is dense; use 1"
            )
        if config.router_bias_rate and layout.model.config.router != "sigmoid":
            raise ConfigError(
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
            compiler_options=self.compiler_options(),
        )

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
        return in_order(self.jitted)(state, batch)

    def compiler_options(self) -> dict[str, bool | int | str] | None:
        """For XLA's compiler of this mesh's devices."""
        model = self.layout.model
        if self.target.backend == "gpu":
            layers = [s for p, s in specs(model).items() if p[0] == "layers"]
            layer = sum(s.size // s.shape[0] for s in layers) * self.dtype.itemsize
            return gpu_options(layer)
        return CPU_OPTIONS if self.layout.mesh.size > 1 else None

    def attention(self, *, packed: bool, seq_len: int, shared_prefix: bool = False) -> Attend:
        """The attention implementation this step resolves to, for rows of `seq_len` tokens.

        Raises ValueError as `context_attention` does.
        """
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
            shared_prefix=shared_prefix,
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
        trainable_spec, _ = self.layout.param_partition()
        out_specs = (trainable_spec, PartitionSpec())
        return self.on_mesh(Gradients, params, frozen, batch, out_specs)

    def on_mesh(self, body: type[Gradients], params, frozen, batch: Batch, out_specs):
        """`body`, a `Gradients`, called on every device's shards of these."""
        seq_len = batch.tokens.shape[-1]
        order = sequence_order(self.config.context_method, seq_len, self.layout.mesh.shape[CONTEXT])
        rows = predictions(batch)
        if order is not None:
            rows = jax.tree.map(lambda a: a[..., order], rows)
        return jax.shard_map(
            body(self, seq_len, order),
            mesh=self.layout.mesh,
            in_specs=(*self.layout.param_partition(), BATCH_SPEC),
            out_specs=out_specs,
            check_vma=False,
        )(params, frozen, rows)

    def _step(self, state: TrainState, batch: Batch):
        grads, metrics = self.gradients(state.params, state.frozen, batch)
        metrics["grad_norm"] = norm = optax.tree.norm(grads)
        good = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"]) & (metrics["tokens"] > 0)
        metrics["skipped"] = 1.0 - good.astype(jnp.float32)
        metrics["lr"] = self.layout.learning_rate(state.opt_state)
        frozen = state.frozen
        if (load := metrics.get("expert_load")) is not None:
            metrics["expert_load_max"] = jnp.max(load) * load.shape[-1]
            if self.config.router_bias_rate:
                frozen = _balance(frozen, load, self.config.router_bias_rate, good)
        with jax.named_scope("optimizer"):
            updates, opt_state = self.layout.optimizer.update(
                grads, state.opt_state, state.params, keep=good
            )
            params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, frozen, opt_state), metrics


def _balance(frozen, load: Float[Array, "L E"], rate: float, keep: Bool[Array, ""]):
    """The routers' correction biases moved towards an even load: up by `rate` where an expert got
    less than its share, down where more (arXiv:2408.15664); where `keep` is false, not at all."""
    router = frozen["layers"]["mlp"]["router"]
    moved = router["bias"] + rate * jnp.sign(1.0 / load.shape[-1] - load)
    bias = chosen(keep, moved, router["bias"])
    layers = frozen["layers"] | {
        "mlp": frozen["layers"]["mlp"] | {"router": router | {"bias": bias}}
    }
    return frozen | {"layers": layers}
