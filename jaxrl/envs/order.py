"""Which task comes next: every one once in each pass, in an order of its own."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from jaxrl.envs.curriculum import Curriculum
from jaxrl.options import ConfigError


class TaskOrder:
    """Numbers groups 0, 1, 2, ... and says which of `count` tasks each is about; numbers that the
    curriculum skips are no group's."""

    def __init__(self, count: int, seed: int, curriculum: Curriculum | None = None):
        self.count, self.seed = count, seed
        self.curriculum = curriculum or Curriculum(seed)
        self._next, self._again = 0, []
        self._epoch, self._order = -1, np.empty(0, int)  # the pass last asked for

    def take(self) -> tuple[int, int]:
        """(number, task's index) of the next group."""
        if self._again:
            number = self._again.pop(0)
            return number, self.index(number)
        # Where all tasks are put aside, one is asked all the same.
        for number in range(self._next, self._next + 2 * self.count):  # a whole pass is among them
            if not self.curriculum.skips(number, self.index(number)):
                break
        else:
            number = self._next
        self._next = number + 1
        return number, self.index(number)

    def index(self, number: int) -> int:
        epoch, place = divmod(number, self.count)
        if epoch != self._epoch:
            rng = np.random.default_rng((self.seed, epoch))
            self._epoch, self._order = epoch, rng.permutation(self.count)
        return int(self._order[place])

    def draw_seed(self, number: int) -> int:
        """What decides the rollouts of a group."""
        return int(np.random.SeedSequence((self.seed, 1, number)).generate_state(1)[0] >> 1)

    def get_state(self, in_flight: Collection[int] = ()) -> dict[str, Any]:
        """A JSON value; `in_flight`: numbers that were taken, and will be taken again."""
        again = sorted({*in_flight, *self._again})
        place = {"next": self._next, "again": again, "count": self.count}
        return place | {"curriculum": self.curriculum.get_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from there. Raises ConfigError where there are other tasks."""
        self.check(state)
        self._next, self._again = state["next"], list(state["again"])
        self.curriculum.set_state(state["curriculum"])

    def check(self, state: Mapping[str, Any]) -> None:
        if state["count"] != self.count:
            raise ConfigError(
                f"the environment has {self.count} tasks, and had {state['count']} when the "
                "checkpoint was written; make it with the options it had"
            )
