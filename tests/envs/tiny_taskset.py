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
            kind |= {"tools": WithTools, "server": WithServer, "broken": WithBroken}
            data = SumData(prompt=f"{a} + 1?", system_prompt="Add.", answer=a + 1)
            yield kind[self.config.needs](data, self.config.task)


class NeedsRuntime(SumTask):
    @vf.reward
    async def runs(self, runtime) -> float:
        return 1.0


class NeedsContainer(SumTask):
    NEEDS_CONTAINER = True


class Uses(vf.State):
    total: int = 0


class SumTools(vf.Toolset[vf.ToolsetConfig, Uses]):
    async def setup_task(self, task):
        self.right = task.answer

    @vf.tool
    async def add(self, a: int, b: int = 1) -> str:
        """The sum of two numbers."""
        self.state.total += 1
        return f"{a + b}, use {self.state.total}"

    @vf.tool
    async def peek(self) -> str:
        """The right answer."""
        return str(self.right)


class WithTools(vf.Task[SumData, Uses]):
    @classmethod
    def toolsets(cls, config):
        return [SumTools(vf.ToolsetConfig())]

    @vf.reward
    async def right(self, task, trace) -> float:
        return float(trace.last_reply == str(task.answer))

    @vf.metric
    async def uses(self, trace) -> float:
        return float(trace.state.total)

    @vf.metric
    async def answers(self, trace) -> float:
        return float(sum(node.message.role == "tool" for node in trace.nodes))


class WithServer(WithTools):
    @classmethod
    def toolsets(cls, config):
        return [SumTools(vf.ToolsetConfig(url="http://127.0.0.1:1"))]


class Broken(SumTools):
    async def setup(self):
        raise OSError("no index")


class WithBroken(WithTools):
    @classmethod
    def toolsets(cls, config):
        return [Broken(vf.ToolsetConfig())]


__all__ = ["Sums"]
