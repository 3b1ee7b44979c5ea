"""One conversation of the model about a task, as training sees it."""

import collections
import dataclasses
import itertools
from typing import Any

from jaxrl.envs.protocol import Message, Task


@dataclasses.dataclass
class Rollout:
    """tokens: prompt, turns and replies, in order. drawn: which of them the model drew; logprobs
    and versions of those (0 and -1 of the others). by_version: how many tokens each version drew.
    truncated: its last turn was cut off by a limit. failure: why it has no reward."""

    task: Task
    tokens: list[int] = dataclasses.field(default_factory=list)
    drawn: list[bool] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    versions: list[int] = dataclasses.field(default_factory=list)
    by_version: dict[int, int] = dataclasses.field(default_factory=collections.Counter)
    messages: list[Message] = dataclasses.field(default_factory=list)
    truncated: bool = False
    reward: float | None = None
    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    failure: str | None = None

    def say(self, tokens: list[int]) -> None:
        """Add what others than the model say."""
        self._add(tokens, False, [0.0] * len(tokens), [-1] * len(tokens))

    def draw(self, tokens: list[int], logprobs: list[float], versions: list[int]) -> None:
        """Add a turn of the model."""
        self._add(tokens, True, logprobs, versions)
        for version in versions:
            self.by_version[version] += 1

    def forget(self) -> None:
        """Drop tokens and words; what figures are made of stays."""
        self.tokens, self.drawn, self.logprobs, self.versions, self.messages = [], [], [], [], []

    def _add(self, tokens, drawn: bool, logprobs, versions) -> None:
        self.tokens += tokens
        self.drawn += [drawn] * len(tokens)
        self.logprobs += logprobs
        self.versions += versions

    @property
    def length(self) -> int:
        """Tokens that the model drew."""
        return sum(self.by_version.values())

    @property
    def turns(self) -> list[tuple[int, int]]:
        """(first token, number of tokens) of each of the model's turns."""
        found, place = [], 0
        for drawn, run in itertools.groupby(self.drawn):
            count = len(list(run))
            if drawn:
                found.append((place, count))
            place += count
        return found

    @property
    def plain(self) -> dict[str, Any]:
        """As JSON takes it, without the task and what was said: all that training needs."""
        left_out = ("task", "messages", "by_version")
        return {k: v for k, v in vars(self).items() if k not in left_out} | {"id": self.task.id}

    @classmethod
    def of_plain(cls, values: dict[str, Any]) -> "Rollout":
        rest = {k: v for k, v in values.items() if k != "id"}
        return cls(Task(values["id"], ()), **rest)


@dataclasses.dataclass
class Group:
    """The rollouts of one task. `number`: which of the run's groups it is."""

    number: int
    rollouts: list[Rollout]

    @property
    def scored(self) -> list[Rollout]:
        return [rollout for rollout in self.rollouts if rollout.reward is not None]

    @property
    def rewards(self) -> list[float]:
        """Of those that have one."""
        return [rollout.reward for rollout in self.rollouts if rollout.reward is not None]
