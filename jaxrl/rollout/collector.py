"""From tasks to scored rollouts: the engine draws, the environment answers and scores.

Everything is in flight at once: while some rollouts' tokens are drawn, others wait for a reply or a
reward in the environment's processes.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from jaxrl.data.tokenizer import Tokenizer
from jaxrl.envs.isolated import Isolated, Outcome
from jaxrl.envs.protocol import Environment, Message, SingleTurn, Task
from jaxrl.options import ConfigError
from jaxrl.rollout.requests import Completion, Request, Sampling
from jaxrl.rollout.rollouts import Group, Rollout

_PLACE = "\ufdd0"  # a noncharacter, which no text is expected to hold


class Generates(Protocol):
    """What the collector needs of an engine, here or elsewhere."""

    @property
    def busy(self) -> bool: ...

    def prepare(self, weights: Any, version: int) -> Any: ...

    def set_weights(self, weights: Any, version: int) -> None: ...

    def submit(self, prompt: Sequence[int], sampling: Sampling | None = None) -> Request: ...

    def step(self) -> Any: ...


@dataclasses.dataclass
class _Turn:
    """A rollout whose next turn is being drawn."""

    rollout: Rollout
    group: Group
    request: Request
    completion: Completion


class Collector:
    """`start` tasks, `poll` until their groups are finished.

    isolated: runs the environment's replies and rewards. max_len: tokens of a whole rollout;
    max_turns: turns of the model. A rollout that fails, in whatever way, is in its group, without a
    reward.
    """

    def __init__(
        self,
        engine: Generates,
        environment: Environment,
        isolated: Isolated,
        tokenizer: Tokenizer,
        *,
        group_size: int,
        sampling: Sampling,
        max_len: int,
        max_turns: int = 8,
    ):
        self.engine, self.isolated, self.tokenizer = engine, isolated, tokenizer
        self.single = isinstance(environment, SingleTurn)
        self.group_size, self.sampling = group_size, sampling
        self.max_len, self.max_turns = max_len, max_turns
        self._turns: list[_Turn] = []
        self._replies: list[tuple[Rollout, Group, Future[Outcome]]] = []
        self._scores: list[tuple[Rollout, Group, Future[Outcome]]] = []
        self._groups: dict[int, Group] = {}
        self._waiting: dict[int, int] = {}  # of each group, rollouts that are not finished
        self._seeds: dict[int, int | None] = {}
        self._finished: list[Group] = []

    @property
    def in_flight(self) -> Mapping[int, Group]:
        """The groups that are not finished, by number."""
        return self._groups

    def start(self, number: int, task: Task, seed: int | None = None) -> None:
        """Begin a group. `seed` decides what is drawn, whatever else is in flight."""
        group = Group(number, [Rollout(task) for _ in range(self.group_size)])
        self._groups[number], self._waiting[number] = group, self.group_size
        self._seeds[number] = seed
        for rollout in group.rollouts:
            rollout.messages = list(task.messages)
        try:
            prompt = self._tokens(self._text(task, task.messages))
            sampling = dataclasses.replace(self.sampling, n=self.group_size, seed=seed)
            request = self.engine.submit(prompt, self._within(len(prompt), sampling))
        except (ConfigError, PromptRefused) as error:
            for rollout in group.rollouts:
                self._end(rollout, group, failure=f"prompt: {error}")
            return
        for rollout, completion in zip(group.rollouts, request.completions, strict=True):
            rollout.say(prompt)
            self._turns.append(_Turn(rollout, group, request, completion))

    def refuse(self, number: int, task: Task, failure: str) -> None:
        """A group that is not begun: all of its rollouts have failed."""
        rollouts = [Rollout(task, failure=failure) for _ in range(self.group_size)]
        self._finished.append(Group(number, rollouts))

    def poll(self) -> list[Group]:
        """Draw some tokens, take up what has arrived, and return the groups that are finished."""
        if self.engine.busy:
            self.engine.step()
        elif self._replies or self._scores:
            time.sleep(0.001)  # nothing to draw: only others' processes work
        for turn in self._take(self._turns, lambda turn: turn.completion.finish is not None):
            self._turn_ended(turn)
        for rollout, group, future in self._take(self._replies, lambda one: one[2].done()):
            self._replied(rollout, group, future.result())
        for rollout, group, future in self._take(self._scores, lambda one: one[2].done()):
            self._scored(rollout, group, future.result())
        finished, self._finished = self._finished, []
        return finished

    def collect(self, tasks: Sequence[Task], seeds: Sequence[int | None]) -> list[Group]:
        """Groups of these tasks, finished, in their order."""
        found: dict[int, Group] = {}
        for number, (task, seed) in enumerate(zip(tasks, seeds, strict=True)):
            self.start(number, task, seed)
        while len(found) < len(tasks):
            found |= {group.number: group for group in self.poll()}
        return [found[number] for number in range(len(tasks))]

    def _turn_ended(self, turn: _Turn) -> None:
        rollout, group, completion = turn.rollout, turn.group, turn.completion
        if completion.failure:
            self._end(rollout, group, failure=f"turn: {completion.failure}")
            return
        rollout.draw(completion.tokens, completion.logprobs, completion.versions)
        stopped = completion.finish == "stop"
        text = self._said(completion, stopped)
        rollout.messages.append({"role": "assistant", "content": text})
        rollout.truncated = not stopped
        new = rollout.messages[len(rollout.task.messages) :]  # a task may begin with examples
        turns = sum(m["role"] == "assistant" for m in new)
        if self.single or not stopped or turns >= self.max_turns:
            self._score(rollout, group)
        else:
            future = self.isolated.reply(rollout.task, rollout.messages)
            self._replies.append((rollout, group, future))

    def _replied(self, rollout: Rollout, group: Group, outcome: Outcome) -> None:
        if outcome.failure:
            self._end(rollout, group, failure=f"reply: {outcome.failure}")
            return
        if not outcome.value:
            self._score(rollout, group)
            return
        before = rollout.messages
        rollout.messages = [*before, *outcome.value]
        try:
            more = self._continuation(before, rollout)
            sampling = dataclasses.replace(self.sampling, n=1, seed=self._next_seed(rollout, group))
            prompt = [*rollout.tokens, *more]
            request = self.engine.submit(prompt, self._within(len(prompt), sampling))
        except ConfigError:  # there is no room for another turn
            rollout.messages, rollout.truncated = before, True
            self._score(rollout, group)
            return
        except PromptRefused as error:
            self._end(rollout, group, failure=f"reply: {error}")
            return
        rollout.say(more)
        self._turns.append(_Turn(rollout, group, request, request.completions[0]))

    def _scored(self, rollout: Rollout, group: Group, outcome: Outcome) -> None:
        if outcome.failure:
            self._end(rollout, group, failure=f"reward: {outcome.failure}")
            return
        figures = dict(outcome.value)
        rollout.reward, rollout.figures = figures.pop("reward"), figures
        self._end(rollout, group)

    def _score(self, rollout: Rollout, group: Group) -> None:
        future = self.isolated.score(rollout.task, rollout.messages)
        self._scores.append((rollout, group, future))

    def _end(self, rollout: Rollout, group: Group, failure: str | None = None) -> None:
        rollout.failure = failure
        self._waiting[group.number] -= 1
        if not self._waiting[group.number]:
            for known in (self._waiting, self._groups, self._seeds):
                del known[group.number]
            self._finished.append(group)

    def _within(self, prompt: int, sampling: Sampling) -> Sampling:
        """`sampling`, with no more tokens than the rollout has room for."""
        room = self.max_len - prompt
        if room < 1:
            raise ConfigError(
                f"it has {prompt} tokens, and a rollout at most {self.max_len}; shorten it, or use "
                "a larger config.seq_len"
            )
        most = min(sampling.max_tokens or room, room)
        return dataclasses.replace(sampling, max_tokens=most)

    def _text(self, task: Task, messages: Sequence[Message]) -> str:
        try:
            return self.tokenizer.chat_text(messages, task.tools)
        except ConfigError as error:
            raise PromptRefused(str(error)) from None

    def _tokens(self, text: str) -> list[int]:
        try:
            return self.tokenizer.ids(text, special=False)
        except ConfigError as error:
            raise PromptRefused(str(error)) from None

    def _said(self, completion: Completion, stopped: bool) -> str:
        """A turn's text, without the token that ended it."""
        if completion.text:
            return completion.text
        tokens = completion.tokens[:-1] if stopped else completion.tokens
        return self.tokenizer.hf.decode(tokens, skip_special_tokens=True)

    def _continuation(self, before: Sequence[Message], rollout: Rollout) -> list[int]:
        """The tokens from the end of the model's turn to the beginning of its next one.

        What was drawn stays as it was drawn, though templates may write earlier turns differently
        (without thoughts): only what stands behind the turn is encoded.
        """
        replies = rollout.messages[len(before) :]
        turn = {"role": "assistant", "content": _PLACE}
        behind = self._text(rollout.task, [*before[:-1], turn, *replies]).rpartition(_PLACE)[2]
        last = self.tokenizer.hf.convert_ids_to_tokens(rollout.tokens[-1])
        if not behind.startswith(last):
            raise PromptRefused(f"the chat template writes no {last!r} behind the model's turn")
        return self._tokens(behind[len(last) :])

    def _next_seed(self, rollout: Rollout, group: Group) -> int | None:
        """Of a later turn: from what was drawn so far, so that the group's decides all of it."""
        seed = self._seeds[group.number]
        if seed is None:
            return None
        index = next(i for i, one in enumerate(group.rollouts) if one is rollout)
        return hash((seed, index, *rollout.tokens)) & 0x7FFFFFFF

    @staticmethod
    def _take[T](items: list[T], ready: Callable[[T], bool]) -> list[T]:
        """Those that are ready, taken out of `items`."""
        taken = [item for item in items if ready(item)]
        items[:] = [item for item in items if not any(item is one for one in taken)]
        return taken


class PromptRefused(Exception):
    """A conversation that cannot be written down for the model."""
