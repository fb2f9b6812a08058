"""`llama_cpp.LlamaState` without the room for logits that upstream copies, n_batch x n_vocab floats that nobody reads.

With `logits_all=True` the logits are data, and states carry them as upstream's do.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import llama_cpp
import numpy as np
import numpy.typing as npt

from refreekv_cpp import _upstream, native
from refreekv_cpp._generation import Generations
from refreekv_cpp._log import logger
from refreekv_cpp.errors import CacheStateError


class UnfitStateError(CacheStateError, KeyError):
    """The error of `Llama.load_state`.

    It is a KeyError as well, because that is what llama-cpp-python's completions take as a miss: an entry of a
    `LlamaDiskCache` that was written under another policy, version or cache type must not end them.
    """

    __str__ = Exception.__str__  # a KeyError quotes its message


def _no_scores() -> npt.NDArray[np.single]:
    # upstream assigns it to [n_tokens, n_vocab], and this fits any
    return np.zeros((1, 1), dtype=np.single)


@contextmanager
def without_scores(llm: llama_cpp.Llama) -> Iterator[None]:
    """Inside, upstream's code that saves and loads states finds next to nothing in the place of `llm.scores`."""
    scores = llm.scores
    if not _upstream.keeps_all_logits(llm):
        llm.scores = _no_scores()
    try:
        yield
    finally:
        llm.scores = scores


def fitted(state: llama_cpp.LlamaState, llm: llama_cpp.Llama) -> llama_cpp.LlamaState:
    """The state with arrays as this Llama has them; for `without_scores`.

    Raises:
        ValueError: it is empty, or holds more tokens than the context has room for.
    """
    if state.llama_state_size == 0:
        raise ValueError("it is empty")
    n_tokens, n_ctx = state.n_tokens, len(llm.input_ids)
    if not 0 <= n_tokens <= n_ctx:
        raise ValueError(f"it holds {n_tokens} tokens; this context has room for {n_ctx}")
    res = copy.copy(state)
    res.input_ids = llm.input_ids.copy()
    res.input_ids[:n_tokens] = state.input_ids[:n_tokens]
    if not _upstream.keeps_all_logits(llm):
        res.scores = _no_scores()
    return res


class SavedStates(Generations):
    """... with states that carry what was evicted, and that are refused where they do not fit."""

    _refused_state = False  # an entry of the cache of states did not fit, and the log says so

    def save_state(self) -> llama_cpp.LlamaState:
        """As upstream's, but without `scores` that were not asked for (`logits_all`); and with what was evicted, unless
        `kv_cold_state` is False.

        Raises:
            CacheStateError: what was evicted cannot be read any more.
        """
        with self._using, without_scores(self):
            self._prune_due()
            native.clear_error()
            state = super().save_state()
        if state.llama_state_size == 0:
            raise CacheStateError(f"the state cannot be saved: {native.last_error().removeprefix('state: ')}")
        return state

    def load_state(self, state: llama_cpp.LlamaState) -> None:
        """As upstream's.

        Raises:
            CacheStateError: the state is damaged, or of a cache with other types or without (or with) a policy. Nothing
                is left in the cache then.
            TypeError: it is no state.
        """
        if not isinstance(state, llama_cpp.LlamaState):
            raise TypeError(f"load_state() got {type(state).__name__}: must be a state that save_state() has made")
        with self._using:
            self._load_state(state)

    def _load_state(self, state: llama_cpp.LlamaState) -> None:
        self._generation = None
        self._n_exact = 0  # nobody knows how it was read
        native.clear_error()
        try:
            with without_scores(self):
                super().load_state(fitted(state, self))
        except (RuntimeError, ValueError) as error:
            _upstream.clear(self)
            self.reset()
            reason = native.last_error() or "it was not written by a context like this one (model, cache types, policy)"
            message = f"{error}: {reason.removeprefix('state: ')}"
            if self.cache is not None and not self._refused_state:
                self._refused_state = True
                logger.warning("an entry of the cache of states does not fit, and is not used: %s", message)
            raise UnfitStateError(message) from error
