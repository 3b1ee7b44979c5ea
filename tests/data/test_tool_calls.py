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
        ("[" * 10**5, "[" * 10**5, []),
        (f"<tool_call>{'[' * 10**5}</tool_call>", f"<tool_call>{'[' * 10**5}</tool_call>", []),
        (QWEN.replace("ä", "\\ud83d"), "", [("find", {"text": "\ud83d", "count": 2})]),
    ],
)
def test_calls_and_what_is_said_beside_them(text, said, calls):
    rest, found = parse_tool_calls(text, TOOLS)
    assert rest == said and [call["name"] for call in found] == [name for name, _ in calls]
    for call, (_, arguments) in zip(found, calls, strict=True):
        assert arguments is None or json.loads(call["arguments"]) == arguments
        call["arguments"].encode()  # it can be sent


def test_arguments_of_any_depth_end_nothing():
    for depth in range(1, 4000, 7):
        deep = GLM.replace(">12<", f">{'[' * depth}{']' * depth}<").replace("text", "count")
        assert len(parse_tool_calls(deep, TOOLS)[1]) <= 1


@pytest.mark.parametrize("schema", [True, {"properties": {"text": True}}, {"properties": []}])
def test_schemas_that_say_nothing(schema):
    tool = {"name": "find", "parameters": schema}
    ((call,)) = parse_tool_calls(GLM, [tool])[1]
    assert json.loads(call["arguments"]) == {"text": 12, "count": 2}
