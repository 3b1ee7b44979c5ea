"""Reinforcement-learning losses over the log-probabilities of sampled tokens.

Every loss returns *sums* over this device's tokens; the step divides by the number of loss tokens
of the whole global batch, over all devices and micro-batches. Notation: lp trainer log-prob, lq
sampler log-prob, r = exp(lp - lq), A advantage, m mask. Formulas of masked_ratio and dppo_kl: those
of the trainer whose page is in bench/baselines (its default of February 2026, and its current one).
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
    ref_logprobs: log-probs of the reference model, for `ref_kl_coef`.
    """

    sampler_logprobs: Float[Array, "B T"]
    advantages: Float[Array, "B T"]
    mask: Bool[Array, "B T"]
    segment_ids: Int[Array, "B T"] | None = None
    ref_logprobs: Float[Array, "B T"] | None = None


def rl_loss(
    logprobs: Float[Array, "B T"], tokens: RLTokens, config: LossConfig
) -> tuple[Float[Array, ""], Metrics]:
    """(summed loss, summed metrics) of the loss that `config.name` names, and of the divergence
    from a reference model, if it has a weight."""
    if config.name not in LOSSES:
        raise ValueError(f"unknown loss {config.name!r}; one of {', '.join(LOSSES)}")
    loss, metrics = LOSSES[config.name](logprobs, tokens, config)
    if config.ref_kl_coef:
        kl = _ref_kl(logprobs, tokens)
        loss, metrics["ref_kl"] = loss + config.ref_kl_coef * kl, jax.lax.stop_gradient(kl)
    return loss, {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}


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
    return -jnp.sum(jax.lax.stop_gradient(weight) * logprobs), metrics


def dppo_kl(logprobs, tokens: RLTokens, config: LossConfig):
    """-A r of kept tokens (arXiv:2602.04879) + kl_coef (log r)^2 of all, gradient through r.

    A token is dropped where its probability moved too far in the direction its advantage pushes:
    A > 0 and exp(lp) - exp(lq) > delta, or A <= 0 and exp(lp) - exp(lq) < -delta. The second term
    then still draws it back to the sampler's.
    """
    log_ratio = jnp.where(tokens.mask, logprobs - tokens.sampler_logprobs, 0.0)
    moved = jax.lax.stop_gradient(jnp.exp(logprobs) - jnp.exp(tokens.sampler_logprobs))
    too_far = jnp.where(tokens.advantages > 0, moved > config.delta, moved < -config.delta)
    keep = tokens.mask & ~too_far
    # The inner where keeps a dropped token's overflow out of the gradient.
    kept_ratio = jnp.where(keep, log_ratio, 0.0)
    policy = -tokens.advantages * jnp.exp(kept_ratio)
    loss = jnp.where(keep, policy, 0.0) + config.kl_coef * log_ratio**2
    metrics = _ratio_metrics(jax.lax.stop_gradient(log_ratio), keep, tokens)
    metrics["dropped_by_divergence"] = jnp.sum(tokens.mask & too_far)
    return jnp.sum(loss), metrics


def ppo_clip(logprobs, tokens: RLTokens, config: LossConfig):
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), as PPO (arXiv:1707.06347) and GRPO
    (arXiv:2402.03300); gradient through r."""
    log_ratio = jnp.where(tokens.mask, logprobs - tokens.sampler_logprobs, 0.0)
    return _clipped(log_ratio, tokens, config.clip_low, config.clip_high, log_ratio)


def gspo(logprobs, tokens: RLTokens, config: LossConfig):
    """`ppo_clip` with the geometric mean of its sequence's r in place of each token's
    (arXiv:2507.18071, in its form by tokens), clipped by sequence_clip_low and _high.

    A token's gradient is that mean's value times its own log-prob's.
    """
    log_ratio = jnp.where(tokens.mask, logprobs - tokens.sampler_logprobs, 0.0)
    fixed = jax.lax.stop_gradient(log_ratio)
    total, count, _ = _per_sequence(fixed, tokens)
    mean = total / jnp.maximum(count, 1) + (log_ratio - fixed)
    mean = jnp.where(tokens.mask, mean, 0.0)
    low, high = config.sequence_clip_low, config.sequence_clip_high
    return _clipped(mean, tokens, low, high, log_ratio)


def cispo(logprobs, tokens: RLTokens, config: LossConfig):
    """-stopgrad(clip(r, 1 - clip_low, 1 + clip_high)) A lp: clipped tokens learn, too
    (arXiv:2506.13585)."""
    log_ratio = jnp.where(tokens.mask, logprobs - tokens.sampler_logprobs, 0.0)
    fixed = jax.lax.stop_gradient(log_ratio)
    ratio = _ratio(fixed)
    low, high = ratio < 1 - config.clip_low, ratio > 1 + config.clip_high
    weight = jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high) * tokens.advantages
    weight = jnp.where(tokens.mask, weight, 0.0)
    metrics = _ratio_metrics(fixed, tokens.mask, tokens) | _clip_metrics(tokens, low, high)
    return -jnp.sum(weight * jnp.where(tokens.mask, logprobs, 0.0)), metrics


LOSSES = {
    "masked_ratio": masked_ratio,
    "dppo_kl": dppo_kl,
    "ppo_clip": ppo_clip,
    "gspo": gspo,
    "cispo": cispo,
}


def _clipped(log_ratio, tokens: RLTokens, low: float, high: float, by_token):
    """PPO's loss for this log ratio, of tokens or of sequences; `by_token`: of tokens."""
    ratio, advantages = _ratio(log_ratio), jnp.where(tokens.mask, tokens.advantages, 0.0)
    loss = -jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - low, 1 + high) * advantages)
    fixed = jax.lax.stop_gradient(ratio)
    # Only these lose their gradient.
    too_low, too_high = (advantages < 0) & (fixed < 1 - low), (advantages > 0) & (fixed > 1 + high)
    keep = tokens.mask & ~(too_low | too_high)
    metrics = _ratio_metrics(jax.lax.stop_gradient(by_token), keep, tokens)
    return jnp.sum(loss), metrics | _clip_metrics(tokens, too_low, too_high)


def _clip_metrics(tokens: RLTokens, low, high):
    return {
        "clipped_low": jnp.sum(tokens.mask & low),
        "clipped_high": jnp.sum(tokens.mask & high),
    }


def _ratio(log_ratio):
    """exp(log_ratio), up to e^10, where the gradient ends: beyond it fp32 overflows some day."""
    return jnp.exp(jnp.minimum(log_ratio, 10.0))


def _ref_kl(logprobs, tokens: RLTokens):
    """KL(policy || reference) of the trained tokens, estimated as GRPO does: q - log q - 1 with q
    the ratio of the reference's probability to the policy's."""
    if tokens.ref_logprobs is None:
        raise ValueError("ref_kl_coef needs ref_logprobs [M, B, T] in the batch")
    log_q = jnp.where(tokens.mask, tokens.ref_logprobs - logprobs, 0.0)
    return jnp.sum(_ratio(log_q) - log_q - 1.0)


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
