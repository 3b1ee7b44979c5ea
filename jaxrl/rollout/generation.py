"""Groups of rollouts as a trainer takes them: in turns with its steps, or while it steps."""

import contextlib
import queue
import threading
import time
from collections.abc import Collection, Iterator
from typing import Any

from jaxrl.envs.messages import TaskFailed, take_task
from jaxrl.envs.order import TaskOrder
from jaxrl.envs.protocol import Environment, Task
from jaxrl.rollout.collector import Collector
from jaxrl.rollout.rollouts import Group


class InTurns:
    """Tasks are begun as groups are wanted, and drawn while the trainer waits."""

    overlaps = False

    def __init__(self, collector: Collector, environment: Environment, order: TaskOrder):
        self.collector, self.environment, self.order = collector, environment, order
        self.seconds = 0.0  # spent on drawing; reset by whoever reads it
        self._order_lock = threading.Lock()
        self._begun: set[int] = set()  # numbers that were not handed out yet

    def __enter__(self) -> "InTurns":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def set_weights(self, weights: Any, version: int) -> None:
        """Draw with these from now on."""
        self.collector.engine.set_weights(weights, version)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Meanwhile the engine is the caller's alone."""
        yield

    def take(self, wanted: int) -> list[Group]:
        """Groups that are finished now, after a while of drawing; `wanted`: how many are, of which
        as many tasks are in flight."""
        self._begin(wanted)
        groups = self._poll()
        self._handed_out(groups)
        return groups

    def place(self, also: Collection[int] = ()) -> dict[str, Any]:
        """Where the run is among its tasks. Those in flight, and the numbers `also`, will be begun
        again."""
        with self._order_lock:
            return self.order.get_state({*self._begun, *also})

    def record(self, number: int, mean: float) -> None:
        """Tell the curriculum of a group's mean reward."""
        with self._order_lock:
            self.order.curriculum.record(self.order.index(number), mean)

    def curriculum_figures(self) -> dict[str, float]:
        """How many tasks it has put aside, as metrics."""
        with self._order_lock:
            return self.order.curriculum.figures()

    def close(self) -> None:
        """Nothing is drawn any more."""

    def _begin(self, wanted: int) -> None:
        # Not until so many are in flight: those whose prompts are refused never are.
        for _ in range(wanted - len(self.collector.in_flight)):
            with self._order_lock:
                number, index = self.order.take()
                self._begun.add(number)
            try:
                task = take_task(self.environment, index)
            except TaskFailed as error:
                self.collector.refuse(number, Task(f"task {index}", ()), f"task: {error}")
            else:
                self.collector.start(number, task, self.order.draw_seed(number))

    def _poll(self) -> list[Group]:
        began = time.perf_counter()
        groups = self.collector.poll()
        self.seconds += time.perf_counter() - began
        return groups

    def _handed_out(self, groups: Collection[Group]) -> None:
        with self._order_lock:
            self._begun -= {group.number for group in groups}


class Overlapped(InTurns):
    """A thread draws all the time; new weights are taken up between two calls of the engine.

    ahead: groups that are in flight or wait to be taken, at most. A thread that fails does so in
    `take`.
    """

    overlaps = True

    def __init__(
        self,
        collector: Collector,
        environment: Environment,
        order: TaskOrder,
        *,
        ahead: int,
    ):
        super().__init__(collector, environment, order)
        self.ahead = ahead
        self._groups: queue.Queue[list[Group]] = queue.Queue()
        self._left: list[Group] = []  # that more arrived than were wanted
        self._weights: queue.Queue[tuple[Any, int]] = queue.Queue()
        self._engine_lock = threading.Lock()
        # A thread that takes a lock again at once would leave it to nobody.
        self._pauses, self._ends = threading.Event(), threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="rollouts", daemon=True)

    def set_weights(self, weights: Any, version: int) -> None:
        # Here, not in the thread: the trainer gives its arrays away.
        self._weights.put((self.collector.engine.prepare(weights, version), version))
        if self._thread.ident is None:
            self._thread.start()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self._pauses.set()
        try:
            with self._engine_lock:
                self._take_up_weights()
                yield
        finally:
            self._pauses.clear()

    def take(self, wanted: int) -> list[Group]:
        if not self._left:
            with contextlib.suppress(queue.Empty):
                self._left = self._groups.get(timeout=0.2)
        if self._failure is not None:
            raise self._failure
        groups, self._left = self._left[:wanted], self._left[wanted:]
        self._handed_out(groups)
        return groups

    def close(self) -> None:
        self._ends.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _work(self) -> None:
        try:
            while not self._ends.is_set():
                with self._engine_lock:
                    groups = self._draw()
                while self._pauses.is_set() and not self._ends.wait(0.001):
                    pass
                if groups:
                    self._groups.put(groups)
                elif not self.collector.in_flight:
                    self._ends.wait(0.01)
        except BaseException as error:  # of any kind: the trainer's thread is to know
            self._failure = error

    def _draw(self) -> list[Group]:
        self._take_up_weights()
        with self._order_lock:
            waiting = len(self._begun) - len(self.collector.in_flight)
        self._begin(self.ahead - waiting)
        return self._poll()

    def _take_up_weights(self) -> None:
        newest = None
        while not self._weights.empty():
            newest = self._weights.get()
        if newest is not None:
            super().set_weights(*newest)
