"""Log-probs of a batch's tokens under the model that the run began with, for `loss.ref_kl_coef`."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxrl.parallel.context import AXIS as CONTEXT
from jaxrl.parallel.context import sequence_order
from jaxrl.parallel.dispatch import in_order
from jaxrl.train.batch import BATCH_SPEC, Batch, Predictions
from jaxrl.train.gradients import Gradients, one
from jaxrl.train.pretrained import base_params
from jaxrl.train.state import TrainState
from jaxrl.train.step import TrainStep


class Reference:
    """`reference(state, batch) -> [M, B, T]`, fp32, as `Batch.ref_logprobs` has them: of each token
    given those before it, 0 of a row's first. Micro-batches without a trained token are left out.

    With LoRA the reference is the state's own base without its adapters, which costs nothing; in
    full fine-tuning it is a second copy of the weights in `folder`, in the compute dtype.
    """

    def __init__(self, step: TrainStep, folder: str | Path):
        self.step, layout = step, step.layout
        state = layout.shardings()
        self._own: Any = None if layout.is_lora else base_params(layout, folder, step.dtype)
        batch = NamedSharding(layout.mesh, BATCH_SPEC)
        self.jitted = jax.jit(
            self._logprobs,
            in_shardings=(state.params, state.frozen, batch),
            out_shardings=batch,
            compiler_options=step.compiler_options(),
        )

    def __call__(self, state: TrainState, batch: Batch) -> jax.Array:
        return in_order(self.jitted)(*(self._own or (state.params, state.frozen)), batch)

    def _logprobs(self, params, frozen, batch: Batch) -> jax.Array:
        layout = self.step.layout
        if layout.is_lora:  # B is zero: the adapters add nothing
            params = jax.tree.map(jnp.zeros_like, params)
        made: Any = self.step.on_mesh(_Logprobs, params, frozen, batch, BATCH_SPEC)
        found: jax.Array = made
        seq_len, devices = batch.tokens.shape[-1], layout.mesh.shape[CONTEXT]
        order = sequence_order(self.step.config.context_method, seq_len, devices)
        if order is not None:
            found = found[..., np.argsort(order)]
        # From the position that predicts a token to the token's own.
        return jnp.pad(found[..., :-1], [(0, 0), (0, 0), (1, 0)])


class _Logprobs(Gradients):
    """The body of the `shard_map`: one device's shards."""

    def __call__(self, params, frozen, batch: Predictions):
        def body(i, found):
            return found.at[i].set(values(one(batch, i)))

        values = functools.partial(self.token_logprobs, params, frozen)
        nothing = jnp.zeros(batch.targets.shape, jnp.float32)
        return jax.lax.fori_loop(0, self.used(batch), body, nothing)
