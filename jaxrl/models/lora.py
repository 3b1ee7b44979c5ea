"""LoRA (arXiv:2106.09685): y = x W + (alpha / R) x A B, with W frozen."""

import dataclasses

from flax import nnx

from jaxrl.models.layers import Linear
from jaxrl.models.moe import ExpertLinear
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
