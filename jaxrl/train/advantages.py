"""From the rewards of a task's rollouts to the advantage of each, and which groups teach anything.

A group is the rollouts of one task; its own mean is the baseline (arXiv:2402.03300).
"""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float

type Kind = Literal["mean", "grpo", "leave_one_out", "max_rl"]
type Rewards = Float[np.ndarray, " G"]


def group_advantages(rewards: Rewards, kind: Kind) -> Rewards:
    """The advantage of each rollout of a group.

    mean: r - mean(r). grpo: that over the standard deviation (G - 1 degrees of freedom; 0 where all
    are equal). leave_one_out: r less the mean of the others (arXiv:2402.14740). max_rl: r - mean(r)
    over mean(r), for rewards that are not negative; 0 where the mean is 0.
    """
    return _KINDS[kind](np.asarray(rewards, np.float64)).astype(np.float32)


def _grpo(r: np.ndarray) -> np.ndarray:
    spread = r.std(ddof=1) if len(r) > 1 else 0.0
    # Equal rewards differ by rounding, which must not become advantages of 1.
    return (r - r.mean()) / spread if spread > 1e-9 * (1 + abs(r.mean())) else np.zeros_like(r)


def _leave_one_out(r: np.ndarray) -> np.ndarray:
    return (r - r.mean()) * len(r) / (len(r) - 1) if len(r) > 1 else np.zeros_like(r)


def _max_rl(r: np.ndarray) -> np.ndarray:
    return (r - r.mean()) / r.mean() if r.mean() > 0 else np.zeros_like(r)


_KINDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": lambda r: r - r.mean(),
    "grpo": _grpo,
    "leave_one_out": _leave_one_out,
    "max_rl": _max_rl,
}


def is_flat(rewards: Sequence[float] | Rewards) -> bool:
    """Whether a group teaches nothing: all of its advantages are 0."""
    return bool(np.ptp(np.asarray(rewards, np.float64)) <= 1e-9)


def length_penalty(lengths: Sequence[int], limits: Sequence[int], margin: int) -> np.ndarray:
    """What is taken from the reward of turns of these lengths, 0 to 1: rises linearly over the last
    `margin` tokens before each one's limit, or over all there are (arXiv:2503.14476)."""
    most = np.asarray(limits, np.float64)
    margins = np.maximum(np.minimum(margin, most), 1)
    return np.clip((np.asarray(lengths) - (most - margins)) / margins, 0.0, 1.0)
