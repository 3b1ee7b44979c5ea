"""Find a number between two others in a few guesses: a game of several turns."""

import random
import re
from collections.abc import Sequence

from jaxrl.envs.protocol import Message, Task, last_turn
from jaxrl.options import ConfigError


class GuessNumber:
    """`count` games, drawn from `seed`: a number from 1 to `high`, and `guesses` to find it.

    reward: 1 for the first guess, falling linearly to 1 / guesses for the last one; 0 where it was
    not found. A turn's guess is its last whole number; one without a number costs a guess. Metrics
    `found`, `turns`.
    """

    def __init__(self, *, count: int = 2000, high: int = 20, guesses: int = 5, seed: int = 0):
        if high < 1 or guesses < 1:
            raise ConfigError(f"high is {high} and guesses {guesses}; both take 1 and more")
        self._count, self._high, self._guesses, self._seed = count, high, guesses, seed

    def __len__(self) -> int:
        return self._count

    def task(self, index: int) -> Task:
        number = random.Random(f"{self._seed} {index}").randint(1, self._high)
        ask = (
            f"I think of a whole number from 1 to {self._high}. Find it in at most "
            f"{self._guesses} guesses. Say one number; I answer higher or lower."
        )
        name = f"guess_number/{self._seed}/{index}"
        return Task(name, ({"role": "user", "content": ask},), {"number": number})

    def reply(self, task: Task, messages: Sequence[Message]) -> Sequence[Message]:
        number, guess = task.info["number"], _guess(last_turn(messages))
        if guess == number or _turns(messages) >= self._guesses:
            return ()
        if guess is None:
            answer = "That is no number."
        else:
            answer = "Higher." if number > guess else "Lower."
        return ({"role": "user", "content": answer},)

    def score(self, task: Task, messages: Sequence[Message]) -> dict[str, float]:
        turns = _turns(messages)
        found = _guess(last_turn(messages)) == task.info["number"]
        reward = (self._guesses - turns + 1) / self._guesses if found else 0.0
        return {"reward": reward, "found": float(found), "turns": float(turns)}


def _turns(messages: Sequence[Message]) -> int:
    return sum(m["role"] == "assistant" for m in messages)


def _guess(text: str) -> int | None:
    numbers = re.findall(r"\d+", text)
    return int(numbers[-1]) if numbers and len(numbers[-1]) < 10 else None
