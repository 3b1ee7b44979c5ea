"""What each rollout of a group is worth, and whether the group teaches anything."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float

from jaxrl.rl_config import RlConfig
from jaxrl.rollout.rollouts import Group, Rollout
from jaxrl.train.advantages import group_advantages, is_flat, length_penalty

type Verdict = Literal["good", "failed", "stale", "flat"]


def worth(config: RlConfig, group: Group) -> Float[np.ndarray, " G"]:
    """The rewards of the group's scored rollouts, less what the longest turn of each pays for its
    length: a turn may have `rollout.max_tokens` tokens, or what `seq_len` leaves it."""
    rewards, options = np.array(group.rewards, np.float64), config.algorithm
    if not options.length_penalty:
        return rewards
    most = config.rollout.max_tokens or config.seq_len

    def penalty(rollout: Rollout) -> float:
        turns = rollout.turns
        limits = [min(most, config.seq_len - first) for first, _ in turns]
        lengths = [length for _, length in turns]
        return max(length_penalty(lengths, limits, options.length_margin), default=0.0)

    return rewards - options.length_penalty * np.array([penalty(r) for r in group.scored])


def verdict(config: RlConfig, group: Group, step: int) -> Verdict:
    """Whether step `step` + 1 has something to learn from the group, or why not."""
    if len(group.rewards) < 2:
        return "failed"
    versions = [v for rollout in group.scored for v in rollout.by_version]
    if min(versions, default=step) < step - config.rollout.max_staleness:
        return "stale"
    return "flat" if is_flat(worth(config, group)) else "good"


def training_rollouts(
    config: RlConfig, groups: Sequence[Group]
) -> tuple[list[Rollout], list[float]]:
    """The groups' scored rollouts, and the advantage of each."""
    rollouts, advantages = [], []
    for group in groups:
        rollouts += group.scored
        found = group_advantages(worth(config, group), config.algorithm.advantage)
        advantages += found.tolist()
    return rollouts, advantages
