"""Groups drawn in turns with a trainer, and beside it: what is in flight, and whose weights."""

import threading

import pytest

from jaxrl.envs.curriculum import Curriculum
from jaxrl.envs.order import TaskOrder
from jaxrl.envs.protocol import Task
from jaxrl.rollout.generation import InTurns, Overlapped
from jaxrl.rollout.rollouts import Group, Rollout


class Tasks:
    """fails: indices of tasks that raise."""

    def __init__(self, fails=()):
        self.fails = fails

    def __len__(self):
        return 100

    def task(self, index):
        if index in self.fails:
            raise OSError("no data")
        return Task(str(index), ())


class Engine:
    def prepare(self, weights, version):
        return weights.upper()

    def set_weights(self, weights, version):
        self.weights, self.version = weights, version


class Collector:
    """Each poll finishes the group that began first, with the engine's weights."""

    def __init__(self, refuses=()):
        self.engine, self.refuses = Engine(), refuses
        self.in_flight, self.done, self.most = {}, [], 0
        self.polling = threading.Lock()

    def start(self, number, task, seed=None):
        group = Group(number, [Rollout(task)])
        if number in self.refuses:
            self.done.append(group)
        else:
            self.in_flight[number] = group
        self.most = max(self.most, len(self.in_flight))

    def refuse(self, number, task, failure):
        self.done.append(Group(number, [Rollout(task, failure=failure)]))

    def poll(self):
        assert self.polling.acquire(blocking=False), "two threads poll"
        found, self.done = self.done, []
        if self.in_flight:
            number = min(self.in_flight)
            group = self.in_flight.pop(number)
            if number == 66:
                raise OSError("broken")
            group.rollouts[0].versions = [self.engine.version]
            group.rollouts[0].logprobs = [self.engine.weights]
            found.append(group)
        self.polling.release()
        return found


def test_in_turns_no_more_is_begun_than_is_wanted():
    collector = Collector()
    generation = InTurns(collector, Tasks(), TaskOrder(100, 0))
    generation.set_weights("w", 3)
    assert [group.number for group in generation.take(4)] == [0]
    assert sorted(collector.in_flight) == [1, 2, 3]
    state = generation.place([0])
    assert (state["next"], state["again"]) == (4, [0, 1, 2, 3])
    assert [group.number for group in generation.take(1)] == [1]
    assert generation.place()["again"] == [2, 3] and collector.most == 4
    assert generation.seconds > 0


def test_tasks_that_are_refused_come_back_too():
    generation = InTurns(Collector(refuses=range(8)), Tasks(), TaskOrder(100, 0))
    generation.set_weights("w", 0)
    assert [group.number for group in generation.take(4)] == [0, 1, 2, 3]


def some(generation, count):
    found = []
    while len(found) < count:
        found += generation.take(count)
    return found


def test_beside_the_trainer_so_many_are_ahead_and_the_newest_weights_draw():
    collector = Collector()
    order = TaskOrder(100, 0)
    made = Overlapped(collector, Tasks(), order, ahead=5)
    with made as generation:
        generation.set_weights("a", 0)
        some(generation, 3)
        with generation.paused():  # nobody polls now
            begun = generation.place()
            assert len(begun["again"]) <= 5 and collector.polling.acquire(blocking=False)
            collector.polling.release()
        generation.set_weights("b", 1)
        groups = some(generation, 20)
        drawn = [(g.rollouts[0].logprobs[0], g.rollouts[0].versions[0]) for g in groups]
        assert drawn[-1] == ("B", 1) and set(drawn) <= {("A", 0), ("B", 1)}
        assert drawn == sorted(drawn) and collector.most <= 5
    state = generation.place()
    assert state["next"] - len(state["again"]) == 3 + len(groups)
    assert not generation._thread.is_alive()


def made(overlaps, *args):
    return Overlapped(*args, ahead=5) if overlaps else InTurns(*args)


@pytest.mark.parametrize("overlaps", [False, True])
def test_a_task_that_raises_is_a_failed_group_and_the_others_go_on(overlaps):
    with made(
        overlaps, Collector(), Tasks(fails=range(0, 100, 2)), TaskOrder(100, 0)
    ) as generation:
        generation.set_weights("a", 0)
        groups = some(generation, 40)
        begun = generation.place()
    failed = {g.number for g in groups if g.rollouts[0].failure == "task: OSError: no data"}
    assert failed == {g.number for g in groups if generation.order.index(g.number) % 2 == 0}
    assert all(g.rollouts[0].versions == [0] for g in groups if g.number not in failed)
    assert 0 < len(failed) < len(groups) == begun["next"] - len(begun["again"])


def test_tasks_that_are_put_aside_are_counted():
    order = TaskOrder(100, 0, Curriculum(0, easy=0.9, hard=0.0))
    generation = InTurns(Collector(), Tasks(), order)
    generation.set_weights("w", 0)
    for group in some(generation, 6):
        generation.record(group.number, [1.0, 0.5, 0.0][group.number % 3])
    assert generation.curriculum_figures() == {"curriculum/easy": 2.0, "curriculum/hard": 2.0}


def test_a_thread_that_fails_fails_the_run():
    with Overlapped(Collector(), Tasks(), TaskOrder(100, 0), ahead=2) as generation:
        generation.set_weights("a", 0)
        with pytest.raises(OSError, match="broken"):
            some(generation, 80)


def test_beside_the_trainer_no_more_is_handed_out_than_is_wanted():
    """What arrived with it is not lost, and begins again where the run ends before it is taken."""
    collector = Collector(refuses=range(3))  # a poll finishes these three and another
    with Overlapped(collector, Tasks(), TaskOrder(100, 0), ahead=4) as generation:
        generation.set_weights("a", 0)
        found = []
        while len(found) < 2:
            taken = generation.take(2 - len(found))
            assert len(taken) <= 2 - len(found)
            found += taken
        with generation.paused():
            again = generation.place()["again"]
        assert {g.number for g in found} == {0, 1} and 2 in again and not {0, 1} & set(again)
        assert [g.number for g in some(generation, 1)] == [2]
