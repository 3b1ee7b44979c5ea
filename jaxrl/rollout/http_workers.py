"""Servers that draw rollouts, over HTTP: our own, vLLM's and SGLang's.

Servers read weights from the folders that they are told of: both sides see the same paths. vLLM is
to be started with VLLM_SERVER_DEV_MODE=1 (whole models, a version whose reload_weights takes a
path), or with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 (adapters), and with
--logprobs-mode processed_logprobs where the temperature is not 1.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import httpx

from jaxrl.options import ConfigError
from jaxrl.rollout.requests import Sampling
from jaxrl.rollout.workers import Drawn, WorkerBusy, WorkerLost

ADAPTER = "jaxrl"  # the name that adapters are loaded under

Kind = Literal["jaxrl", "vllm", "sglang"]


class ServerMissing(ConfigError):
    """A server does not answer."""


class HttpWorker:
    """A server at `url`. adapters: whether weights come as adapters. timeout_s: of a request."""

    def __init__(self, url: str, *, adapters: bool, api_key: str = "", timeout_s: float = 600.0):
        self.name, self.adapters = url.rstrip("/").removesuffix("/v1"), adapters
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._options: dict[str, Any] = {"base_url": self.name, "headers": headers}
        self._options |= {"timeout": httpx.Timeout(timeout_s, connect=10), "trust_env": False}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self._client = httpx.AsyncClient(**self._options, limits=limits)

    def check(self, max_len: int) -> None:
        """Raises ServerMissing where the server is not there, ConfigError where it takes only
        shorter sequences."""
        try:
            with httpx.Client(**self._options) as client:
                found = self._read("/v1/models", client.get("/v1/models"))["data"][0]
        except (httpx.HTTPError, WorkerLost) as error:
            raise ServerMissing(f"no rollout server at {self.name}: {error}") from None
        room = found.get("max_model_len")
        if room is not None and room < max_len:
            raise ConfigError(
                f"the rollout server at {self.name} takes {room} tokens, and config.seq_len is "
                f"{max_len}; start it with as many"
            )

    async def _post(self, path: str, content: dict[str, Any]) -> Any:
        """The answer. Raises WorkerLost, WorkerBusy, or ConfigError for what is refused."""
        try:
            answer = await self._client.post(path, json=content)
        except httpx.HTTPError as error:
            raise WorkerLost(f"{type(error).__name__}: {error}") from None
        return self._read(path, answer)

    def _read(self, path: str, answer: httpx.Response) -> Any:
        if answer.status_code == 429:
            raise WorkerBusy
        if answer.status_code in (408, 425) or answer.status_code >= 500:
            raise WorkerLost(f"{path} answers {answer.status_code}: {_line(answer.text)}")
        if answer.status_code >= 400:
            raise ConfigError(
                f"the rollout server at {self.name} refuses {path}: {_line(answer.text)}"
            )
        try:
            return answer.json()
        except ValueError:  # vLLM says some things in plain text
            return answer.text


class OpenAiWorker(HttpWorker):
    """Completions of token ids, as vLLM and our own server have them."""

    async def complete(self, prompt: Sequence[int], sampling: Sampling) -> list[Drawn]:
        asked = {
            "prompt": list(prompt),
            "n": sampling.n,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "stop": list(sampling.stop),
            "stop_token_ids": list(sampling.stop_tokens),
            "ignore_eos": sampling.ignore_eos,
            "logprobs": 0,
            "return_token_ids": True,
        }
        asked |= {"max_tokens": sampling.max_tokens} if sampling.max_tokens else {}
        asked |= {"top_k": sampling.top_k} if sampling.top_k else {}
        asked |= {"seed": sampling.seed} if sampling.seed is not None else {}
        answer = await self._post("/v1/completions", asked | self._model())
        found = sorted(answer["choices"], key=lambda choice: choice["index"])
        return [
            Drawn(
                choice["token_ids"],
                choice["logprobs"]["token_logprobs"],
                choice["text"],
                "stop" if choice["finish_reason"] == "stop" else "length",
            )
            for choice in found
        ]

    def _model(self) -> dict[str, str]:
        return {}


class JaxrlWorker(OpenAiWorker):
    async def update(self, folder: Path, version: int) -> None:
        asked = {"model_path": str(folder), "version": version}
        await self._post("/update_weights_from_disk", asked)


class VllmWorker(OpenAiWorker):
    def _model(self) -> dict[str, str]:
        return {"model": ADAPTER} if self.adapters else {}

    async def update(self, folder: Path, version: int) -> None:
        if self.adapters:
            asked = {"lora_name": ADAPTER, "lora_path": str(folder), "load_inplace": True}
            await self._post("/v1/load_lora_adapter", asked)
            return
        asked = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        await self._post("/collective_rpc", asked)


class SglangWorker(HttpWorker):
    async def complete(self, prompt: Sequence[int], sampling: Sampling) -> list[Drawn]:
        how: dict[str, Any] = {
            "n": sampling.n,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_p": sampling.min_p,
            "stop": list(sampling.stop),
            "stop_token_ids": list(sampling.stop_tokens),
            "ignore_eos": sampling.ignore_eos,
        }
        how |= {"max_new_tokens": sampling.max_tokens} if sampling.max_tokens else {}
        asked = {"input_ids": list(prompt), "sampling_params": how, "return_logprob": True}
        asked |= {"lora_path": ADAPTER} if self.adapters else {}
        answer = await self._post("/generate", asked)
        found = answer if isinstance(answer, list) else [answer]
        return [self._drawn(one) for one in found]

    @staticmethod
    def _drawn(one: dict[str, Any]) -> Drawn:
        """Token ids and log-probs stand together in output_token_logprobs."""
        meta = one["meta_info"]
        logprobs, tokens = zip(*((p, t) for p, t, *_ in meta["output_token_logprobs"]), strict=True)
        finish = "stop" if meta["finish_reason"]["type"] == "stop" else "length"
        return Drawn(list(tokens), list(logprobs), one["text"], finish)

    async def update(self, folder: Path, version: int) -> None:
        if self.adapters:
            with contextlib.suppress(ConfigError):  # the first time there is none
                await self._post("/unload_lora_adapter", {"lora_name": ADAPTER})
            await self._post("/load_lora_adapter", {"lora_name": ADAPTER, "lora_path": str(folder)})
            return
        asked = {"model_path": str(folder), "weight_version": str(version), "flush_cache": False}
        await self._post("/update_weights_from_disk", asked)


KINDS: dict[Kind, type[JaxrlWorker | VllmWorker | SglangWorker]] = {
    "jaxrl": JaxrlWorker,
    "vllm": VllmWorker,
    "sglang": SglangWorker,
}


def http_worker(kind: Kind, url: str, **options) -> JaxrlWorker | VllmWorker | SglangWorker:
    """The worker of a server of this kind; options: of `HttpWorker`."""
    return KINDS[kind](url, **options)


def _line(text: str) -> str:
    return " ".join(text.split())[:300]
