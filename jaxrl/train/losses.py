"""Reinforcement-learning losses over the log-probabilities of sampled tokens.

Every loss returns *sums* over this device's tokens; the step divides by the number of loss tokens
of the whole global batch, over all devices and micro-batches. Notation: lp trainer log-prob, lq
sampler log-prob, r = exp(lp - lq), A advantage, m mask. Formulas: those of the
trainer whose page is in bench/baselines (its default of February 2026, and its current one).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl.config import LossConfig

type Metrics = dict[str, Float[Array, ""]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RLTokens:
    """What an RL loss knows of each token besides lp. All [B, T]; `mask` marks trained tokens.

    segment_ids: which sequence a token belongs to; None: each row is one sequence.
    """

    sampler_logprobs: Float[Array, "B T"]
    advantages: Float[Array, "B T"]
    mask: Bool[Array, "B T"]
    segment_ids: Int[Array, "B T"] | None = None


def rl_loss(
    logprobs: Float[Array, "B T"], tokens: RLTokens, config: LossConfig
) -> tuple[Float[Array, ""], Metrics]:
    """(summed loss, summed metrics) of the loss that `config.name` names."""
    match config.name:
        case "masked_ratio":
            return masked_ratio(logprobs, tokens, config)
        case "dppo_kl":
            return dppo_kl(logprobs, tokens, config)
    raise ValueError(f"unknown loss {config.name!r}; one of masked_ratio, dppo_kl")


def masked_ratio(logprobs, tokens: RLTokens, config: LossConfig):
    """-stopgrad(r A) lp over kept tokens. Tokens are dropped, never clipped.

    Dropped: r outside [token_ratio_low, token_ratio_high]; every token of a sequence whose
    geometric mean ratio lies outside [sequence_ratio_low, sequence_ratio_high] or whose largest
    ratio exceeds max_ratio.
    """
    log_ratio = jnp.where(tokens.mask, logprobs - tokens.sampler_logprobs, 0.0)
    fixed = jax.lax.stop_gradient(log_ratio)
    ratio = jnp.exp(fixed)
    total, count, largest = _per_sequence(fixed, tokens)
    mean = total / jnp.maximum(count, 1)
    by_token = (ratio < config.token_ratio_low) | (ratio > config.token_ratio_high)
    by_mean = (mean < jnp.log(config.sequence_ratio_low)) | (
        mean > jnp.log(config.sequence_ratio_high)
    )
    by_max = largest > jnp.log(config.max_ratio)
    keep = tokens.mask & ~(by_token | by_mean | by_max)
    weight = jnp.where(keep, ratio * tokens.advantages, 0.0)
    metrics = _ratio_metrics(fixed, keep, tokens) | {
        "dropped_by_token_ratio": jnp.sum(tokens.mask & by_token),
        "dropped_by_sequence_ratio": jnp.sum(tokens.mask & by_mean),
        "dropped_by_max_ratio": jnp.sum(tokens.mask & by_max),
    }
    return -jnp.sum(jax.lax.stop_gradient(weight) * logprobs), _as_float(metrics)


def dppo_kl(logprobs, tokens: RLTokens, config: LossConfig):
    """-A r + kl_coef (log r)^2, gradient through r.

    A token is dropped where its probability moved too far in the direction its advantage pushes:
    A > 0 and exp(lp) - exp(lq) > delta, or A <= 0 and exp(lp) - exp(lq) < -delta.
    """
    log_ratio = jnp.where(tokens.mask, logprobs - tokens.sampler_logprobs, 0.0)
    moved = jax.lax.stop_gradient(jnp.exp(logprobs) - jnp.exp(tokens.sampler_logprobs))
    too_far = jnp.where(tokens.advantages > 0, moved > config.delta, moved < -config.delta)
    keep = tokens.mask & ~too_far
    # The inner where keeps a dropped token's overflow out of the gradient.
    kept_ratio = jnp.where(keep, log_ratio, 0.0)
    policy = -tokens.advantages * jnp.exp(kept_ratio)
    loss = jnp.where(keep, policy + config.kl_coef * kept_ratio**2, 0.0)
    metrics = _ratio_metrics(jax.lax.stop_gradient(log_ratio), keep, tokens)
    metrics["dropped_by_divergence"] = jnp.sum(tokens.mask & too_far)
    return jnp.sum(loss), _as_float(metrics)


def _per_sequence(log_ratio, tokens: RLTokens):
    """Sum, token count and largest log ratio of each token's sequence; arrays [B, T] or [B, 1]."""
    shown = jnp.where(tokens.mask, log_ratio, -jnp.inf)
    if tokens.segment_ids is None:
        return (
            jnp.sum(log_ratio, axis=1, keepdims=True),
            jnp.sum(tokens.mask, axis=1, keepdims=True),
            jnp.max(shown, axis=1, keepdims=True),
        )

    def row(log_ratio, mask, shown, ids):
        n = ids.shape[0]
        # Documents are runs of equal ids: number them 0.. so that any id value will do.
        run = jnp.cumsum(jnp.concatenate([jnp.zeros(1, jnp.int32), ids[1:] != ids[:-1]]))
        sums = jax.ops.segment_sum(log_ratio, run, n, indices_are_sorted=True)
        counts = jax.ops.segment_sum(mask.astype(jnp.int32), run, n, indices_are_sorted=True)
        return sums[run], counts[run], jax.ops.segment_max(shown, run, n)[run]

    return jax.vmap(row)(log_ratio, tokens.mask, shown, tokens.segment_ids)


def _ratio_metrics(log_ratio, keep, tokens: RLTokens):
    # KL(sampler || trainer) estimated per token as r - log r - 1 (Schulman's k3).
    kl = jnp.where(tokens.mask, jnp.exp(log_ratio) - log_ratio - 1.0, 0.0)
    return {"mismatch_kl": jnp.sum(kl), "kept": jnp.sum(keep)}


def _as_float(metrics) -> Metrics:
    return {k: v.astype(jnp.float32) for k, v in metrics.items()}
