"""Which tasks are held out, and what is told of them."""

import pytest

from jaxrl.envs.protocol import SingleTurn, Task
from jaxrl.options import ConfigError
from jaxrl.rollout.rollouts import Group, Rollout
from jaxrl.train.rl_rollouts import Evaluation, held_out_tasks


class Numbers(SingleTurn):
    """Asks these numbers, each with its place in `info`."""

    def __init__(self, *numbers, answer=0):
        self.numbers, self.answer = numbers, answer

    def __len__(self):
        return len(self.numbers)

    def task(self, index):
        if self.numbers[index] is None:
            raise ZeroDivisionError
        message = {"role": "user", "content": str(self.numbers[index])}
        return Task(f"{index}", (message,), {"index": index, "answer": self.answer})


@pytest.mark.parametrize(
    ("wanted", "asked", "seen"), [(2, "57", 0), (3, "579", 0), (4, "5791", 1), (5, "57912", 2)]
)
def test_tasks_that_training_has_come_last_and_are_counted(wanted, asked, seen):
    training = Numbers(1, 2, 3)
    tasks, count = held_out_tasks(Numbers(1, 5, 2, 7, 9), training, wanted)
    assert ("".join(task.messages[0]["content"] for task in tasks), count) == (asked, seen)


def test_the_same_words_with_another_answer_are_another_task():
    assert held_out_tasks(Numbers(1, answer=4), Numbers(1), 1)[1] == 0
    assert held_out_tasks(Numbers(1), Numbers(2, 1), 1)[1] == 1


def test_tasks_that_cannot_be_asked_are_told_of_where_they_are_held_out():
    assert held_out_tasks(Numbers(1), Numbers(2, None), 1)[1] == 0
    with pytest.raises(ConfigError, match=r"held-out task 1: ZeroDivisionError"):
        held_out_tasks(Numbers(1, None), Numbers(2), 2)


class Scored:
    """A collector whose rollouts have these rewards."""

    def __init__(self, *rewards):
        self.rewards = rewards

    def collect(self, tasks, numbers):
        assert len(tasks) == len(self.rewards)
        return [
            Group(n, [Rollout(tasks[n], reward=r, failure=None if r is not None else "turn: x")
                      for r in self.rewards[n]])
            for n in numbers
        ]  # fmt: skip


def test_figures_of_an_evaluation():
    collector = Scored((1.0, 0.5, 0.0), (0.0, 0.25, None), (1.0, 1.0, 1.0), (0.5, 0.5, 0.5))
    tasks = [Numbers(1, 2, 3, 4).task(i) for i in range(4)]
    found = Evaluation(tasks, 1, collector, solved=1.0)()  # type: ignore[arg-type]
    assert found == {
        "eval/reward_mean": pytest.approx((1.5 + 0.25 + 3 + 1.5) / 12),
        "eval/pass@1": pytest.approx(4 / 12),
        "eval/pass@3": pytest.approx(2 / 4),
        "eval/length_mean": 0.0,
        "eval/failed": 1.0,
        "eval/seen": 1.0,
    }
