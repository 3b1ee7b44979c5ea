"""Tasks of the `verifiers` package (MIT): any taskset that is installed."""

import asyncio
import importlib.util
import inspect
import itertools
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

from jaxrl.data.tool_calls import parse_tool_calls
from jaxrl.envs.protocol import Message, Task, last_turn
from jaxrl.envs.verifiers_tools import opened
from jaxrl.options import ConfigError


class VerifiersTasks:
    """The first `count` tasks of the taskset `taskset` (0: all), made with `config`.

    reward: the sum of its rewards by their weights; each of them, and its metrics, are figures.
    Tools are called where rewards are computed, as the model's turns ask for them; each time those
    of earlier turns are called again before, so they must do the same again. A taskset that needs
    a container, a picture, another model, or a running machine to be scored in is refused.
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
        self._name, self._taskset = taskset, loaded
        self._schemas: dict[type, tuple[Any, ...]] = {}  # of the tools of each kind of task
        for kind, task in {type(task): task for task in reversed(self._tasks)}.items():
            _check(task, loaded, taskset)
            try:
                self._schemas[kind] = _run(self._list_tools(task))
            except ConfigError:
                raise
            except Exception as error:  # of any kind, again
                line = " ".join(str(error).split())[:300]
                raise ConfigError(f"the tools of {taskset!r} cannot be set up: {line}") from error

    def __len__(self) -> int:
        return len(self._tasks)

    def task(self, index: int) -> Task:
        theirs = self._tasks[index]
        data = theirs.data
        messages = [{"role": "system", "content": data.system_prompt}] if data.system_prompt else []
        if isinstance(data.prompt, str):
            messages.append({"role": "user", "content": data.prompt})
        else:
            messages += [_plain(message) for message in data.prompt or ()]
        name = f"{self._name}/{data.id or index}"
        return Task(name, tuple(messages), {"index": index}, self._schemas[type(theirs)])

    def reply(self, task: Task, messages: Sequence[Message]) -> Sequence[Message]:
        """What the tools that the last turn calls return."""
        calls = parse_tool_calls(last_turn(messages), task.tools)[1]
        if not calls:
            return ()
        answers = _run(self._call(task, messages, self._state(task)))
        pairs = zip(calls, answers[-len(calls) :], strict=True)
        return [{"role": "tool", "name": c["name"], "content": text} for c, text in pairs]

    def score(self, task: Task, messages: Sequence[Message]) -> dict[str, float]:
        theirs, state = self._tasks[task.info["index"]], self._state(task)
        if task.tools:
            answered = [i for i, message in enumerate(messages) if message["role"] == "tool"]
            _run(self._call(task, messages[: max(answered, default=0)], state))
        trace = _trace(theirs, messages, task, state)
        _run(theirs.score(trace))
        figures = {name: float(value) for name, value in trace.metrics.items() if value is not None}
        figures |= {
            f"reward/{name}": float(reward.value)
            for name, reward in trace.rewards.items()
            if reward is not None
        }
        return figures | {"reward": float(trace.reward)}

    def _state(self, task: Task) -> Any:
        """What the tools and rewards of a rollout share, as it begins."""
        from verifiers.v1.state import state_cls

        return state_cls(type(self._tasks[task.info["index"]]))()

    async def _list_tools(self, theirs: Any) -> tuple[Any, ...]:
        from verifiers.v1.state import state_cls

        async with opened(theirs, self._taskset, state_cls(type(theirs))()) as tools:
            return tuple(tools.schemas.values())

    async def _call(self, task: Task, messages: Sequence[Message], state: Any) -> list[str]:
        """What the tools return that turns in `messages` call, in order; they change `state`."""
        said = [m["content"] for m in messages[len(task.messages) :] if m["role"] == "assistant"]
        theirs = self._tasks[task.info["index"]]
        async with opened(theirs, self._taskset, state) as tools:
            calls = [call for text in said for call in parse_tool_calls(text, task.tools)[1]]
            return [await tools.call(call) for call in calls]


def _run[T](what: Coroutine[Any, Any, T]) -> T:
    """Its result, from a loop of its own: notebooks have one that runs already."""
    with futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, what).result()


def _check(task: Any, taskset: Any, name: str) -> None:
    """Raises ConfigError where a conversation alone does not answer the tasks."""

    def needs_runtime(function: Any) -> bool:
        found = inspect.signature(function).parameters.get("runtime")
        return found is not None and found.default is inspect.Parameter.empty

    needs = []
    if type(task).NEEDS_CONTAINER or task.data.image:
        needs.append("a container")
    toolsets = [*task.toolsets(task.config), *taskset.toolsets(taskset.config)]
    if any(getattr(toolset.config, "url", None) for toolset in toolsets):
        needs.append("a server of tools")
    signals = [*task.hooks("reward"), *task.hooks("metric")]
    if any(map(needs_runtime, [*signals, *(judge.score for judge in task.plugged_judges())])):
        needs.append("a runtime to be scored in")
    if task.data.prompt is None:
        needs.append("somebody who begins the conversation")
    if needs:
        raise ConfigError(
            f"the taskset {name!r} needs {' and '.join(needs)}; jaxrl takes tasks that the model "
            "answers alone or with tools"
        )


def _plain(message: Any) -> Message:
    from verifiers.v1.types import content_text

    if getattr(message, "tool_calls", None):
        raise ConfigError("a prompt with calls of tools is not taken")
    return {"role": message.role, "content": content_text(message.content)}


def _trace(theirs: Any, messages: Sequence[Message], task: Task, state: Any) -> Any:
    """The conversation as its rewards look at it."""
    import verifiers.v1 as vf
    from verifiers.v1.trace import AgentInfo, Trace, TraceTask

    nodes = [
        vf.MessageNode(
            parent=i - 1 if i else None,
            message=message,
            sampled=i >= len(task.messages) and message.role == "assistant",
        )
        for i, message in enumerate(_typed(messages, task))
    ]
    return Trace(
        task=TraceTask(
            type=type(theirs).__name__, data=theirs.data, key=theirs.key, hash=theirs.hash
        ),
        agent=AgentInfo(config=vf.AgentConfig()),
        nodes=nodes,
        state=state,
        is_completed=True,
        ok=True,
    )


def _typed(messages: Sequence[Message], task: Task) -> Iterator[Any]:
    """The messages as verifiers has them: calls apart from what is said, answers by their ids."""
    import verifiers.v1 as vf

    open_calls: list[Any] = []
    for i, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if role == "system":
            yield vf.SystemMessage(content=content)
        elif role == "user":
            yield vf.UserMessage(content=content)
        elif role == "tool":
            call = open_calls.pop(0)
            yield vf.ToolMessage(tool_call_id=call.id, content=content, name=call.name)
        else:
            said, calls = parse_tool_calls(content, task.tools if i >= len(task.messages) else ())
            open_calls = [
                vf.ToolCall(id=f"{i}-{n}", name=call["name"], arguments=call["arguments"])
                for n, call in enumerate(calls)
            ]
            yield vf.AssistantMessage(content=said, tool_calls=list(open_calls) or None)
