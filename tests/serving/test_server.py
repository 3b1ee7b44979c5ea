"""The server as OpenAI's own client sees it, and what it refuses."""

import json
import threading

import httpx
import openai
import pytest
from local_server import drawn, local_server
from starlette.requests import Request
from tiny_run import CHATML, tiny_checkpoint

from jaxrl.data.tokenizer import load_tokenizer
from jaxrl.options import ConfigError
from jaxrl.rollout.engine import Engine
from jaxrl.serve_config import ServerConfig
from jaxrl.serving.app import Guard

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
WITH_TOOLS = "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}" + CHATML


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny_checkpoint(tmp_path_factory.mktemp("inputs") / "tiny")
    (folder.parent / "tools.jinja").write_text(WITH_TOOLS)
    return folder


@pytest.fixture(scope="module")
def server(model):
    with local_server(model, chat_template=str(model.parent / "tools.jinja")) as local:
        yield local


@pytest.fixture(scope="module")
def hf(model):
    return load_tokenizer(model, 264).hf


def test_completions_of_text_and_of_tokens(server, hf):
    client = server.openai
    tokens = hf("hello").input_ids
    asked = {"model": "tiny", "max_tokens": 6, "temperature": 0}
    by_text = client.completions.create(prompt="hello", logprobs=0, **asked)
    (choice,) = by_text.choices
    assert choice.finish_reason == "length" and by_text.usage.completion_tokens == 6
    assert by_text.usage.prompt_tokens == len(tokens)
    assert len(choice.logprobs.token_logprobs) == len(choice.logprobs.tokens) == 6
    assert choice.logprobs.text_offset[0] == 0 and max(choice.logprobs.token_logprobs) <= 0
    by_ids = client.completions.create(
        prompt=tokens, extra_body={"return_token_ids": True}, **asked
    )
    assert by_ids.choices[0].text == choice.text
    extra = by_ids.choices[0].model_extra
    assert extra["prompt_token_ids"] == tokens and hf.decode(extra["token_ids"]) == choice.text
    several = client.completions.create(prompt=["hello", "b"], n=2, **asked)
    assert [c.index for c in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == several.choices[1].text == choice.text


def test_a_chat_is_its_templates_prompt_completed(server, hf):
    messages = [{"role": "user", "content": "hi"}]
    asked = {"max_tokens": 5, "seed": 3, "n": 2}
    chat = server.openai.chat.completions.create(
        model="tiny", messages=messages, logprobs=True, **asked
    )
    text = hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    plain = drawn(server, hf(text, add_special_tokens=False).input_ids, **asked)
    assert [c.message.content for c in chat.choices] == [c["text"] for c in plain]
    assert chat.choices[0].message.content != chat.choices[1].message.content
    assert len(chat.choices[0].logprobs.content) == 5
    again = server.openai.chat.completions.create(model="tiny", messages=messages, **asked)
    assert again.choices[0].message.content == chat.choices[0].message.content


@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_a_stream_says_the_same_in_parts(server, kind):
    client = server.openai
    asked = {"model": "tiny", "max_tokens": 20, "seed": 5, "n": 2}
    asked |= {"extra_body": {"return_token_ids": True}}
    if kind == "chat":
        create = client.chat.completions.create
        asked |= {"messages": [{"role": "user", "content": "hi"}], "logprobs": True}
    else:
        create, asked = client.completions.create, asked | {"prompt": "hi", "logprobs": 0}
    whole = create(**asked)
    texts, finishes, logprobs, parts = ["", ""], {}, [[], []], 0
    tokens, of_prompts = [[], []], [[], []]
    for chunk in create(stream=True, stream_options={"include_usage": True}, **asked):
        for choice in chunk.choices:
            parts += 1
            said = choice.delta.content if kind == "chat" else choice.text
            texts[choice.index] += said or ""
            tokens[choice.index] += (choice.model_extra or {}).get("token_ids", [])
            of_prompts[choice.index] += (choice.model_extra or {}).get("prompt_token_ids", [])
            if choice.finish_reason:
                finishes[choice.index] = choice.finish_reason
            if choice.logprobs:
                found = choice.logprobs
                logprobs[choice.index] += (
                    [one.logprob for one in found.content]
                    if kind == "chat"
                    else found.token_logprobs
                )
        usage = chunk.usage
    for i, choice in enumerate(whole.choices):
        text = choice.message.content if kind == "chat" else choice.text
        assert (texts[i], finishes[i]) == (text, choice.finish_reason)
        assert (
            len(logprobs[i])
            == len(tokens[i])
            == len(choice.logprobs.content if kind == "chat" else choice.logprobs.tokens)
        )
        ids = {"token_ids": tokens[i], "prompt_token_ids": of_prompts[i]}
        assert {key: choice.model_extra[key] for key in ids} == ids
        assert len(of_prompts[i]) == whole.usage.prompt_tokens
    assert parts > 6 and usage.completion_tokens == whole.usage.completion_tokens


def test_stop_texts_and_stop_tokens(server, hf):
    (free,) = drawn(server, "ab", max_tokens=12, temperature=0)
    stop = free["text"][4:6]
    (cut,) = drawn(server, "ab", max_tokens=12, temperature=0, stop=stop)
    assert cut["text"] == free["text"][: free["text"].index(stop)]
    assert cut["finish_reason"] == "stop"
    (by_token,) = drawn(
        server, "ab", max_tokens=12, temperature=0, stop_token_ids=[free["token_ids"][3]]
    )
    first = free["token_ids"].index(free["token_ids"][3])
    assert by_token["token_ids"] == free["token_ids"][: first + 1]
    stream = server.openai.completions.create(
        model="tiny", prompt="ab", max_tokens=12, temperature=0, stop=stop, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == cut["text"]


def test_tools_are_shown_by_the_template_and_calls_are_found(server, monkeypatch):
    from jaxrl.serving import answers

    client, seen = server.openai, []
    call = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    parse = answers.parse_tool_calls
    monkeypatch.setattr(
        answers, "parse_tool_calls", lambda text, tools: seen.append(text) or parse(call, tools)
    )
    messages = [{"role": "user", "content": "1?"}]
    chat = client.chat.completions.create(
        model="tiny", messages=messages, tools=TOOLS, max_tokens=3, extra_body={"ignore_eos": True}
    )
    (found,) = chat.choices[0].message.tool_calls
    assert found.function.name == "add" and json.loads(found.function.arguments) == {"a": 1}
    assert len(seen) == 1 and chat.choices[0].message.content is None
    plain = client.chat.completions.create(model="tiny", messages=messages, max_tokens=3)
    assert chat.usage.prompt_tokens > plain.usage.prompt_tokens + 50  # the tools are in the prompt
    # What the client sends back has arguments as text.
    answered = [
        *messages,
        {"role": "assistant", "content": None, "tool_calls": [found.model_dump()]},
        {"role": "tool", "tool_call_id": found.id, "content": "2"},
    ]
    client.chat.completions.create(model="tiny", messages=answered, tools=TOOLS, max_tokens=3)


def test_models_health_and_metrics(server):
    (model,) = server.openai.models.list().data
    assert (model.id, model.model_extra["max_model_len"]) == ("tiny", 256)
    assert server.openai.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError, match="model 'a/b' is not served here; use 'tiny'"):
        server.openai.models.retrieve("a/b")
    assert server.http.get("/health").status_code == 200
    drawn(server, "x", max_tokens=4)
    text = server.http.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["jaxrl_generated_tokens_total"]) >= 4
    assert float(values["jaxrl_running"]) == 0 and "jaxrl_first_token_seconds_count" in values
    assert values['jaxrl_completions_total{finish="length"}']


@pytest.mark.parametrize(
    ("asked", "status", "problem"),
    [
        ({"prompt": "x", "temprature": 1}, 400, "temprature: Extra inputs are not permitted"),
        ({"prompt": "x", "temperature": -1}, 400, "temperature is -1.0; it takes 0 and more"),
        ({"prompt": "x", "max_tokens": 0}, 400, "max_tokens: "),
        ({"prompt": "x" * 300}, 400, "the prompt has 300 tokens, and prompt and completion"),
        ({"prompt": [5, 264]}, 400, "the prompt has token 264; the model's are 0 to 263"),
        ({"prompt": [10**12]}, 400, "the prompt has token 1000000000000; the model's are"),
        ({"prompt": "x", "stop_token_ids": [264]}, 400, "stop_tokens has 264; the model's are"),
        ({"prompt": "x", "stop_token_ids": [5 * 10**9]}, 400, "stop_tokens has 5000000000; the"),
        ({"prompt": "x", "stop_token_ids": [-(10**12)]}, 400, "stop_tokens has -1000000000000; "),
        ({"prompt": "x", "seed": -1}, 400, "seed: "),
        ({"prompt": []}, 400, "prompt is empty"),
        ({"prompt": "x", "logprobs": 5}, 400, "logprobs is 5; those of drawn tokens are given"),
        ({"prompt": "x", "n": 1000}, 400, "1 prompts with n 1000 are more completions than"),
        ({"prompt": "x", "frequency_penalty": 1}, 400, "frequency_penalty is 1.0, and not offered"),
        ({"prompt": "x", "echo": True}, 400, "echo, suffix and best_of are not offered"),
        ({"prompt": "x", "model": "other"}, 404, "model 'other' is not served here; use 'tiny'"),
        ({"messages": []}, 400, "messages is empty"),
        ({"messages": [{"role": "bot", "content": "x"}]}, 400, "has role 'bot'; one of system"),
        ({"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}, 400, "top_logprobs"),
        ({"messages": [{"role": "user", "content": "x"}], "tool_choice": "required"}, 400, "auto"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "its text cannot be encoded"),
        ({"prompt": "x", "stop": ["x"] * 65}, 400, "stop has 65 texts, the longest of 1 char"),
        ({"prompt": "x", "stop": "x" * 1025}, 400, "stop has 1 texts, the longest of 1025 char"),
        *(
            (
                {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {name: 1}},
                400,
                f"chat_template_kwargs has '{name}', no variable of a chat template",
            )
            for name in ("chat_template", "conversation", "messages", "self", "tools", "tokenize")
        ),
    ],
)
def test_bad_requests_are_refused_in_one_line(server, asked, status, problem):
    path = "/v1/chat/completions" if "messages" in asked else "/v1/completions"
    # httpx would refuse to write half a character.
    headers = {"Content-Type": "application/json"}
    answer = server.http.post(path, content=json.dumps(asked), headers=headers)
    error = answer.json()["error"]
    assert answer.status_code == status and problem in error["message"]
    assert "\n" not in error["message"] and error["type"] == "invalid_request_error"
    assert server.served.service.engine.counts["waiting"] == 0


def test_numbers_of_any_size_end_no_server(server):
    asked = {"max_tokens": 6, "seed": 10**30, "temperature": 1.5}
    huge = drawn(server, "ab", top_k=5 * 10**9, **asked)
    assert huge == drawn(server, "ab", **asked) == drawn(server, "ab", top_k=264, **asked)
    (choice,) = drawn(server, "ab", max_tokens=10**12)
    assert choice["finish_reason"] in ("length", "stop")
    update = {"model_path": "/nowhere", "version": 10**400}
    answer = server.http.post("/update_weights_from_disk", json=update)
    assert answer.status_code == 400 and "version" in answer.json()["error"]["message"]
    assert server.http.get("/health").status_code == 200


def test_a_body_that_is_no_json_or_too_large(server):
    http = server.http
    assert http.post("/v1/completions", content=b"{").status_code == 400
    answer = http.post("/v1/completions", content=b" " * (5 * 2**20))
    assert answer.status_code == 413 and "may have 4194304" in answer.json()["error"]["message"]
    assert http.post("/v1/completions", content=iter([b"{}"])).status_code == 411
    assert http.get("/nothing").status_code == 404


def test_who_leaves_is_no_longer_drawn_for(server):
    engine = server.served.service.engine
    asked = {"prompt": "x", "max_tokens": 250, "n": 4, "ignore_eos": True}
    with server.http.stream("POST", "/v1/completions", json=asked | {"stream": True}) as answer:
        next(answer.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json=asked | {"n": 60}, timeout=0.3)
    for _ in range(3000):
        if not engine.busy:
            break
        threading.Event().wait(0.01)
    text = server.http.get("/metrics").text
    aborted = [line for line in text.splitlines() if 'completions_total{finish="abort"}' in line]
    assert float(aborted[0].split()[-1]) >= 50 and not engine.busy


def test_too_much_at_once_is_told_to_come_again(model):
    with local_server(model, server={"max_waiting": 6}) as server:
        answers = []

        def ask():
            asked = {"prompt": "x", "max_tokens": 200, "n": 5, "ignore_eos": True}
            answers.append(server.http.post("/v1/completions", json=asked))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {answer.status_code for answer in answers} == {200, 429}
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert refused.headers["retry-after"] == "1"
        assert "6 completions wait already" in refused.json()["error"]["message"]


@pytest.mark.parametrize("asked", [{"prompt": "x", "n": 7}, {"prompt": ["x", "y"], "n": 4}])
def test_more_than_may_ever_wait_is_not_told_to_come_again(model, asked):
    with local_server(model, server={"max_waiting": 6}) as server:
        with pytest.raises(openai.BadRequestError) as refused:
            server.openai.completions.create(model="tiny", **asked)
        said = f"n {asked['n']} are more completions than the 6 of this server's max_waiting; ask"
        assert said in str(refused.value) and "--config.server.max_waiting" in str(refused.value)
        for _ in range(3):  # what may wait is always taken by a server that does nothing else
            assert len(drawn(server, ["x", "y"], n=3, max_tokens=2)) == 6


def test_a_request_that_takes_too_long_is_given_up(model, monkeypatch):
    monkeypatch.setattr(Engine, "step", lambda engine: [])  # it takes requests, and draws nothing
    with local_server(model, server={"timeout_s": 0.2}) as server:
        asked = {"prompt": "x"}
        answer = server.http.post("/v1/completions", json=asked)
        assert answer.status_code == 504 and answer.json()["error"]["type"] == "timeout_error"
        events = server.http.post("/v1/completions", json=asked | {"stream": True}).text
        assert "the time of the request is over" in events and events.endswith("[DONE]\n\n")


def test_prompts_of_one_request_are_drawn_together(model, server, monkeypatch):
    step, waited = Engine.step, []

    def counted(engine):
        waited.append(engine.counts["waiting"])
        return step(engine)

    monkeypatch.setattr(Engine, "step", counted)
    asked = ["a", "bc", "d", "efg", "h", "ij"]
    together = drawn(server, asked, max_tokens=2, temperature=0)
    assert waited[0] == 6
    alone = [drawn(server, prompt, max_tokens=2, temperature=0)[0] for prompt in asked]
    assert [c["token_ids"] for c in together] == [c["token_ids"] for c in alone]
    waited.clear()
    too_long = {"prompt": ["a", "b", "x" * 300], "max_tokens": 2}
    assert server.http.post("/v1/completions", json=too_long).status_code == 400
    assert not waited and not server.served.service.engine.busy


def test_what_is_null_is_left_open(server):
    open_ = dict.fromkeys(("temperature", "top_p", "n", "stream", "stop", "seed", "logit_bias"))
    asked = {"prompt": "x", "max_tokens": 2, "echo": None, "logprobs": None, **open_}
    assert server.http.post("/v1/completions", json=asked).status_code == 200
    stream = {"stream": True, "stream_options": {"include_usage": None}}
    assert server.http.post("/v1/completions", json=asked | stream).status_code == 200
    asked = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "tools": None}
    answer = server.openai.chat.completions.create(model="tiny", **asked, **open_)
    assert answer.choices[0].finish_reason == "length"


def test_a_key_opens_what_is_locked(model):
    with local_server(model, server={"api_key": "secret"}) as server:
        with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
            server.openai.models.list()
        server.key = "secret"
        assert server.openai.models.list().data[0].id == "tiny"
        assert server.http.get("/health").status_code == 200
        assert server.http.post("/update_weights_from_disk", json={}).status_code == 401


def test_what_the_client_calls_the_host_opens_nothing(monkeypatch):
    scope = {"type": "http", "path": "/v1/completions", "headers": [(b"host", b"x/health?")]}
    guard = Guard(None, ServerConfig(api_key="secret"))  # type: ignore[arg-type]
    monkeypatch.setattr(Request, "url", httpx.URL("http://x/health?/v1/completions"))
    assert guard.refusal(Request(scope)).status_code == 401
    assert guard.refusal(Request(scope | {"path": "/health"})) is None


def test_other_hosts_are_served_with_a_key_alone(model):
    with (
        pytest.raises(ConfigError, match="is reached from other hosts: set JAXRL_API_KEY"),
        local_server(model, server={"host": "0.0.0.0"}),
    ):
        pass
