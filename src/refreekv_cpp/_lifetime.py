"""The locks of a `Llama`, and how it ends: closed, or in a process that was forked."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import llama_cpp

from refreekv_cpp import _closed, _upstream
from refreekv_cpp.errors import CacheStateError


class Lifetime(llama_cpp.Llama):
    """A `llama_cpp.Llama` that several threads can use, and that raises ClosedError once its native part is gone.

    A subclass calls `_make_locks` before it loads a model, and sets `_loaded` after.
    """

    def _make_locks(self) -> None:
        """Where one thread holds several, it takes them in this order."""
        self._closing = False  # `close` waits for the step that is being computed; no other may begin
        self._completing = threading.RLock()  # held during a completion that is no stream
        self._using = threading.RLock()  # held while the native context is used, by one step of a generation at a time
        self._reading = threading.RLock()  # held while figures or the vocabulary are read; `close` takes it, too

    def close(self) -> None:
        """Free the model and the context. All that needs them raises ClosedError from now on.

        Raises:
            CacheStateError: this thread is in the middle of a step of this Llama, whose code needs them: it was called
                by a logits processor, a stopping criterion, or the `select` of a policy.
        """
        if not _upstream.has_begun(self):  # an argument was refused
            return
        # of CPython's RLock, as threading.Condition uses it
        if self._using._is_owned() or self._reading._is_owned():  # type: ignore[attr-defined]
            raise CacheStateError("close(): this thread is in the middle of a call of this Llama; close it afterwards")
        self._closing = True
        with self._using, self._reading:
            # other threads ask for some of it without a lock, and must not find what is being freed
            wrappers = _upstream.replace_wrappers(self, _closed.Closed())
            super().close()
            for wrapper in wrappers:
                _closed.mark_closed(wrapper)

    def _forked(self) -> None:
        """In a child process, which has the context but none of the threads that work on it."""
        self._make_locks()  # one may have been held
        _upstream.free_nothing(self)
        for wrapper in _upstream.wrappers(self).values():
            _closed.mark_closed(wrapper, _closed.Forked)

    if not TYPE_CHECKING:  # for a type checker, any attribute would be there

        def __getattr__(self, name: str) -> Any:
            if "_loaded" not in self.__dict__ and not name.startswith("__"):
                _closed.raise_closed()
            return self.__getattribute__(name)  # raises its own error
