"""The protocol of environments, and how one is found by its name. Imports no JAX."""

import dataclasses
import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from jaxrl.options import ConfigError

type Message = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Task:
    """One thing to do. id: the same for the same task, always. messages: the conversation up to the
    model's first turn. info: what a reward needs to know, such as the right answer. tools: JSON
    schemas of functions that the model may call, as chat templates take them; a turn's calls are in
    its text (`data.tool_calls`), and replies answer them with messages of role "tool"."""

    id: str
    messages: tuple[Message, ...]
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tools: tuple[Mapping[str, Any], ...] = ()


class Environment(Protocol):
    """Tasks, each with an index from 0, and what becomes of conversations about them.

    `messages` are the task's and all that followed: turns of the model (role "assistant") and
    replies. `reply` and `score` run in other processes, in which an environment of the same options
    is made: they see what they are given, and nothing that another call has left behind.

    A message is JSON: {"role": text, "content": text, ...}; content may be None, or missing, where
    there are `tool_calls`. Figures are finite numbers. `task` runs in the trainer's process: one
    that raises, or whose messages are none, is a failure of its rollouts, as the others' are.
    """

    def __len__(self) -> int: ...

    def task(self, index: int) -> Task: ...

    def reply(self, task: Task, messages: Sequence[Message]) -> Sequence[Message]:
        """What follows a turn of the model, before its next one; nothing where it was the last."""
        ...

    def score(self, task: Task, messages: Sequence[Message]) -> float | Mapping[str, float]:
        """The reward of the whole conversation, or {"reward": it, NAME: other figures, ...}."""
        ...


class SingleTurn:
    """Base of environments in which one turn of the model is all."""

    def reply(self, task: Task, messages: Sequence[Message]) -> Sequence[Message]:
        del task, messages
        return ()


# Name -> "module:class". Names with a colon are such places themselves.
KNOWN = {
    "reverse_text": "jaxrl.envs.reverse_text:ReverseText",
    "guess_number": "jaxrl.envs.guess_number:GuessNumber",
    "reasoning_gym": "jaxrl.envs.reasoning_gym:ReasoningGym",
    "verifiers": "jaxrl.envs.verifiers_tasks:VerifiersTasks",
}


def make_environment(name: str, options: Mapping[str, Any]) -> Environment:
    """The environment of this name, or of "module:callable", made with these options.

    Raises ConfigError for a name that is not known and options that it does not take.
    """
    place = KNOWN.get(name, name)
    module, colon, attribute = place.partition(":")
    if not colon:
        known = ", ".join(KNOWN)
        raise ConfigError(f"unknown environment {name!r}; use {known} or MODULE:CALLABLE")
    try:
        make = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"environment {name!r} cannot be imported: {error}") from error
    try:
        inspect.signature(make).bind(**options)
    except TypeError as error:
        takes = ", ".join(inspect.signature(make).parameters)
        raise ConfigError(f"environment {name!r}: {error}; it takes {takes}") from None
    return make(**options)


def last_turn(messages: Sequence[Message]) -> str:
    """The text of the model's last turn."""
    return next(m["content"] or "" for m in reversed(messages) if m["role"] == "assistant")
