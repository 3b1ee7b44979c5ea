"""Tasks that teach nothing, because the model always or never solves them, asked less often."""

from collections.abc import Mapping
from typing import Any

import numpy as np


class Curriculum:
    """Which tasks are put aside as easy or hard, by the mean reward of their last group.

    easy, hard: a mean of at least `easy`, or at most `hard`, puts a task aside (None: none).
    easy_share, hard_share: of the times at which such a task would be next, when it is.
    """

    def __init__(
        self,
        seed: int,
        *,
        easy: float | None = None,
        hard: float | None = None,
        easy_share: float = 0.0,
        hard_share: float = 0.0,
    ):
        self.seed, self.easy, self.hard = seed, easy, hard
        self._shares = {"easy": easy_share, "hard": hard_share}
        self._pools: dict[int, str] = {}

    def record(self, index: int, mean: float) -> None:
        """The task's rollouts had this mean reward."""
        self._pools.pop(index, None)
        if self.easy is not None and mean >= self.easy:
            self._pools[index] = "easy"
        elif self.hard is not None and mean <= self.hard:
            self._pools[index] = "hard"

    def skips(self, number: int, index: int) -> bool:
        """Whether group `number`, which would be about this task, is left out; decided by the seed
        and the number."""
        pool = self._pools.get(index)
        if pool is None:
            return False
        drawn = np.random.default_rng((self.seed, 2, number)).random()
        return bool(drawn >= self._shares[pool])

    def size(self, pool: str) -> int:
        """Tasks that are "easy", or "hard"."""
        return sum(found == pool for found in self._pools.values())

    def figures(self) -> dict[str, float]:
        """How many tasks are put aside: `curriculum/easy`, `curriculum/hard`, of those in use."""
        limits = {"easy": self.easy, "hard": self.hard}
        used = [pool for pool, limit in limits.items() if limit is not None]
        return {f"curriculum/{pool}": float(self.size(pool)) for pool in used}

    def get_state(self) -> dict[str, Any]:
        """A JSON value."""
        pools = self._pools.items()
        return {name: sorted(i for i, pool in pools if pool == name) for name in self._shares}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self._pools = {i: name for name in self._shares for i in state[name]}
