"""Grammars that llama.cpp cannot use. Upstream puts its NULL into the chain of samplers, which crashes."""

from __future__ import annotations

import re
from typing import Any

import llama_cpp
from llama_cpp.llama_grammar import LlamaGrammar

from refreekv_cpp import native

# llama.cpp parses a grammar recursively. These bounds are a quarter or less of what overflows a stack of 8 MiB.
MAX_CHARACTERS = 100_000
MAX_NESTING = 4000

# what may have parentheses in it that are text: literals, sets of characters, comments
_TEXTS = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\n]*', re.DOTALL)


def check(vocab: Any, grammar: LlamaGrammar | None) -> None:
    """
    Args:
        vocab: the llama_vocab of the model that the grammar is for.

    Raises:
        ValueError: the grammar cannot be used (`make_sampler`).
    """
    if grammar is not None:
        llama_cpp.llama_sampler_free(make_sampler(vocab, grammar._grammar, grammar._root))


def make_sampler(vocab: Any, text: str, root: str) -> Any:
    """The llama_sampler of a grammar in GBNF. The caller owns it.

    Raises:
        ValueError: it does not parse, has no rule `root`, is left-recursive, or is so large that parsing it would
            overflow the stack.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"the grammar has {len(text)} characters; it must have {MAX_CHARACTERS} at most")
    if _nesting(text) > MAX_NESTING:
        raise ValueError(f"the grammar must not nest more than {MAX_NESTING} parentheses")
    native.clear_error()
    sampler = llama_cpp.llama_sampler_init_grammar(vocab, text.encode(), root.encode())
    if not sampler:
        reason = native.last_error().strip() or f"it needs a rule {root!r}, and no rule may begin with itself"
        raise ValueError(f"the grammar cannot be used: {_shortened(reason)}")
    return sampler


def _nesting(text: str) -> int:
    depth = deepest = 0
    for bracket in re.findall("[()]", _TEXTS.sub("", text)):
        depth += 1 if bracket == "(" else -1
        deepest = max(deepest, depth)
    return deepest


def _shortened(reason: str) -> str:
    """llama.cpp's reasons quote all of the grammar from the error on."""
    return reason if len(reason) <= 200 else reason[:200] + "..."
