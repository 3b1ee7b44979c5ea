"""The loss of a batch without its gradient, for validation: the training step's forward half."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl.train.batch import BATCH_SPEC, Batch, Predictions
from jaxrl.train.gradients import Gradients
from jaxrl.train.state import TrainState
from jaxrl.train.step import TrainStep


class Evaluation:
    """`evaluate(state, batch) -> {"loss", "tokens"}`: the sum of -log p over the trained tokens of
    the global batch, and their number; fp32 scalars. The state stays as it is.
    """

    def __init__(self, step: TrainStep):
        self.step = step
        layout = step.layout
        state = layout.shardings()
        self.jitted = jax.jit(
            functools.partial(step.on_mesh, _Losses, out_specs=PartitionSpec()),
            in_shardings=(
                state.params,
                state.frozen,
                NamedSharding(layout.mesh, BATCH_SPEC),
            ),
            out_shardings=NamedSharding(layout.mesh, PartitionSpec()),
            compiler_options=step.compiler_options(),
        )

    def __call__(self, state: TrainState, batch: Batch) -> dict:
        return self.jitted(state.params, state.frozen, batch)


class _Losses(Gradients):
    """The body of the `shard_map`: one device's shards."""

    def __call__(self, params, frozen, batch: Predictions):
        def micro(total, batch):
            return jax.tree.map(jnp.add, total, self.loss(params, frozen, batch)), None

        zero = jnp.zeros((), jnp.float32)
        total, _ = jax.lax.scan(micro, {"loss": zero, "tokens": zero}, batch)
        return jax.tree.map(self.sum_devices, total)

    def loss(self, params, frozen, batch: Predictions):
        """Of one micro-batch [B, T], on this device."""
        values = self.token_logprobs(params, frozen, batch)
        return {
            "loss": -jnp.sum(jnp.where(batch.mask, values, 0.0)),
            "tokens": jnp.sum(batch.mask, dtype=jnp.float32),
        }
