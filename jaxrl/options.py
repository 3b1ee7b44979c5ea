"""Options as frozen dataclasses: declared once, filled from a ConfigDict, listed for the user.

Each field carries its meaning (`option`), so `--help` and README's table of options come from the
dataclasses of `jaxrl.config`.
"""

import dataclasses
import difflib
import math
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from ml_collections import ConfigDict


class ConfigError(ValueError):
    """Input that cannot be used: one line that names the value and the way out."""


def option[T](default: T, doc: str) -> T:
    """A dataclass field with its default and its one-sentence meaning."""
    return dataclasses.field(default=default, metadata={"doc": doc})  # type: ignore[return-value]


def group[T](cls: type[T], doc: str) -> T:
    """A field that is itself a section of options."""
    return dataclasses.field(default_factory=cls, metadata={"doc": doc})  # type: ignore


def at_least(config, least, *names: str) -> None:
    for name in names:
        if getattr(config, name) < least:
            raise ConfigError(f"{name} is {getattr(config, name)}; it must be at least {least}")


def above(config, limit, *names: str) -> None:
    for name in names:
        if getattr(config, name) <= limit:
            raise ConfigError(f"{name} is {getattr(config, name)}; it must be above {limit}")


def default_config(cls: type, **values) -> ConfigDict:
    """The options of dataclass `cls` as a ConfigDict with their defaults, some replaced."""
    return ConfigDict(dataclasses.asdict(cls()) | values)


def from_config[T](cls: type[T], config: ConfigDict | Mapping[str, Any]) -> T:
    """`cls` filled from `config`, missing keys at their defaults.

    Raises ConfigError for an unknown key (naming the nearest known one), a value of the wrong type
    or out of range.
    """
    return _fill(cls, config, "", cls)


def field_type(cls: type, key: str) -> Any:
    """Type of the option `key` ("train.optimizer.b1") of `cls`; ConfigError for an unknown one."""
    kind: Any = cls
    for part in key.split("."):
        fields = _fields(typing.cast(type, kind)) if dataclasses.is_dataclass(kind) else {}
        if part not in fields:
            raise _unknown(cls, key)
        kind = fields[part][1]
    return kind


def options(cls: type, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """(dotted key, default, meaning) of every option of `cls`, sections flattened."""
    for name, (field, kind) in _fields(cls).items():
        if dataclasses.is_dataclass(kind):
            yield from options(typing.cast(type, kind), f"{prefix}{name}.")
        else:
            yield prefix + name, field.default, field.metadata["doc"]


def options_table(cls: type) -> str:
    """The options of `cls` as a markdown table."""
    lines = ["| option | default | meaning |", "|---|---|---|"]
    for key, default, doc in options(cls):
        shown = show_value(default)
        doc = doc.replace("|", "\\|")
        lines.append(f"| `{key}` | {f'`{shown}`' if shown else ''} | {doc} |")
    return "\n".join(lines)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"ac": x}} -> {"train.ac": x}."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[prefix + key] = value
    return values


def show_value(value: Any) -> str:
    """An option's value as one would type it on the command line."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _fields(cls: type) -> dict[str, tuple[dataclasses.Field, Any]]:
    types = typing.get_type_hints(cls)
    return {f.name: (f, types[f.name]) for f in dataclasses.fields(cls)}


def _unknown(cls: type, key: str) -> ConfigError:
    known = [name for name, _, _ in options(cls)]
    # A key of the right name in another section is nearer than one that looks alike.
    near = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean config.{near[0]}?" if near else "--help lists the keys"
    return ConfigError(f"unknown key config.{key}; {hint}")


def _fill(cls: type, config, prefix: str, root: type):
    values, fields = {}, _fields(cls)
    for key, value in config.items():
        if key not in fields:
            raise _unknown(root, prefix + key)
        kind = fields[key][1]
        if dataclasses.is_dataclass(kind) and isinstance(value, (Mapping, ConfigDict)):
            values[key] = _fill(typing.cast(type, kind), value, f"{prefix}{key}.", root)
        else:
            values[key] = _typed(value, kind, f"config.{prefix}{key}")
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"config.{prefix}{error}") from None


def _typed(value: Any, kind: Any, key: str) -> Any:
    """`value` as a `kind`, or ConfigError; only int -> float and list -> tuple are converted."""
    if dataclasses.is_dataclass(kind):
        raise ConfigError(f"{key} is {value!r}; it is a section of options, set {key}.<option>")
    if typing.get_origin(kind) is Literal:
        if value in (choices := typing.get_args(kind)):
            return value
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{key} is {value!r}; choose one of {', '.join(choices)}{hint}")
    if typing.get_origin(kind) is tuple:
        if isinstance(value, (tuple, list)) and all(isinstance(v, str) for v in value):
            return tuple(value)
        raise ConfigError(f"{key} is {value!r}; it takes a tuple of strings")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and not math.isfinite(value):
        raise ConfigError(f"{key} is {value}; it takes a finite number")
    if kind is float and number:
        return float(value)
    if type(value) is kind:
        return value
    raise ConfigError(f"{key} is {value!r}; it takes {_KINDS[kind]}")


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
