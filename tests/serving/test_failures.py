"""An engine that fails: all is answered, and the process ends so that it is started again."""

import asyncio
import pathlib
import queue
import threading

import httpx
import pytest
import yaml
from local_server import ENGINE
from tiny_run import tiny_checkpoint

from jaxrl import serve
from jaxrl.options import from_config
from jaxrl.rollout.engine import Engine
from jaxrl.rollout.requests import Sampling
from jaxrl.serve_config import ServeConfig
from jaxrl.serving.app import make_app, make_server
from jaxrl.serving.service import EngineEnded
from jaxrl.serving.start import started

ROOT = pathlib.Path(__file__).parents[2]
SAID = "the engine has failed, and the server ends: RuntimeError: no memory"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("inputs") / "tiny")


class Steps:
    """In place of `Engine.step`: says that it has begun, and ends as it is told."""

    def __init__(self):
        self.begun, self.go_on = threading.Event(), threading.Event()

    def __call__(self, engine):
        self.begun.set()
        assert self.go_on.wait(60)
        return self.end()

    def end(self):
        raise RuntimeError("no\nmemory")


@pytest.fixture
def steps(monkeypatch):
    made = Steps()
    monkeypatch.setattr(Engine, "step", lambda engine: made(engine))
    yield made
    made.go_on.set()


def serving(model, **server):
    return started(from_config(ServeConfig, {"model": str(model), "engine": ENGINE, **server}))


def run(asks):
    return asyncio.run(asyncio.wait_for(asks, 60))  # what is never answered fails


async def all_of(ticket):
    return [delta async for delta in ticket.deltas()]


def test_what_is_drawn_what_is_asked_and_what_comes_later_is_answered(model, steps):
    async def asks(served):
        service = served.service
        http = httpx.AsyncClient(
            transport=httpx.ASGITransport(make_app(served)), base_url="http://here"
        )
        assert (await http.get("/health")).status_code == 200
        drawn = await service.submit([1], Sampling())
        assert await asyncio.to_thread(steps.begun.wait, 60)
        asked = asyncio.ensure_future(service.submit([2], Sampling()))
        body = {"prompt": "x", "stream": False}
        posted = asyncio.ensure_future(http.post("/v1/completions", json=body))
        update = asyncio.ensure_future(
            http.post("/update_weights_from_disk", json={"model_path": str(model)})
        )
        await asyncio.sleep(0)  # it is asked
        steps.go_on.set()
        for waits in (asked, all_of(drawn)):
            with pytest.raises(EngineEnded, match=SAID):
                await waits
        with pytest.raises(EngineEnded, match=SAID):
            await service.submit([3], Sampling())
        for answer in (await posted, await update, await http.post("/v1/completions", json=body)):
            assert answer.status_code == 503 and answer.json()["error"]["message"] == SAID
        health = await http.get("/health")
        assert health.status_code == 503 and health.json()["error"]["message"] == SAID

    with serving(model) as served:
        run(asks(served))


def test_a_stream_says_why_it_ends(model, steps):
    async def asks(served):
        app = httpx.ASGITransport(make_app(served))
        async with httpx.AsyncClient(transport=app, base_url="http://here") as http:
            steps.go_on.set()
            body = {"prompt": "x", "stream": True}
            return (await http.post("/v1/completions", json=body)).text

    with serving(model) as served:
        assert SAID in run(asks(served))


def test_a_request_that_is_not_taken_in_time_is_given_up(model, steps):
    async def asks(served):
        service = served.service
        drawn = await service.submit([1], Sampling())
        assert await asyncio.to_thread(steps.begun.wait, 60)
        app = httpx.ASGITransport(make_app(served))
        async with httpx.AsyncClient(transport=app, base_url="http://here") as http:
            answer = await http.post("/v1/completions", json={"prompt": "x", "n": 3})
        assert answer.status_code == 504 and service._waiting == 0
        steps.go_on.set()
        with pytest.raises(EngineEnded):
            await all_of(drawn)

    with serving(model, server={"timeout_s": 0.05}) as served:
        run(asks(served))


def test_who_gives_up_while_the_engine_takes_it_is_not_drawn_for(model, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()
    submit = Engine.submit

    def slow(engine, *asked):
        begun.set()
        assert go_on.wait(60)
        return submit(engine, *asked)

    monkeypatch.setattr(Engine, "submit", slow)

    async def asks(service):
        asked = asyncio.ensure_future(service.submit([1], Sampling(ignore_eos=True)))
        assert await asyncio.to_thread(begun.wait, 60)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        go_on.set()
        for _ in range(2):  # what it is asked first is the request's end
            await service.run(lambda: None)
        assert service._waiting == 0 and not service._tickets and not service.engine.busy

    with serving(model) as served:
        run(asks(served.service))


def test_what_waits_when_the_server_ends_is_told(model, steps, monkeypatch):
    async def asks(service):
        drawn = await service.submit([1], Sampling())
        assert await asyncio.to_thread(steps.begun.wait, 60)
        asked = asyncio.ensure_future(service.submit([2], Sampling()))
        await asyncio.sleep(0)
        service._ends = True
        both = asyncio.gather(asked, all_of(drawn), return_exceptions=True)
        steps.go_on.set()
        return await both

    monkeypatch.setattr(Steps, "end", lambda _: [])
    with serving(model) as served:
        assert [str(e) for e in run(asks(served.service))] == ["the server ends"] * 2


def test_who_listens_no_more_ends_no_engine(model):
    async def asks(service):
        return await service.submit([1], Sampling(max_tokens=40, ignore_eos=True))

    async def asks_longer(service):
        return await all_of(await service.submit([1], Sampling(max_tokens=80, ignore_eos=True)))

    with serving(model) as served:
        ticket = run(asks(served.service))  # and its loop is closed
        deltas = run(asks_longer(served.service))
        assert ticket.request.finished and sum(len(delta.tokens) for delta in deltas) == 80
        assert served.service.alive


def test_the_http_server_ends_with_the_engine(model, steps):
    with serving(model) as served:
        server = make_server(served)
        assert not server.should_exit
        served.service.on_failure()
        assert server.should_exit


def test_the_process_exits_with_1(model, steps, monkeypatch, capsys):
    ports, codes = queue.Queue(), []
    listening = serve.listening

    def listens(host, port):
        sock = listening(host, port)
        ports.put(sock.getsockname()[1])
        return sock

    monkeypatch.setattr(serve, "listening", listens)
    flags = [f"--config.model={model}", "--config.server.port=0", "--config.engine.warm_up=false"]
    argv = ["serve", f"--config={ROOT}/configs/serve.py", *flags, "--config.engine.max_len=64"]
    thread = threading.Thread(target=lambda: codes.append(serve.main(argv)), daemon=True)
    thread.start()
    steps.go_on.set()
    url = f"http://127.0.0.1:{ports.get(timeout=60)}/v1/completions"
    answer = httpx.post(url, json={"prompt": "x"}, timeout=60)
    assert answer.status_code == 503 and answer.json()["error"]["message"] == SAID
    thread.join(60)
    assert codes == [1] and f"error: {SAID}\n" in capsys.readouterr().err


def test_kubernetes_starts_a_server_again_that_is_not_healthy():
    _, servers, _ = yaml.safe_load_all((ROOT / "launch/rl_kubernetes.yaml").read_text())
    (server,) = servers["spec"]["template"]["spec"]["containers"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server[probe]["httpGet"] == {"path": "/health", "port": 8001}
    # It reads the model and compiles for as long as the trainer waits for it.
    startup = server["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 1800
