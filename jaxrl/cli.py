"""Command lines of the entry points: `--config=FILE.py --config.key=value ...`, errors in one line.

The file's `get_config(arg)` returns an ml_collections ConfigDict; `--config=FILE.py:arg` passes an
argument. The options' own types read the values, so that every refusal names key, value and type.
"""

import contextlib
import os
import pathlib
import re
import runpy
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from jaxrl.options import ConfigError, field_type, from_config, options, show_value

BAD_INPUT = 2
INTERRUPTED = 130


class OutputError(RuntimeError):
    """Results cannot be written: one line that names the path and the way out."""


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """What the operating system refuses, as an OutputError that names the path."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error


class HostLostError(RuntimeError):
    """Another process that this one works with has gone: one line that names it."""


def parse[T](cls: type[T], argv: Sequence[str], usage: str) -> T:
    """The options `cls` that the command line `argv` (program name first) asks for.

    Prints `usage` and the options, and exits, for --help. Raises ConfigError for bad input.
    """
    if {"-h", "--help"} & set(argv[1:]):
        print(_help(cls, usage))
        raise SystemExit(0)
    source, overrides = None, {}
    for flag, value in _flags(argv[1:]):
        kind = field_type(cls, flag.removeprefix("config.")) if "." in flag else str
        if value is None and kind is not bool:
            raise ConfigError(f"--{flag} has no value; write --{flag}=VALUE")
        if flag == "config":
            source = value
        else:
            text = "true" if value is None else value
            overrides[flag.removeprefix("config.")] = _read(text, kind)
    if source is None:
        example = re.search(r"--config=\S+", usage)
        hint = f"; e.g. {example[0]} (--help for more)" if example else ""
        raise ConfigError(f"no --config given{hint}")
    tree = load(source).to_dict()
    # Before anything is checked: a flag may give what the file leaves open.
    for key, value in overrides.items():
        *sections, name = key.split(".")
        section: Any = tree
        for part in sections:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):  # which is refused below
                break
        else:
            section[name] = value
    return from_config(cls, tree)


def with_dry_run(argv: Sequence[str]) -> list[str]:
    """`--dry_run` as the option that it is short for."""
    return ["--config.dry_run" if arg == "--dry_run" else arg for arg in argv]


def load(source: str) -> ConfigDict:
    """The ConfigDict of `get_config` in "FILE.py" or "FILE.py:arg"."""
    path, colon, arg = source.partition(":")
    if not pathlib.Path(path).is_file():
        here = ", ".join(map(str, sorted(pathlib.Path("configs").glob("*.py"))))
        hint = f"; there are {here}" if here else ""
        raise ConfigError(f"no config file {path!r}{hint}")
    try:  # the file is the user's: whatever it raises is bad input
        get_config = runpy.run_path(path).get("get_config")
        if get_config is None:
            raise ConfigError("it defines no get_config(arg)")
        config = get_config(arg) if colon else get_config()
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        where = f"{path}:{lines[-1]}" if lines else path
        kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
        raise ConfigError(f"config file {where}: {kind}{' '.join(str(error).split())}") from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"config file {path}: get_config returned {config!r}, no ConfigDict")
    return config


def run(main: Callable[[Sequence[str]], int]) -> None:
    """Exit with `main(sys.argv)`; bad input, a full disk and Ctrl-C end in one line on stderr."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a stop cleans up like Ctrl-C
    try:
        code = main(sys.argv)
    except (ConfigError, OutputError) as error:
        code = _fail(f"error: {error}", BAD_INPUT)
    except HostLostError as error:
        code = _fail(f"error: {error}", 1)
    except BrokenPipeError:  # the reader of our output (`| head`) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except KeyboardInterrupt as stop:
        code = _fail(f"interrupted{f'; {stop}' if str(stop) else ''}", INTERRUPTED)
    sys.exit(code)


def _fail(line: str, code: int) -> int:
    print(line, file=sys.stderr)
    return code


def _flags(args: Sequence[str]) -> list[tuple[str, str | None]]:
    """(name, value) of `--name=value` and `--name value`; a bare `--name` has None."""
    found, rest = [], list(args)
    while rest:
        arg = rest.pop(0)
        match = re.fullmatch(r"--?(config(?:\.[\w.]+)?)(?:=(.*))?", arg, re.DOTALL)
        if not match:
            raise ConfigError(f"unexpected argument {arg!r}; options are --config.key=value")
        name, value = match[1], match[2]
        if value is None:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else None
        found.append((name, value))
    return found


def _read(text: str, kind: Any) -> Any:
    """The value that `text` spells for an option of type `kind`; unreadable text stays text."""
    if getattr(kind, "__origin__", None) is tuple:
        return tuple(part for part in (p.strip() for p in text.split(",")) if part)
    if kind is bool:
        return {"true": True, "false": False, "1": True, "0": False}.get(text.lower(), text)
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            return text
    return text


def _help(cls: type, usage: str) -> str:
    rows = [(f"--config.{key}", show_value(value), doc) for key, value, doc in options(cls)]
    width = max(len(name) for name, _, _ in rows)
    lines = [usage.strip(), "", "Options (default in brackets):"]
    for name, default, doc in rows:
        text = doc.replace("`", "") + (f" [{default}]" if default else "")
        first, *more = textwrap.wrap(text, 98 - width)
        lines.append(f"  {name:<{width}}  {first}")
        lines += [" " * (width + 4) + line for line in more]
    return "\n".join(lines)
