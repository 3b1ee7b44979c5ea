"""What environments give, held to what chat templates, files and other processes take."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

from jaxrl.envs.protocol import Environment, Task


class TaskFailed(Exception):
    """A task that cannot be asked; the message is why, in a line."""


def take_task(environment: Environment, index: int) -> Task:
    """The environment's task. Raises TaskFailed for one that raises, or cannot be written down."""
    try:
        task = environment.task(index)
        if not isinstance(task, Task):
            raise TypeError(f"it is {task!r}, no Task")
        messages = tuple(checked_messages(task.messages))
        if not all(isinstance(tool, Mapping) for tool in task.tools):
            raise TypeError(f"its tools are {task.tools!r}, no JSON schemas")
        json_bytes([task.id, *map(dict, task.tools)])
    except Exception as error:  # of any kind: environments are the user's
        raise TaskFailed(line_of(error)) from error
    return dataclasses.replace(task, messages=messages)


def checked_messages(messages: Iterable[Any]) -> list[dict[str, Any]]:
    """The messages, as JSON has them. Raises ValueError or TypeError for one that is none: role and
    content are text, and content may be missing only where there are `tool_calls`."""
    found = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TypeError(f"message {i} is {message!r}, no mapping")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str):
            raise ValueError(f"message {i} has the role {role!r}, no text")
        if not isinstance(content, str) and (content is not None or not message.get("tool_calls")):
            raise ValueError(f"message {i} has the content {content!r}, no text")
        found.append({**message, "content": content})
    return json.loads(json_bytes(found))


def json_bytes(value: Any) -> bytes:
    """Raises ValueError or TypeError for what JSON, or UTF-8, does not know: NaN, half characters,
    objects."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()


def line_of(error: BaseException) -> str:
    """What was raised, in a line that can be written to a file."""
    line = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return line.encode(errors="replace").decode()
