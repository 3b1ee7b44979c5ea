"""Requests as OpenAI's API has them, and what a request adds to it under vLLM's names."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from jaxrl.options import ConfigError
from jaxrl.rollout.requests import Sampling

# Every token's text is compared with all of them.
STOP_TEXTS, STOP_LENGTH = 64, 1024


class Asked(BaseModel):
    """A field that is not known is refused: it would be ignored where the client counts on it."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        """Clients write null for what they leave open."""
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}


class StreamOptions(Asked):
    include_usage: bool = False


class Generation(Asked):
    """What both kinds of requests have."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = 1.0
    top_p: float = 1.0
    n: int = 1
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=0)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    # Beyond OpenAI's.
    top_k: int = Field(0, ge=-1)
    min_p: float = 0.0
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    return_token_ids: bool = False
    # Taken as long as they ask for nothing.
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[str, float] | None = None

    def sampling(self, max_tokens: int) -> Sampling:
        """Raises ConfigError for what is out of range or not offered."""
        refused = {
            "frequency_penalty": bool(self.frequency_penalty),
            "presence_penalty": bool(self.presence_penalty),
            "repetition_penalty": self.repetition_penalty != 1,
            "logit_bias": bool(self.logit_bias),
        }
        for name in (name for name, asked in refused.items() if asked):
            raise ConfigError(
                f"{name} is {getattr(self, name)}, and not offered here; leave it out"
            )
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        longest = max(map(len, stop), default=0)
        if len(stop) > STOP_TEXTS or longest > STOP_LENGTH:
            raise ConfigError(
                f"stop has {len(stop)} texts, the longest of {longest} characters; it may have "
                f"{STOP_TEXTS} of {STOP_LENGTH}"
            )
        return Sampling(
            n=self.n,
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_k=max(self.top_k, 0),
            top_p=self.top_p,
            min_p=self.min_p,
            stop=tuple(stop),
            stop_tokens=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            seed=self.seed,
        )

    @property
    def usage_in_stream(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(Generation):
    """`POST /v1/completions`."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = None
    echo: bool = False
    best_of: int | None = None
    suffix: str | None = None

    def check(self) -> None:
        """Raises ConfigError for what is not offered."""
        if self.logprobs:
            raise ConfigError(
                f"logprobs is {self.logprobs}; those of drawn tokens are given, not those of "
                "others: use 0"
            )
        if self.echo or self.suffix or self.best_of not in (None, self.n):
            raise ConfigError("echo, suffix and best_of are not offered here; leave them out")

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]  # pyright: ignore[reportReturnType]
        return self.prompt  # pyright: ignore[reportReturnType]


class ChatRequest(Generation):
    """`POST /v1/chat/completions`. Messages and tools are checked by `data.chat`."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    logprobs: bool = False
    top_logprobs: int | None = None
    max_completion_tokens: int | None = Field(None, ge=1)
    response_format: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] = {}

    def check(self) -> None:
        """Raises ConfigError for what is not offered."""
        if self.top_logprobs:
            raise ConfigError(
                f"top_logprobs is {self.top_logprobs}; those of drawn tokens are given, not those "
                "of others: leave it out"
            )
        if self.tool_choice not in (None, "auto", "none"):
            raise ConfigError(f"tool_choice is {self.tool_choice!r}; it takes auto or none")
        if self.response_format not in (None, {"type": "text"}):
            raise ConfigError("response_format other than text is not offered here; leave it out")


class UpdateRequest(Asked):
    """`POST /update_weights_from_disk`. model_path: a Hugging Face folder of the same model, or a
    PEFT adapter's. version: of the weights; default one more than before. marker: the name of a
    file in it that is there when all others are, and is waited for."""

    model_path: str
    version: int | None = Field(None, ge=0, lt=2**53)
    marker: str | None = Field(None, pattern=r"^\w+$")
