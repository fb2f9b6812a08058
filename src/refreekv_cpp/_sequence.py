"""The one sequence of a `Llama`: its tokens are read into the cache, which is pruned after a prompt and restored before
the next one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from refreekv_cpp import _chat, _upstream, native, spans
from refreekv_cpp._checkpoints import N_REQUEST, STEP, Checkpoints
from refreekv_cpp._lifetime import Lifetime
from refreekv_cpp._log import inform
from refreekv_cpp._model import check_tokens
from refreekv_cpp.errors import CacheMemoryError, CacheStateError, ContextFullError
from refreekv_cpp.options import Cold, ColdType, Evicted, KVOptions
from refreekv_cpp.policies import Policy
from refreekv_cpp.stats import KVStats

# llama-cpp-python keeps one sequence per Llama
_SEQ_ID = 0


class PrunedSequence(Lifetime):
    """Reads and prunes.

    Attributes:
        kv_policy, ...: the options of `Llama`, as they were passed, or as `KVOptions` has them where they were not.
    """

    kv_policy: Policy
    kv_evicted: Evicted
    kv_elastic: bool
    kv_memory_limit: int | None
    kv_protect: Literal["system"] | tuple[spans.Span, ...]
    kv_cold: Cold
    kv_cold_dir: Path | None
    kv_cold_limit: int | None
    kv_cold_type: ColdType | None
    kv_cold_state: bool
    kv_library: Path | None
    kv_library_limit: int

    _kv: KVOptions  # all of them, as the native part was made with them
    _prompt_next = False  # what is read next is the prompt of the generation that began last
    _chat_reads = False  # a chat handler is reading its prompt, with images, before that generation begins
    _n_limit_prunes = 0
    _checkpoints: Checkpoints | None = None  # of layers whose cache cannot be cut anywhere; None: there are none
    _prompt = range(0)  # positions of the tokens of a prompt that are being read
    _n_opened = 0  # tokens that came from a library so far
    _system: str | None = None  # message of the chat that is in the cache

    def _make_checkpoints(self) -> None:
        """After the model has been loaded."""
        checkpoints = Checkpoints(self.ctx, _SEQ_ID, swa_full=self.context_params.swa_full)
        if self._kv.evicts and checkpoints.are_needed:
            self._checkpoints = checkpoints
            checkpoints.folder = self._kv.cold_folder() if self.kv_stats.cold == "file" else None

    @property
    def kv_stats(self) -> KVStats:
        """The memory of the process and what the KV cache holds. Reading it changes nothing.

        Any thread may read it, also while another one generates: the figures are those of the end of the last batch or
        operation. A prompt is pruned when the token after the first one is read, or when the generation ends.

        Raises:
            ClosedError: the Llama is closed.
        """
        with self._reading:
            checkpoints = self._checkpoints
            return KVStats.read(
                self.kv_policy.name,
                self.ctx,
                n_limit_prunes=self._n_limit_prunes,
                n_opened=self._n_opened,
                bytes_checkpoints=0 if checkpoints is None else checkpoints.n_bytes,
                bytes_checkpoints_in_memory=0 if checkpoints is None else checkpoints.n_bytes_in_memory,
            )

    def prune_kv(self) -> int:
        """Apply the policy to what has been read so far. Returns the cells evicted, over all layers.

        Completions do this by themselves after the prompt; this is for those who call `eval` and `sample`.

        Raises:
            CacheStateError: there is nothing to prune, or the cache was rewound and its last query is gone.
            PolicyError: a `PythonPolicy` did not answer with a mask of the cells.
            ClosedError: the Llama is closed.
        """
        with self._using:
            ctx = self.ctx
            if not self._kv.evicts or self.n_tokens == 0:
                return 0
            native.prompt(ctx, _SEQ_ID, -1)  # none is due from now on, even if this one fails
            _upstream.cut(self, self.n_tokens)  # as eval would: what lies behind is as good as gone
            for start, end in spans.resolve(self.kv_protect, self, self._system):
                native.protect(ctx, _SEQ_ID, start, end)
            before = native.stats(ctx)
            n_evicted = self.kv_policy.prune(ctx, _SEQ_ID)
            after = self.kv_stats
            inform(
                f"{after.receipt()}; freed {(after.bytes_freed - before.bytes_freed) / 2**20:.1f} MiB "
                f"in {after.prune_ms - before.prune_us / 1000:.0f} ms",
                verbose=self.verbose,
            )
            return n_evicted

    def eval(self, tokens: Sequence[int]) -> None:
        """Read tokens, as upstream's does. A call first prunes a prompt that is due. The first call of a generation is
        its prompt.

        Raises:
            ContextFullError: the context has no room for all of these tokens. None is read.
            TokenError: one of them is not in the vocabulary. None is read.
            CacheStateError: `n_tokens` was set back into what a pruning has looked at, and what was evicted there
                cannot be restored.
            CacheMemoryError: the cache could not grow, or not within `kv_memory_limit`. It is what it was before the
                batch that failed.
        """
        with self._using:
            # recurrent layers have room for any number
            if not _upstream.is_recurrent(self) and self.n_tokens + len(tokens) > self.n_ctx():
                raise ContextFullError(
                    f"{len(tokens)} tokens after {self.n_tokens}: the context has room for {self.n_ctx()} in all"
                )
            check_tokens(tokens, self.n_vocab())
            try:
                self._prune_due_and_eval(tokens)
            except BaseException:
                _upstream.forget_logits(self)  # a batch that fails leaves none, neither its own nor those before
                raise

    def _prune_due_and_eval(self, tokens: Sequence[int]) -> None:
        if not self.kv_elastic:
            super().eval(tokens)
            return

        self._prune_due()
        if self._prompt_next or _chat.system() is not None:  # what comes is not a caller's own `eval`
            self._system = _chat.system()
        self._rewind()
        pruned_pos = native.pruned_pos(self.ctx, _SEQ_ID)
        # removing the rest brings back what was evicted of it, where that was kept
        if 0 < self.n_tokens <= pruned_pos and not _upstream.cut(self, self.n_tokens):
            raise CacheStateError(
                f"n_tokens={self.n_tokens}: the cache was pruned at position {pruned_pos}; go on from {pruned_pos + 1} "
                "or later, or reset()"
            )
        if self._prompt_next:
            _upstream.cut(self, self.n_tokens)  # as upstream's eval; an emptied sequence has no turn
            native.prompt(self.ctx, _SEQ_ID, len(tokens))
            self._prompt = range(self.n_tokens, self.n_tokens + len(tokens))
        elif self._chat_reads and self._kv.evicts:
            native.prompt(self.ctx, _SEQ_ID, self.n_ctx())  # more of it follows
        try:
            self._read(tokens)
        except BaseException:
            native.prompt(self.ctx, _SEQ_ID, -1)
            raise
        finally:
            self._prompt_next = False
            self._prompt = range(0)

    def _rewind(self) -> None:
        """Where `n_tokens` was set back, and the cache cannot be cut there, go back further and read the rest again."""
        n_tokens = self.n_tokens
        if self._checkpoints is None or self._checkpoints.can_cut(n_tokens):
            return
        rest = _upstream.tokens(self)
        n_there = self._nearest(n_tokens)
        if not self._go_back(n_there):
            raise CacheStateError(f"n_tokens={n_tokens}: the cache cannot go back to it; reset()")
        if n_there < n_tokens:
            self._read(rest[n_there:])

    def _prune_due(self) -> None:
        """Prune a prompt that was read and is not pruned yet. The first token of its answer did not wait for this."""
        if self._kv.evicts and native.is_due(self.ctx, _SEQ_ID):
            self.prune_kv()

    def _read(self, tokens: Sequence[int]) -> None:
        if self.kv_memory_limit is None:
            self._eval(tokens)
        else:
            self._eval_within(tokens, self.kv_memory_limit)

    def _eval(self, tokens: Sequence[int]) -> None:
        if len(tokens) > self.n_batch:
            native.expect(self.ctx, len(tokens))
        try:
            for part in self._parts(tokens):
                n_before = self.n_tokens
                super().eval(part)
                if self._checkpoints is not None:
                    self._checkpoints.forget_read_again(_upstream.token_array(self), n_before)
        except RuntimeError as error:
            if reason := native.last_error():
                raise CacheMemoryError(reason) from error
            raise
        finally:
            if len(tokens) > self.n_batch:
                native.expect(self.ctx, 0)  # what is left of it will not come

    def _parts(self, tokens: Sequence[int]) -> Iterator[Sequence[int]]:
        """The tokens; those of a prompt in batches, with checkpoints before some of them."""
        if self._checkpoints is None or not self._prompt:
            if self._checkpoints is not None and self._checkpoints.is_hybrid and len(tokens) > 1:
                self._checkpoints.take(_upstream.token_array(self))  # a draft, which may be refused
            yield tokens
            return
        n_last = self._prompt.stop - N_REQUEST
        while tokens:
            at = self.n_tokens
            if (at - self._prompt.start) % STEP < self.n_batch or n_last - self.n_batch <= at <= n_last:
                self._checkpoints.take(_upstream.token_array(self))
            n = n_last - at if at < n_last < at + self.n_batch else self.n_batch
            yield tokens[:n]
            tokens = tokens[n:]

    def _eval_within(self, tokens: Sequence[int], limit: int) -> None:
        """Batch by batch; one that does not fit is tried again after a pruning of what has been read."""
        if not self._kv.evicts:
            bytes_per_token = sum(layer.row_bytes for layer in native.figures(self.ctx)[1])
            needed = bytes_per_token * (self.n_tokens + len(tokens))
            if needed > limit:
                raise CacheMemoryError(
                    f"{self.n_tokens + len(tokens)} tokens need {needed} bytes of KV cache; kv_memory_limit is {limit}"
                )
        for i in range(0, len(tokens), self.n_batch):
            batch = tokens[i : i + self.n_batch]
            n_before = self.n_tokens
            try:
                self._eval(batch)
            except CacheMemoryError:
                if self.n_tokens == 0 or self.prune_kv() == 0:
                    raise
                self._n_limit_prunes += 1
                self._eval(batch[self.n_tokens - n_before :])  # a prompt's last batch comes in two parts

    def _prepare(self, prompt: Sequence[int], reset: bool) -> None:
        """Have the cache ready for a prompt that may ask for what was evicted."""
        self._prune_due()
        if not reset:
            return
        read = _upstream.tokens(self)
        n_common = self.longest_token_prefix(read, prompt[:-1])
        n_usable = native.usable_prefix(self.ctx, _SEQ_ID, n_common, len(prompt))
        whole = native.pruned_pos(self.ctx, _SEQ_ID) < 0
        # if the prompt is the one that was read last, nothing has to be restored: its logits are still there
        is_last = list(prompt) == read
        if not whole and self._restores() and not is_last:
            if not self._restore(self._nearest(n_usable)):
                self.reset()
            return
        n_tokens = n_usable if whole or self.kv_evicted != "drop" else n_common
        if n_tokens < n_common or not is_last or not _upstream.has_logits(self):
            n_tokens = self._nearest(n_tokens)
        if n_tokens < n_common and not self._go_back(n_tokens) and self._checkpoints is not None:
            self.reset()

    def _restores(self) -> bool:
        """Whether the next prompt needs back what was evicted: not where the cache goes on attending to it by codes.

        A state that was loaded may have brought none.
        """
        if self.kv_evicted == "keep":
            return int(native.figures(self.ctx)[0].bytes_codes) == 0
        return self.kv_evicted != "drop"

    def _nearest(self, n_tokens: int) -> int:
        """The last position, n_tokens or before, that `_go_back` can go back to."""
        return (
            n_tokens if self._checkpoints is None else self._checkpoints.nearest(_upstream.token_array(self), n_tokens)
        )

    def _go_back(self, n_tokens: int) -> bool:
        """Remove what lies behind these tokens, which brings back what was evicted of them. False: it was refused."""
        loaded = None if self._checkpoints is None or self._checkpoints.can_cut(n_tokens) else self._checkpoints
        native.clear_error()
        # recurrent layers refuse without a reason; where the others have one, nothing has changed
        if not _upstream.cut(self, n_tokens) and (loaded is None or native.last_error()):
            return False
        if loaded and not (loaded.load(_upstream.token_array(self)[:n_tokens]) and _upstream.cut(self, n_tokens)):
            self.reset()
            _upstream.clear(self)
            return False
        self.n_tokens = n_tokens
        _upstream.forget_logits(self)  # they are not those of the last token that is left
        return True

    def _restore(self, n_tokens: int) -> bool:
        """Bring back what was evicted of the first tokens, without the others. False: they have to be read again."""
        try:
            if self.kv_evicted != "recompute" and n_tokens > 0 and self._go_back(n_tokens):
                native.restore(self.ctx, _SEQ_ID)
                return True
        except (CacheStateError, CacheMemoryError) as error:
            inform(f"{error}; the conversation is read again", verbose=self.verbose)
        return False
