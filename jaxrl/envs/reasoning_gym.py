"""Tasks of reasoning-gym (Apache-2.0): a hundred generators, each with its own verifier."""

import importlib.util
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from jaxrl.envs.protocol import Message, SingleTurn, Task, last_turn
from jaxrl.options import ConfigError

ASK = "Put your final answer between <answer> and </answer>."


class ReasoningGym(SingleTurn):
    """`count` tasks of the generator `dataset`, drawn from `seed`; `options` are the generator's.

    reward: what its verifier gives, 0 to 1. The answer is what stands between <answer> and
    </answer>, which the prompt asks for; with `tags` False it is the turn's last number, or the
    whole turn where there is none. Metric `answered`: whether there was one.
    """

    def __init__(
        self,
        *,
        dataset: str,
        count: int = 2000,
        seed: int = 0,
        tags: bool = True,
        options: Mapping[str, Any] | None = None,
    ):
        if importlib.util.find_spec("reasoning_gym") is None:
            raise ConfigError("reasoning_gym is not installed: pip install reasoning-gym")
        with warnings.catch_warnings():  # of a package that it imports
            warnings.simplefilter("ignore", SyntaxWarning)
            import reasoning_gym
            from reasoning_gym.factory import DATASETS
        if dataset not in DATASETS:
            raise ConfigError(f"reasoning_gym has no {dataset!r}; it has {', '.join(DATASETS)}")
        self._name, self._seed, self._tags = dataset, seed, tags
        try:
            self._items = reasoning_gym.create_dataset(
                dataset, size=count, seed=seed, **(options or {})
            )
        except (TypeError, AssertionError) as error:
            raise ConfigError(
                f"reasoning_gym's {dataset} does not take {options}: {error}"
            ) from None

    def __len__(self) -> int:
        return len(self._items)

    def task(self, index: int) -> Task:
        item = self._items[index]
        ask = f"{item['question']}\n{ASK}" if self._tags else item["question"]
        name = f"{self._name}/{self._seed}/{index}"
        info = {"index": index, "answer": item["answer"]}
        return Task(name, ({"role": "user", "content": ask},), info)

    def score(self, task: Task, messages: Sequence[Message]) -> dict[str, float]:
        said = self._answer(last_turn(messages))
        reward = self._items.score_answer(said, self._items[task.info["index"]])
        return {"reward": float(reward), "answered": float(said is not None)}

    def _answer(self, turn: str) -> str | None:
        if self._tags:
            found = re.findall(r"<answer>(.*?)</answer>", turn, re.DOTALL)
            return found[-1].strip() if found else None
        numbers = re.findall(r"-?\d+(?:\.\d+)?", turn)
        return numbers[-1] if numbers else turn.strip() or None
