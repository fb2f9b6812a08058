"""The signatures that are written out for editors are those of upstream."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from refreekv_cpp import Llama
from refreekv_cpp._lifetime import Lifetime
from refreekv_cpp._signatures import LlamaOptions

(STOCK,) = Lifetime.__bases__  # llama_cpp.Llama
METHODS = ["create_chat_completion", "create_completion", "detokenize", "embed", "generate", "sample", "tokenize"]


def parameters(function: Any) -> list[tuple[str, Any, Any]]:
    return [(each.name, each.kind, each.default) for each in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_takes_what_upstreams_takes(name: str) -> None:
    assert parameters(getattr(Llama, name)) == parameters(getattr(STOCK, name))
    assert getattr(Llama, name).__doc__


def test_the_options_are_upstreams() -> None:
    upstream = inspect.signature(STOCK.__init__).parameters.values()
    names = [each.name for each in upstream if each.kind is inspect.Parameter.KEYWORD_ONLY]
    assert list(LlamaOptions.__annotations__) == names


def test_no_public_method_of_ours_hides_what_it_takes() -> None:
    variable = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    for name, method in inspect.getmembers(Llama, inspect.isfunction):
        if not name.startswith("_") and method is not getattr(STOCK, name, None):
            kinds = {each.kind for each in inspect.signature(method).parameters.values()}
            assert not kinds & variable, name
