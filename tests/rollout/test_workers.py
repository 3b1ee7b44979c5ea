"""Rollouts drawn elsewhere: who is asked, what is asked again, and what the servers are told."""

import asyncio
import http.server
import json
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
from jaxrl.rollout.http_workers import http_worker
from jaxrl.rollout.requests import Sampling
from jaxrl.rollout.workers import Drawn, WorkerBusy, WorkerLost, WorkerPool


class Folders:
    def write(self, weights, version):
        return Path(f"/weights/{weights}/{version}")


class Fake:
    """A worker that answers with its own number, or fails as it is told to."""

    def __init__(self, number):
        self.name, self.number = f"w{number}", number
        self.lost, self.busy, self.asked, self.told = False, 0, 0, []
        self.open = True

    async def complete(self, prompt, sampling):
        self.asked += 1
        while not self.open:
            await asyncio.sleep(0.001)
        if self.lost:
            raise WorkerLost("gone")
        if self.busy:
            self.busy -= 1
            raise WorkerBusy
        if prompt == (99,):
            raise ConfigError("it refuses 99")
        return [Drawn([self.number, i], [-1.0, -2.0], "x", "stop") for i in range(sampling.n)]

    async def update(self, folder, version):
        if self.lost:
            raise WorkerLost("gone")
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
    for version in (8, 9, 10, 10):
        folder = handover.write(weights, version)
    assert (folder / COMPLETE).exists() and handover.is_adapter == bool(rank)
    names = sorted(p.name for p in (tmp_path / "weights").iterdir())
    assert names == ["step_000009", "step_000010"]
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
        status, answer = self.server.answers.get(self.path, (200, {}))
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
    return http_worker(kind, url, adapters=adapters, api_key="k")


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
    assert asked.get("model") == ("jaxrl" if adapters else None)
    expected = (
        ("/v1/load_lora_adapter", {"lora_name": "jaxrl", "lora_path": "/w/step_1"})
        if adapters
        else ("/collective_rpc", {"method": "reload_weights"})
    )
    path, asked, _ = recorder.seen[1]
    assert path == expected[0] and expected[1].items() <= asked.items()


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
        else ["/update_weights_from_disk"]
    )


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
    made = http_worker("jaxrl", "http://127.0.0.1:9", adapters=False)
    with pytest.raises(WorkerLost, match="ConnectError"):
        asyncio.run(made.complete([1], SAMPLING))
    with pytest.raises(ConfigError, match=r"no rollout server at http://127\.0\.0\.1:9: .*refused"):
        made.check(10)
