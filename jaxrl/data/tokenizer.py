"""A checkpoint's tokenizer, its chat template, and the tokens that end a turn."""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from jaxrl.data.tool_calls import function_of
from jaxrl.options import ConfigError


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """hf: a fast tokenizer of transformers. stop_ids: the tokens at which the model's generation
    ends (eos_token and generation_config.json's eos_token_id), sorted. pad_id fills rows."""

    hf: Any
    stop_ids: tuple[int, ...]
    pad_id: int

    @functools.cached_property
    def stop_texts(self) -> tuple[str, ...]:
        return tuple(self.hf.convert_ids_to_tokens(list(self.stop_ids)))

    def chat_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        **variables: Any,
    ) -> str:
        """A conversation as the chat template writes it, up to where the model's turn begins.

        tools: JSON schemas. variables: the template's own. Raises ConfigError, in a line, for what
        the template refuses or does not show.
        """
        schemas = [dict(tool) for tool in tools]
        try:
            text = self.hf.apply_chat_template(
                [_for_template(message) for message in messages],
                tools=schemas or None,
                tokenize=False,
                add_generation_prompt=True,
                **variables,
            )
        except Exception as error:  # of any kind: templates look into messages as they please
            line = " ".join(str(error).split())[:200]
            raise ConfigError(f"the chat template refuses the messages: {line}") from None
        for tool in schemas:  # a template that knows no tools leaves them out without a word
            name = function_of(tool).get("name")
            if not name or str(name) not in text:
                raise ConfigError(f"the model's chat template does not show the tool {name!r}")
        return text

    def ids(self, text: str, *, special: bool) -> list[int]:
        """Its tokens; with `special`, and those that the tokenizer puts around a text. Raises
        ConfigError for what cannot be encoded."""
        try:
            return self.hf(text, add_special_tokens=special).input_ids
        except (TypeError, UnicodeError) as error:  # half a character
            raise ConfigError(f"its text cannot be encoded: {error}") from None


def _for_template(message: Mapping[str, Any]) -> dict[str, Any]:
    """Templates take the arguments of calls as objects, clients send them as JSON text."""
    found = dict(message)
    calls: list[Any] = list(message.get("tool_calls") or ())
    for i, call in enumerate(calls):
        function = dict(function_of(call))
        with contextlib.suppress(ValueError, TypeError):
            function["arguments"] = json.loads(function["arguments"])
        calls[i] = {**call, "function": function}
    return found | ({"tool_calls": calls} if calls else {})


def load_tokenizer(name: str | pathlib.Path, vocab_size: int, chat_template: str = "") -> Tokenizer:
    """The tokenizer in a checkpoint folder, or of a model on the Hugging Face hub; no code of the
    checkpoint is run. chat_template: a Jinja file that replaces the tokenizer's own.

    Raises ConfigError where there is none, or it has tokens that a model of `vocab_size` has not.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # or it says that torch is missing
    with warnings.catch_warnings():  # in notebooks, of a progress bar that nothing here shows
        warnings.filterwarnings("ignore", message="IProgress not found")
        from transformers import AutoTokenizer

    try:
        hf = AutoTokenizer.from_pretrained(str(name), trust_remote_code=False)
    except Exception as error:  # of many kinds, with messages of many lines
        line = " ".join(str(error).split())[:200]
        raise ConfigError(f"no tokenizer in {name}: {line}") from error
    if not hf.is_fast:
        raise ConfigError(f"the tokenizer in {name} is no fast one: it needs a tokenizer.json")
    largest = max(hf.get_vocab().values())
    if largest >= vocab_size:
        raise ConfigError(
            f"the tokenizer in {name} has token {largest} "
            f"({hf.convert_ids_to_tokens(largest)!r}), and the model {vocab_size} tokens; use the "
            "tokenizer that the model was trained with"
        )
    if chat_template:
        file = pathlib.Path(chat_template)
        if not file.is_file():
            raise ConfigError(f"config.data.chat_template {chat_template!r} is no file")
        hf.chat_template = file.read_text(encoding="utf-8")
    stops = {hf.eos_token_id, *_generation_stops(str(name))} - {None}
    if not stops:
        raise ConfigError(f"the tokenizer in {name} has no eos_token: nothing would end a turn")
    pad = next(i for i in (hf.pad_token_id, hf.eos_token_id, min(stops)) if i is not None)
    return Tokenizer(hf, tuple(sorted(stops)), pad)


def _generation_stops(name: str) -> list[int]:
    """eos_token_id of the folder's, or the hub's, generation_config.json, if there is one."""
    from transformers.utils.hub import cached_file

    missing = ("gated_repo", "missing_entries", "connection_errors")
    silent = {f"_raise_exceptions_for_{case}": False for case in missing}
    file = cached_file(name, "generation_config.json", **silent)
    if file is None:
        return []
    try:
        stops = json.loads(pathlib.Path(file).read_text(encoding="utf-8")).get("eos_token_id")
    except ValueError as error:
        raise ConfigError(f"{file} is no JSON ({error})") from None
    return [stops] if isinstance(stops, int) else list(stops or ())
