"""A server of a tiny model in a thread of this process, and what asks it."""

import contextlib
import dataclasses
import threading
from collections.abc import Iterator

import httpx
import openai

from jaxrl.options import from_config
from jaxrl.serve import listening
from jaxrl.serve_config import ServeConfig
from jaxrl.serving.app import make_server
from jaxrl.serving.served import Served
from jaxrl.serving.start import started

ENGINE = {"max_len": 256, "slots": 4, "page": 16, "dtype": "float32", "warm_up": False}


@dataclasses.dataclass
class Local:
    served: Served
    url: str
    key: str = "none"

    @property
    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0)

    @property
    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60)


@contextlib.contextmanager
def local_server(model, *, server=None, engine=None, **options) -> Iterator[Local]:
    tree = {"model": str(model), "server": server or {}, "engine": ENGINE | (engine or {})}
    config = from_config(ServeConfig, tree | options)
    with listening("127.0.0.1", 0) as sock, started(config) as served:
        running = make_server(served)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        yield Local(served, f"http://127.0.0.1:{sock.getsockname()[1]}")
        running.should_exit = True
        thread.join()


def drawn(server, prompt, **sampling):
    """What the engine itself says, by token ids."""
    asked = {"model": "tiny", "prompt": prompt, "return_token_ids": True, **sampling}
    answer = server.http.post("/v1/completions", json=asked)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]
