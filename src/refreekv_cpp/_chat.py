"""The system message of the chat that a thread is answering: prompts that it reads meanwhile are those of that chat."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_system: ContextVar[str | None] = ContextVar("system", default=None)


def system() -> str | None:
    """That message; None: there is no chat, or it has none."""
    return _system.get()


@contextmanager
def answering(system: str | None) -> Iterator[None]:
    """Inside, this thread answers a chat with this system message."""
    token = _system.set(system)
    try:
        yield
    finally:
        _system.reset(token)


def stream(system: str | None, chunks: Iterator[Any]) -> Iterator[Any]:
    """The chunks, whose generation begins with the first one, or later: other chats may be answered between them."""
    try:
        while True:
            with answering(system):
                try:
                    chunk = next(chunks)
                except StopIteration:
                    return
            yield chunk
    finally:
        if isinstance(chunks, Generator):
            chunks.close()
