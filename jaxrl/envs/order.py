"""Which task comes next: every one once in each pass, in an order of its own."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from jaxrl.options import ConfigError


class TaskOrder:
    """Numbers groups 0, 1, 2, ... and says which of `count` tasks each is about."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed
        self._next, self._again = 0, []

    def take(self) -> tuple[int, int]:
        """(number, task's index) of the next group."""
        number = self._again.pop(0) if self._again else self._next
        self._next = max(self._next, number + 1)
        return number, self.index(number)

    def index(self, number: int) -> int:
        epoch, place = divmod(number, self.count)
        return int(np.random.default_rng((self.seed, epoch)).permutation(self.count)[place])

    def draw_seed(self, number: int) -> int:
        """What decides the rollouts of a group."""
        return int(np.random.SeedSequence((self.seed, 1, number)).generate_state(1)[0] >> 1)

    def get_state(self, in_flight: Collection[int] = ()) -> dict[str, Any]:
        """A JSON value; `in_flight`: numbers that were taken, and will be taken again."""
        again = sorted({*in_flight, *self._again})
        return {"next": self._next, "again": again, "count": self.count}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from there. Raises ConfigError where there are other tasks."""
        self.check(state)
        self._next, self._again = state["next"], list(state["again"])

    def check(self, state: Mapping[str, Any]) -> None:
        if state["count"] != self.count:
            raise ConfigError(
                f"the environment has {self.count} tasks, and had {state['count']} when the "
                "checkpoint was written; make it with the options it had"
            )
