"""Servers that draw rollouts, over HTTP: our own, vLLM's and SGLang's.

Servers read weights from the folders that they are told of: both sides see the same paths. vLLM is
to be started with VLLM_SERVER_DEV_MODE=1 (whole models, a version whose reload_weights takes a
path), or with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 (adapters), and with
--logprobs-mode processed_logprobs where the temperature is not 1.

What a server has cached of prompts is of the weights that read them. Neither vLLM nor SGLang drops
it while anything is being drawn, and an SGLang that is to drop it with an update ends itself where
it cannot. So each update brings a new salt, which requests carry (`cache_salt`, `extra_key`): what
was cached under another one is never found again, whatever is in flight. That they are asked to
drop it, too, serves memory, and old servers that know no salt. What is in flight goes on as on our
own engine: with the new weights, on keys and values of the old ones.

A server that was started again has its first weights until it is given others. Our own and SGLang
(whole models) say in their answers which weights drew; a missing adapter is refused. vLLM says
nothing of whole models: one that starts again while nothing is asked of it draws with its first
weights until the next update.
"""

import contextlib
import math
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import httpx

from jaxrl.options import ConfigError
from jaxrl.rollout.handover import COMPLETE
from jaxrl.rollout.requests import Sampling
from jaxrl.rollout.workers import Drawn, WorkerBusy, WorkerLost

ADAPTER = "jaxrl"  # the name that adapters are loaded under

Kind = Literal["jaxrl", "vllm", "sglang"]


class ServerMissing(ConfigError):
    """A server does not answer."""


class Refused(ConfigError):
    """A server says that what it is asked is wrong. status: as HTTP has it."""

    def __init__(self, problem: str, status: int):
        super().__init__(problem)
        self.status = status


class HttpWorker:
    """A server at `url`. adapters: whether weights come as adapters. vocab_size: of the model that
    it is to draw with. timeout_s: of a request."""

    path: str  # of completions

    def __init__(
        self,
        url: str,
        *,
        adapters: bool,
        vocab_size: int,
        api_key: str = "",
        timeout_s: float = 600.0,
    ):
        self._vocab_size = vocab_size
        self.name, self.adapters = url.rstrip("/").removesuffix("/v1"), adapters
        self._version: int | None = None  # of the weights it was given
        self._salt, self._updating = "first", False
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
                answer = self._read("/v1/models", client.get("/v1/models"))
            room = answer["data"][0].get("max_model_len")
        except (httpx.HTTPError, WorkerLost, WorkerBusy) as error:
            problem = str(error) or type(error).__name__
            raise ServerMissing(f"no rollout server at {self.name}: {problem}") from None
        except _SHAPE:
            raise ServerMissing(f"no rollout server at {self.name}: it lists no model") from None
        if isinstance(room, int) and room < max_len:
            raise ConfigError(
                f"the rollout server at {self.name} takes {room} tokens, and config.seq_len is "
                f"{max_len}; start it with as many"
            )

    async def complete(self, prompt: Sequence[int], sampling: Sampling) -> list[Drawn]:
        wanted = self._version
        try:
            answer = await self._post(self.path, self._asked(prompt, sampling))
        except Refused as error:
            if not self._has_no_adapter(error):
                raise
            if self._updating:  # between two of them
                raise WorkerBusy from None
            raise WorkerLost(f"{error}; it was started again") from None
        if isinstance(answer, str):
            raise WorkerLost(f"{self.path} answers no JSON: {_line(answer) or 'nothing'}")
        try:
            drawn, versions = self._drawn(answer), self._versions(answer)
            _check(drawn, sampling, self._vocab_size)
        except _SHAPE as error:
            lacks = f"no {error}" if isinstance(error, KeyError) else error
            raise WorkerLost(f"{self.path} answers no completions: {lacks}") from None
        for version in versions:
            self._check_version(version, wanted)
        return drawn

    async def update(self, folder: Path, version: int) -> None:
        self._updating = True
        try:
            await self._load(folder, version)
        finally:
            self._updating = False
        self._version, self._salt = version, secrets.token_hex(16)

    def _asked(self, prompt: Sequence[int], sampling: Sampling) -> dict[str, Any]:
        """What is asked for completions."""
        raise NotImplementedError

    def _drawn(self, answer: Any) -> list[Drawn]:
        """What an answer holds; an answer of another shape may raise what is in `_SHAPE`."""
        raise NotImplementedError

    def _versions(self, answer: Any) -> list[Any]:
        """Of the weights that drew, as far as it is said."""
        raise NotImplementedError

    def _has_no_adapter(self, error: Refused) -> bool:
        """Whether completions are refused because the adapter is not there."""
        del error
        return False

    async def _load(self, folder: Path, version: int) -> None:
        raise NotImplementedError

    def _check_version(self, said: Any, wanted: int | None) -> None:
        """Raises WorkerLost for weights older than those it was given. Newer ones are what an
        update brought while it drew."""
        if said is None or wanted is None:
            return
        if not str(said).isdecimal() or int(said) < wanted:
            raise WorkerLost(f"it draws with weights {said} where it was given {wanted}")

    async def _post(self, path: str, content: dict[str, Any]) -> Any:
        """The answer. Raises WorkerLost, WorkerBusy, or Refused."""
        try:
            answer = await self._client.post(path, json=content)
        except httpx.HTTPError as error:
            raise WorkerLost(f"{type(error).__name__}: {error}") from None
        return self._read(path, answer)

    async def _post_load(self, path: str, content: dict[str, Any]) -> None:
        """Raises WorkerLost, too, where the answer does not say that it was done."""
        answer = await self._post(path, content)
        if not isinstance(answer, dict) or answer.get("success") is not True:
            raise WorkerLost(f"{path} answers without success: {_line(str(answer)) or 'nothing'}")

    def _read(self, path: str, answer: httpx.Response) -> Any:
        if answer.status_code == 429:
            raise WorkerBusy
        if answer.status_code in (408, 425) or answer.status_code >= 500:
            raise WorkerLost(f"{path} answers {answer.status_code}: {_line(answer.text)}")
        if answer.status_code >= 400:
            problem = f"the rollout server at {self.name} refuses {path}: {_line(answer.text)}"
            raise Refused(problem, answer.status_code)
        if not answer.is_success:  # another server's address, a page to log in at
            raise WorkerLost(f"{path} answers {answer.status_code}")
        try:
            return answer.json()
        except ValueError:  # vLLM says some things in plain text
            return answer.text


class OpenAiWorker(HttpWorker):
    """Completions of token ids, as vLLM and our own server have them."""

    path = "/v1/completions"

    def _asked(self, prompt: Sequence[int], sampling: Sampling) -> dict[str, Any]:
        asked = {
            "prompt": list(prompt),
            "logprobs": 0,
            "return_token_ids": True,
        }
        asked |= {"max_tokens": sampling.max_tokens} if sampling.max_tokens else {}
        asked |= {"seed": sampling.seed} if sampling.seed is not None else {}
        return asked | _how(sampling)

    def _drawn(self, answer: Any) -> list[Drawn]:
        found = sorted(answer["choices"], key=lambda choice: choice["index"])
        return [
            Drawn(
                choice["token_ids"],
                choice["logprobs"]["token_logprobs"],
                choice["text"],
                choice["finish_reason"],
            )
            for choice in found
        ]

    def _versions(self, answer: Any) -> list[Any]:
        return [answer.get("weights_version")]


class JaxrlWorker(OpenAiWorker):
    async def _load(self, folder: Path, version: int) -> None:
        asked = {"model_path": str(folder), "version": version, "marker": COMPLETE}
        await self._post_load("/update_weights_from_disk", asked)


class VllmWorker(OpenAiWorker):
    def _asked(self, prompt: Sequence[int], sampling: Sampling) -> dict[str, Any]:
        asked = super()._asked(prompt, sampling) | {"cache_salt": self._salt}
        return asked | ({"model": ADAPTER} if self.adapters else {})

    def _has_no_adapter(self, error: Refused) -> bool:
        return self.adapters and error.status == 404

    async def _load(self, folder: Path, version: int) -> None:
        if self.adapters:
            asked = {"lora_name": ADAPTER, "lora_path": str(folder), "load_inplace": True}
            await self._post("/v1/load_lora_adapter", asked)
        else:
            asked = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            await self._post("/collective_rpc", asked)
        with contextlib.suppress(Refused):  # only in its development mode
            await self._post("/reset_prefix_cache", {})


class SglangWorker(HttpWorker):
    path = "/generate"

    def _asked(self, prompt: Sequence[int], sampling: Sampling) -> dict[str, Any]:
        how = _how(sampling)
        how |= {"max_new_tokens": sampling.max_tokens} if sampling.max_tokens else {}
        asked = {"input_ids": list(prompt), "sampling_params": how, "return_logprob": True}
        asked |= {"extra_key": self._salt}
        return asked | ({"lora_path": ADAPTER} if self.adapters else {})

    def _drawn(self, answer: Any) -> list[Drawn]:
        return [self._one(one) for one in _listed(answer)]

    @staticmethod
    def _one(one: dict[str, Any]) -> Drawn:
        """Token ids and log-probs stand together in output_token_logprobs."""
        meta = one["meta_info"]
        pairs = [(token, p) for p, token, *_ in meta["output_token_logprobs"]]
        tokens, logprobs = [token for token, _ in pairs], [p for _, p in pairs]
        return Drawn(tokens, logprobs, one["text"], meta["finish_reason"]["type"])

    def _versions(self, answer: Any) -> list[Any]:
        if self.adapters:  # it counts those of whole models only
            return []
        return [one["meta_info"].get("weight_version") for one in _listed(answer)]

    def _has_no_adapter(self, error: Refused) -> bool:
        return self.adapters and "not loaded" in str(error)

    async def _load(self, folder: Path, version: int) -> None:
        if self.adapters:
            with contextlib.suppress(Refused):  # the first time there is none
                await self._post("/unload_lora_adapter", {"lora_name": ADAPTER})
            asked = {"lora_name": ADAPTER, "lora_path": str(folder)}
            await self._post_load("/load_lora_adapter", asked)
            return
        asked = {"model_path": str(folder), "weight_version": str(version), "flush_cache": False}
        await self._post_load("/update_weights_from_disk", asked)
        with contextlib.suppress(Refused):  # it draws
            await self._post("/flush_cache", {})


KINDS: dict[Kind, type[JaxrlWorker | VllmWorker | SglangWorker]] = {
    "jaxrl": JaxrlWorker,
    "vllm": VllmWorker,
    "sglang": SglangWorker,
}


def http_worker(kind: Kind, url: str, **options) -> JaxrlWorker | VllmWorker | SglangWorker:
    """The worker of a server of this kind; options: of `HttpWorker`."""
    return KINDS[kind](url, **options)


# What reading JSON of another shape than expected raises.
_SHAPE = (KeyError, TypeError, ValueError, AttributeError, IndexError)


def _how(sampling: Sampling) -> dict[str, Any]:
    """Everything that decides what is drawn: servers fill in what is left open from the model's
    generation_config.json."""
    return {
        "n": sampling.n,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,  # all
        "min_p": sampling.min_p,
        "repetition_penalty": 1.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "stop": list(sampling.stop),
        "stop_token_ids": list(sampling.stop_tokens),
        "ignore_eos": sampling.ignore_eos,
    }


def _check(drawn: Sequence[Drawn], sampling: Sampling, vocab_size: int) -> None:
    """Raises ValueError for what is no completion of such a model, or not what was asked for."""
    if len(drawn) != sampling.n:
        raise ValueError(f"{len(drawn)} where {sampling.n} were asked for")
    for one in drawn:
        if one.finish not in ("stop", "length"):
            raise ValueError(f"one that ended by {one.finish!r}")
        if not isinstance(one.text, str):
            raise ValueError(f"text {one.text!r}")
        if not _all(one.tokens, lambda token: type(token) is int and 0 <= token < vocab_size):
            raise ValueError(f"token ids {_line(str(one.tokens))} of a model of {vocab_size}")
        if sampling.max_tokens and len(one.tokens) > sampling.max_tokens:
            raise ValueError(f"{len(one.tokens)} tokens where {sampling.max_tokens} may be drawn")
        if not _all(one.logprobs, lambda p: type(p) in (int, float) and math.isfinite(p)):
            raise ValueError(f"log-probs {_line(str(one.logprobs))}")
        if len(one.logprobs) != len(one.tokens):
            raise ValueError(f"{len(one.logprobs)} log-probs of {len(one.tokens)} tokens")


def _all(items: Any, fits) -> bool:
    return isinstance(items, list) and bool(items) and all(map(fits, items))


def _listed(answer: Any) -> list[Any]:
    return answer if isinstance(answer, list) else [answer]


def _line(text: str) -> str:
    return " ".join(text.split())[:300]
