"""Calls of tools in the forms of three families."""

import json

import pytest

from jaxrl.data.tool_calls import parse_tool_calls

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "find",
            "parameters": {
                "type": "object",
                "properties": {"text": {"type": "string"}, "count": {"type": "integer"}},
            },
        },
    },
    {"name": "now"},
]
QWEN = '<tool_call>\n{"name": "find", "arguments": {"text": "ä", "count": 2}}\n</tool_call>'
GLM = (
    "<tool_call>find\n<arg_key>text</arg_key>\n<arg_value>12</arg_value>\n"
    "<arg_key>count</arg_key>\n<arg_value>2</arg_value>\n</tool_call>"
)
LLAMA = '{"name": "find", "parameters": {"text": "x", "count": 2}}'


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        (QWEN, "", [("find", {"text": "ä", "count": 2})]),
        (GLM, "", [("find", {"text": "12", "count": 2})]),  # text stays text
        (LLAMA, "", [("find", {"text": "x", "count": 2})]),
        ("<tool_call>now</tool_call>", "", [("now", {})]),
        (f"So:\n{QWEN}\n{GLM}", "So:", [("find", None), ("find", None)]),
        ("no call {at all}", "no call {at all}", []),
        (QWEN.replace("find", "other"), QWEN.replace("find", "other"), []),
        ("<tool_call>{broken</tool_call>", "<tool_call>{broken</tool_call>", []),
        ('{"name": "find", "parameters": 3}', '{"name": "find", "parameters": 3}', []),
        ('{"a": 1}', '{"a": 1}', []),
    ],
)
def test_calls_and_what_is_said_beside_them(text, said, calls):
    rest, found = parse_tool_calls(text, TOOLS)
    assert rest == said and [call["name"] for call in found] == [name for name, _ in calls]
    for call, (_, arguments) in zip(found, calls, strict=True):
        assert arguments is None or json.loads(call["arguments"]) == arguments
