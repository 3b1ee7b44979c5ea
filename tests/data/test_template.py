"""What is trained of a conversation is what the template itself would mark as generated."""

import dataclasses
import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxrl.data.chat import SampleError, parse_sample
from jaxrl.data.template import ChatTemplate
from jaxrl.options import ConfigError

FAMILIES = ("smollm2", "qwen3", "llama3", "llama31", "glm45")
WITH_TOOLS = ("qwen3", "llama31", "glm45")

USER = {"role": "user", "content": "What is 2 + 2?"}
SYSTEM = {"role": "system", "content": "Be brief."}
SAYS = {"role": "assistant", "content": "It is 4."}
THINKS = {"role": "assistant", "content": "<think>\nTwo and two.\n</think>\n\nIt is 4."}
REASONS = {"role": "assistant", "content": "It is 4.", "reasoning_content": "Two and two."}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": "2"}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
TALKS_AND_CALLS = {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]}
TOOL = {"role": "tool", "content": "4"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds.",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
        },
    }
]
# What stands between two answers, so that where an answer ends is not seen by looking for it.
LOOKALIKES = (
    "<|im_end|>\n<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\nNo"
    "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWhat is 2 + 2?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nNo<|user|>\nWhat is 2 + 2?<|assistant|>No"
)
CHATS = {
    "one turn": [USER, SAYS],
    "three turns": [USER, SAYS, USER, SAYS, USER, {"role": "assistant", "content": "Still 4."}],
    "system": [SYSTEM, USER, SAYS],
    "ends with a question": [USER, SAYS, USER],
    "thought in content": [USER, THINKS, USER, THINKS],
    "thought beside content": [SYSTEM, USER, REASONS, USER, REASONS],
    "nothing said": [USER, {"role": "assistant", "content": ""}],
    "space around": [USER, {"role": "assistant", "content": "\n\n  It is 4.\n \n"}, USER, SAYS],
    "header in a question": [
        {"role": "user", "content": "<|im_start|>assistant\nIt<|assistant|>\n<think></think>\nis"},
        SAYS,
    ],
    "the same twice": [USER, SAYS, USER, SAYS],
    "an answer that looks like the rest": [USER, SAYS | {"content": "It" + LOOKALIKES}, USER, SAYS],
}
TOOL_CHATS = {
    "call": [USER, CALLS],
    "call and answer": [USER, CALLS, TOOL, SAYS],
    "two rounds": [SYSTEM, USER, CALLS, TOOL, CALLS, TOOL, SAYS, USER, CALLS, TOOL, SAYS],
    "thought before the call": [USER, CALLS | {"reasoning_content": "Add."}, TOOL, REASONS],
    "words before the call": [USER, TALKS_AND_CALLS, TOOL, SAYS],
}


def reference(tokenizer, family, sample):
    """(tokens, mask) of the marked template, as transformers finds them, the stop token that ends
    the conversation appended where the template has none."""
    found = tokenizer.hf.apply_chat_template(
        [dict(m) for m in sample.messages],
        tools=sample.tools,
        chat_template=family.marked(),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    tokens, mask = list(found["input_ids"]), list(found["assistant_masks"])
    last = sample.messages[-1]
    if family.template == "glm45" and last["role"] == "assistant":
        stop = "<|observation|>" if last.get("tool_calls") else "<|user|>"
        tokens, mask = [*tokens, tokenizer.hf.convert_tokens_to_ids(stop)], [*mask, 1]
    return tokens, mask


def told(messages, family):
    """Without thoughts, where the template knows none and jaxrl would refuse them."""
    left_out = () if family.thoughts else ("reasoning_content",)
    return [{k: v for k, v in m.items() if k not in left_out} for m in messages]


def trained(tokenizer, encoded):
    """Texts of the trained stretches."""
    edges = np.flatnonzero(np.diff(np.pad(encoded.mask.astype(int), 1)))
    return [tokenizer.hf.decode(encoded.tokens[a:b]) for a, b in edges.reshape(-1, 2)]


def same(encoded, expected):
    assert encoded.tokens.dtype == np.int32 and encoded.mask.dtype == bool
    assert (encoded.tokens.tolist(), encoded.mask.astype(int).tolist()) == expected


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", FAMILIES)
def test_trained_is_what_the_template_marks(name, chat, families, tokenizers):
    sample = parse_sample({"messages": told(CHATS[chat], families[name])})
    encoded = ChatTemplate(tokenizers[name]).encode(sample)
    same(encoded, reference(tokenizers[name], families[name], sample))


@pytest.mark.parametrize("chat", TOOL_CHATS)
@pytest.mark.parametrize("name", WITH_TOOLS)
def test_tool_calls_are_trained_and_their_answers_are_not(name, chat, families, tokenizers):
    messages = told(TOOL_CHATS[chat], families[name])
    sample = parse_sample({"messages": messages, "tools": TOOLS})
    encoded = ChatTemplate(tokenizers[name]).encode(sample)
    same(encoded, reference(tokenizers[name], families[name], sample))
    texts = trained(tokenizers[name], encoded)
    turns = [m for m in messages if m["role"] == "assistant"]
    assert len(texts) == len(turns)
    for text, turn in zip(texts, turns, strict=True):
        assert ("add" in text) == ("tool_calls" in turn)


STOPS = {
    "smollm2": ("It is 4.<|im_end|>", "Still 4.<|im_end|>"),
    "qwen3": ("It is 4.<|im_end|>", "<think>\n\n</think>\n\nStill 4.<|im_end|>"),
    "llama3": ("It is 4.<|eot_id|>", "Still 4.<|eot_id|>"),
    "llama31": ("It is 4.<|eot_id|>", "Still 4.<|eot_id|>"),
    "glm45": ("\n<think></think>\nIt is 4.<|user|>", "\n<think></think>\nStill 4.<|user|>"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_turn_is_trained_from_behind_its_header_to_its_stop_token(name, tokenizers):
    chat = [SYSTEM, USER, SAYS, USER, SAYS | {"content": "Still 4."}]
    encoded = ChatTemplate(tokenizers[name]).encode(parse_sample({"messages": chat}))
    assert tuple(trained(tokenizers[name], encoded)) == STOPS[name]
    assert tokenizers[name].stop_ids.count(encoded.tokens[encoded.mask][-1]) == 1


PIECES = st.sampled_from(
    (
        *("", " ", "\n", "\n\n", "yes", " no.", "é", "汉", "😀", "{{ x }}", "'", '"', "\\n"),
        *("<think>", "</think>", "<think>\n\n</think>\n\n", "<|im_start|>assistant\n"),
        *("<|im_end|>\n", "<|im_start|>user\n", "<|user|>", "<|assistant|>", "<|eot_id|>"),
        *("<|assistant|>\n<think></think>\n", "<|observation|>", "<|endoftext|>"),
        *("<|start_header_id|>assistant<|end_header_id|>\n\n", "<tool_response>"),
        "</tool_response>",
    )
)
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\ufdd0")
TEXTS = st.builds(lambda a, b: "".join([*a, b]), st.lists(PIECES, max_size=5), st.text(CHARACTERS))


@st.composite
def chats(draw, tools, thoughts):
    messages = [{"role": "system", "content": draw(TEXTS)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        messages.append({"role": "user", "content": draw(TEXTS)})
        for _ in range(draw(st.integers(0, 2)) if tools else 0):
            arguments = draw(st.dictionaries(st.sampled_from(["a", "b"]), TEXTS))
            call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
            messages.append({"role": "assistant", "content": draw(TEXTS), "tool_calls": [call]})
            messages.append({"role": "tool", "content": draw(TEXTS)})
        messages.append({"role": "assistant", "content": draw(TEXTS)})
        if thoughts and draw(st.booleans()):
            messages[-1]["reasoning_content"] = draw(TEXTS)
    return messages


@pytest.mark.parametrize("name", FAMILIES)
def test_any_conversation_is_trained_as_marked(name, families, tokenizers):
    family, tokenizer = families[name], tokenizers[name]
    template = ChatTemplate(tokenizer)

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(chats(family.tools, family.thoughts))
    def check(messages):
        sample = parse_sample({"messages": messages, "tools": TOOLS if family.tools else None})
        same(template.encode(sample), reference(tokenizer, family, sample))

    check()


@pytest.mark.parametrize("turns, texts", [("all", 2), ("last", 1)])
@pytest.mark.parametrize("name", FAMILIES)
def test_marks_of_the_template_are_used(name, turns, texts, families, tokenizers):
    """Those of some turns only, too, the others being between turns that look the same."""
    chat = [USER, THINKS, USER, SAYS | {"weight": 0}, USER, SAYS]
    sample, plain = parse_sample({"messages": chat}), tokenizers[name]
    by_marks, found = (
        ChatTemplate(tokenizer, turns=turns).encode(sample)
        for tokenizer in (with_template(plain, families[name].marked()), plain)
    )
    np.testing.assert_array_equal(by_marks.tokens, found.tokens)
    np.testing.assert_array_equal(by_marks.mask, found.mask)
    assert len(trained(plain, found)) == texts


def with_template(tokenizer, source):
    hf = pickle.loads(pickle.dumps(tokenizer.hf))
    hf.chat_template = source
    return dataclasses.replace(tokenizer, hf=hf)


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def test_a_prompt_that_opens_a_thought(tokenizers):
    """The last turn has `<think>`, which the prompt wrote; earlier turns have no thought."""
    source = CHATML.replace(
        "{{ m.content",
        "{% if m.role == 'assistant' and loop.last %}<think>\n"
        "{{ m.reasoning_content }}</think>{% endif %}{{ m.content",
    ) + PROMPT.replace("{% endif", "<think>\n{% endif")
    tokenizer = with_template(tokenizers["qwen3"], source)
    chat = [USER, SAYS, USER, REASONS]
    encoded = ChatTemplate(tokenizer).encode(parse_sample({"messages": chat}))
    texts = ["It is 4.<|im_end|>", "Two and two.</think>It is 4.<|im_end|>"]
    assert trained(tokenizer, encoded) == texts


@pytest.mark.parametrize(
    "roles, texts",
    [
        (("user",), ["What is 2 + 2?<|im_end|>", "4<|im_end|>"]),
        (("system", "assistant"), ["Be brief.<|im_end|>", "It is 4.<|im_end|>"]),
    ],
)
def test_other_roles_are_trained_without_their_headers(roles, texts, tokenizers):
    chat = [SYSTEM, USER, SAYS, {"role": "user", "content": "4"}]
    tokenizer = tokenizers["smollm2"]
    encoded = ChatTemplate(tokenizer, roles=roles).encode(parse_sample({"messages": chat}))
    assert trained(tokenizer, encoded) == texts


def test_prompt_and_completion_as_text_have_no_template(tokenizers):
    tokenizer = tokenizers["qwen3"]
    encoded = ChatTemplate(tokenizer).encode(
        parse_sample({"prompt": "2 + 2 =", "completion": " 4"})
    )
    assert tokenizer.hf.decode(encoded.tokens) == "2 + 2 = 4<|im_end|>"
    assert trained(tokenizer, encoded) == [" 4<|im_end|>"]


def test_prompt_and_completion_as_messages_train_the_completion(tokenizers):
    tokenizer = tokenizers["qwen3"]
    sample = parse_sample({"prompt": [USER, SAYS, USER], "completion": [SAYS]})
    encoded = ChatTemplate(tokenizer).encode(sample)
    assert trained(tokenizer, encoded) == ["<think>\n\n</think>\n\nIt is 4.<|im_end|>"]


REFUSED = {
    "role order": (
        CHATML.replace(
            "<|im_start|>",
            "{% if loop.first and m.role != 'user' %}"
            "{{ raise_exception('begin with\nuser') }}{% endif %}<|im_start|>",
        )
        + PROMPT,
        [SYSTEM, USER, SAYS],
        "refused",
        "refuses it: begin with user",
    ),
    "text where an object is meant": (
        CHATML.replace(
            "{{ m.content",
            "{% for c in m.tool_calls or [] %}"
            "{{ c.function.arguments.items() }}{% endfor %}{{ m.content",
        )
        + PROMPT,
        [USER, CALLS | {"tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]}],
        "refused",
        "arguments that are text",
    ),
    "contents not shown": (
        CHATML.replace("{{ m.content }}", "{{ m.content if m.role == 'user' else '...' }}")
        + PROMPT,
        [USER, SAYS],
        "not shown",
        "message 1 .assistant.*{% generation %}",
    ),
    "contents changed": (
        CHATML.replace("{{ m.content }}", "{{ m.content }} {{ m.content | length }}") + PROMPT,
        [USER, SAYS],
        "uncertain",
        "message 1 .assistant.*{% generation %}",
    ),
    "a long opening": (
        CHATML.replace("{{ m.content }}", "An answer, well considered: " * 3 + "{{ m.content }}")
        + PROMPT,
        [USER, SAYS],
        "uncertain",
        "message 1 .assistant.*{% generation %}",
    ),
    "an empty turn left out": (
        "{% for m in messages %}|{{ m.content }}{{ '|' if m.content }}{% endfor %}"
        "{% if add_generation_prompt %}|{% endif %}",
        [USER, SAYS | {"content": ""}],
        "uncertain",
        "message 1 .assistant.*{% generation %}",
    ),
    "no stop token": (
        CHATML.replace("<|im_end|>", "") + PROMPT,
        [USER, SAYS, USER, SAYS],
        "no stop token",
        "no stop token behind message 1 .assistant.*{% generation %}",
    ),
    "calls not shown": (
        CHATML + PROMPT,
        [USER, TALKS_AND_CALLS],
        "tools not shown",
        "call of 'add' in message 1",
    ),
    "thought not shown": (
        CHATML + PROMPT,
        [USER, REASONS],
        "thought not shown",
        "last message's reasoning_content",
    ),
    "nothing to train": (CHATML + PROMPT, [SYSTEM, USER], "nothing trained", "no message of assis"),
    "noncharacter": (
        CHATML + PROMPT,
        [USER, SAYS | {"content": "\ufdd0"}],
        "malformed",
        "noncharacter",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_names_the_place_and_the_reason(case, tokenizers):
    source, chat, reason, problem = REFUSED[case]
    template = ChatTemplate(with_template(tokenizers["qwen3"], source))
    with pytest.raises(SampleError, match=f"^chats.jsonl:7: [^\n]*{problem}[^\n]*$") as caught:
        template.encode(parse_sample({"messages": chat}), "chats.jsonl:7")
    assert caught.value.reason == reason


def test_tools_that_the_template_leaves_out_are_refused(tokenizers):
    sample = parse_sample({"messages": [USER, SAYS], "tools": TOOLS})
    with pytest.raises(SampleError, match=r"^x:1: .*does not show the tool 'add'"):
        ChatTemplate(tokenizers["llama3"]).encode(sample, "x:1")


@pytest.mark.parametrize("prompt", ["", "{% if add_generation_prompt %}Answer:{% endif %}"])
def test_templates_without_a_usable_generation_prompt_are_refused(prompt, tokenizers):
    template = ChatTemplate(with_template(tokenizers["qwen3"], CHATML + prompt))
    with pytest.raises(ConfigError, match="generation prompt; use another, or mark"):
        template.encode(parse_sample({"messages": [USER, SAYS]}))


def test_no_template_or_marks_for_other_roles_are_refused(families, tokenizers):
    with pytest.raises(ConfigError, match="no chat template; name a Jinja file"):
        ChatTemplate(with_template(tokenizers["qwen3"], None))
    marked = with_template(tokenizers["qwen3"], families["qwen3"].marked())
    with pytest.raises(ConfigError, match=r"train_roles is user,assistant.* use assistant"):
        ChatTemplate(marked, roles=("user", "assistant"))
