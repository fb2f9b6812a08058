"""What stands in the place of a model and a context that have been freed."""

from __future__ import annotations

from typing import Any, NoReturn

from refreekv_cpp.errors import ClosedError


class Closed:
    """A wrapper of llama-cpp-python's (model, context or batch) whose native part is gone: asking it raises."""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__"):
            return super().__getattribute__(name)
        return raise_closed()


def raise_closed() -> NoReturn:
    raise ClosedError("this Llama is closed, or could not be loaded; make a new one")


def mark_closed(wrapper: Any) -> None:
    """From now on everything that holds this wrapper (tokenizers do) gets a ClosedError, not freed memory."""
    wrapper.__class__ = Closed
