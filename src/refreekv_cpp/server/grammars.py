"""Grammars that are made of the JSON schemas of requests."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from llama_cpp.llama_grammar import json_schema_to_gbnf

# llama-cpp-python writes each repetition of a schema out, item by item
MAX_REPETITIONS = 4000

_REPETITION = re.compile(r"\{(\d*),?(\d*)\}")


def check_schema(schema: Any) -> Any:
    """The JSON schema, if its grammar has a reasonable size.

    Raises:
        ValueError: something in it is repeated too often.
    """
    for name, value in _members(schema):
        n: float = 0
        if name in ("minItems", "maxItems", "minLength", "maxLength") and isinstance(value, (int, float)):
            n = value
        elif name == "pattern" and isinstance(value, str):
            n = math.prod(int(count) for counts in _REPETITION.findall(value) for count in counts if count.strip("0"))
        if n > MAX_REPETITIONS:
            raise ValueError(f"{name} of a JSON schema must not repeat anything more than {MAX_REPETITIONS} times")
    return schema


def _members(value: Any) -> Iterator[tuple[str, Any]]:
    """Names and values of all objects inside a JSON value, however deep."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from value.items()
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def from_schema(schema: Any) -> str:
    """The grammar of a JSON schema.

    Raises:
        ValueError: it is no schema, or uses what llama-cpp-python has no grammar for.
    """
    try:
        return str(json_schema_to_gbnf(json.dumps(check_schema(schema))))
    except Exception as error:  # it raises all kinds
        raise ValueError(f"there is no grammar for this JSON schema: {error}") from error
