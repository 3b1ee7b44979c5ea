"""The RL losses, their gradients and metrics against loops in numpy over the published formulas."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.config import LossConfig
from jaxrl.train.losses import RLTokens, rl_loss

CONFIGS = {
    "masked_ratio": LossConfig(),
    "masked_ratio_tight": LossConfig(
        token_ratio_low=0.5,
        token_ratio_high=3.0,
        sequence_ratio_low=0.8,
        sequence_ratio_high=1.3,
        max_ratio=6.0,
    ),
    "dppo_kl": LossConfig(name="dppo_kl"),
    "dppo_kl_strong": LossConfig(name="dppo_kl", delta=0.05, kl_coef=0.7),
    "ppo_clip": LossConfig(name="ppo_clip"),
    "ppo_clip_higher": LossConfig(name="ppo_clip", clip_low=0.1, clip_high=0.3, ref_kl_coef=0.3),
    "gspo": LossConfig(name="gspo", sequence_clip_low=0.01, sequence_clip_high=0.2),
    "cispo": LossConfig(name="cispo", clip_low=0.5, clip_high=2.0),
    "ref_kl": LossConfig(name="dppo_kl", ref_kl_coef=0.1),
}


@functools.partial(jax.jit, static_argnums=2)
def run(lp, tokens, config):
    """(loss, metrics, d loss / d lp)."""
    loss = functools.partial(rl_loss, tokens=tokens, config=config)
    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(lp)
    return value, metrics, gradient


def tokens(lq, advantages, mask, segment_ids=None, ref=None):
    f32 = lambda a: jnp.asarray(a, jnp.float32)  # noqa: E731
    ids = None if segment_ids is None else jnp.asarray(segment_ids)
    ref = f32(lq) + 0.5 if ref is None else f32(ref)
    return RLTokens(f32(lq), f32(advantages), jnp.asarray(mask, bool), ids, ref)


def sequences(mask, segment_ids):
    """The positions (row, [columns]) of every document."""
    for row in range(mask.shape[0]):
        ids = np.zeros(mask.shape[1]) if segment_ids is None else segment_ids[row]
        start = 0
        for end in range(1, len(ids) + 1):
            if end == len(ids) or ids[end] != ids[end - 1]:
                yield row, list(range(start, end))
                start = end


def oracle(lp, lq, A, mask, segment_ids, config):
    """(loss, metrics, gradient), token by token in fp64."""
    loss, gradient, m = 0.0, np.zeros(lp.shape), dict.fromkeys(metric_names(config), 0.0)
    for row, columns in sequences(mask, segment_ids):
        at = [(row, t) for t in columns if mask[row, t]]
        ratios = [math.exp(lp[i] - lq[i]) for i in at]
        if not at:
            continue
        mean, largest = math.prod(ratios) ** (1 / len(ratios)), max(ratios)
        for i, r in zip(at, ratios, strict=True):
            m["mismatch_kl"] += r - math.log(r) - 1
            if config.ref_kl_coef:
                log_q = lq[i] + 0.5 - lp[i]
                kl = math.exp(min(log_q, 10)) - log_q - 1
                m["ref_kl"] += kl
                loss += config.ref_kl_coef * kl
                gradient[i] += config.ref_kl_coef * (1 - math.exp(log_q) * (log_q < 10))
            if config.name in ("ppo_clip", "gspo", "cispo"):
                by_sequence = config.name == "gspo"
                low = 1 - (config.sequence_clip_low if by_sequence else config.clip_low)
                high = 1 + (config.sequence_clip_high if by_sequence else config.clip_high)
                x = mean if by_sequence else r
                clipped = min(max(x, low), high)
                if config.name == "cispo":
                    m["clipped_low"], m["clipped_high"] = (
                        m["clipped_low"] + (x < low),
                        m["clipped_high"] + (x > high),
                    )
                    m["kept"] += 1
                    loss -= clipped * A[i] * lp[i]
                    gradient[i] -= clipped * A[i]
                    continue
                loss -= min(x * A[i], clipped * A[i])
                if x > high and A[i] > 0:
                    m["clipped_high"] += 1
                elif x < low and A[i] < 0:
                    m["clipped_low"] += 1
                else:
                    m["kept"] += 1
                    gradient[i] -= x * A[i]
                continue
            if config.name == "masked_ratio":
                reasons = {
                    "dropped_by_token_ratio": not (
                        config.token_ratio_low <= r <= config.token_ratio_high
                    ),
                    "dropped_by_sequence_ratio": not (
                        config.sequence_ratio_low <= mean <= config.sequence_ratio_high
                    ),
                    "dropped_by_max_ratio": largest > config.max_ratio,
                }
            else:
                dp = math.exp(lp[i]) - math.exp(lq[i])
                up = A[i] > 0
                far = dp > config.delta if up else dp < -config.delta
                reasons = {"dropped_by_divergence": far}
                loss += config.kl_coef * (lp[i] - lq[i]) ** 2  # of dropped tokens, too
                gradient[i] += 2 * config.kl_coef * (lp[i] - lq[i])
            for reason, dropped in reasons.items():
                m[reason] += dropped
            if any(reasons.values()):
                continue
            m["kept"] += 1
            if config.name == "masked_ratio":
                loss -= r * A[i] * lp[i]
                gradient[i] -= r * A[i]
            else:
                loss += -A[i] * r
                gradient[i] += -A[i] * r
    return loss, m, gradient


METRICS = {
    "masked_ratio": (
        "mismatch_kl",
        "kept",
        "dropped_by_token_ratio",
        "dropped_by_sequence_ratio",
        "dropped_by_max_ratio",
    ),
    "dppo_kl": ("mismatch_kl", "kept", "dropped_by_divergence"),
} | dict.fromkeys(
    ("ppo_clip", "gspo", "cispo"), ("mismatch_kl", "kept", "clipped_low", "clipped_high")
)


def metric_names(config):
    return (*METRICS[config.name], *(("ref_kl",) if config.ref_kl_coef else ()))


def random_case(seed, packed, B=6, T=24):
    """Mostly small ratios, a few large ones, some rows off as a whole."""
    rng = np.random.default_rng(seed)
    lp = -rng.exponential(1.0, (B, T))
    scale = rng.choice([0.05, 0.5, 2.0], (B, 1))
    shift = rng.choice([0.0, 0.0, -3.0], (B, 1))
    lq = np.minimum(lp + shift + scale * rng.standard_normal((B, T)), -1e-3)
    A = rng.standard_normal((B, T)) * (rng.random((B, T)) < 0.9)
    ids = np.sort(rng.integers(0, 5, (B, T))) if packed else None
    return *(a.astype(np.float32) for a in (lp, lq, A)), rng.random((B, T)) < 0.7, ids


def compare(case, config):
    lp, lq, A, mask, ids = case
    value, metrics, gradient = run(jnp.asarray(lp), tokens(lq, A, mask, ids), config)
    expected, expected_metrics, expected_gradient = oracle(
        *(a.astype(np.float64) for a in (lp, lq, A)), mask, ids, config
    )
    np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-5)
    assert metrics.keys() == expected_metrics.keys()
    for key, number in expected_metrics.items():
        np.testing.assert_allclose(metrics[key], number, rtol=1e-3, err_msg=key)
        assert metrics[key].dtype == jnp.float32
    return metrics


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_formula(name, packed):
    totals = dict.fromkeys(metric_names(CONFIGS[name]), 0.0)
    for seed in range(5):
        for key, value in compare(random_case(seed, packed), CONFIGS[name]).items():
            totals[key] += float(value)
    assert all(totals.values())  # every reason to drop did occur


LOG = math.log
DROPS = {  # log ratios of a sequence of four tokens -> which are kept
    "none": ([0.0, 0.1, -0.1, 0.0], "1111"),
    "token_just_inside": ([LOG(7.9), LOG(0.127), 0.0, 0.0], "1111"),
    "token_above": ([LOG(8.1), 0.0, 0.0, 0.0], "0111"),
    "token_below": ([0.0, LOG(0.124), 0.0, 0.0], "1011"),
    "largest_just_inside": ([LOG(99), 0.0, 0.0, 0.0], "0111"),
    "largest_above": ([LOG(101), 0.0, 0.0, 0.0], "0000"),
    "mean_just_inside": ([LOG(90), LOG(90), LOG(1.1), LOG(1.1)], "0011"),
    "mean_above": ([LOG(90), LOG(90), LOG(1.3), LOG(1.3)], "0000"),
    "mean_below": ([LOG(1 / 90), LOG(1 / 90), LOG(1 / 1.3), LOG(1 / 1.3)], "0000"),
    "mean_low_inside": ([LOG(1 / 90), LOG(1 / 90), LOG(1 / 1.1), LOG(1 / 1.1)], "0011"),
}


@pytest.mark.parametrize("case", DROPS)
def test_what_masked_ratio_drops(case):
    log_ratio, kept = DROPS[case]
    lp = jnp.full((1, 4), -7.0)
    given = tokens(lp - jnp.array([log_ratio]), np.ones((1, 4)), np.ones((1, 4)))
    _, metrics, gradient = run(lp, given, LossConfig())
    assert [bool(g) for g in gradient[0]] == [c == "1" for c in kept]
    assert metrics["kept"] == kept.count("1")


@pytest.mark.parametrize("name", METRICS)
def test_a_masked_token_counts_for_nothing(name):
    """Neither in its sequence's mean nor as its largest; whatever was stored for it, NaN too."""
    lp = jnp.full((1, 4), -1.0)
    mask = np.array([[1, 0, 1, 0]])
    clean = tokens(np.full((1, 4), -1.1), np.ones((1, 4)), mask)
    lq, A = np.array([[-1.1, -90.0, -1.1, np.nan]]), np.array([[1.0, 1.0, 1.0, np.nan]])
    config = LossConfig(name=name, ref_kl_coef=0.1)
    ref = np.array([[-1.0, np.nan, -1.0, 90.0]])
    for a, b in zip(
        jax.tree.leaves(run(lp, dataclasses.replace(clean, ref_logprobs=lp), config)),
        jax.tree.leaves(run(lp, tokens(lq, A, mask, ref=ref), config)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("lp", "lq", "A", "kept"),
    [
        (-0.5, -0.9, 1.0, True),  # probability rose by 0.2000, advantage positive: just inside
        (-0.5, -0.92, 1.0, False),
        (-0.5, -0.92, -1.0, True),  # the same move against the advantage
        (-0.92, -0.5, -1.0, False),
        (-0.92, -0.5, 0.0, False),  # no advantage is treated as a negative one
        (-0.92, -0.5, 1.0, True),
    ],
)
def test_what_dppo_kl_drops(lp, lq, A, kept):
    given = tokens([[lq]], [[A]], [[1]])
    _, metrics, gradient = run(jnp.array([[lp]]), given, LossConfig(name="dppo_kl", kl_coef=0.0))
    assert bool(gradient[0, 0]) == bool(metrics["kept"]) == kept
    assert metrics["dropped_by_divergence"] == (not kept)


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_documents_equal_separate_rows(name):
    lp, lq, A, mask, _ = random_case(7, False, B=4, T=6)
    separate = run(lp, tokens(lq, A, mask), CONFIGS[name])
    row = lambda a: a.reshape(1, -1)  # noqa: E731
    ids = np.repeat([[4, 1, 4, 0]], 6, axis=1)  # an id used twice is two documents
    together = run(row(lp), tokens(row(lq), row(A), row(mask), ids), CONFIGS[name])
    np.testing.assert_allclose(together[0], separate[0], rtol=1e-5)
    np.testing.assert_allclose(together[2], row(np.asarray(separate[2])), rtol=1e-6)
    for key, value in separate[1].items():
        np.testing.assert_allclose(together[1][key], value, rtol=1e-5, err_msg=key)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["masked_ratio", "dppo_kl"])
def test_nothing_kept_is_zero(name, packed):
    shape = (2, 4)
    ids = np.array([[0, 0, 1, 1]] * 2) if packed else None
    lp, lq = np.full(shape, -0.01), np.full(shape, -9.0)  # far on every measure
    ones = np.ones(shape)
    for given, trained in ((tokens(lq, ones, ones, ids), 8), (tokens(lq, ones, 0 * ones, ids), 0)):
        config = LossConfig(name=name, kl_coef=0.0)
        value, metrics, gradient = run(jnp.asarray(lp), given, config)
        assert value == 0 and not np.any(gradient) and metrics["kept"] == 0
        dropped = sum(v for k, v in metrics.items() if k.startswith("dropped"))
        assert (dropped >= trained) if trained else (dropped == 0)
        assert all(np.isfinite(v) for v in metrics.values())


@pytest.mark.parametrize("name", METRICS)
def test_extreme_ratios_stay_finite(name):
    """exp(log r) overflows fp32 above 88: such a token leaves no trace of NaN."""
    lp = jnp.array([[-0.01, -200.0, -1.0, -0.01]])
    given = tokens([[-200.0, -0.01, -1.0, -1000.0]], [[1.0, -1.0, 1.0, 1.0]], np.ones((1, 4)))
    value, metrics, gradient = run(lp, given, LossConfig(name=name, ref_kl_coef=0.1))
    assert np.isfinite(value) and np.all(np.isfinite(gradient))
    kept = {"masked_ratio": 0, "dppo_kl": 1, "ppo_clip": 1, "gspo": 1, "cispo": 4}
    assert metrics["kept"] == kept[name]


def test_a_reference_model_without_its_log_probs_raises():
    given = dataclasses.replace(tokens([[0.0]], [[0.0]], [[1]]), ref_logprobs=None)
    with pytest.raises(ValueError, match="ref_kl_coef needs ref_logprobs"):
        rl_loss(jnp.zeros((1, 1)), given, LossConfig(ref_kl_coef=0.1))


def test_unknown_loss_raises():
    config = dataclasses.replace(LossConfig(), name="ppo")
    with pytest.raises(
        ValueError, match="unknown loss 'ppo'; one of masked_ratio, dppo_kl, ppo_clip"
    ):
        rl_loss(jnp.zeros((1, 1)), tokens([[0.0]], [[0.0]], [[1]]), config)
