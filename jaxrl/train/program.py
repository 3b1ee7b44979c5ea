"""From a description of a run to the one program that is trained with, measured and planned."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxrl.config import LoraOptions, OptimizerConfig, StepConfig
from jaxrl.data.fake import batch_shapes
from jaxrl.models.attention import LayerContext
from jaxrl.models.config import ModelConfig
from jaxrl.models.layers import rope_tables
from jaxrl.models.lora import LoraConfig, add_lora
from jaxrl.models.moe import ExpertOps
from jaxrl.models.params import nest, specs
from jaxrl.models.transformer import Transformer, merge_trees
from jaxrl.ops.grouped_matmul import composed
from jaxrl.options import ConfigError
from jaxrl.parallel.context import check_context
from jaxrl.parallel.mesh import make_mesh
from jaxrl.rl_config import RlConfig
from jaxrl.run_config import RunConfig
from jaxrl.sft_config import SftConfig
from jaxrl.train.batch import BATCH_SPEC, Batch
from jaxrl.train.offload import HOST
from jaxrl.train.optimizer import make_optimizer, schedule
from jaxrl.train.state import StateLayout, TrainState
from jaxrl.train.step import TrainStep


@dataclasses.dataclass(frozen=True)
class Program:
    """A training step and the shapes it runs on. `rows`: sequences per micro-batch, all devices.
    packed: rows hold several documents; shared_prompts: of which some may go on from others."""

    step: TrainStep
    micro_batches: int
    rows: int
    seq_len: int
    packed: bool = False
    shared_prompts: bool = False

    @property
    def layout(self) -> StateLayout:
        return self.step.layout

    @property
    def has_experts(self) -> bool:
        return self.layout.model.config.num_experts > 0

    @property
    def rows_per_device(self) -> int:
        """Sequences, or parts of one, of each device and micro-batch."""
        shape = self.layout.mesh.shape
        return self.rows // (shape["fsdp"] * shape["expert"])

    @property
    def tokens_per_step(self) -> int:
        return self.micro_batches * self.rows * self.seq_len

    @property
    def kernels(self) -> dict[str, str]:
        """The implementations that its step resolves to, by what they do. Raises ConfigError where
        there is none."""
        attention = self.step.attention(
            packed=self.packed, seq_len=self.seq_len, shared_prefix=self.shared_prompts
        )
        found = {"attention": attention.name}
        return found | ({"experts": self.step.grouped_matmul().name} if self.has_experts else {})

    @property
    def summary(self) -> str:
        """Model, devices and kernels, in a line."""
        mesh, layout = self.layout.mesh, self.layout
        axes = " x ".join(f"{axis} {n}" for axis, n in mesh.shape.items())
        learn = sum(s.size for s in layout.trainable_specs.values())
        kernels = ", ".join(f"{what} {name}" for what, name in self.kernels.items())
        return (
            f"{layout.model.config.name}: {learn:,} trained parameters on {mesh.size} "
            f"{mesh.devices.flat[0].device_kind} ({axes}), {kernels}"
        )

    def abstract_batch(self) -> Batch:
        sharding = NamedSharding(self.layout.mesh, BATCH_SPEC)
        shape = (self.micro_batches, self.rows, self.seq_len)
        shapes = batch_shapes(
            self.step.config.type, *shape, packed=self.packed, shared_prompts=self.shared_prompts
        )
        return jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes
        )

    def lower(self) -> jax.stages.Lowered:
        """The step, traced and lowered for its mesh; nothing is allocated."""
        return self.step.jitted.lower(self.layout.abstract(), self.abstract_batch())


def build_program(
    model: ModelConfig,
    *,
    mesh: Mesh,
    step: StepConfig,
    optimizer: OptimizerConfig,
    lora_rank: int,
    lora: LoraOptions,
    seq_len: int,
    micro_batches: int,
    rows_per_device: int = 1,
    packed: bool = False,
) -> Program:
    """The step for this model, mesh and recipe; `lora_rank` 0 is full fine-tuning.

    Raises ConfigError where the mesh does not divide the model.
    """
    decoder = Transformer(model)
    if lora_rank:
        add_lora(decoder, LoraConfig(lora_rank, lora.alpha, lora.targets))
    layout = StateLayout(
        decoder,
        make_optimizer(
            optimizer,
            devices=mesh.size if step.offload_optimizer else 0,
            dtype=jnp.dtype(step.compute_dtype),
        ),
        schedule(optimizer),
        mesh,
        frozen_dtype=jnp.dtype(step.compute_dtype),
        offload_optimizer=step.offload_optimizer,
    )
    check_context(
        step.context_method,
        size=mesh.shape["context"],
        seq_len=seq_len,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
    )
    rows = rows_per_device * mesh.shape["fsdp"] * mesh.shape["expert"]
    return Program(TrainStep(layout, step), micro_batches, rows, seq_len, packed)


def sft_program(
    config: SftConfig, model: ModelConfig, devices: Sequence, *, total_steps: int | None = None
) -> Program:
    """The step of an SFT run over these devices; its rows are packed.

    total_steps: the run's, for schedules whose own `total_steps` is 0.

    Raises ConfigError where `batch_size` is no multiple of the rows that the devices work on at
    once, and where they do not divide the model.
    """
    mesh, at_once = _mesh(config, devices)
    if config.batch_size % at_once:
        least = max(config.batch_size // at_once, 1) * at_once
        raise ConfigError(
            f"config.batch_size {config.batch_size} is no multiple of the {at_once} rows that "
            f"{len(devices)} devices work on at once; use e.g. {least}"
        )
    return _run_program(
        config,
        model,
        mesh,
        total_steps=total_steps or config.max_steps or 1,  # or 1: a plan, which makes no step
        seq_len=config.data.seq_len,
        micro_batches=config.batch_size // at_once,
    )


def rl_program(config: RlConfig, model: ModelConfig, devices: Sequence) -> Program:
    """The step of an RL run over these devices, with as many micro-batches as its rollouts could
    need at their longest; those that are not needed are not computed.

    Raises ConfigError where the devices do not divide the model, and where it is to share prompts
    and cannot.
    """
    mesh, at_once = _mesh(config, devices)
    rollouts = config.tasks_per_step * config.algorithm.group_size
    program = _run_program(
        config,
        model,
        mesh,
        total_steps=config.max_steps,
        seq_len=config.seq_len,
        micro_batches=-(-rollouts // at_once),
    )
    return dataclasses.replace(program, shared_prompts=_shares_prompts(config, program))


def _shares_prompts(config: RlConfig, program: Program) -> bool:
    """Whether prompts may be trained on once a group; `auto`: not at the price of another attention
    implementation, and not where each time counts for the experts' load."""
    if config.share_prompts == "no":
        return False
    if config.share_prompts == "auto" and config.train.router_bias_rate:
        return False
    attention = functools.partial(program.step.attention, packed=True, seq_len=program.seq_len)
    try:
        name = attention(shared_prefix=True).name
    except ValueError as error:
        if config.share_prompts == "yes":
            raise ConfigError(
                f"config.share_prompts is 'yes', and {error}; or 'auto', or 'no'"
            ) from None
        return False
    return config.share_prompts == "yes" or name == attention().name


def _mesh(config: RunConfig, devices: Sequence) -> tuple[Mesh, int]:
    """(the mesh, how many rows its devices work on at once)."""
    mesh = make_mesh(devices, expert=config.mesh.expert, context=config.mesh.context)
    return mesh, config.rows_per_device * mesh.shape["fsdp"] * mesh.shape["expert"]


def _run_program(
    config: RunConfig,
    model: ModelConfig,
    mesh: Mesh,
    *,
    total_steps: int,
    seq_len: int,
    micro_batches: int,
) -> Program:
    optimizer = config.optimizer
    if not optimizer.total_steps:
        optimizer = dataclasses.replace(optimizer, total_steps=total_steps)
    return build_program(
        model,
        mesh=mesh,
        step=config.step,
        optimizer=optimizer,
        lora_rank=config.lora_rank,
        lora=config.lora,
        seq_len=seq_len,
        micro_batches=micro_batches,
        rows_per_device=config.rows_per_device,
        packed=True,
    )


def floor_bytes(program: Program) -> int:
    """Bytes per device below which this run cannot go without recomputing or offloading more.

    State (parameters, optimizer if on the device, fp32 gradients) + the layers' saved inputs + one
    layer's working set in backward: its whole weights (of the experts those of the device's own)
    and, whichever is more, attention's q, k, v, output and their cotangents with the layer's input
    and its cotangent, or the fp32 gradient of its largest matrix. MLP, experts and head work in
    chunks of tokens, which can be made as small as one likes, so they add nothing.
    """
    layout, config = program.layout, program.layout.model.config
    itemsize = jnp.dtype(program.step.config.compute_dtype).itemsize
    state: TrainState = layout.abstract()

    tokens = program.rows * program.seq_len // layout.mesh.size
    saved = config.num_layers * tokens * config.hidden_size * itemsize
    if program.step.config.ac == "offload":
        saved = 0
    heads = 4 * config.num_heads + 4 * config.num_kv_heads
    activations = tokens * (heads * config.head_dim + 2 * config.hidden_size) * itemsize
    weights, gradient = {"dense_layers": 0, "layers": 0}, 0
    for path, spec in specs(layout.model).items():
        if path[0] in weights:
            here = spec.size // spec.shape[0]
            if "experts" in spec.axes:
                here //= layout.mesh.shape["expert"]
            weights[path[0]] += here * itemsize
            gradient = max(gradient, 4 * here * (path in layout.trainable_specs))
    working = max(weights.values()) + max(activations, gradient)
    return local_bytes(state) + local_bytes(state.params) + saved + working


def local_bytes(tree) -> int:
    """Of abstract arrays with shardings, on each device; what lives on the host does not count."""
    return sum(
        math.prod(s.sharding.shard_shape(s.shape)) * s.dtype.itemsize
        for s in jax.tree.leaves(tree)
        if s.sharding.memory_kind != HOST
    )


def lower_reference(program: Program, num_layers: int) -> jax.stages.Lowered:
    """Loss and gradient of one sequence as plainly as it can be written, lowered for the CPU.

    For XLA's cost analysis: `num_layers` layers unrolled (behind the dense first ones of a model
    with experts), full logits, no recomputation, one device. Attention is left out (its q, k, v
    are merely added): it counts what it declares. All rows of expert layers go to the first expert:
    which one does not change the count.
    """
    whole = program.layout.model
    first = whole.config.first_k_dense
    config = whole.config.replace(num_layers=first + num_layers)
    model = Transformer(config)
    lora = specs(whole, nnx.LoRAParam)
    if lora:
        rank = next(s.shape[-1] for p, s in lora.items() if p[-1] == "lora_a")
        targets = tuple(sorted({p[-2] for p in lora}))
        add_lora(model, LoraConfig(rank=rank, targets=targets))
    dtype = program.step.dtype
    learn = specs(model, nnx.LoRAParam) or specs(model, nnx.Param)
    abstract = {
        p: jax.ShapeDtypeStruct(s.shape, jnp.float32 if p in learn else s.dtype(dtype))
        for p, s in specs(model).items()
    }
    trainable = nest({p: a for p, a in abstract.items() if p in learn})
    frozen = nest({p: a for p, a in abstract.items() if p not in learn})
    graphdef = nnx.graphdef(model)

    def attend(q, k, v, segment_ids):
        del segment_ids
        groups = q.shape[2] // k.shape[2]
        return q + jnp.repeat(k + v, groups, axis=2)

    def loss(trainable, frozen, tokens):
        model = nnx.merge(graphdef, merge_trees(trainable, frozen))
        x = model.embed[...][tokens].astype(dtype)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        experts = ExpertOps(composed("first", lambda x, w, group_sizes: x @ w[0].astype(x.dtype)))
        ctx = LayerContext(*rope_tables(config, positions), None, attend, experts=experts)
        for stack, count in ((model.dense_layers, first), (model.layers, num_layers)):
            if stack is None:
                continue
            block, layers = nnx.split(stack)
            layers = nnx.to_pure_dict(layers)
            for i in range(count):
                x, _ = nnx.merge(block, jax.tree.map(lambda a, i=i: a[i], layers))(x, ctx)
        head = model.embed if model.head is None else model.head
        logits = jnp.einsum(
            "BTD,VD->BTV",
            model.final_norm(x),
            head[...].astype(dtype),
            preferred_element_type=jnp.float32,
        )
        targets = jnp.roll(tokens, -1, axis=1)
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)

    tokens = jax.ShapeDtypeStruct((1, program.seq_len), jnp.int32)
    with jax.default_device(jax.devices("cpu")[0]):  # XLA:GPU gives no cost analysis
        return jax.jit(jax.value_and_grad(loss)).lower(trainable, frozen, tokens)
