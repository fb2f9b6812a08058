"""Grammars that make llama.cpp crash or abort, and exceptions that ctypes would swallow; this module raises them."""

from __future__ import annotations

import contextlib
import ctypes
import json
import re
from collections.abc import Callable
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp.llama_grammar import LlamaGrammar

from refreekv_cpp import _upstream, native
from refreekv_cpp._branches import branches
from refreekv_cpp._literals import factored
from refreekv_cpp._upstream import LlamaModel, LlamaSampler, SchemaConverter

MAX_CHARACTERS = 1_000_000
# llama.cpp parses a grammar recursively. These bounds are a quarter or less of what overflows a stack of 8 MiB.
MAX_UNQUOTED = 100_000  # characters outside of quoted text
MAX_NESTING = 4000
# llama.cpp's time for one token grows with the square of the first and the cube of the second: at these bounds it is
# some 3 seconds in the worst case. A schema with n optional properties has n in a row.
MAX_ALTERNATIVES = 2000
MAX_OPTIONAL = 250

# what may have parentheses in it that are text: literals, sets of characters, comments
_TEXTS = re.compile(r'"(?:\\.|[^"\\])*"?|\[(?:\\.|[^\]\\])*\]?|#[^\n]*', re.DOTALL)


def check(vocab: Any, grammar: LlamaGrammar | None) -> None:
    """Once for a grammar: it remembers that it was found good.

    Args:
        vocab: the llama_vocab of the model that the grammar is for.

    Raises:
        ValueError: the grammar cannot be used (`make_sampler`).
    """
    if grammar is not None and getattr(grammar, "refreekv_checked_for", None) != vocab:
        llama_cpp.llama_sampler_free(make_sampler(vocab, *_upstream.grammar_text(grammar)))
        grammar.refreekv_checked_for = vocab  # type: ignore[attr-defined]


def make_sampler(vocab: Any, text: str, root: str) -> Any:
    """The llama_sampler of a grammar in GBNF. The caller owns it.

    Raises:
        ValueError: it does not parse, has no rule `root`, is left-recursive, or is so large that parsing it would
            overflow the stack, or has so many alternatives that choosing a token would take minutes.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"the grammar has {len(text)} characters; it must have {MAX_CHARACTERS} at most")
    unquoted = _TEXTS.sub("", text)
    if len(unquoted) > MAX_UNQUOTED:
        raise ValueError(
            f"the grammar has {len(unquoted)} characters outside of quotes; it must have {MAX_UNQUOTED} at most"
        )
    if _nesting(unquoted) > MAX_NESTING:
        raise ValueError(f"the grammar must not nest more than {MAX_NESTING} parentheses")
    text = factored(text)
    most = branches(text)
    if most.n_alternatives > MAX_ALTERNATIVES:
        raise ValueError(f"the grammar must not have more than {MAX_ALTERNATIVES} alternatives at one place")
    if most.n_optional > MAX_OPTIONAL:
        raise ValueError(f"the grammar must not have more than {MAX_OPTIONAL} optional parts in a row")
    native.clear_error()
    sampler = llama_cpp.llama_sampler_init_grammar(vocab, text.encode(), root.encode())
    if not sampler:
        reason = native.last_error().strip() or f"it needs a rule {root!r}, and no rule may begin with itself"
        raise ValueError(f"the grammar cannot be used: {_shortened(reason)}")
    return sampler


def _format_literal(_: SchemaConverter, literal: str) -> str:
    """Text, which for the most part is JSON, as a grammar writes it; as llama.cpp's own converter does.

    llama-cpp-python leaves backslashes alone, so a word with a quote breaks the grammar and one with a line break is no
    JSON; and it has two halves in the place of an emoji, which no token is.
    """
    with contextlib.suppress(ValueError):
        literal = json.dumps(json.loads(literal), ensure_ascii=False)
    escaped = re.sub(r'[\\"]', r"\\\g<0>", literal).replace("\n", "\\n").replace("\r", "\\r")
    return f'"{escaped}"'


_upstream.replace_literal_format(_format_literal)


def _nesting(unquoted: str) -> int:
    depth = deepest = 0
    for bracket in re.findall("[()]", unquoted):
        depth += 1 if bracket == "(" else -1
        deepest = max(deepest, depth)
    return deepest


def _shortened(reason: str) -> str:
    """llama.cpp's reasons quote all of the grammar from the error on."""
    return reason if len(reason) <= 200 else reason[:200] + "..."


class _Active:
    """A grammar of llama.cpp's, and the place in it.

    Raises:
        ValueError: it does not parse, or is too large.
    """

    def __init__(self, model: LlamaModel, text: str) -> None:
        self.sampler = make_sampler(model.vocab, text, "root")

    def __del__(self) -> None:
        if getattr(self, "sampler", None):
            llama_cpp.llama_sampler_free(self.sampler)


class Sampler(LlamaSampler):
    """llama-cpp-python's sampler, except that a grammar raises Python exceptions.

    llama-cpp-python adds the grammar to llama.cpp's chain of samplers. If it does not parse, a null pointer is added;
    if it allows none of the model's tokens, llama.cpp throws a C++ exception that nothing catches. Both end the
    process. Here a custom sampler in the chain applies the grammar, and the grammar accepts the chosen token only if it
    allows it.
    """

    _active: _Active | None = None
    _error: BaseException | None = None  # of a custom sampler, such as a logits processor

    def add_custom(self, apply_func: Callable[[Any], None]) -> None:
        """`sample` raises what this function raises. ctypes would print it, and go on with the logits as they are."""

        def apply(candidates: Any) -> None:
            try:
                apply_func(candidates)
            except BaseException as error:
                self._error = self._error or error

        super().add_custom(apply)

    def add_grammar(self, model: LlamaModel, grammar: LlamaGrammar) -> None:
        """
        Raises:
            ValueError: the grammar does not parse, or is too large.
        """
        text, _ = _upstream.grammar_text(grammar)
        if not text:
            return  # as llama.cpp, which takes it for none
        self._active = _Active(model, text)
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
            BaseException: what a logits processor has raised.
        """
        token: int = super().sample(ctx, idx)
        if (error := self._error) is not None:
            self._error = None
            raise error
        if self._active is not None:
            if token not in self._allowed:
                raise ValueError("the model has no token that goes on with the grammar")
            llama_cpp.llama_sampler_accept(self._active.sampler, token)
        return token
