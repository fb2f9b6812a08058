"""A sequence whose text is kept in a library once it has been read, and opened from there in place of being read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import llama_cpp

from refreekv_cpp import _chat, _upstream, native, spans
from refreekv_cpp._library import Library
from refreekv_cpp._log import inform, logger
from refreekv_cpp._sequence import _SEQ_ID, PrunedSequence
from refreekv_cpp.errors import CacheMemoryError, CacheStateError
from refreekv_cpp.models import shards

N_MIN = 64  # tokens; a shorter text is not kept (native/library/library.cpp)


class KeptSequence(PrunedSequence):
    _library: Library | None = None
    _library_refusal: str | None = None  # why there is no library although one was asked for
    _warned = False  # that the library could not be written

    def _open_library(self) -> None:
        """After the model has been loaded."""
        folder = self._kv.kv_library
        if folder is None:
            return
        reason = native.library_refusal(self.ctx)
        if self.chat_handler is not None:
            reason = "a chat handler may read images"
        elif _upstream.keeps_all_logits(self):
            reason = "logits_all=True (or a draft model) needs the logits of all tokens"
        elif self.context_params.swa_full and llama_cpp.llama_model_n_swa(self.model) > 0:
            reason = "swa_full=True: the layers with a window would be in no block and in no state"
        if reason is None:
            files = [*shards(Path(self.model_path)), *([] if self.lora_path is None else [Path(self.lora_path)])]
            reads_with = "" if self.lora_path is None else f"lora {self.lora_scale}"
            if self.kv_overrides:
                reads_with += json.dumps(self.kv_overrides, sort_keys=True, default=repr)
            try:
                native.library_use(
                    self.ctx, folder, self._kv.kv_library_limit, files, reads_with, self._kv.library_evicts_with
                )
                self._library = Library(folder)
            except CacheStateError as error:
                reason = str(error)
        if reason is not None:
            self._library_refusal = reason
            inform(f"kv_library is not used: {reason}", verbose=self.verbose)

    def keep_kv(self, name: str = "") -> int:
        """Write what the cache holds to the library. Completions do this by themselves when they end.

        Args:
            name: by which `refreekv library` lists the text, also as it grows in this process.

        Returns:
            The tokens that the library has of it now; 0 where there is no library, or it could not be written. They are
            fewer than the cache holds where `kv_library_limit` has no room for all.

        Raises:
            ClosedError: the Llama is closed.
            TypeError: the name is no text.
        """
        if not isinstance(name, str):
            raise TypeError(f"keep_kv({name!r}): the name must be text")
        with self._using:
            self._prune_due()
            return self._keep(name)

    def _prepare(self, prompt: Sequence[int], reset: bool) -> None:
        if reset and self._library is not None and self.chat_handler is None:
            self._prune_due()
            self._open(prompt[:-1])
        super()._prepare(prompt, reset)

    def _open(self, prompt: Sequence[int]) -> None:
        """Have the cache hold what the library has of a prompt, where that is more than it has already."""
        n_common = self._nearest(self.longest_token_prefix(_upstream.tokens(self), prompt))
        with_state = self._checkpoints is not None
        # a prompt that is too long for the context is refused later
        n_tokens = native.library_find(self.ctx, _SEQ_ID, prompt[: self.n_ctx()], n_common, with_state=with_state)
        if damaged := native.last_error():
            logger.warning("%s", damaged)
        if n_tokens == 0:
            return
        self.reset()
        _upstream.cut(self, 0)
        self.input_ids[:n_tokens] = prompt[:n_tokens]
        self.n_tokens = n_tokens
        try:
            self._system = _chat.system()
            for start, end in spans.resolve(self.kv_protect, self, self._system):
                native.protect(self.ctx, _SEQ_ID, start, end)
            if self._checkpoints is not None:
                self._checkpoints.put(_upstream.token_array(self), native.library_state(self.ctx))
            native.library_open(self.ctx, _SEQ_ID)
            if self._checkpoints is not None and not self._checkpoints.load(_upstream.token_array(self)):
                raise CacheStateError("library: the state is not of this model, or of these cache types")
        except BaseException as error:  # it may be empty now
            self.reset()
            _upstream.cut(self, 0)
            if not isinstance(error, (CacheStateError, CacheMemoryError)):
                raise
            inform(f"{error}; the prompt is read", verbose=self.verbose)
            return
        _upstream.forget_logits(self)
        self._n_opened += n_tokens

    def _keep(self, name: str = "") -> int:
        if self._library is None or self.chat_handler is not None:
            return 0
        read = _upstream.token_array(self)
        states = []
        if self._checkpoints is not None:
            # where the text ends, and before the request for its answer
            self._checkpoints.take(read)
            states = list(self._checkpoints.newest(read))
        try:
            n_kept = native.library_keep(self.ctx, _SEQ_ID, read.tolist(), states, stay=bool(name))
            key = native.library_key(self.ctx, _SEQ_ID)
            if replaced := native.library_key(self.ctx, _SEQ_ID, replaced=True):
                self._library.follow(replaced, key)
            if name and n_kept:
                self._library.name(name, key)
            return n_kept
        except (CacheStateError, OSError) as error:
            if not self._warned:
                self._warned = True
                inform(f"the library could not be written, and is left as it was: {error}", verbose=self.verbose)
            return 0
