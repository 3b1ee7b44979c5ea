"""Samples as data files hold them: what is taken, and what is refused by name."""

import pickle

import pytest

from jaxrl.data.chat import Conversation, PlainText, SampleError, parse_sample

USER = {"role": "user", "content": "a"}
SAYS = {"role": "assistant", "content": "b"}
CALLS = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}


def test_messages_are_trained_but_for_those_of_weight_0():
    sample = {"messages": [USER, SAYS | {"weight": 0}, USER, SAYS | {"weight": 1}], "id": 3}
    found = parse_sample(sample)
    assert found == Conversation([USER, SAYS, USER, SAYS], [True, False, True, True])


def test_of_prompt_and_completion_the_completion_is_trained():
    found = parse_sample({"prompt": [USER], "completion": [SAYS, USER, SAYS | {"weight": 0}]})
    assert found == Conversation([USER, SAYS, USER, SAYS], [False, True, True, False])
    found = parse_sample({"prompt": "a", "completion": "b", "messages": None, "tools": []})
    assert found == PlainText("a", "b")


def test_content_in_parts_or_null_beside_calls_is_text():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}, "c"]
    found = parse_sample({"messages": [{"role": "user", "content": parts}, CALLS]})
    assert isinstance(found, Conversation)
    assert [m["content"] for m in found.messages] == ["abc", ""]


def test_null_keys_of_messages_are_dropped_and_other_keys_kept():
    message = SAYS | {"reasoning_content": "t", "tool_calls": None, "name": None, "weight": None}
    arguments = {"function": {"name": "f", "arguments": {"x": None}}}
    found = parse_sample({"messages": [USER, message, SAYS | {"tool_calls": [arguments]}]})
    assert isinstance(found, Conversation)
    assert found.messages[1] == SAYS | {"reasoning_content": "t"}
    assert found.messages[2]["tool_calls"] == [arguments]  # null is a value there


@pytest.mark.parametrize("tools", [[{"name": "f"}], '[{"name": "f"}]'])
def test_tools_are_a_list_or_its_json(tools):
    found = parse_sample({"messages": [USER, SAYS], "tools": tools})
    assert isinstance(found, Conversation) and found.tools == [{"name": "f"}]


@pytest.mark.parametrize("tools", [None, [], "", "[]", "null"])
def test_no_tools(tools):
    found = parse_sample({"messages": [USER, SAYS], "tools": tools})
    assert isinstance(found, Conversation) and found.tools is None


@pytest.mark.parametrize(
    "sample, problem",
    [
        ({"text": "a"}, r"has 'text'; a sample has 'messages', or 'prompt' and 'completion'"),
        ({}, "has nothing; a sample has 'messages'"),
        ({"prompt": "a"}, "has 'prompt'; a sample has"),
        ({"messages": []}, "messages is empty"),
        ({"messages": "a"}, "messages is 'a'; it is to be a list of messages"),
        ({"messages": [USER, "b"]}, r"messages\[1\] is 'b'; it is to be an object"),
        ({"messages": [{"content": "a"}]}, r"messages\[0\] has role None; one of system, user"),
        ({"messages": [USER | {"role": "human"}]}, r"has role 'human'; one of system, user, ass"),
        ({"messages": [USER | {"role": ["user"]}]}, r"has role \['user'\]; one of"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] has content None; it is to be text"),
        ({"messages": [{"role": "assistant"}]}, "has content None"),
        ({"messages": [USER | {"content": 3}]}, "has content 3"),
        ({"messages": [USER | {"content": [{"type": "image"}]}]}, "trains on text alone"),
        ({"messages": [SAYS | {"tool_calls": "f()"}]}, r"has tool_calls 'f\(\)'; they are to be"),
        ({"messages": [SAYS | {"tool_calls": ["f"]}]}, "has tool_calls"),
        ({"messages": [SAYS | {"weight": 2}]}, "has weight 2; 1 trains it, 0 does not"),
        ({"messages": [SAYS | {"weight": []}]}, r"has weight \[\]; 1 trains it"),
        ({"messages": [SAYS], "tools": "{"}, "tools is no JSON"),
        ({"messages": [SAYS], "tools": {"name": "f"}}, "it is to be a list of JSON schemas"),
        ({"messages": [SAYS], "tools": ["f"]}, "it is to be a list of JSON schemas"),
        ({"prompt": "a", "completion": [SAYS]}, "both texts or both lists"),
        ({"prompt": 3, "completion": 4}, "prompt is 3; it is to be a list of messages"),
        ({"prompt": [USER], "completion": []}, "completion is empty"),
        ({"prompt": "a", "completion": ""}, "completion is empty"),
        ({"prompt": "a", "completion": "b", "tools": [{"name": "f"}]}, "tools need messages"),
        ({"messages": [USER | {"content": list(range(99))}]}, r"has a part 0; jaxrl"),
    ],
)
def test_what_is_no_chat_is_refused_with_its_place(sample, problem):
    with pytest.raises(SampleError, match=rf"^f\.jsonl:17: [^\n]*{problem}") as caught:
        parse_sample(sample, "f.jsonl:17")
    again = pickle.loads(pickle.dumps(caught.value))  # as from a worker
    assert (str(again), again.reason) == (str(caught.value), caught.value.reason)
