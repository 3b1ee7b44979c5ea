"""What is sent back: OpenAI's objects, whole or in parts."""

import dataclasses
import json
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from jaxrl.data.tool_calls import BEGINS, parse_tool_calls
from jaxrl.serving.schema import ChatRequest, CompletionRequest
from jaxrl.serving.service import Delta


@dataclasses.dataclass
class Choice:
    """One of the completions that a request asked for, as far as it has come."""

    prompt: Sequence[int]
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    text: str = ""
    finish: str | None = None
    # Of a stream: characters that were sent where not all may be yet, and those of tokens' names.
    sent: int = 0
    named: int = 0

    def add(self, delta: Delta) -> None:
        self.tokens += delta.tokens
        self.logprobs += delta.logprobs
        self.text += delta.text
        self.finish = delta.finish


class Answers:
    """The objects of one request's answer, by a model of this name and its tokenizer."""

    def __init__(self, request: CompletionRequest | ChatRequest, model: str, hf: Any):
        self.request, self.hf = request, hf
        self.chat = isinstance(request, ChatRequest)
        kind = "chatcmpl" if self.chat else "cmpl"
        self.head = {"id": f"{kind}-{secrets.token_hex(12)}"}
        self.head |= {"created": int(time.time()), "model": model}
        self.tools = []
        if isinstance(request, ChatRequest) and request.tool_choice != "none":
            self.tools = request.tools or []

    def whole(self, choices: Sequence[Choice], usage: Mapping[str, int]) -> dict[str, Any]:
        """The one object of an answer that is not streamed."""
        kind = "chat.completion" if self.chat else "text_completion"
        parts = [self._choice(i, choice) for i, choice in enumerate(choices)]
        return self.head | {"object": kind, "choices": parts, "usage": usage}

    def begin(self, count: int) -> list[dict[str, Any]]:
        """What a stream of so many choices begins with."""
        if not self.chat:
            return []
        role = {"role": "assistant", "content": ""}
        return [
            self._chunk([{"index": i, "delta": role, "finish_reason": None}]) for i in range(count)
        ]

    def part(self, index: int, choice: Choice, delta: Delta) -> dict[str, Any]:
        """What a stream says of a choice that has grown by `delta`, which is in it already."""
        finish = self._finish(choice, [])
        if not self.chat:
            part = {"index": index, "text": delta.text, "finish_reason": finish}
            logprobs = self._completion_logprobs(delta.tokens, delta.logprobs, choice.named)
            choice.named += sum(map(len, logprobs["tokens"])) if logprobs else 0
            part |= {"logprobs": logprobs}
        else:
            said = self._said(choice)
            if choice.finish and self.tools:
                rest, calls = parse_tool_calls(choice.text[choice.sent :], self.tools)
                rest = said.get("content", "") + rest
                said = {"content": rest} if rest else {}
                finish = self._finish(choice, calls)
                if calls:
                    said["tool_calls"] = [
                        {"index": i} | call for i, call in enumerate(_tool_calls(calls))
                    ]
            part = {"index": index, "delta": said, "finish_reason": finish}
            part |= {"logprobs": self._chat_logprobs(delta.tokens, delta.logprobs)}
        if self.request.return_token_ids:
            first = len(choice.tokens) == len(delta.tokens)
            part |= {"token_ids": list(delta.tokens)}
            part |= {"prompt_token_ids": list(choice.prompt)} if first else {}
        return self._chunk([part])

    def end(self, usage: Mapping[str, int]) -> dict[str, Any]:
        return self._chunk([]) | {"usage": usage}

    def _chunk(self, choices: list) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return self.head | {"object": kind, "choices": choices}

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        found: dict[str, Any] = {"index": index}
        if self.chat:
            text, calls = choice.text, []
            if self.tools:
                text, calls = parse_tool_calls(text, self.tools)
            content = text if text or not calls else None
            message: dict[str, Any] = {"role": "assistant", "content": content}
            if calls:
                message["tool_calls"] = _tool_calls(calls)
            found |= {"message": message, "finish_reason": self._finish(choice, calls)}
            found["logprobs"] = self._chat_logprobs(choice.tokens, choice.logprobs)
        else:
            found |= {"text": choice.text, "finish_reason": self._finish(choice, [])}
            found["logprobs"] = self._completion_logprobs(choice.tokens, choice.logprobs, 0)
        if self.request.return_token_ids:
            found |= {"token_ids": choice.tokens, "prompt_token_ids": list(choice.prompt)}
        return found

    def _said(self, choice: Choice) -> dict[str, Any]:
        """Text that may be sent: with tools, not what may be the beginning of a call."""
        end = len(choice.text)
        if self.tools:
            whole = choice.text.lstrip()
            begins = choice.text.find(BEGINS)
            if whole.startswith("{") or not whole:
                end = choice.sent
            elif begins >= 0:
                end = begins
            else:
                tails = (
                    n for n in range(len(BEGINS) - 1, 0, -1) if choice.text.endswith(BEGINS[:n])
                )
                end -= next(tails, 0)
        text, choice.sent = choice.text[choice.sent : end], max(end, choice.sent)
        return {"content": text} if text else {}

    def _finish(self, choice: Choice, calls: Sequence) -> str | None:
        return "tool_calls" if calls and choice.finish == "stop" else choice.finish

    def _names(self, tokens: Sequence[int]) -> list[str]:
        """What each says behind a word: some tokenizers leave out a text's first space."""
        backend = self.hf.backend_tokenizer
        word = backend.encode("a", add_special_tokens=False).ids[-1:]
        begin = len(backend.decode(word, skip_special_tokens=False))
        return [backend.decode([*word, t], skip_special_tokens=False)[begin:] for t in tokens]

    def _bytes(self, token: int, name: str) -> list[int]:
        """Of a token, also of one that is half a character."""
        if "\ufffd" not in name:
            return list(name.encode())
        written = self.hf.convert_ids_to_tokens(token)
        if found := re.fullmatch(r"<0x([0-9A-F]{2})>", written):
            return [int(found[1], 16)]
        if all(c in _BYTE_LETTERS for c in written):
            return [_BYTE_LETTERS[c] for c in written]
        return list(name.encode())

    def _completion_logprobs(self, tokens, logprobs, offset: int) -> dict[str, Any] | None:
        if self.request.logprobs is None:
            return None
        names, offsets = self._names(tokens), []
        for name in names:
            offsets.append(offset)
            offset += len(name)
        return {
            "tokens": names,
            "token_logprobs": list(logprobs),
            "top_logprobs": None,
            "text_offset": offsets,
        }

    def _chat_logprobs(self, tokens, logprobs) -> dict[str, Any] | None:
        if not self.request.logprobs:
            return None
        return {
            "content": [
                {
                    "token": name,
                    "logprob": p,
                    "bytes": self._bytes(token, name),
                    "top_logprobs": [],
                }
                for token, name, p in zip(tokens, self._names(tokens), logprobs, strict=True)
            ]
        }


def _byte_letters() -> dict[str, int]:
    """How byte-level tokenizers write bytes: printable ones as themselves, others from U+0100 on
    (GPT-2's alphabet)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_LETTERS = _byte_letters()


def _tool_calls(calls: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    return [
        {"id": f"call_{secrets.token_hex(8)}", "type": "function", "function": dict(call)}
        for call in calls
    ]


def event(content: Mapping[str, Any] | str) -> str:
    """A server-sent event."""
    return f"data: {content if isinstance(content, str) else json.dumps(content)}\n\n"


def failure(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    """OpenAI's object of an error."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
