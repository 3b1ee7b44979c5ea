"""What is asked of an engine, and what comes back."""

import dataclasses
import math
from collections.abc import Sequence

from jaxrl.options import ConfigError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How completions of a prompt are drawn.

    n: so many completions. max_tokens: of each (0: as many as the context takes). stop: texts that
    end a completion, and are no part of its text; stop_tokens: tokens that do, beside those of the
    engine unless `ignore_eos`. seed: 0 and more; the same seed draws the same tokens, whatever else
    is sampled beside them; None: a new one. temperature to min_p: see `sampling.Choice`.
    """

    n: int = 1
    max_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None

    def __post_init__(self):
        def refuse(name: str, takes: str):
            raise ConfigError(f"{name} is {getattr(self, name)}; it takes {takes}")

        if self.n < 1:
            refuse("n", "1 and more")
        if self.max_tokens < 0:
            refuse("max_tokens", "0 and more")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            refuse("temperature", "0 and more")
        if self.top_k < 0:
            refuse("top_k", "0 (all) and more")
        if not 0 < self.top_p <= 1:
            refuse("top_p", "more than 0, up to 1")
        if not 0 <= self.min_p <= 1:
            refuse("min_p", "0 to 1")
        if self.seed is not None and self.seed < 0:
            refuse("seed", "0 and more")
        if "" in self.stop:
            raise ConfigError("stop has an empty text, which would end everything; leave it out")


@dataclasses.dataclass
class Completion:
    """One of a request's completions, as far as it is.

    logprobs: of each token, as `sampling.sample` gives them. versions: of the weights that drew
    each. finish: "stop", "length" or "abort"; None while it goes on. text: what the tokens say, up
    to a stop text, "" in an engine without a tokenizer; safe: the first so many characters of it
    stay, whatever comes. failure: why it was given up, in a line, where it was not by who asked.
    """

    index: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    versions: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    safe: int = 0
    finish: str | None = None
    failure: str | None = None


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt and how it is completed; `id` is the engine's name of it."""

    id: int
    prompt: Sequence[int]
    sampling: Sampling
    completions: Sequence[Completion]

    @property
    def finished(self) -> bool:
        return all(completion.finish for completion in self.completions)
