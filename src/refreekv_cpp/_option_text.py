"""Options of `Llama` as text, NAME=VALUE: on command lines, and in the settings of the server."""

from __future__ import annotations

import inspect
import json
import types
from collections.abc import Iterable
from typing import Any, Union, get_args, get_origin, get_type_hints

import llama_cpp

from refreekv_cpp import _upstream
from refreekv_cpp._cache_types import CACHE_TYPES
from refreekv_cpp._checks import check_options
from refreekv_cpp.llama import Llama
from refreekv_cpp.options import read_option

OBJECTS = frozenset({"chat_handler", "draft_model", "tokenizer"})
"""Options that cannot be written as text."""

LLAMA_OPTIONS = frozenset(
    name
    for function in (llama_cpp.Llama.__init__, Llama.__init__)
    for name, parameter in inspect.signature(function).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
)
"""The names of all."""

# other kv_ options need no entry here: `read_option` checks their values
_KINDS = {**get_type_hints(llama_cpp.Llama.__init__), "kv_cold_dir": str | None, "kv_elastic": bool | None}
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
_PYTHON_WORDS = {"True": True, "False": False, "None": None}


def parse(text: str) -> tuple[str, Any]:
    """The value is JSON or one of Python's words where it can be read as that, the name of a cache type, or text.

    Raises:
        ValueError: it is not NAME=VALUE.
    """
    name, equals, value = text.partition("=")
    name = name.strip().replace("-", "_")
    if not (name and equals):
        raise ValueError(f"--option {text}: must be NAME=VALUE")
    if name in ("type_k", "type_v") and value in CACHE_TYPES:
        return name, CACHE_TYPES[value]
    if value in _PYTHON_WORDS:
        return name, _PYTHON_WORDS[value]
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


def check(name: str, value: Any) -> None:
    """
    Raises:
        ValueError: the value of this option of `Llama` is of another kind, or no chat format or type of a cache.
    """
    if name in ("type_k", "type_v"):
        if value not in CACHE_TYPES.values():
            raise ValueError(f"{name}: must be one of {', '.join(CACHE_TYPES)}")
    elif name in _KINDS and not _is(value, _KINDS[name]):
        raise ValueError(f"{name}: must be {_described(_KINDS[name])}")
    check_options({name: value})
    if value is not None:
        read_option(name, value)
    if name == "chat_format" and value is not None:
        check_chat_format(value)


def check_chat_format(name: str) -> None:
    """
    Raises:
        ValueError: llama-cpp-python has no such format, and no model can have it in its file.
    """
    known = _upstream.chat_formats()
    if name not in known and not name.startswith("chat_template."):
        raise ValueError(
            f"chat_format {name}: must be chat_template.NAME (of the model's file) or one of {', '.join(known)}"
        )


def _is(value: Any, kind: Any) -> bool:
    """Whether a value, as it comes from JSON, is of the kind that an annotation says."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(_is(value, each) for each in args)
    if origin is list:
        return isinstance(value, list) and all(_is(each, args[0]) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(_is(each, args[1]) for each in value.values())
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _described(kind: Any) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _either(_described(each) for each in args)
    if origin is list:
        return f"a JSON list (of each: {_described(args[0])})"
    if origin is dict:
        return f"a JSON object (of each value: {_described(args[1])})"
    return _NAMES[kind]


def _either(texts: Iterable[str]) -> str:
    *first, last = texts
    return f"{', '.join(first)} or {last}"
