"""Grammars of requests. Some of them make llama.cpp abort or crash; this module turns those into exceptions."""

from __future__ import annotations

import ctypes
import json
import math
import re
from collections.abc import Iterator
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp._internals import LlamaModel, LlamaSampler
from llama_cpp.llama_grammar import LlamaGrammar, json_schema_to_gbnf

from refreekv_cpp import _grammar

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


class _Grammar:
    """A grammar of llama.cpp's, and the place in it.

    Raises:
        ValueError: it does not parse, or is too large.
    """

    def __init__(self, model: LlamaModel, text: str) -> None:
        self.sampler = _grammar.make_sampler(model.vocab, text, "root")

    def __del__(self) -> None:
        if getattr(self, "sampler", None):
            llama_cpp.llama_sampler_free(self.sampler)


def check(model: LlamaModel, text: str) -> None:
    """
    Raises:
        ValueError: the grammar does not parse, or is too large.
    """
    _Grammar(model, text)


class Sampler(LlamaSampler):
    """llama-cpp-python's sampler, except that a grammar raises Python exceptions.

    llama-cpp-python adds the grammar to llama.cpp's chain of samplers. If it does not parse, a null pointer is added;
    if it allows none of the model's tokens, llama.cpp throws a C++ exception that nothing catches. Both end the
    process. Here a custom sampler in the chain applies the grammar, and the grammar accepts the chosen token only if it
    allows it.
    """

    _active: _Grammar | None = None

    def add_grammar(self, model: LlamaModel, grammar: LlamaGrammar) -> None:
        """
        Raises:
            ValueError: the grammar does not parse, or is too large.
        """
        if not grammar._grammar:
            return  # as llama.cpp, which takes it for none
        self._active = _Grammar(model, grammar._grammar)
        self.add_custom(self._apply_grammar)

    def _apply_grammar(self, candidates: Any) -> None:
        assert self._active is not None
        llama_cpp.llama_sampler_apply(self._active.sampler, candidates)
        array = candidates.contents
        data = (llama_cpp.llama_token_data * array.size).from_address(ctypes.addressof(array.data.contents))
        tokens = np.frombuffer(data, dtype=[("id", np.intc), ("logit", np.single), ("p", np.single)])
        self._allowed = tokens["id"][tokens["logit"] > -np.inf]

    def sample(self, ctx: Any, idx: int = -1) -> int:
        """
        Raises:
            ValueError: the model has no token that goes on with the grammar.
        """
        token: int = super().sample(ctx, idx)
        if self._active is not None:
            if token not in self._allowed:
                raise ValueError("the model has no token that goes on with the grammar")
            llama_cpp.llama_sampler_accept(self._active.sampler, token)
        return token
