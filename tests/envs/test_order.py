"""The order of tasks: every one once in a pass, in flight ones again, easy and hard ones less."""

import collections
import json

import pytest

from jaxrl.envs.curriculum import Curriculum
from jaxrl.envs.order import TaskOrder
from jaxrl.options import ConfigError


def taken(order, count):
    return [order.take() for _ in range(count)]


def test_each_pass_has_every_task_once_in_an_order_of_its_own():
    order = TaskOrder(10, seed=1)
    first, second = taken(order, 10), taken(order, 10)
    for part, begin in ((first, 0), (second, 10)):
        assert [number for number, _ in part] == list(range(begin, begin + 10))
        assert sorted(index for _, index in part) == list(range(10))
    assert [i for _, i in first] != [i for _, i in second]
    assert [i for _, i in taken(TaskOrder(10, seed=2), 10)] != [i for _, i in first]
    seeds = [order.draw_seed(number) for number in range(20)]
    assert len(set(seeds)) == 20 and TaskOrder(10, seed=1).draw_seed(3) == seeds[3]


def test_a_resumed_order_begins_what_was_in_flight_again():
    order = TaskOrder(10, seed=1)
    begun = taken(order, 6)
    state = json.loads(json.dumps(order.get_state([2, 4])))
    again = TaskOrder(10, seed=1)
    again.set_state(state)
    rest = taken(again, 4)
    assert [rest[0], rest[1]] == [begun[2], begun[4]] and [n for n, _ in rest[2:]] == [6, 7]
    with pytest.raises(ConfigError, match="the environment has 11 tasks, and had 10"):
        TaskOrder(11, seed=1).set_state(state)


def curriculum(**options):
    return Curriculum(3, **options)


def test_easy_and_hard_tasks_are_left_out():
    order = TaskOrder(8, 0, curriculum(easy=0.9, hard=0.0))
    for index, mean in enumerate([1.0, 0.95, 0.5, 0.0, 0.1, 0.5, 0.5, 0.5]):
        order.curriculum.record(index, mean)
    assert {index for _, index in taken(order, 40)} == {2, 4, 5, 6, 7}
    assert (order.curriculum.size("easy"), order.curriculum.size("hard")) == (2, 1)
    assert order.curriculum.figures() == {"curriculum/easy": 2.0, "curriculum/hard": 1.0}
    assert curriculum(hard=0.0).figures() == {"curriculum/hard": 0.0}
    assert curriculum().figures() == {}
    order.curriculum.record(3, 0.4)  # it is solved at times now
    assert 3 in {index for _, index in taken(order, 12)}


def test_a_share_of_their_turns_is_kept():
    order = TaskOrder(4, 0, curriculum(easy=1.0, easy_share=0.25))
    order.curriculum.record(0, 1.0)
    counts = collections.Counter(index for _, index in taken(order, 3000))
    assert 0.17 < counts[0] / counts[1] < 0.33


def test_while_one_is_left_no_other_is_asked():
    order = TaskOrder(6, 0, curriculum(easy=0.5))
    for index in range(5):
        order.curriculum.record(index, 1.0)
    assert {index for _, index in taken(order, 30)} == {5}


def test_where_all_are_put_aside_they_are_asked_all_the_same():
    order = TaskOrder(3, 0, curriculum(easy=0.5))
    for index in range(3):
        order.curriculum.record(index, 1.0)
    assert len(taken(order, 7)) == 7


def test_a_resumed_curriculum_goes_on_as_it_was():
    def made():
        return TaskOrder(8, 0, curriculum(easy=0.9, hard=0.0, hard_share=0.5))

    order = made()
    taken(order, 5)
    for index, mean in enumerate([1.0, 0.5, 0.0, 0.0]):
        order.curriculum.record(index, mean)
    again = made()
    again.set_state(json.loads(json.dumps(order.get_state())))
    assert taken(again, 30) == taken(order, 30)
