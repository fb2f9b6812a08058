"""Grammars that llama.cpp cannot use. Upstream puts its NULL into the chain of samplers, which crashes."""

from __future__ import annotations

from typing import Any

import llama_cpp
from llama_cpp.llama_grammar import LlamaGrammar

from refreekv_cpp import native


def check(vocab: Any, grammar: LlamaGrammar | None) -> None:
    """
    Args:
        vocab: the llama_vocab of the model that the grammar is for.

    Raises:
        ValueError: it does not parse, has no rule `root`, or is left-recursive.
    """
    if grammar is None:
        return
    native.clear_error()
    sampler = llama_cpp.llama_sampler_init_grammar(vocab, grammar._grammar.encode(), grammar._root.encode())
    if not sampler:
        reason = native.last_error().strip() or f"it needs a rule {grammar._root!r}, and no rule may begin with itself"
        raise ValueError(f"the grammar cannot be used: {_shortened(reason)}")
    llama_cpp.llama_sampler_free(sampler)


def _shortened(reason: str) -> str:
    """llama.cpp's reasons quote all of the grammar from the error on."""
    return reason if len(reason) <= 200 else reason[:200] + "..."
