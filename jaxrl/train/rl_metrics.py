"""What an RL run tells of its rollouts: figures, counts, and the rollouts themselves."""

import collections
import itertools
import json
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from jaxrl.monitor import Monitor
from jaxrl.rollout.rollouts import Group, Rollout
from jaxrl.train.advantages import is_flat


def statistics(groups: Sequence[Group], version: int) -> dict[str, float]:
    """Of all rollouts of a step: rewards, lengths, how old, how hard the tasks were. version: of
    the weights that learn from them."""
    rollouts = list(each(groups))
    scored = [r for r in rollouts if r.reward is not None]
    rewards = np.array([reward for g in groups for reward in g.rewards] or [0.0])
    flat = [g for g in groups if len(g.rewards) > 1 and is_flat(g.rewards)]
    means = [np.mean(g.rewards) for g in groups if g.rewards]
    spreads = [np.std(g.rewards) for g in groups if g.rewards]
    ages = [version - v for r in scored for v in r.versions if v >= 0]
    values = {
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "group_reward_min": float(min(means, default=0.0)),
        "group_reward_max": float(max(means, default=0.0)),
        "group_reward_std": float(np.mean(spreads)) if spreads else 0.0,
        "groups_flat": len(flat) / len(groups),
        "staleness": float(np.mean(ages)) if ages else 0.0,
        "staleness_max": float(max(ages, default=0)),
        "length_mean": float(np.mean([r.length for r in rollouts])),
        "length_max": float(max(r.length for r in rollouts)),
        "truncated": float(np.mean([r.truncated for r in rollouts])),
        "failed": float(np.mean([r.failure is not None for r in rollouts])),
    }
    names = {name for r in scored for name in r.figures}
    return values | {
        f"env/{name}": float(np.mean([r.figures[name] for r in scored if name in r.figures]))
        for name in sorted(names)
    }


def failures(groups: Sequence[Group]) -> collections.Counter[str]:
    """How many rollouts failed at what: "prompt", "reply", "reward"."""
    return collections.Counter(r.failure.partition(":")[0] for r in each(groups) if r.failure)


def trace(output: str, monitor: Monitor, groups: Sequence[Group], step: int) -> None:
    """Every rollout as a line of rollouts.jsonl, the step's first ones as TensorBoard text."""
    with (pathlib.Path(output) / "rollouts.jsonl").open("a", encoding="utf-8") as file:
        for group in groups:
            for rollout in group.rollouts:
                line = {
                    "step": step,
                    "group": group.number,
                    "task": rollout.task.id,
                    "messages": rollout.messages,
                    "reward": rollout.reward,
                    "figures": rollout.figures,
                    "tokens": rollout.length,
                    "versions": sorted({v for v in rollout.versions if v >= 0}),
                    "truncated": rollout.truncated,
                    "failure": rollout.failure,
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    shown = [
        f"reward {rollout.reward}  \n"
        + "  \n".join(f"**{m['role']}**: {m['content']}" for m in rollout.messages)
        for rollout in itertools.islice(each(groups), 2)
    ]
    monitor.text("rollouts", "\n\n---\n\n".join(shown).replace("<", "&lt;"), step)


def each(groups: Sequence[Group]) -> Iterator[Rollout]:
    return (rollout for group in groups for rollout in group.rollouts)
