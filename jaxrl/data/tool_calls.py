"""Calls of tools in what a model says, in the forms of the families that jaxrl knows."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

# Qwen3 and others: JSON with name and arguments between the tags; GLM-4.5: the name, and pairs of
# <arg_key> and <arg_value>.
_TAGGED = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_PAIR = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)
BEGINS = "<tool_call>"


def parse_tool_calls(
    text: str, tools: Sequence[Mapping[str, Any]]
) -> tuple[str, list[dict[str, str]]]:
    """(what is said beside them, [{"name": ..., "arguments": JSON text}, ...]) of a turn's text.

    tools: JSON schemas as requests have them; what calls another, or is no JSON, stays text.
    """
    known = {function_of(tool).get("name"): function_of(tool) for tool in tools}
    calls, said, end = [], "", 0
    for match in _TAGGED.finditer(text):
        call = _json_call(match[1]) or _pairs_call(match[1], known)
        if call is None or call["name"] not in known:
            continue
        calls.append(call)
        said, end = said + text[end : match.start()], match.end()
    if not calls:  # Llama 3: the whole turn is the call
        call = _json_call(text)
        if call is not None and call["name"] in known:
            return "", [call]
    return (said + text[end:]).strip() if calls else text, calls


def function_of(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """A tool's, or a call's, name and what belongs to it."""
    found = tool.get("function", tool)
    return found if isinstance(found, Mapping) else {}


def _json_call(text: str) -> dict[str, str] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", found.get("parameters", {}))
    if not isinstance(arguments, dict):
        return None
    return _call(found["name"], arguments)


def _pairs_call(text: str, known: Mapping[Any, Mapping[str, Any]]) -> dict[str, str] | None:
    name = text.partition("<arg_key>")[0].strip()
    if not re.fullmatch(r"[\w.-]+", name):
        return None
    properties = _mapping(_mapping(known.get(name, {}).get("parameters")).get("properties"))
    types = {key: _mapping(value).get("type") for key, value in properties.items()}
    arguments = {
        key.strip(): _value(value, types.get(key.strip())) for key, value in _PAIR.findall(text)
    }
    return _call(name, arguments)


def _mapping(schema: Any) -> Mapping[str, Any]:
    """A JSON schema may be true, too."""
    return schema if isinstance(schema, Mapping) else {}


def _call(name: str, arguments: Mapping[str, Any]) -> dict[str, str] | None:
    """With arguments as JSON that can be encoded."""
    try:
        text = json.dumps(arguments, ensure_ascii=False)
    except RecursionError:
        return None
    if any("\ud800" <= c <= "\udfff" for c in text):  # an escape of half a character
        text = json.dumps(arguments)
    return {"name": name, "arguments": text}


def _value(text: str, kind: Any) -> Any:
    """An argument that is written without quotes where it is text."""
    if kind == "string":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
