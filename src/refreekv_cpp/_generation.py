"""The generations of a `Llama`: one at a time has the cache, and prunes it once its prompt has been read."""

from __future__ import annotations

import inspect
from collections.abc import Generator, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import llama_cpp

from refreekv_cpp import _closed, _upstream
from refreekv_cpp._kept import KeptSequence
from refreekv_cpp._signatures import implemented_by
from refreekv_cpp.errors import CacheStateError, ClosedError, ContextFullError

if TYPE_CHECKING:
    from llama_cpp import LogitsProcessorList, StoppingCriteriaList
    from llama_cpp.llama_grammar import LlamaGrammar

_GENERATE = inspect.signature(llama_cpp.Llama.generate)


class Generations(KeptSequence):
    _is_full = False  # the generation that began last has reached the end of the context
    _generation: object = None  # the one that began last; None: what it left in the cache has been changed

    def _generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        generation = object()
        seed = _upstream.seed(self)
        tokens = list(tokens)
        steps = super().generate(tokens, *args, **kwargs)
        with self._completing, self._using:  # a stream begins once another thread's completion is done
            if self._kv.evicts:
                self._prepare(tokens, _GENERATE.bind(self, tokens, *args, **kwargs).arguments.get("reset", True))
                self._prompt_next = True
            self._chat_reads = False
            self._generation = generation
        sent: Sequence[int] | None = None
        token: int | None = None
        self._is_full = False
        try:
            while not self._is_full:
                with self._using:
                    self._check_generation(generation, sent)
                    if token is None:
                        self.set_seed(seed)  # the completion that it waited for may have had another one
                    try:
                        token = steps.send(sent)
                    except StopIteration:
                        return
                    except ContextFullError:
                        # upstream's completion goes on here where the last token ends in the middle of a character
                        if token is None or self.n_tokens < self.n_ctx() or self.token_eos() < 0:
                            raise
                        token, self._is_full = self.token_eos(), True
                    finally:
                        self._generation = generation  # a reset() of its own does not end it
                sent = yield token
        finally:
            steps.close()
            self._end(generation)

    @implemented_by(_generate)
    def generate(
        self,
        tokens: Sequence[int],
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        temp: float = 0.8,
        repeat_penalty: float = 1.0,
        reset: bool = True,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        penalize_nl: bool = True,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        grammar: LlamaGrammar | None = None,
    ) -> Generator[int, Sequence[int] | None, None]:
        """As upstream's; the cache is pruned once `tokens` have been read and the first token is out: before the next
        one is read, or when the generator ends or is closed. Where the context is full, the last token is the one that
        ends a text.

        Raises:
            ContextFullError: the context has no room for `tokens`.
            CacheStateError: something else has changed the cache since the last token.
            ClosedError: the Llama is closed.
        """
        raise NotImplementedError

    def _check_generation(self, generation: object, sent: Sequence[int] | None) -> None:
        if self._closing:
            _closed.raise_closed()
        if self._generation is not generation:
            raise CacheStateError(
                "this generation cannot go on: another one, embed(), load_state() or reset() has changed the cache"
            )
        if sent and not _upstream.keeps_all_logits(self):
            raise ValueError(
                "tokens can be sent only to a Llama with logits_all=True, which has the logits before them"
            )

    def _end(self, generation: object) -> None:
        """What a generation leaves to be done is done, unless another one has begun."""
        # a generator may be closed by the garbage collector, in a thread that holds `_reading`: it must not wait
        if self._generation is not generation or not self._using.acquire(blocking=False):
            return  # whoever reads next prunes before
        with ExitStack() as locked:
            locked.callback(self._using.release)
            if self._generation is generation:
                self._prompt_next = False
                with suppress(ClosedError):
                    self._prune_due()
                    self._keep()

    def reset(self) -> None:
        """As upstream's."""
        with self._using:
            self._generation = None
            super().reset()
