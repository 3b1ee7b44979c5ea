"""Rollouts drawn elsewhere: who is asked, what is asked again, and what the servers are told."""

import asyncio
import http.server
import json
import os
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from tiny import TINY, tiny_program, tiny_state

from jaxrl.cli import HostLostError
from jaxrl.models.hf import load_pretrained, save_pretrained
from jaxrl.models.peft import load_adapter
from jaxrl.models.transformer import Transformer, initialize, merge_trees
from jaxrl.options import ConfigError
from jaxrl.rollout import workers
from jaxrl.rollout.handover import COMPLETE, Handover
from jaxrl.rollout.http_workers import ServerMissing, http_worker
from jaxrl.rollout.requests import Sampling
from jaxrl.rollout.workers import ATTEMPTS, Drawn, Silence, WorkerBusy, WorkerLost, WorkerPool
from jaxrl.serving.schema import CompletionRequest


class Folders:
    """Keeps from which version on folders are still read."""

    def write(self, weights, version, read_from):
        self.read_from = read_from
        return Path(f"/weights/{weights}/{version}")


class Fake:
    """A worker that answers with its own number, or fails as it is told to."""

    def __init__(self, number):
        self.name, self.number = f"w{number}", number
        self.lost, self.busy, self.asked, self.told = False, 0, 0, []
        self.open, self.loads, self.begun = True, True, threading.Event()
        self.broken = False  # for completions alone

    async def complete(self, prompt, sampling):
        self.asked += 1
        assert self.asked < 100, "it is asked without end"
        while not self.open:
            await asyncio.sleep(0.001)
        if self.lost:
            raise WorkerLost("gone")
        if self.broken or prompt == (98,):
            raise WorkerLost("it answers 500")
        if self.busy:
            self.busy -= 1
            raise WorkerBusy
        if prompt == (99,):
            raise ConfigError("it refuses 99")
        return [Drawn([self.number, i], [-1.0, -2.0], "x", "stop") for i in range(sampling.n)]

    async def update(self, folder, version):
        if self.lost:
            raise WorkerLost("gone")
        self.begun.set()
        while not self.loads:
            await asyncio.sleep(0.001)
        self.told.append((str(folder), version))


@pytest.fixture
def fakes():
    return [Fake(0), Fake(1)]


@pytest.fixture
def pool(fakes, monkeypatch):
    monkeypatch.setattr(workers, "PROBE_S", 0.0)
    said = []
    with WorkerPool(fakes, Folders(), say=said.append, patience_s=1.0) as made:
        made.said = said
        yield made


def finished(pool, requests):
    while not all(request.finished for request in requests):
        pool.step()
    return requests


def test_requests_go_to_the_least_busy_and_carry_their_version(pool, fakes):
    pool.set_weights("w", 4)
    assert [fake.told for fake in fakes] == [[("/weights/w/4", 4)]] * 2
    for fake in fakes:
        fake.open = False
    requests = [pool.submit([1], Sampling(n=2)) for _ in range(4)]
    assert pool.busy and pool.step() == []
    for fake in fakes:
        fake.open = True
    finished(pool, requests)
    assert [fake.asked for fake in fakes] == [2, 2] and not pool.busy
    one = requests[0].completions[1]
    assert (one.tokens[1], one.versions, one.text, one.finish) == (1, [4, 4], "x", "stop")


def test_what_a_lost_worker_was_asked_is_asked_of_another(pool, fakes):
    pool.set_weights("w", 0)
    fakes[0].open = False
    requests = [pool.submit([1]) for _ in range(6)]
    fakes[0].lost = True
    fakes[0].open = True
    finished(pool, requests)
    assert {r.completions[0].tokens[0] for r in requests} == {1}
    assert pool.said == ["rollout worker w0 is lost: gone; its tasks go to others"]
    pool.set_weights("w", 1)  # which does not wait for it
    fakes[0].lost, fakes[1].lost = False, True
    finished(pool, [pool.submit([1])])  # it is back, with the newest weights
    assert fakes[0].told[-1] == ("/weights/w/1", 1) and "rollout worker w0 is back" in pool.said


def test_a_busy_worker_is_asked_again(pool, fakes):
    pool.set_weights("w", 0)
    fakes[0].busy = fakes[1].busy = 2
    finished(pool, [pool.submit([1])])
    assert pool.said == []


def test_without_any_worker_the_run_ends(pool, fakes):
    pool.set_weights("w", 0)
    fakes[0].lost = fakes[1].lost = True
    request = pool.submit([1])
    with pytest.raises(HostLostError, match="none of the rollout workers answers: w0, w1"):
        finished(pool, [request])


def test_a_request_that_no_worker_answers_fails_alone(pool, fakes):
    pool.set_weights("w", 0)
    bad, good = finished(pool, [pool.submit([98], Sampling(n=2)), pool.submit([1])])
    assert [c.finish for c in bad.completions] == ["abort"] * 2
    failure = bad.completions[1].failure
    assert failure.startswith(f"given up after {ATTEMPTS} attempts, the last at w")
    assert failure.endswith(": it answers 500")
    assert sum(fake.asked for fake in fakes) == ATTEMPTS + 1
    assert good.completions[0].finish == "stop"
    finished(pool, [pool.submit([1])])  # they are back
    assert not pool.busy


def test_workers_that_take_weights_and_answer_nothing_end_the_run(fakes, monkeypatch):
    monkeypatch.setattr(workers, "PROBE_S", 0.0)
    with WorkerPool(fakes, Folders(), say=lambda line: None, patience_s=0.0) as pool:
        pool.set_weights("w", 0)
        fakes[0].broken = fakes[1].broken = True
        with pytest.raises(HostLostError, match=r"answers: w0, w1; the last .* it answers 500"):
            finished(pool, [pool.submit([1])])
        fakes[0].broken = fakes[1].broken = False
        fakes[0].busy = fakes[1].busy = 10**6
        with pytest.raises(HostLostError, match="answers: w0, w1"):
            finished(pool, [pool.submit([1])])


def test_a_worker_that_still_draws_is_waited_for(fakes):
    said = threading.Event()
    with WorkerPool(fakes, Folders(), say=lambda line: said.set(), patience_s=0.0) as pool:
        pool.set_weights("w", 0)
        fakes[0].open = fakes[1].open = False
        requests = [pool.submit([1]) for _ in range(4)]
        while sum(fake.asked for fake in fakes) < 4:
            pool.step()
        fakes[0].lost = fakes[0].open = True
        assert said.wait(60)
        fakes[1].open = True
        finished(pool, requests)


def test_silence_lasts_from_the_first_failure_and_counts_no_idle_time():
    now = [0.0]
    silence = Silence(lambda: now[0])

    def fails_at(seconds):
        now[0] = seconds
        return silence.failed()

    silence.begin()
    assert fails_at(100.0) == 0.0 and fails_at(103.0) == 3.0
    silence.begin()
    silence.end()
    silence.end()
    now[0] = 1000.0
    silence.begin()
    assert fails_at(1002.0) == 5.0  # one request after the other fails
    silence.answered()
    assert fails_at(1010.0) == 0.0


def test_one_that_hangs_as_it_comes_back_holds_up_no_other(fakes, monkeypatch):
    monkeypatch.setattr(workers, "PROBE_S", 0.01)
    said = []
    with WorkerPool(fakes, Folders(), say=said.append, patience_s=60.0) as pool:
        pool.set_weights("w", 0)
        fakes[0].lost = True
        finished(pool, [pool.submit([1]), pool.submit([1])])
        fakes[0].begun.clear()
        fakes[0].lost = fakes[0].loads = False
        assert fakes[0].begun.wait(60)  # it takes its time
        fakes[1].lost = True
        request = pool.submit([1])
        while "rollout worker w1 is lost: gone; its tasks go to others" not in said:
            pool.step()
        fakes[1].lost = False
        (completion,) = finished(pool, [request])[0].completions
        assert completion.tokens == [1, 0] and not fakes[0].loads


def test_what_workers_read_and_what_is_to_be_set_stays(pool, fakes):
    pool.set_weights("w", 3)
    for version in (4, 5, 6):
        pool.prepare("w", version)
        assert pool.handover.read_from == 3
    fakes[0].lost = True
    finished(pool, [pool.submit([1]), pool.submit([1])])
    fakes[0].begun.clear()
    fakes[0].lost = fakes[0].loads = False
    assert fakes[0].begun.wait(60)  # version 3, again
    pool.set_weights("w", 6)
    pool.prepare("w", 7)
    assert pool.handover.read_from == 3
    fakes[0].loads, fakes[1].lost = True, True
    request = finished(pool, [pool.submit([1])])[0]
    assert request.completions[0].versions == [6, 6]  # not as it came back
    assert [version for _, version in fakes[0].told] == [3, 3, 6]
    pool.prepare("w", 8)
    assert pool.handover.read_from == 6


def test_at_its_end_nothing_in_flight_is_waited_for(fakes):
    with WorkerPool(fakes, Folders(), say=print) as pool:
        pool.set_weights("w", 0)
        fakes[0].open = fakes[1].open = False
        request = pool.submit([1])
        assert pool.step() == []
    assert not request.finished and not pool._thread.is_alive()


def test_what_is_refused_ends_the_run(pool):
    pool.set_weights("w", 0)
    with pytest.raises(ConfigError, match="it refuses 99"):
        finished(pool, [pool.submit([99])])


@pytest.mark.parametrize("rank", [0, 4])
def test_weights_are_handed_over_as_others_read_them(rank, tmp_path):
    program = tiny_program(8, rank=rank)
    state = tiny_state(program)
    save_pretrained(initialize(Transformer(TINY), jax.random.key(0)), tmp_path / "base")
    model = program.layout.model
    handover = Handover(model, tmp_path / "weights", tmp_path / "base", "float32")
    weights = merge_trees(state.params, state.frozen)

    def left():
        return sorted(int(p.name.removeprefix("step_")) for p in handover.root.iterdir())

    for version in (8, 9, 10, 10):
        folder = handover.write(weights, version)
    assert left() == [9, 10] and handover.is_adapter == bool(rank)
    for version in (11, 12):
        handover.write(weights, version, read_from=9)
    assert left() == [9, 10, 11, 12]
    killed = handover.root / f".step_000010.partial-{os.getpid()}"
    (killed / "half").mkdir(parents=True)
    folder = handover.write(weights, 10)  # by a run that has gone back to a checkpoint
    assert left() == [9, 10] and (folder / COMPLETE).exists() and not killed.exists()
    if rank:
        found = load_adapter(nnx.merge(nnx.graphdef(model), weights), folder)
    else:
        found = load_pretrained(folder, dtype=np.float32)
    for a, b in zip(
        jax.tree.leaves(nnx.to_pure_dict(nnx.state(found))), jax.tree.leaves(weights), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


class Recorder(http.server.BaseHTTPRequestHandler):
    """Answers as `answers[path]` says, and keeps what it was asked."""

    def do_POST(self):
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, content, self.headers.get("Authorization")))
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        status, answer = self.server.answers.get(self.path, (200, {"success": True}))
        if isinstance(answer, bytes):  # all of it, and the end of the connection
            self.close_connection = True
            self.wfile.write(answer)
            return
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def recorder():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Recorder)
    server.seen, server.answers = [], {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def worker(recorder, kind, adapters=False):
    url = f"http://127.0.0.1:{recorder.server_port}/v1"
    return http_worker(kind, url, adapters=adapters, vocab_size=100, api_key="k")


def both(made):
    """What it draws; and it is given weights."""

    async def calls():
        drawn = await made.complete([1, 2], SAMPLING)
        await made.update(Path("/w/step_1"), 1)
        return drawn

    return asyncio.run(calls())


SAMPLING = Sampling(n=2, max_tokens=7, temperature=0.5, top_k=3, seed=11)


@pytest.mark.parametrize("adapters", [False, True])
def test_vllm_is_asked_in_its_own_words(recorder, adapters):
    logprobs = {"token_logprobs": [-1.0, -2.0]}
    choices = [
        {"index": i, "token_ids": [i, 5], "logprobs": logprobs, "text": "t", "finish_reason": why}
        for i, why in ((1, "length"), (0, "stop"))
    ]
    recorder.answers["/v1/completions"] = (200, {"choices": choices})
    made = worker(recorder, "vllm", adapters)
    first, second = both(made)
    assert first == Drawn([0, 5], [-1.0, -2.0], "t", "stop") and second.finish == "length"
    path, asked, key = recorder.seen[0]
    wanted = {"prompt": [1, 2], "n": 2, "max_tokens": 7, "top_k": 3, "seed": 11, "logprobs": 0}
    assert wanted.items() <= asked.items() and asked["return_token_ids"]
    assert (path, key) == ("/v1/completions", "Bearer k")
    assert asked.get("model") == ("jaxrl" if adapters else None) and asked["cache_salt"]
    expected = (
        ("/v1/load_lora_adapter", {"lora_name": "jaxrl", "lora_path": "/w/step_1"})
        if adapters
        else ("/collective_rpc", {"method": "reload_weights"})
    )
    path, asked, _ = recorder.seen[1]
    assert path == expected[0] and expected[1].items() <= asked.items()
    assert [path for path, *_ in recorder.seen[2:]] == ["/reset_prefix_cache"]


@pytest.mark.parametrize("adapters", [False, True])
def test_sglang_is_asked_in_its_own_words(recorder, adapters):
    meta = {
        "finish_reason": {"type": "length", "length": 7},
        "output_token_logprobs": [[-1.0, 4, None], [-2.0, 5, None]],
    }
    answers = recorder.answers
    answers["/generate"] = (200, [{"text": "t", "output_ids": [4, 5], "meta_info": meta}] * 2)
    answers["/unload_lora_adapter"] = (400, {"error": "none"})
    made = worker(recorder, "sglang", adapters)
    assert both(made) == [Drawn([4, 5], [-1.0, -2.0], "t", "length")] * 2
    _, asked, _ = recorder.seen[0]
    assert asked["input_ids"] == [1, 2] and asked["return_logprob"]
    assert {"n": 2, "max_new_tokens": 7, "top_k": 3}.items() <= asked["sampling_params"].items()
    paths = [path for path, *_ in recorder.seen[1:]]
    assert paths == (
        ["/unload_lora_adapter", "/load_lora_adapter"]
        if adapters
        else ["/update_weights_from_disk", "/flush_cache"]
    )


def good(kind, **more):
    """What a server answers to `SAMPLING`; more: in each completion."""
    if kind == "sglang":
        meta = {"finish_reason": {"type": "stop"}, "output_token_logprobs": [[-1.0, 4, None]]}
        return [{"text": "t", "meta_info": meta | more} for _ in range(2)]
    logprobs = {"token_logprobs": [-1.0]}
    choice = {"token_ids": [4], "logprobs": logprobs, "text": "t", "finish_reason": "stop"}
    return {"choices": [{"index": i} | choice | more for i in range(2)]}


def cut(kind, head, share):
    """The beginning of an answer: `head`, and so much of its body; then the connection ends."""
    body = json.dumps(good(kind))
    part = body[: int(len(body) * share)]
    head = head.format(whole=len(body), part=len(part))
    return 200, f"HTTP/1.1 200 OK\r\n{head}\r\n{part}".encode()


PATHS = {"jaxrl": "/v1/completions", "vllm": "/v1/completions", "sglang": "/generate"}


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize(
    ("head", "share", "problem"),
    [
        ("Content-Length: {part}\r\n", 0, "answers no JSON: nothing"),
        ("Connection: close\r\n", 0, "answers no JSON: nothing"),
        ("Content-Length: {part}\r\n", 0.5, "answers no JSON: .*text"),
        ("Connection: close\r\n", 0.5, "answers no JSON: .*text"),
        ("Content-Length: {whole}\r\n", 0.5, "RemoteProtocolError"),
        ("Transfer-Encoding: chunked\r\n\r\n{whole:x}", 0.5, "RemoteProtocolError"),
    ],
)
def test_an_answer_that_is_cut_off_is_a_lost_worker(recorder, kind, head, share, problem):
    recorder.answers[PATHS[kind]] = cut(kind, head, share)
    with pytest.raises(WorkerLost, match=problem):
        asyncio.run(worker(recorder, kind).complete([1], SAMPLING))


BAD = [
    ("jaxrl", 500, {"error": "the engine has ended"}, "/v1/completions answers 500: .*ended"),
    ("sglang", 500, {}, "/generate answers 500"),
    ("vllm", 302, {}, "answers 302"),
    ("jaxrl", 200, {}, "answers no completions: no 'choices'"),
    ("jaxrl", 200, [], "answers no completions: list indices"),
    ("jaxrl", 200, None, "answers no completions: 'NoneType'"),
    ("vllm", 200, {"choices": None}, "answers no completions"),
    ("vllm", 200, {"choices": good("vllm")["choices"][:1]}, "1 where 2 were asked for"),
    ("vllm", 200, {"choices": [{"index": 0}, {"index": 1}]}, "no 'token_ids'"),
    ("vllm", 200, good("vllm", token_ids=None), "token ids None"),
    ("vllm", 200, good("vllm", token_ids=[]), r"token ids \[\]"),
    ("vllm", 200, good("vllm", token_ids=["4"]), "token ids"),
    ("vllm", 200, good("vllm", token_ids=[100]), r"token ids \[100\] of a model of 100"),
    ("vllm", 200, good("vllm", token_ids=[4] * 8), "8 tokens where 7 may be drawn"),
    ("vllm", 200, good("vllm", token_ids=[4, 5]), "1 log-probs of 2 tokens"),
    ("vllm", 200, good("vllm", logprobs=None), "answers no completions"),
    ("vllm", 200, good("vllm", logprobs={"token_logprobs": [None]}), r"log-probs \[None\]"),
    ("vllm", 200, good("vllm", logprobs={"token_logprobs": [float("nan")]}), "log-probs"),
    ("vllm", 200, good("vllm", text=None), "text None"),
    ("vllm", 200, good("vllm", finish_reason="abort"), "ended by 'abort'"),
    ("sglang", 200, {}, "no 'meta_info'"),
    ("sglang", 200, good("sglang")[:1], "1 where 2 were asked for"),
    ("sglang", 200, good("sglang", output_token_logprobs=[]), "token ids"),
    ("sglang", 200, good("sglang", output_token_logprobs=[[None, 4, None]]), "log-probs"),
    ("sglang", 200, good("sglang", finish_reason=None), "answers no completions"),
]


@pytest.mark.parametrize(("kind", "status", "answer", "problem"), BAD)
def test_an_answer_of_another_shape_is_a_lost_worker(recorder, kind, status, answer, problem):
    recorder.answers[PATHS[kind]] = (status, answer)
    with pytest.raises(WorkerLost, match=problem):
        asyncio.run(worker(recorder, kind).complete([1], SAMPLING))


def test_what_a_server_answers_badly_is_asked_of_another(recorder, fakes):
    recorder.answers["/v1/completions"] = (200, {"choices": []})
    bad, said = worker(recorder, "jaxrl"), []
    with WorkerPool([bad, fakes[1]], Folders(), say=said.append) as pool:
        pool.set_weights("w", 0)
        request = finished(pool, [pool.submit([1])])[0]
    assert request.completions[0].tokens == [1, 0]
    assert said == [
        f"rollout worker {bad.name} is lost: /v1/completions answers no completions: 0 where 1 "
        "were asked for; its tasks go to others"
    ]


def test_servers_fill_in_nothing_of_how_is_drawn(recorder):
    whole = {"n": 1, "temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0}
    whole |= {"repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}
    for kind in PATHS:
        asked = worker(recorder, kind)._asked([1, 2], Sampling())
        assert whole.items() <= asked.get("sampling_params", asked).items()
    asked = worker(recorder, "jaxrl")._asked([1, 2], Sampling(max_tokens=5, seed=3))
    assert CompletionRequest(**asked).sampling(5) == Sampling(max_tokens=5, seed=3)


@pytest.mark.parametrize(("kind", "salt"), [("vllm", "cache_salt"), ("sglang", "extra_key")])
def test_what_is_cached_of_other_weights_is_never_found(recorder, kind, salt):
    recorder.answers[PATHS[kind]] = (200, good(kind))
    for path in ("/reset_prefix_cache", "/flush_cache"):
        recorder.answers[path] = (400, {})  # something is in flight
    made = worker(recorder, kind)

    async def calls():
        for version in (1, 1, 2):
            await made.complete([1], SAMPLING)
            await made.complete([1], SAMPLING)
            await made.update(Path("/w"), version)

    asyncio.run(calls())
    salts = [asked[salt] for path, asked, _ in recorder.seen if path == PATHS[kind]]
    assert salts[::2] == salts[1::2] and len(set(salts)) == 3
    updates = [asked for path, asked, _ in recorder.seen if path == "/update_weights_from_disk"]
    assert not any(asked["flush_cache"] for asked in updates)  # it would end the server


@pytest.mark.parametrize(
    ("kind", "said", "fits"),
    [
        ("jaxrl", 3, True),
        ("jaxrl", 4, True),  # an update came while it drew
        ("jaxrl", None, True),
        ("jaxrl", 0, False),
        ("sglang", "3", True),
        ("sglang", "default", False),
    ],
)
def test_a_server_that_was_started_again_is_a_lost_worker(recorder, kind, said, fits):
    answer = good(kind, weight_version=said)
    if kind == "jaxrl":
        answer = good(kind) | {"weights_version": said}
    recorder.answers[PATHS[kind]] = (200, answer)
    made = worker(recorder, kind)

    async def calls():
        await made.complete([1], SAMPLING)  # it was given none yet
        await made.update(Path("/w"), 3)
        return await made.complete([1], SAMPLING)

    if fits:
        assert len(asyncio.run(calls())) == 2
    else:
        with pytest.raises(WorkerLost, match=f"with weights {said} where it was given 3"):
            asyncio.run(calls())


@pytest.mark.parametrize(
    ("kind", "status", "error"),
    [("vllm", 404, "no model jaxrl"), ("sglang", 400, "LoRA adapters are not loaded: jaxrl")],
)
def test_a_server_without_the_adapter_is_a_lost_worker(recorder, kind, status, error):
    recorder.answers[PATHS[kind]] = (status, {"error": error})
    made = worker(recorder, kind, adapters=True)
    with pytest.raises(WorkerLost, match="it was started again"):
        asyncio.run(made.complete([1], SAMPLING))
    with pytest.raises(ConfigError, match="refuses"):
        asyncio.run(worker(recorder, kind).complete([1], SAMPLING))
    made._updating = True  # between two adapters
    with pytest.raises(WorkerBusy):
        asyncio.run(made.complete([1], SAMPLING))


@pytest.mark.parametrize("kind", ["jaxrl", "sglang"])
@pytest.mark.parametrize("answer", [{}, {"success": False}, b"HTTP/1.1 200 OK\r\n\r\n{"])
def test_weights_are_taken_only_where_it_is_said(recorder, kind, answer):
    recorder.answers["/update_weights_from_disk"] = (200, answer)
    with pytest.raises(WorkerLost, match="answers without success"):
        asyncio.run(worker(recorder, kind).update(Path("/w"), 1))


@pytest.mark.parametrize(
    ("status", "error", "problem"),
    [
        (400, ConfigError, "refuses /update_weights_from_disk: .*bad"),
        (404, ConfigError, "refuses"),
        (429, WorkerBusy, "^$"),
        (500, WorkerLost, "answers 500"),
        (503, WorkerLost, "answers 503"),
    ],
)
def test_what_an_answer_means(recorder, status, error, problem):
    recorder.answers["/update_weights_from_disk"] = (status, {"error": "bad"})
    with pytest.raises(error, match=problem):
        asyncio.run(worker(recorder, "jaxrl").update(Path("/w"), 1))


def test_a_server_that_is_not_there():
    made = http_worker("jaxrl", "http://127.0.0.1:9", adapters=False, vocab_size=100)
    with pytest.raises(WorkerLost, match="ConnectError"):
        asyncio.run(made.complete([1], SAMPLING))
    with pytest.raises(ConfigError, match=r"no rollout server at http://127\.0\.0\.1:9: .*refused"):
        made.check(10)


@pytest.mark.parametrize(
    ("status", "answer"), [(200, b"HTTP/1.1 200 OK\r\n\r\n{"), (200, {"data": []}), (429, {})]
)
def test_a_server_that_lists_no_model_is_not_there(recorder, status, answer):
    recorder.answers["/v1/models"] = (status, answer)
    with pytest.raises(ServerMissing, match="no rollout server at"):
        worker(recorder, "jaxrl").check(10)
