"""What an RL run tells of its rollouts: figures, counts, and the rollouts themselves."""

import collections
import json
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from jaxrl.cli import writing
from jaxrl.monitor import Monitor
from jaxrl.rollout.rollouts import Group, Rollout


def statistics(groups: Sequence[Group], version: int) -> dict[str, float]:
    """Of all rollouts of a step: rewards, lengths, how old, how hard the tasks were. version: of
    the weights that learn from them."""
    rollouts = list(each(groups))
    scored = [r for r in rollouts if r.reward is not None]
    rewards = np.array([reward for g in groups for reward in g.rewards] or [0.0])
    means = [np.mean(g.rewards) for g in groups if g.rewards]
    spreads = [np.std(g.rewards) for g in groups if g.rewards]
    ages = collections.Counter[int]()
    for rollout in scored:
        ages.update({version - v: count for v, count in rollout.by_version.items()})
    values = {
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "group_reward_min": float(min(means, default=0.0)),
        "group_reward_max": float(max(means, default=0.0)),
        "group_reward_std": float(np.mean(spreads)) if spreads else 0.0,
        "staleness": sum(age * n for age, n in ages.items()) / max(ages.total(), 1),
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
    """How many rollouts failed at what: "task", "prompt", "turn", "reply", "reward"."""
    return collections.Counter(r.failure.partition(":")[0] for r in each(groups) if r.failure)


def trace(output: str, group: Group, step: int) -> None:
    """Every rollout of a group as a line of rollouts.jsonl. Raises OutputError where it cannot be
    written."""
    lines = [
        {
            "step": step,
            "group": group.number,
            "task": rollout.task.id,
            "messages": rollout.messages,
            "reward": rollout.reward,
            "figures": rollout.figures,
            "tokens": rollout.length,
            "versions": sorted(rollout.by_version),
            "truncated": rollout.truncated,
            "failure": rollout.failure,
        }
        for rollout in group.rollouts
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    file = pathlib.Path(output) / "rollouts.jsonl"
    with (
        writing(file),
        file.open("a", encoding="utf-8", errors="backslashreplace") as appended,
    ):
        appended.write(text)


def show(monitor: Monitor, rollouts: Sequence[Rollout], step: int) -> None:
    """A few rollouts as TensorBoard text."""
    shown = [
        f"reward {rollout.reward}  \n"
        + "  \n".join(f"**{m['role']}**: {m.get('content')}" for m in rollout.messages)
        for rollout in rollouts
    ]
    monitor.text("rollouts", "\n\n---\n\n".join(shown).replace("<", "&lt;"), step)


def each(groups: Sequence[Group]) -> Iterator[Rollout]:
    return (rollout for group in groups for rollout in group.rollouts)
