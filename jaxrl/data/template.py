"""Conversations to tokens through the model's chat template, and which of them are trained.

A template says how a conversation is written, not who wrote what. Some mark what the assistant
generates (`{% generation %}`); for all others it is found out by rendering: the conversation is
rendered again with the contents of its trained messages replaced, and what that render shares with
the first is the template's and the other messages'.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxrl.data.chat import Conversation, PlainText, SampleError
from jaxrl.data.tokenizer import Tokenizer
from jaxrl.options import ConfigError

# Unicode's noncharacters, which are not for text that is passed on: no template treats them as
# space, and no text is expected to hold them. Between the outer two stands the message's number.
_OPEN, _CLOSE, _DIGITS = "\ufdd0", "\ufdd1", [chr(0xFDD2 + i) for i in range(10)]
_PLACE = re.compile(f"{_OPEN}([{''.join(_DIGITS)}]+){_CLOSE}")
_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
MARKS = (
    "mark what is generated, {% generation %}...{% endgeneration %}, in a template of your own "
    "(config.data.chat_template)"
)
# What a template may write between the assistant's header and its text, such as an empty thought.
LONGEST_OPENING = 64
# What of a message, beside its content, the assistant generates; thoughts have three names.
GENERATED = ("tool_calls", "reasoning_content", "reasoning", "thinking")


@dataclasses.dataclass(frozen=True)
class Encoded:
    """tokens: int32 [T]. mask: bool [T], true where the token, as a target, is trained."""

    tokens: np.ndarray
    mask: np.ndarray


class ChatTemplate:
    """`encode(sample) -> Encoded`, the tokens being those of transformers' `apply_chat_template`.

    Trained are what messages of `roles` add to the conversation (of the assistant everything it
    generates: thoughts, tool calls and what the template writes around them) and the stop token
    behind it, but no headers. A template that ends a conversation without a stop token (GLM-4.5,
    whose turns end where the next role begins) gets one appended. turns "last": only the last such
    message. Of a template with `{% generation %}` it is what transformers' assistant mask says.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        roles: Sequence[str] = ("assistant",),
        turns: str = "all",
    ):
        self.tokenizer, self.roles, self.turns = tokenizer, tuple(roles), turns
        if not tokenizer.hf.chat_template:
            raise ConfigError(
                "the tokenizer has no chat template; name a Jinja file with "
                "config.data.chat_template"
            )
        if self.roles != ("assistant",) and _MARK.search(str(tokenizer.hf.chat_template)):
            raise ConfigError(
                f"config.data.train_roles is {','.join(self.roles)}, and the chat template marks "
                "what the assistant generates; use assistant"
            )

    def encode(self, sample: Conversation | PlainText, where: str = "") -> Encoded:
        """Raises SampleError where the template refuses the conversation, shows not all of it, or
        leaves open what is trained, and where nothing is."""
        if isinstance(sample, PlainText):
            return self._plain(sample)
        chosen = [
            i
            for i, (message, trained) in enumerate(
                zip(sample.messages, sample.trained, strict=True)
            )
            if trained and message["role"] in self.roles
        ]
        if not chosen:
            wanted = " or ".join(self.roles)
            problem = f"no message of {wanted} is to be trained"
            raise SampleError(where, "nothing trained", problem)
        if self.turns == "last":
            chosen = chosen[-1:]
        text = self._render(sample.messages, sample.tools, where)
        self._check_tools(sample, text, where)
        if _MARK.search(self._template(sample.tools)):
            spans, open_end = self._marked_spans(sample, chosen, text, where)
        else:
            spans, open_end = self._spans(sample, chosen, text, where)
        tokens, mask = self._tokens(text, spans)
        if open_end:
            tokens.append(self._final_stops[bool(sample.messages[-1].get("tool_calls"))])
            mask = np.append(mask, True)
        if not mask.any():
            raise SampleError(where, "nothing trained", "no token of it is trained")
        return Encoded(np.array(tokens, np.int32), mask)

    def _plain(self, sample: PlainText) -> Encoded:
        hf = self.tokenizer.hf
        prompt = hf(sample.prompt).input_ids
        completion = [*hf(sample.completion, add_special_tokens=False).input_ids, self._eos]
        tokens = np.array([*prompt, *completion], np.int32)
        return Encoded(tokens, np.arange(len(tokens)) >= len(prompt))

    @property
    def _eos(self) -> int:
        eos = self.tokenizer.hf.eos_token_id
        return self.tokenizer.stop_ids[0] if eos is None else eos

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        where: str,
        *,
        prompt: bool = False,
    ) -> str:
        try:
            return self.tokenizer.hf.apply_chat_template(
                [dict(m) for m in messages],
                tools=[dict(t) for t in tools] if tools else None,
                tokenize=False,
                add_generation_prompt=prompt,
            )
        except Exception as error:  # of any kind: templates look into messages as they please
            line = " ".join(str(error).split())[:200]
            called = (c for m in messages for c in m.get("tool_calls", ()))
            if any(isinstance(_function(call).get("arguments"), str) for call in called):
                line += " (its tool calls have arguments that are text, not an object)"
            raise SampleError(where, "refused", f"the chat template refuses it: {line}") from None

    def _check_tools(self, sample: Conversation, text: str, where: str) -> None:
        """Templates that know no tools leave them out without a word."""
        for tool in sample.tools or ():
            name = _function(tool).get("name")
            if isinstance(name, str) and name not in text:
                problem = f"the chat template does not show the tool {name!r}; use one with tools"
                raise SampleError(where, "tools not shown", f"{problem}, or leave them out")

    def _spans(
        self, sample: Conversation, chosen: Sequence[int], text: str, where: str
    ) -> tuple[list[tuple[int, int]], bool]:
        """(The characters of `text` that are trained for the chosen messages, whether the text ends
        with such a message, and without a stop token.)"""
        spans = []
        for i, (start, end) in zip(chosen, self._located(sample, chosen, text, where), strict=True):
            message = sample.messages[i]
            for call in message.get("tool_calls", ()):
                name = _function(call).get("name")
                if isinstance(name, str) and text.find(name, start, end) < 0:
                    problem = f"the chat template does not show the call of {name!r} in message {i}"
                    raise SampleError(where, "tools not shown", f"{problem}; use one with tools")
            thought = message.get("reasoning_content")
            # Of earlier turns, templates for thinking models leave it out.
            shown = not isinstance(thought, str) or text.find(thought.strip(), start, end) >= 0
            if i == len(sample.messages) - 1 and not shown:
                problem = "the chat template does not show the last message's reasoning_content"
                problem += "; use one for models that think, or leave it out"
                raise SampleError(where, "thought not shown", problem)
            stop = self._behind_stop(text, end, i, sample, where)
            if stop is None:
                return [*spans, (start, len(text))], True
            spans.append((start, stop))
        return spans, False

    def _located(
        self, sample: Conversation, chosen: Sequence[int], text: str, where: str
    ) -> list[tuple[int, int]]:
        """Where each chosen message stands, without what the template writes behind it."""
        if _OPEN in text:
            problem = f"the text holds the noncharacter {_OPEN!r}; remove it"
            raise SampleError(where, "malformed", problem)
        try:
            return self._located_at_once(sample, chosen, text, where)
        except SampleError:
            # What stands between two messages comes twice, or one's text decides on another's.
            return [self._located_at_once(sample, [i], text, where)[0] for i in chosen]

    def _located_at_once(
        self, sample: Conversation, chosen: Sequence[int], text: str, where: str
    ) -> list[tuple[int, int]]:
        """The same from one render, which may not be enough for several messages.

        The parts of the text that do not depend on the chosen messages are taken from a render with
        their contents replaced. The first such part begins the text, the last ends it, and those
        between are looked for; each has to come once.
        """
        changed = list(sample.messages)
        for i in chosen:
            kept = {k: v for k, v in sample.messages[i].items() if k not in GENERATED}
            changed[i] = kept | {"content": _place(i)}
        rendered = self._render_changed(changed, sample, chosen, where)
        pieces = _PLACE.split(rendered)
        shown = [int("".join(str(_DIGITS.index(c)) for c in n)) for n in pieces[1::2]]
        for i in chosen:
            if i not in shown:
                problem = f"the chat template does not show message {i} ({self._role(sample, i)})"
                raise SampleError(where, "not shown", f"{problem}; leave it out, or {MARKS}")
        if shown != list(chosen):
            raise self._uncertain(sample, chosen, where)
        *parts, last = pieces[::2]
        # What the template writes between a header and the text may differ: it is generated.
        for n, i in enumerate(chosen):
            if self._role(sample, i) == "assistant":
                end = self._header_end(parts[n])
                if end is None:
                    raise self._uncertain(sample, chosen, where)
                parts[n] = parts[n][:end]
        limit = len(text) - len(last)
        if not text.startswith(parts[0]) or not text.endswith(last) or len(parts[0]) > limit:
            raise self._uncertain(sample, chosen, where)
        starts, ends = [len(parts[0])], []
        for part in parts[1:]:
            at = text.find(part, starts[-1], limit)
            if at < 0 or text.find(part, at + 1, limit) >= 0:
                raise self._uncertain(sample, chosen, where)
            ends.append(at)
            starts.append(at + len(part))
        return list(zip(starts, [*ends, limit], strict=True))

    def _render_changed(
        self,
        messages: Sequence[Mapping[str, Any]],
        sample: Conversation,
        chosen: Sequence[int],
        where: str,
    ) -> str:
        try:
            return self._render(messages, sample.tools, where)
        except SampleError:  # such as of a tool's answer without a call
            raise self._uncertain(sample, chosen, where) from None

    def _uncertain(self, sample: Conversation, chosen: Sequence[int], where: str) -> SampleError:
        named = ", ".join(f"{i} ({self._role(sample, i)})" for i in chosen)
        problem = f"it is not certain what of the text the chat template writes for message {named}"
        return SampleError(where, "uncertain", f"{problem}; {MARKS}")

    @staticmethod
    def _role(sample: Conversation, i: int) -> str:
        return sample.messages[i]["role"]

    def _header_end(self, part: str) -> int | None:
        """Where, in the text before an assistant's content, it begins to generate: behind the
        nearest header, of which the generation prompt may have more (`<think>`)."""
        at = part.rfind(self._header)
        if at < 0:
            return None
        end = at + _common_prefix(part[at:], self._generation_prompt)
        opening = part[end:]
        if len(opening) > LONGEST_OPENING or any(s in opening for s in self.tokenizer.stop_texts):
            return None
        return end

    def _behind_stop(
        self, text: str, end: int, i: int, sample: Conversation, where: str
    ) -> int | None:
        """Where the stop token ends that follows there; None where the conversation ends."""
        behind = end
        while behind < len(text) and text[behind].isspace():
            behind += 1
        stop = self._stop_at(text, behind)
        if stop is not None:
            return behind + len(stop)
        if self._role(sample, i) != "assistant":
            return end
        if behind == len(text):
            return None
        problem = f"the chat template puts no stop token behind message {i} (assistant)"
        raise SampleError(where, "no stop token", f"{problem}; {MARKS}")

    def _stop_at(self, text: str, at: int) -> str | None:
        """The stop token that stands there, the longest of them."""
        found = [stop for stop in self.tokenizer.stop_texts if text.startswith(stop, at)]
        return max(found, key=len, default=None)

    @functools.cached_property
    def _generation_prompt(self) -> str:
        """What the template writes before the assistant's turn."""
        before, after = (self._render([_ASKED], None, "", prompt=p) for p in (False, True))
        prompt = after[len(before) :]
        if not after.startswith(before) or not prompt.strip():
            raise ConfigError(
                f"the chat template has no generation prompt; use another, or {MARKS}"
            )
        return prompt

    @functools.cached_property
    def _header(self) -> str:
        """What of the generation prompt stands before every assistant's text."""
        before, header = self._render([_ASKED], None, ""), self._generation_prompt
        for more in ([], [_ASKED]):
            text = self._render([_ASKED, _SAID, *more], None, "")
            if text.startswith(before):
                header = header[: _common_prefix(header, text[len(before) :])]
        if not header.strip():
            raise ConfigError(
                "the chat template writes the assistant's turns in another way than its generation "
                f"prompt; use another, or {MARKS}"
            )
        return header

    @functools.cached_property
    def _final_stops(self) -> Mapping[bool, int]:
        """The stop token to append to a conversation that ends without one, by whether its last
        message has tool calls: what the template writes behind such a message elsewhere."""
        ids = dict(zip(self.tokenizer.stop_texts, self.tokenizer.stop_ids, strict=True))
        stops = {}
        for calls, role in ((False, "user"), (True, "tool")):
            stop = None
            try:
                text = self._render([_ASKED, _SAID, {"role": role, "content": "x"}], None, "")
                rest = _PLACE.split(text)[-1].lstrip()
                stop = self._stop_at(rest, 0)
            except SampleError:  # a template without tools
                pass
            stops[calls] = self._eos if stop is None else ids[stop]
        return stops

    def _marked_spans(
        self, sample: Conversation, chosen: Sequence[int], text: str, where: str
    ) -> tuple[list[tuple[int, int]], bool]:
        """The same by the template's own marks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        hf = self.tokenizer.hf
        _, indices = render_jinja_template(
            conversations=[[dict(m) for m in sample.messages]],
            tools=[dict(t) for t in sample.tools] if sample.tools else None,
            chat_template=self._template(sample.tools),
            return_assistant_tokens_mask=True,
            **hf.special_tokens_map,
        )
        marks: list[Any] = list(indices[0])
        turns = [i for i, message in enumerate(sample.messages) if message["role"] == "assistant"]
        if list(chosen) != turns:
            marks = self._of_turns(marks, turns, chosen, self._located(sample, turns, text, where))
        stopped = text.endswith(self.tokenizer.stop_texts)
        return marks, bool(marks) and marks[-1][1] == len(text) and not stopped

    @staticmethod
    def _of_turns(
        marks: Sequence[tuple[int, int]],
        turns: Sequence[int],
        chosen: Sequence[int],
        located: Sequence[tuple[int, int]],
    ) -> list[tuple[int, int]]:
        """The marks in the chosen ones of the assistant's turns, which may have several each, such
        as one for the stop token."""
        numbers = np.searchsorted([start for start, _ in located], [end for _, end in marks])
        owners = [turns[n - 1] if n else None for n in numbers]
        return [mark for mark, owner in zip(marks, owners, strict=True) if owner in chosen]

    def _template(self, tools: Sequence[Mapping[str, Any]] | None) -> str:
        return self.tokenizer.hf.get_chat_template(tools=list(tools) if tools else None)

    def _tokens(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], np.ndarray]:
        """(tokens, which of them are in the spans); as transformers counts, those that hold some of
        a span's characters."""
        found = self.tokenizer.hf(text, add_special_tokens=False, return_offsets_mapping=True)
        begins, ends = np.array(found.offset_mapping, np.int64).reshape(-1, 2).T
        mask = np.zeros(len(begins), bool)
        for start, end in spans:
            first = np.searchsorted(ends, start, side="right")
            mask[first : np.searchsorted(begins, end, side="left")] = True
        return list(found.input_ids), mask


def _common_prefix(a: str, b: str) -> int:
    """How many characters two texts have in common at their beginning."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _place(i: int) -> str:
    """What stands for message i's content."""
    return _OPEN + "".join(_DIGITS[int(digit)] for digit in str(i)) + _CLOSE


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """The function of a tool or of a call, which OpenAI's format wraps."""
    function = tool.get("function")
    return function if isinstance(function, Mapping) else tool


# A conversation to learn from how a template writes one.
_ASKED = {"role": "user", "content": "x"}
_SAID = {"role": "assistant", "content": _place(1)}
