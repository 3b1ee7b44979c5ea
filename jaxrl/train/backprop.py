"""Backpropagation through stacked layers with the gradient accumulated in place, layer by layer.

`jax.grad` over a scanned stack returns a second gradient buffer, which then has to be added to the
one of earlier micro-batches. Here the reverse loop carries the accumulators and adds each layer's
gradient at its index as soon as it exists: one fp32 buffer in all. What a layer keeps for backward
is still decided by `jax.checkpoint` policies.
"""

from collections.abc import Callable
from typing import Any

import jax

from jaxrl.train.remat import remat_policy

# layer(trainable, constants, x) -> (x, counts): one layer, given its own parameters; counts, an
# array or None, is told on and gets no gradient.
type Layer = Callable[[Any, Any, jax.Array], tuple[jax.Array, Any]]


class LayerStack:
    """Forward and backward over stacked layers.

    fetch(trainable_i, frozen_i) -> (trainable, frozen) makes one layer's slices whole (cast and
    gathered over devices) before use; reduce(gradient) -> the shard's sum over devices.
    `constants` are inputs shared by all layers (rotary tables, documents), never differentiated.
    """

    def __init__(self, layer: Layer, *, ac: str, fetch: Callable, reduce: Callable):
        # `prevent_cse` would hold a layer's recomputation back until all its weights are gathered;
        # `backward` holds back the gathers instead, which is enough: forward's layers are computed
        # in another loop.
        self.layer = jax.checkpoint(layer, policy=remat_policy(ac), prevent_cse=False)
        self.fetch, self.reduce = fetch, reduce
        self._template: Any = None
        self._counts: Any = None

    def forward(self, trainable, frozen, constants, x: jax.Array):
        """(x after all layers, what backward needs, counts); parameters stacked [L, ...]."""

        def body(x, layer):
            # As in backward: nothing of the layer before its turn.
            tr, fr, x = jax.lax.optimization_barrier((*layer, x))
            tr, fr = self.fetch(tr, fr)
            # Parameters and constants are at hand again in backward: only the rest is stacked.
            (x, counts), vjp = jax.vjp(
                self.layer,
                tr,
                (fr, constants),
                x,
                in_nzs=(True, False, True),
                saveable_args=(False, False, True),
            )
            self._template = vjp
            self._counts = counts
            kept = (vjp.args_res[2], vjp.opaque_residuals, vjp.structured_residuals)
            return x, (kept, counts)

        x, (saved, counts) = jax.lax.scan(body, x, (trainable, frozen))
        return x, saved, counts

    def backward(self, trainable, frozen, constants, saved, dx: jax.Array, grads):
        """(grads + gradient, dx before the first layer); grads: fp32, stacked [L, ...]."""
        num_layers = jax.tree.leaves((trainable, frozen))[0].shape[0]

        def body(carry, layer):
            dx, grads = carry
            index, tr, fr, (x, opaque, structured) = layer
            # Holds back the whole layer, gathers included, until its turn; then each product waits
            # for its own weights only, and the gathers of later ones run beside it.
            tr, fr, x, dx = jax.lax.optimization_barrier((tr, fr, x, dx))
            tr, fr = self.fetch(tr, fr)
            args = [tr, (fr, constants), x]
            vjp = self._template.replace(
                args_res=args, opaque_residuals=opaque, structured_residuals=structured
            )
            no_counts = None
            if self._counts is not None:
                no_counts = jax.numpy.zeros(self._counts.shape, self._counts.dtype)
            dtrainable, _, dx = vjp((dx, no_counts))

            def add(total, g):
                here = jax.lax.dynamic_index_in_dim(total, index, keepdims=False)
                return jax.lax.dynamic_update_index_in_dim(total, here + g, index, 0)

            with jax.named_scope("accumulate"):
                grads = jax.tree.map(add, grads, self.reduce(dtrainable))
            return (dx, grads), None

        layers = (jax.numpy.arange(num_layers), trainable, frozen, saved)
        (dx, grads), _ = jax.lax.scan(body, (dx, grads), layers, reverse=True)
        return grads, dx
