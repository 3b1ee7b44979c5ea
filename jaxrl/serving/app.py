"""The server's routes: OpenAI's API, health, metrics and new weights."""

import asyncio
import contextlib
import hmac
import inspect
import time
from collections.abc import AsyncIterator, Sequence

import prometheus_client
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxrl.data.chat import Conversation, parse_sample
from jaxrl.data.tokenizer import Tokenizer
from jaxrl.options import ConfigError
from jaxrl.rollout.requests import Sampling
from jaxrl.serve_config import ServerConfig
from jaxrl.serving.answers import Answers, Choice, event, failure
from jaxrl.serving.schema import ChatRequest, CompletionRequest, UpdateRequest
from jaxrl.serving.served import NotWhole, Served
from jaxrl.serving.service import Busy, EngineEnded, Ticket

OPEN = ("/health", "/metrics")  # without a key


class Guard:
    """Lets requests through that bear the key and whose bodies are not too large."""

    def __init__(self, app: ASGIApp, options: ServerConfig):
        self.app, self.options = app, options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = self.refusal(Request(scope)) if scope["type"] == "http" else None
        await (refused or self.app)(scope, receive, send)

    def refusal(self, request: Request) -> Response | None:
        key = self.options.api_key
        # Not `request.url`: some versions of Starlette make it of what the client calls the host.
        if key and request.scope["path"] not in OPEN:
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), key.encode()):
                return _refused(401, "the API key is missing or wrong", "authentication_error")
        length = request.headers.get("content-length", "0")
        most = self.options.max_body_bytes
        if not length.isdigit() or int(length) > most:
            return _refused(413, f"the body has {length} bytes, and may have {most}")
        if "transfer-encoding" in request.headers:  # nobody knows how long it will be
            return _refused(411, "the request says no Content-Length")
        return None


def make_server(served: Served) -> uvicorn.Server:
    """An HTTP server of the app that ends when the engine fails."""
    settings = uvicorn.Config(make_app(served), log_level="warning", timeout_graceful_shutdown=5)
    server = uvicorn.Server(settings)

    def end() -> None:
        server.should_exit = True

    served.service.on_failure = end
    return server


def make_app(served: Served) -> FastAPI:
    """Errors are OpenAI's objects, of one line each."""
    app = FastAPI(title="jaxrl", docs_url=None, redoc_url=None)
    options, service = served.options, served.service
    model = {"id": served.name, "object": "model", "created": int(time.time())}
    model |= {"owned_by": "jaxrl", "max_model_len": served.max_len}

    app.add_middleware(Guard, options=options)

    @app.exception_handler(ConfigError)
    async def bad(_: Request, error: ConfigError) -> Response:
        return _refused(400, str(error))

    @app.exception_handler(NotWhole)
    async def late(_: Request, error: NotWhole) -> Response:
        return _refused(408, str(error), "timeout_error")

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return _refused(400, f"{where}: {first['msg']}" if where else first["msg"])

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        return _refused(error.status_code, str(error.detail))

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> Response:
        return _refused(500, f"{type(error).__name__}: {error}", "server_error")

    @app.exception_handler(EngineEnded)
    async def ended(_: Request, error: EngineEnded) -> Response:
        return _refused(503, str(error), "server_error")

    @app.exception_handler(Busy)
    async def busy(_: Request, __: Busy) -> Response:
        most = f"{options.max_waiting} completions wait already; come again"
        return _refused(429, most, "rate_limit_error", headers={"Retry-After": "1"})

    @app.get("/health")
    async def health() -> Response:
        if not service.alive:
            return _refused(503, service.failure or "the server ends", "server_error")
        return Response(status_code=200)

    @app.get("/metrics")
    async def metrics() -> Response:
        text = prometheus_client.generate_latest(service.metrics.registry)
        return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict:
        _check_model(served, name)
        return model

    @app.post("/v1/completions")
    async def complete(asked: CompletionRequest, request: Request) -> Response:
        asked.check()
        prompts = [_tokens(served.tokenizer, prompt) for prompt in asked.prompts]
        if not prompts:
            raise ConfigError("prompt is empty; it takes one at least")
        sampling = asked.sampling(asked.max_tokens or 16)
        return await _answer(served, asked, request, prompts, sampling)

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, request: Request) -> Response:
        asked.check()
        prompt = _chat_prompt(served.tokenizer, asked)
        sampling = asked.sampling(asked.max_completion_tokens or asked.max_tokens or 0)
        return await _answer(served, asked, request, [prompt], sampling)

    @app.post("/update_weights_from_disk")
    async def update(asked: UpdateRequest) -> dict:
        if not options.updates:
            raise HTTPException(403, "this server takes no new weights (config.server.updates)")
        version = await served.update(asked.model_path, asked.version, asked.marker)
        return {"success": True, "message": asked.model_path, "version": version}

    return app


async def _answer(
    served: Served,
    asked: CompletionRequest | ChatRequest,
    request: Request,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
) -> Response:
    _check_count(served.options, len(prompts), sampling.n)
    if asked.model is not None:
        _check_model(served, asked.model)
    deadline = time.monotonic() + served.options.timeout_s
    try:
        tickets = await _submit(served, prompts, sampling)
    except TimeoutError:
        return _too_late(served.options)
    answers = Answers(asked, served.name, served.tokenizer.hf)
    choices = [Choice(prompt) for prompt in prompts for _ in range(sampling.n)]
    if asked.stream:
        events = _stream(asked, answers, tickets, choices, deadline)
        return StreamingResponse(events, media_type="text/event-stream")
    reading = asyncio.ensure_future(_read(tickets, choices, deadline))
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((reading, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():  # nobody is there to read it
            return Response(status_code=499)
        reading.result()
    except TimeoutError:
        return _too_late(served.options)
    finally:
        for task in (reading, leaving):
            task.cancel()
        _close(tickets)
    drawn_with = min(ticket.version for ticket in tickets)
    whole = answers.whole(choices, _usage(choices, sampling.n))
    return JSONResponse(whole | {"weights_version": drawn_with})


def _check_model(served: Served, name: str) -> None:
    if name != served.name:
        raise HTTPException(404, f"model {name!r} is not served here; use {served.name!r}")


def _check_count(options: ServerConfig, prompts: int, n: int) -> None:
    """Refuse more completions than a request may have, or than may ever wait."""
    for name in ("max_n", "max_waiting"):
        most = getattr(options, name)
        if prompts * n > most:
            raise ConfigError(
                f"{prompts} prompts with n {n} are more completions than the {most} of this "
                f"server's {name}; ask for fewer at once, or start it with a larger "
                f"--config.server.{name}"
            )


async def _submit(
    served: Served, prompts: Sequence[Sequence[int]], sampling: Sampling
) -> list[Ticket]:
    """Raises TimeoutError where the engine does not take them in time."""
    async with asyncio.timeout(served.options.timeout_s):
        return await served.service.submit_all(prompts, sampling)


async def _read(tickets: Sequence[Ticket], choices: Sequence[Choice], deadline: float) -> None:
    async for _ in _deltas(tickets, choices, deadline):
        pass


async def _deltas(tickets: Sequence[Ticket], choices: Sequence[Choice], deadline: float):
    """(index of the choice, delta) of all tickets as they come, added to the choices. Raises
    TimeoutError at the deadline."""
    arrived: asyncio.Queue = asyncio.Queue()

    async def forward(first: int, ticket: Ticket) -> None:
        try:
            async for delta in ticket.deltas():
                arrived.put_nowait((first + delta.index, delta))
        except Exception as error:
            arrived.put_nowait((None, error))

    each = len(choices) // len(tickets)
    tasks = [asyncio.ensure_future(forward(i * each, t)) for i, t in enumerate(tickets)]
    try:
        while any(choice.finish is None for choice in choices):
            left = deadline - time.monotonic()
            index, delta = await asyncio.wait_for(arrived.get(), left)
            if index is None:
                raise delta
            choices[index].add(delta)
            yield index, delta
    finally:
        for task in tasks:
            task.cancel()


async def _stream(
    asked: CompletionRequest | ChatRequest,
    answers: Answers,
    tickets: Sequence[Ticket],
    choices: Sequence[Choice],
    deadline: float,
) -> AsyncIterator[str]:
    try:
        for part in answers.begin(len(choices)):
            yield event(part)
        async with contextlib.aclosing(_deltas(tickets, choices, deadline)) as deltas:
            async for index, delta in deltas:
                yield event(answers.part(index, choices[index], delta))
        if asked.usage_in_stream:
            yield event(answers.end(_usage(choices, asked.n)))
    except TimeoutError:
        yield event(failure("the time of the request is over", "timeout_error"))
    except Exception as error:
        yield event(failure(" ".join(str(error).split()), "server_error"))
    finally:
        _close(tickets)
    yield event("[DONE]")


async def _left(request: Request) -> None:
    """Until the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _close(tickets: Sequence[Ticket]) -> None:
    for ticket in tickets:
        ticket.close()


def _usage(choices: Sequence[Choice], n: int) -> dict[str, int]:
    prompt = sum(len(choice.prompt) for choice in choices[::n])
    drawn = sum(len(choice.tokens) for choice in choices)
    return {"prompt_tokens": prompt, "completion_tokens": drawn, "total_tokens": prompt + drawn}


def _tokens(tokenizer: Tokenizer, prompt: str | list[int]) -> Sequence[int]:
    return tokenizer.ids(prompt, special=True) if isinstance(prompt, str) else prompt


def _chat_prompt(tokenizer: Tokenizer, asked: ChatRequest) -> Sequence[int]:
    chat = parse_sample({"messages": asked.messages, "tools": asked.tools})
    assert isinstance(chat, Conversation)
    tools = [dict(tool) for tool in chat.tools or ()] if asked.tool_choice != "none" else []
    # Variables of the template, and nothing else: not another template, nor another conversation.
    taken = {"self", "messages", *inspect.signature(tokenizer.hf.apply_chat_template).parameters}
    for name in asked.chat_template_kwargs.keys() & taken:
        raise ConfigError(f"chat_template_kwargs has {name!r}, no variable of a chat template")
    text = tokenizer.chat_text(chat.messages, tools, **asked.chat_template_kwargs)
    return tokenizer.ids(text, special=False)


def _too_late(options: ServerConfig) -> JSONResponse:
    return _refused(504, f"no answer within {options.timeout_s:g} s", "timeout_error")


def _refused(
    status: int, message: str, kind: str = "invalid_request_error", headers=None
) -> JSONResponse:
    return JSONResponse(failure(message, kind), status, headers=headers)
