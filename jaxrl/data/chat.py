"""A chat sample as data files hold it, checked: messages, tools, and which messages are trained."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxrl.options import ConfigError

ROLES = ("system", "user", "assistant", "tool")


class SampleError(ConfigError):
    """A sample that cannot be used: where it lies and what is wrong with it.

    `reason`, a word or two, is what such samples are counted under.
    """

    def __init__(self, where: str, reason: str, problem: str):
        super().__init__(f"{where}: {problem}" if where else problem)
        self.where, self.reason, self.problem = where, reason, problem

    def __reduce__(self):  # it crosses from workers' processes
        return SampleError, (self.where, self.reason, self.problem)


@dataclasses.dataclass(frozen=True)
class Conversation:
    """messages: dicts with `role` and `content`, as chat templates take them. trained: of each
    message, whether it may be trained (the roles that are is another matter). tools: JSON schemas
    of functions, or None."""

    messages: Sequence[Mapping[str, Any]]
    trained: Sequence[bool]
    tools: Sequence[Mapping[str, Any]] | None = None


@dataclasses.dataclass(frozen=True)
class PlainText:
    """A prompt, and the completion that is trained, in which no chat template has a part."""

    prompt: str
    completion: str


def parse_sample(sample: Mapping[str, Any], where: str = "") -> Conversation | PlainText:
    """The chat in a sample: `messages`, or `prompt` and `completion` (both texts, or both lists of
    messages, of which the completion's are trained); besides, `tools`.

    Messages have a role (system, user, assistant, tool) and content: text, or a list of text parts.
    `weight` 0 leaves a message untrained. Other keys (tool_calls, reasoning_content, name, ...) are
    handed to the chat template; those that are null are dropped. Keys of the sample that are not
    named here are not looked at. Raises SampleError.
    """

    def bad(problem: str, reason: str = "malformed") -> SampleError:
        return SampleError(where, reason, problem)

    tools = _tools(sample.get("tools"), bad)
    if sample.get("messages") is not None:
        messages = _messages(sample["messages"], "messages", bad)
        trained = [bool(message.pop("weight", 1)) for message in messages]
    elif sample.get("prompt") is not None and sample.get("completion") is not None:
        prompt, completion = sample["prompt"], sample["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            if tools:
                raise bad("tools need messages, and prompt and completion are texts")
            if not completion:
                raise bad("completion is empty", "empty")
            return PlainText(prompt, completion)
        if isinstance(prompt, str) or isinstance(completion, str):
            raise bad("prompt and completion are to be both texts or both lists of messages")
        before = _messages(prompt, "prompt", bad)
        after = _messages(completion, "completion", bad)
        messages = before + after
        trained = [False] * len(before) + [bool(m.get("weight", 1)) for m in after]
        for message in messages:
            message.pop("weight", None)
    else:
        keys = ", ".join(map(repr, sample)) or "nothing"
        raise bad(f"has {keys}; a sample has 'messages', or 'prompt' and 'completion'")
    return Conversation(messages, trained, tools)


def _messages(value: Any, key: str, bad) -> list[dict[str, Any]]:
    if not isinstance(value, (list, tuple)):
        raise bad(f"{key} is {_short(value)}; it is to be a list of messages")
    if not value:
        raise bad(f"{key} is empty", "empty")
    return [_message(message, f"{key}[{i}]", bad) for i, message in enumerate(value)]


def _message(value: Any, key: str, bad) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise bad(f"{key} is {_short(value)}; it is to be an object with role and content")
    message = {k: v for k, v in value.items() if v is not None}
    role = message.get("role")
    if role not in ROLES:
        raise bad(f"{key} has role {role!r}; one of {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        content = "".join(_text(part, f"{key}.content", bad) for part in content)
    if content is None and role == "assistant" and message.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise bad(f"{key} has content {_short(content)}; it is to be text")
    calls = message.get("tool_calls")
    if calls is not None and not (
        isinstance(calls, (list, tuple)) and all(isinstance(call, Mapping) for call in calls)
    ):
        raise bad(f"{key} has tool_calls {_short(calls)}; they are to be a list of objects")
    if message.get("weight", 1) not in (0, 1):
        raise bad(f"{key} has weight {message['weight']!r}; 1 trains it, 0 does not")
    return message | {"content": content}


def _text(part: Any, key: str, bad) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return part["text"]
    raise bad(f"{key} has a part {_short(part)}; jaxrl trains on text alone")


def _tools(value: Any, bad) -> list[Mapping[str, Any]] | None:
    if isinstance(value, str):  # as Parquet files hold what has no one type
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError as error:
            raise bad(f"tools is no JSON ({error})") from None
    if value is None or (isinstance(value, (list, tuple)) and not value):
        return None
    if not isinstance(value, (list, tuple)) or not all(isinstance(t, Mapping) for t in value):
        raise bad(f"tools is {_short(value)}; it is to be a list of JSON schemas")
    return list(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
