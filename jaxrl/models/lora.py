"""LoRA (arXiv:2106.09685): y = x W + (alpha / R) x A B, with W frozen."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrl.models.layers import Linear
from jaxrl.models.moe import ExpertLinear
from jaxrl.models.params import Path
from jaxrl.models.transformer import Transformer

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Adapters on the layers' linear maps: `rank` R, scale alpha / R, and which maps get one."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"lora rank {self.rank} must be at least 1; 0 adapters means full")
        unknown = [t for t in self.targets if t not in TARGETS]
        if unknown or not self.targets:
            raise ValueError(
                f"lora targets {list(self.targets)}: each must be one of {', '.join(TARGETS)}"
            )


def add_lora(model: Transformer, lora: LoraConfig) -> Transformer:
    """Give each targeted linear map of an abstract model its A [D, R] and B [R, F], in place.

    "gate", "up" and "down" are those of dense layers, of every expert (each its own A and B) and of
    shared experts.
    """
    for path, linear in nnx.iter_modules(model):
        if isinstance(linear, (Linear, ExpertLinear)) and path[-1] in lora.targets:
            linear.add_lora(lora.rank, lora.alpha / lora.rank)
    return model


def adapted(model: Transformer) -> dict[Path, float]:
    """The linear maps that have adapters: their paths and scales, alpha / R."""
    return {
        tuple(map(str, path)): linear.lora_scale
        for path, linear in nnx.iter_modules(model)
        if isinstance(linear, (Linear, ExpertLinear)) and linear.lora_a is not None
    }


def merge_lora(model: Transformer, dtype=None) -> Transformer:
    """Make each adapted kernel W + (alpha / R) A B, in place, and drop the adapters; returns the
    model.

    The sum is made in fp32 and held in `dtype`, by default the kernel's own. One kernel is replaced
    at a time, so no more than one is there twice. Raises ValueError where the model has no values.
    """

    @functools.partial(jax.jit, static_argnums=(3, 4))
    def merged(kernel, a, b, scale: float, dtype):
        wide = (x.astype(jnp.float32) for x in (a, b))
        update = jnp.matmul(*wide, precision=jax.lax.Precision.HIGHEST)
        return (kernel.astype(jnp.float32) + scale * update).astype(dtype)

    for _, linear in list(nnx.iter_modules(model)):
        if not isinstance(linear, (Linear, ExpertLinear)):
            continue
        if linear.lora_a is None or linear.lora_b is None:
            continue
        kernel, *adapters = (v.get_value() for v in (linear.kernel, linear.lora_a, linear.lora_b))
        if not isinstance(kernel, jax.Array):
            raise ValueError("the model has no values; initialize or load it before merging")
        held = jnp.dtype(kernel.dtype if dtype is None else dtype)
        linear.kernel.set_value(merged(kernel, *adapters, linear.lora_scale, held))
        linear.lora_a = linear.lora_b = None
        linear.lora_scale = 1.0
    return model
