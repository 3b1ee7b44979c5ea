"""The training state: one pytree that a step takes and returns."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl.models.params import Buffer, ParamSpec, initial_value, nest, specs
from jaxrl.models.transformer import Transformer
from jaxrl.options import ConfigError
from jaxrl.parallel.sharding import check_divides, partition_spec
from jaxrl.train.offload import on_host
from jaxrl.train.optimizer import updates_made


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """step: int32 scalar. params: fp32 masters of what learns. frozen: the rest (LoRA's base, and
    the model's buffers).

    opt_state: the optimizer's, fp32. Parameter trees are nested dicts by the model's paths.
    """

    step: Any
    params: Any
    frozen: Any
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class StateLayout:
    """Shapes and shardings of a model's `TrainState` on a mesh; allocates nothing.

    With LoRA variables in the model only they learn, and the base is held in `frozen_dtype`
    (`ParamSpec.fp32` ones in fp32). With `offload_optimizer` the optimizer's moments live in pinned
    host memory, and `optimizer` is to be one that streams them.
    """

    model: Transformer
    optimizer: optax.GradientTransformationExtraArgs
    schedule: optax.Schedule
    mesh: Mesh
    frozen_dtype: Any = jnp.bfloat16
    offload_optimizer: bool = False

    def __post_init__(self):
        if self.offload_optimizer and self.is_lora:
            raise ConfigError(
                "offload_optimizer has nothing to gain with LoRA, whose optimizer state is small; "
                "turn it off"
            )
        for path, spec in specs(self.model).items():
            check_divides(path, spec, self.mesh)

    @property
    def trainable_specs(self):
        learns = specs(self.model, nnx.LoRAParam) or specs(self.model)
        return {p: s for p, s in learns.items() if s.kind is not Buffer}

    @property
    def frozen_specs(self):
        learns = self.trainable_specs
        return {p: s for p, s in specs(self.model).items() if p not in learns}

    @property
    def is_lora(self) -> bool:
        return bool(specs(self.model, nnx.LoRAParam))

    def is_fp32(self):
        """(trainable, frozen) nested dicts: which parameters are used in fp32."""
        trees = (self.trainable_specs, self.frozen_specs)
        return tuple(nest({p: s.fp32 for p, s in t.items()}) for t in trees)

    def param_partition(self):
        """(trainable, frozen) nested dicts of PartitionSpecs."""
        trees = (self.trainable_specs, self.frozen_specs)
        return tuple(nest({p: partition_spec(s.axes) for p, s in t.items()}) for t in trees)

    def abstract(self) -> TrainState:
        """The state as ShapeDtypeStructs with their shardings."""

        def struct(tree, dtype):
            return nest(
                {
                    p: jax.ShapeDtypeStruct(
                        s.shape, s.dtype(dtype), sharding=self._sharding(s.axes)
                    )
                    for p, s in tree.items()
                }
            )

        params = struct(self.trainable_specs, jnp.float32)
        opt_state = self._opt_state(jax.eval_shape(self.optimizer.init, params))
        step = self._replicated(jax.ShapeDtypeStruct((), jnp.int32))
        return TrainState(step, params, struct(self.frozen_specs, self.frozen_dtype), opt_state)

    def learning_rate(self, opt_state) -> jax.Array:
        """Of the next update, fp32."""
        return jnp.asarray(self.schedule(updates_made(opt_state)), jnp.float32)

    def _opt_state(self, opt_state):
        """Its shapes with their shardings. An array that is kept for a parameter has the
        parameter's path behind its own; it lies as the parameter does, as far as it has the same
        dimensions (Adafactor leaves one out)."""

        def place(path, s):
            keys = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
            spec = next((learns[keys[i:]] for i in range(len(keys)) if keys[i:] in learns), None)
            if spec is None or not s.shape:
                return self._replicated(s)
            sharding = NamedSharding(self.mesh, _kept(spec, s.shape))
            if self.offload_optimizer and s.shape == spec.shape:
                sharding = on_host(sharding)
            return jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding)

        learns = self.trainable_specs
        return jax.tree_util.tree_map_with_path(place, opt_state)

    def shardings(self) -> TrainState:
        return jax.tree.map(lambda s: s.sharding, self.abstract())

    def initialize(self, key: jax.Array) -> TrainState:
        """A fresh state with random parameters, made where it will live."""

        def make(key):
            def values(tree, dtype):
                turns = self.mesh.size == 1
                return nest(
                    {
                        p: initial_value(p, s, key, s.dtype(dtype), in_turns=turns)
                        for p, s in tree.items()
                    }
                )

            params = values(self.trainable_specs, jnp.float32)
            frozen = values(self.frozen_specs, self.frozen_dtype)
            step = jnp.zeros((), jnp.int32)
            return TrainState(step, params, frozen, self.optimizer.init(params))

        return jax.jit(make, out_shardings=self.shardings())(key)

    def _sharding(self, axes):
        return NamedSharding(self.mesh, partition_spec(axes))

    def _replicated(self, s):
        sharding = NamedSharding(self.mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding)


def _kept(spec: ParamSpec, shape: tuple[int, ...]) -> PartitionSpec:
    """The partition of an array of `shape` that an optimizer keeps for a parameter."""
    whole = partition_spec(spec.axes)
    if shape == spec.shape:
        return whole
    axes = tuple(whole) + (None,) * (len(spec.shape) - len(whole))
    without = {
        PartitionSpec(*axes[:i], *axes[i + 1 :])
        for i in range(len(axes))
        if spec.shape[:i] + spec.shape[i + 1 :] == shape
    }
    # Of two equal dimensions it is not known which one was left out.
    return without.pop() if len(without) == 1 else PartitionSpec()
