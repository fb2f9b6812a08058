"""Positions of the prompt that no policy may evict (`Llama(kv_protect=...)`)."""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import llama_cpp

from refreekv_cpp import _upstream
from refreekv_cpp.errors import PolicyError

if TYPE_CHECKING:
    from refreekv_cpp._sequence import PrunedSequence

Span = tuple[int, int]  # positions, end excluded
Protect = Literal["system"] | Sequence[Span]

_VALID = '"system", or a list of (start, end) with 0 <= start <= end'


def check(protect: Any) -> Literal["system"] | tuple[Span, ...]:
    """
    Raises:
        PolicyError: it says no positions.
    """
    if protect is None:
        return ()
    if isinstance(protect, str) and protect == "system":
        return "system"
    try:
        if isinstance(protect, (str, bytes, Mapping)):
            raise TypeError
        found = tuple((operator.index(start), operator.index(end)) for start, end in protect)
    except (TypeError, ValueError):
        found = ((1, 0),)
    if not all(0 <= start <= end < 2**31 for start, end in found):
        raise PolicyError(f"kv_protect={protect!r}: must be {_VALID}")
    return found


def system_text(messages: Iterable[Any]) -> str | None:
    """What the system message says; None: there is none, or it is no text. Messages are mappings or objects."""
    first = next(iter(messages), None)
    if first is None or _field(first, "role") not in ("system", "developer"):
        return None
    content = _field(first, "content")
    if isinstance(content, Iterable) and not isinstance(content, str):  # OpenAI's parts
        content = "".join(_field(part, "text") or "" for part in content if _field(part, "type") == "text")
    return content.strip() or None if isinstance(content, str) else None


def _field(of: Any, name: str) -> Any:
    """As the templates of chats look it up: an item or else an attribute; None: it has neither."""
    try:
        return of[name]
    except (TypeError, KeyError):
        return getattr(of, name, None)


def resolve(protect: Literal["system"] | tuple[Span, ...], llm: PrunedSequence, system: str | None) -> Sequence[Span]:
    """Positions, for what a cache holds now."""
    if protect != "system":
        return protect
    span = find_text(llm, system) if system else None
    return [] if span is None else [span]


def find_text(llm: PrunedSequence, text: str) -> Span | None:
    """The tokens from the first to the last that has a part of a text, where it is first in the cache.

    The template may have changed it; None then.
    """
    tokens = _upstream.tokens(llm)
    pieces = [_piece(llm, token) for token in tokens]
    at = b"".join(pieces).find(text.encode())
    if at < 0:
        return None
    start = end = -1
    offset = 0
    for i, piece in enumerate(pieces):
        offset += len(piece)
        if start < 0 and offset > at:
            start = i
        if offset >= at + len(text.encode()):
            end = i + 1
            break
    return start, end


def _piece(llm: PrunedSequence, token: int) -> bytes:
    size, vocab = 64, _upstream.vocab(llm)
    while True:
        buffer = ctypes.create_string_buffer(size)
        n = llama_cpp.llama_token_to_piece(vocab, token, buffer, size, 0, True)
        if n >= 0:
            return buffer.raw[:n]
        size = -n
