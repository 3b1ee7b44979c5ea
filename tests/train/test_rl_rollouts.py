"""Which tasks are held out."""

import pytest

from jaxrl.envs.protocol import SingleTurn, Task
from jaxrl.train.rl_rollouts import held_out_tasks


class Numbers(SingleTurn):
    """Asks these numbers, each with its place in `info`."""

    def __init__(self, *numbers, answer=0):
        self.numbers, self.answer = numbers, answer

    def __len__(self):
        return len(self.numbers)

    def task(self, index):
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
