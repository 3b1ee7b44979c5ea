"""A taskset of `verifiers`: sums, scored by what is said."""

import verifiers.v1 as vf


class SumData(vf.TaskData):
    answer: int


class SumTask(vf.Task[SumData]):
    @vf.reward(weight=2.0)
    async def right(self, task, trace) -> float:
        return float(trace.last_reply == str(task.answer))

    @vf.reward
    async def short(self, trace) -> float:
        return float(len(trace.last_reply) < 5)

    @vf.metric
    async def letters(self, trace) -> float:
        return float(len(trace.last_reply))


class SumsConfig(vf.TasksetConfig):
    high: int = 10
    needs: str = ""


class Sums(vf.Taskset[SumTask, SumsConfig]):
    def load(self):
        for a in range(self.config.high):
            kind = {"": SumTask, "runtime": NeedsRuntime, "container": NeedsContainer}
            data = SumData(prompt=f"{a} + 1?", system_prompt="Add.", answer=a + 1)
            yield kind[self.config.needs](data, self.config.task)


class NeedsRuntime(SumTask):
    @vf.reward
    async def runs(self, runtime) -> float:
        return 1.0


class NeedsContainer(SumTask):
    NEEDS_CONTAINER = True


__all__ = ["Sums"]
