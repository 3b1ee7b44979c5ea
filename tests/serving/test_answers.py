"""Streams with tools: what may be the beginning of a call is not sent as text."""

import pytest
from fallback import byte_fallback
from tiny_run import tiny_checkpoint

from jaxrl.data.tokenizer import load_tokenizer
from jaxrl.serving.answers import Answers, Choice
from jaxrl.serving.schema import ChatRequest
from jaxrl.serving.service import Delta

TOOLS = [{"type": "function", "function": {"name": "now", "parameters": {}}}]
CALL = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'


def streamed(text, *, tools=TOOLS, size=3):
    """(text sent, calls sent, last finish reason) of a turn that comes in pieces."""
    request = ChatRequest(messages=[], tools=tools, stream=True)
    answers, choice = Answers(request, "m", hf=None), Choice([1])
    said, calls, finish = [], [], None
    for begin in range(0, len(text), size):
        ends = begin + size >= len(text)
        delta = Delta(0, (7,), (-1.0,), text[begin : begin + size], "stop" if ends else None)
        choice.add(delta)
        (part,) = answers.part(0, choice, delta)["choices"]
        said.append(part["delta"].get("content", ""))
        calls += part["delta"].get("tool_calls", [])
        finish = part["finish_reason"]
    return said, [call["function"]["name"] for call in calls], finish


@pytest.mark.parametrize("size", [1, 3, 200])
@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        (f"Now.\n{CALL}", "Now.", ["now"]),
        (CALL, "", ["now"]),
        (f"{CALL}{CALL}", "", ["now", "now"]),
        ('{"name": "now", "parameters": {}}', "", ["now"]),
        ("a <b> and <tool", "a <b> and <tool", []),
        ('{"no": "call"}', '{"no": "call"}', []),
    ],
)
def test_calls_come_whole_at_the_end(text, said, calls, size):
    pieces, found, finish = streamed(text, size=size)
    assert ("".join(pieces).strip(), found) == (said, calls)
    assert finish == ("tool_calls" if calls else "stop")
    assert "<tool_call>" not in "".join(pieces)


def test_without_tools_all_is_text_at_once():
    pieces, found, finish = streamed(CALL, tools=None)
    assert pieces == [CALL[i : i + 3] for i in range(0, len(CALL), 3)]
    assert (found, finish) == ([], "stop")


def named(hf, tokens):
    """What is told of these tokens with their log-probs."""
    request = ChatRequest(messages=[], logprobs=True)
    choice = Choice([1], list(tokens), [-1.0] * len(tokens), finish="stop")
    (found,) = Answers(request, "m", hf).whole([choice], {})["choices"]
    return [(one["token"], bytes(one["bytes"])) for one in found["logprobs"]["content"]]


def test_tokens_are_told_by_their_text_and_their_bytes(tmp_path):
    hf = load_tokenizer(tiny_checkpoint(tmp_path / "model"), 264).hf
    text = "\u00fc \u20ac"
    found = named(hf, hf(text, add_special_tokens=False).input_ids)
    assert b"".join(data for _, data in found).decode() == text
    assert [name for name, _ in found] == ["\ufffd"] * 2 + [" "] + ["\ufffd"] * 3


def test_tokens_keep_the_space_that_their_word_begins_with():
    hf = byte_fallback("\u2581x", "y", "a")
    assert named(hf, [0, 1]) == [(" x", b" x"), ("y", b"y")]
    assert named(hf, [3 + 0xC3]) == [("\ufffd", b"\xc3")]
