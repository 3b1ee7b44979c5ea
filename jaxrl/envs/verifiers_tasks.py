"""Tasks of the `verifiers` package (MIT): any taskset that is installed."""

import asyncio
import importlib.util
import inspect
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from jaxrl.envs.protocol import Message, SingleTurn, Task
from jaxrl.options import ConfigError


class VerifiersTasks(SingleTurn):
    """The first `count` tasks of the taskset `taskset` (0: all), made with `config`.

    reward: the sum of its rewards by their weights; each of them, and its metrics, are figures. Of
    its tasks those are taken that a conversation answers: one that needs a container, tools, a
    picture or a running machine to be scored in is refused, as it would be here without them.
    """

    def __init__(self, *, taskset: str, count: int = 0, config: Mapping[str, Any] | None = None):
        if importlib.util.find_spec("verifiers") is None:
            raise ConfigError('verifiers is not installed: pip install "jaxrl[verifiers]"')
        from verifiers.v1.utils import loaders

        try:
            options = loaders.taskset_config_type(taskset)(id=taskset, **(config or {}))
            loaded = loaders.load_taskset(options)
            if not count and not loaded.bounded:
                raise ConfigError(f"the taskset {taskset!r} has no end; give count")
            self._tasks = list(itertools.islice(iter(loaded), count or None))
        except ConfigError:
            raise
        except Exception as error:  # of any kind: the package is not ours
            line = " ".join(str(error).split())[:300]
            raise ConfigError(f"the taskset {taskset!r} cannot be loaded: {line}") from error
        self._name = taskset
        for task in self._tasks[:1]:
            _check(task, loaded, taskset)

    def __len__(self) -> int:
        return len(self._tasks)

    def task(self, index: int) -> Task:
        data = self._tasks[index].data
        messages = [{"role": "system", "content": data.system_prompt}] if data.system_prompt else []
        if isinstance(data.prompt, str):
            messages.append({"role": "user", "content": data.prompt})
        else:
            messages += [_plain(message) for message in data.prompt or ()]
        return Task(f"{self._name}/{data.id or index}", tuple(messages), {"index": index})

    def score(self, task: Task, messages: Sequence[Message]) -> dict[str, float]:
        theirs = self._tasks[task.info["index"]]
        trace = _trace(theirs, messages, given=len(task.messages))
        asyncio.run(theirs.score(trace))
        figures = {name: float(value) for name, value in trace.metrics.items() if value is not None}
        figures |= {
            f"reward/{name}": float(reward.value)
            for name, reward in trace.rewards.items()
            if reward is not None
        }
        return figures | {"reward": float(trace.reward)}


def _check(task: Any, taskset: Any, name: str) -> None:
    """Raises ConfigError where a conversation alone does not answer the tasks."""

    def needs_runtime(function: Any) -> bool:
        found = inspect.signature(function).parameters.get("runtime")
        return found is not None and found.default is inspect.Parameter.empty

    needs = []
    if type(task).NEEDS_CONTAINER or task.data.image:
        needs.append("a container")
    if task.toolsets(task.config) or taskset.toolsets(taskset.config):
        needs.append("tools")
    signals = [*task.hooks("reward"), *task.hooks("metric")]
    if any(map(needs_runtime, [*signals, *(judge.score for judge in task.plugged_judges())])):
        needs.append("a runtime to be scored in")
    if task.data.prompt is None:
        needs.append("somebody who begins the conversation")
    if needs:
        raise ConfigError(
            f"the taskset {name!r} needs {' and '.join(needs)}; jaxrl takes tasks that one turn of "
            "the model answers"
        )


def _plain(message: Any) -> Message:
    from verifiers.v1.types import content_text

    if getattr(message, "tool_calls", None):
        raise ConfigError("a prompt with calls of tools is not taken")
    return {"role": message.role, "content": content_text(message.content)}


def _trace(task: Any, messages: Sequence[Message], given: int) -> Any:
    """The conversation as its rewards look at it; the first `given` messages are the task's."""
    import verifiers.v1 as vf
    from verifiers.v1.state import state_cls
    from verifiers.v1.trace import AgentInfo, Trace, TraceTask

    kinds = {"system": vf.SystemMessage, "user": vf.UserMessage, "assistant": vf.AssistantMessage}
    nodes = [
        vf.MessageNode(
            parent=i - 1 if i else None,
            message=kinds[message["role"]](content=message["content"]),
            sampled=i >= given and message["role"] == "assistant",
        )
        for i, message in enumerate(messages)
    ]
    return Trace(
        task=TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash),
        agent=AgentInfo(config=vf.AgentConfig()),
        nodes=nodes,
        state=state_cls(type(task))(),
        is_completed=True,
        ok=True,
    )
