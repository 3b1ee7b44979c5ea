"""Conversations to tokens through the model's chat template, and which of them are trained.

A template says how a conversation is written, not who wrote what. Some mark what the assistant
generates (`{% generation %}`); for all others it is found out by rendering: the conversation is
rendered again with one message's content replaced, and what differs is that message.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxrl.data.chat import Conversation, PlainText, SampleError
from jaxrl.data.tokenizer import Tokenizer
from jaxrl.options import ConfigError

# Private-use characters, which no template treats as space, and no text is expected to hold.
SENTINEL = "\ue0f0\ue0f1\ue0f0"
MARKS = "or mark what is generated in a template of your own (config.data.chat_template)"
# What a template may write between the assistant's header and its text, such as an empty thought.
LONGEST_OPENING = 64


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
    message.
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
        self.marked = "generation %}" in str(tokenizer.hf.get_chat_template()).replace("-%}", " %}")
        if self.marked and self.roles != ("assistant",):
            raise ConfigError(
                f"config.data.train_roles is {','.join(self.roles)}, and the chat template marks "
                "what the assistant generates; use assistant"
            )

    def encode(self, sample: Conversation | PlainText, where: str = "") -> Encoded:
        """Raises SampleError where the template refuses the conversation, or nothing is trained."""
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
        if SENTINEL[0] in text or SENTINEL[1] in text:
            raise SampleError(where, "malformed", f"the text holds {SENTINEL[:2]!r}; remove it")
        if self.marked:
            spans = self._marked_spans(sample, chosen, where)
        else:
            spans = [self._span(sample, i, text, where) for i in chosen]
        return self._tokens(text, spans, sample, where)

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
        import jinja2

        try:
            return self.tokenizer.hf.apply_chat_template(
                [dict(m) for m in messages],
                tools=[dict(t) for t in tools] if tools else None,
                tokenize=False,
                add_generation_prompt=prompt,
            )
        # Templates look into messages as they please.
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            line = " ".join(str(error).split())[:200]
            raise SampleError(where, "refused", f"the chat template refuses it: {line}") from None

    def _span(self, sample: Conversation, i: int, text: str, where: str) -> tuple[int, int]:
        """The characters of `text` that are trained for message i; its end may be the text's."""
        message = sample.messages[i]
        left_out = ("tool_calls", "reasoning_content", "reasoning")
        other = {k: v for k, v in message.items() if k not in left_out} | {"content": SENTINEL}
        changed = self._render(
            [*sample.messages[:i], other, *sample.messages[i + 1 :]], sample.tools, where
        )
        start = _common_prefix(text, changed)
        tail = _common_suffix(text, changed, min(len(text), len(changed)) - start)
        if SENTINEL not in changed[start : len(changed) - tail]:
            problem = f"the chat template does not show message {i} ({message['role']})"
            raise SampleError(where, "not shown", f"{problem}; leave it out, {MARKS}")
        end = len(text) - tail
        if message["role"] == "assistant":
            start = self._generated_from(text, start, i, where)
        return start, self._with_stop(text, end, i, sample, where)

    def _generated_from(self, text: str, start: int, i: int, where: str) -> int:
        """Where the assistant begins to generate: behind its header, which may lie a little before
        the text that the content changed (`<think>`)."""
        prompt = self._generation_prompt
        begins = text.rfind(prompt, 0, start) + len(prompt)
        if begins >= len(prompt) and self._is_opening(text[begins:start]):
            return begins
        # A prompt that goes on with what this turn does not have ("<think>\n").
        if any(text.endswith(prompt[:k], 0, start) for k in range(len(prompt), 0, -1)):
            return start
        problem = f"it is not certain where message {i} (assistant) begins in the chat template"
        raise SampleError(where, "uncertain", f"{problem}; {MARKS}")

    def _is_opening(self, between: str) -> bool:
        stops = (*self.tokenizer.stop_texts, self._generation_prompt)
        return len(between) <= LONGEST_OPENING and not any(stop in between for stop in stops)

    def _with_stop(self, text: str, end: int, i: int, sample: Conversation, where: str) -> int:
        """`end`, or behind the stop token that follows there."""
        rest = text[end:]
        space = len(rest) - len(rest.lstrip())
        for stop in self.tokenizer.stop_texts:
            if rest.startswith(stop, space):
                return end + space + len(stop)
        if sample.messages[i]["role"] != "assistant":
            return end
        if not rest.strip():
            return len(text)
        problem = f"the chat template puts no stop token behind message {i} (assistant)"
        raise SampleError(where, "uncertain", f"{problem}; {MARKS}")

    @functools.cached_property
    def _generation_prompt(self) -> str:
        """What the template writes before the assistant's turn."""
        messages = [{"role": "user", "content": "x"}]
        before, after = (self._render(messages, None, "", prompt=p) for p in (False, True))
        prompt = after[len(before) :]
        if not after.startswith(before) or not prompt.strip():
            raise ConfigError(
                "the chat template has no generation prompt, so that it is not certain what the "
                f"assistant generates; use another, {MARKS}"
            )
        return prompt

    @functools.cached_property
    def _final_stops(self) -> Mapping[bool, int]:
        """The stop token to append to a conversation that ends without one, by whether its last
        message has tool calls: what the template writes behind such a message elsewhere."""
        user, said = {"role": "user", "content": "x"}, {"role": "assistant", "content": SENTINEL}
        stops = {}
        for calls, role in ((False, "user"), (True, "tool")):
            found = self._eos
            try:
                text = self._render([user, said, {"role": role, "content": "y"}], None, "")
                rest = text.rpartition(SENTINEL)[2].lstrip()
                for id, stop in zip(
                    self.tokenizer.stop_ids, self.tokenizer.stop_texts, strict=True
                ):
                    found = id if rest.startswith(stop) else found
            except SampleError:  # a template without tools
                pass
            stops[calls] = found
        return stops

    def _marked_spans(
        self, sample: Conversation, chosen: Sequence[int], where: str
    ) -> list[tuple[int, int]]:
        """Of the template's own marks, those of the chosen messages."""
        from transformers.utils.chat_template_utils import render_jinja_template

        hf = self.tokenizer.hf
        self._render(sample.messages, sample.tools, where)  # tells what it refuses
        _, indices = render_jinja_template(
            conversations=[[dict(m) for m in sample.messages]],
            tools=[dict(t) for t in sample.tools] if sample.tools else None,
            chat_template=hf.get_chat_template(),
            return_assistant_tokens_mask=True,
            **hf.special_tokens_map,
        )
        marks: list[Any] = list(indices[0])
        turns = [i for i, message in enumerate(sample.messages) if message["role"] == "assistant"]
        if list(chosen) == turns:
            return marks
        if len(marks) != len(turns):
            problem = f"the chat template marks {len(marks)} passages of {len(turns)} turns"
            raise SampleError(where, "uncertain", f"{problem}: which ones are to be trained?")
        return [marks[turns.index(i)] for i in chosen]

    def _tokens(
        self, text: str, spans: Sequence[tuple[int, int]], sample: Conversation, where: str
    ) -> Encoded:
        found = self.tokenizer.hf(text, add_special_tokens=False, return_offsets_mapping=True)
        tokens = list(found.input_ids)
        begins, ends = np.array(found.offset_mapping, np.int64).reshape(-1, 2).T
        mask = np.zeros(len(tokens), bool)
        for start, end in spans:
            # As transformers counts: the tokens that hold some of the characters.
            first = np.searchsorted(ends, start, side="right")
            mask[first : np.searchsorted(begins, end, side="left")] = True
        last = sample.messages[-1]
        open_end = last["role"] == "assistant" and spans and spans[-1][1] == len(text)
        if open_end and tokens and tokens[-1] not in self.tokenizer.stop_ids:
            tokens.append(self._final_stops[bool(last.get("tool_calls"))])
            mask = np.append(mask, True)
        if not mask.any():
            raise SampleError(where, "nothing trained", "no token of it is trained")
        return Encoded(np.array(tokens, np.int32), mask)


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


def _common_suffix(a: str, b: str, limit: int) -> int:
    """How many, at most `limit`, at their end."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if a[len(a) - middle : len(a) - low] == b[len(b) - middle : len(b) - low]:
            low = middle
        else:
            high = middle - 1
    return low
