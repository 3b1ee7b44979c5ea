"""AdamW with global-norm clipping and a learning-rate schedule, as optax transformations."""

import optax

from jaxrl.config import OptimizerConfig
from jaxrl.train.offload import streamed


def schedule(config: OptimizerConfig) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then constant, or linear or cosine decay to 0."""
    lr, warmup = config.learning_rate, config.warmup_steps
    decay = max(config.total_steps - warmup, 1)
    match config.schedule:
        case "constant":
            after = optax.constant_schedule(lr)
        case "linear":
            after = optax.linear_schedule(lr, 0.0, decay)
        case "cosine":
            after = optax.cosine_decay_schedule(lr, decay)
        case other:
            raise ValueError(f"unknown schedule {other!r}; one of constant, linear, cosine")
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, lr, warmup), after], [warmup])


def make_optimizer(config: OptimizerConfig, *, devices: int = 0) -> optax.GradientTransformation:
    """clip by global norm -> Adam -> decoupled weight decay (arXiv:1711.05101) -> -lr(step).

    devices: of a mesh on which moments are in host memory; 0 where they are not. Same results.
    """
    clip = optax.clip_by_global_norm(config.max_grad_norm)
    by_layer = (
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(schedule(config)),
    )
    return (
        streamed(clip, optax.chain(*by_layer), devices) if devices else optax.chain(clip, *by_layer)
    )
