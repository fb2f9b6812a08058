"""A sequence whose text is kept in a library once it has been read, and opened from there in place of being read."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from refreekv_cpp import _chat, _upstream, native, spans
from refreekv_cpp._library import VERSION, Block, Library, blocks_of, file_identity, hashed_json, is_whole
from refreekv_cpp._log import inform
from refreekv_cpp._sequence import _SEQ_ID, PrunedSequence
from refreekv_cpp.errors import CacheMemoryError, CacheStateError
from refreekv_cpp.models import shards

N_MIN = 64  # tokens; a shorter text is read as quickly as it is opened
_WORTHWHILE = 32  # one part in so many of a prefix has to be new, else the cache goes on from what it has

# of llama_context_params: what the numbers in a cache depend on
_CONTEXT_FIELDS = (
    "type_k",
    "type_v",
    "flash_attn_type",
    "rope_scaling_type",
    "rope_freq_base",
    "rope_freq_scale",
    "yarn_ext_factor",
    "yarn_attn_factor",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_orig_ctx",
)


class KeptSequence(PrunedSequence):
    _library: Library | None = None
    _start = b""  # key of all texts of this model, with these options
    _salt = b""  # what blocks that are not exact depend on besides
    _n_before = 0  # tokens that are never evicted, before the first group of codes
    _n_exact = 0  # leading tokens in the cache that were read while nothing was evicted
    _states: Sequence[tuple[list[int], Path]] = ()  # that were written: the tokens before, and the file
    _tail: Block | None = None  # the last block that was written, if more is to be in it
    _warned = False  # that the library could not be written
    _library_refusal: str | None = None  # why there is no library although one was asked for

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
        if reason is None:
            try:
                self._library = Library(folder, self._kv.kv_library_limit)
            except OSError as error:
                reason = str(error)
        if reason is not None:
            self._library_refusal = reason
            inform(f"kv_library is not used: {reason}", verbose=self.verbose)
            return
        policy = self.kv_policy.native_options() or {}
        self._n_before = policy["n_sink"]
        self._start = hashed_json([VERSION, self._n_before, self.kv_cold_type, _read_with(self)])
        options = [self.kv_policy.as_dict(), self.kv_evicted, self.kv_memory_limit, self.kv_protect]
        self._salt = hashed_json(options)

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
            self._open(self._library, prompt[:-1])
        super()._prepare(prompt, reset)

    def _prune_due_and_eval(self, tokens: Sequence[int]) -> None:
        n_before = self.n_tokens
        self._n_exact = min(self._n_exact, n_before)
        super()._prune_due_and_eval(tokens)
        if self._n_exact == n_before and self._library is not None and native.pruned_pos(self.ctx, _SEQ_ID) < 0:
            self._n_exact = self.n_tokens

    def _open(self, library: Library, prompt: Sequence[int]) -> None:
        """Have the cache hold what the library has of a prompt, where that is more than it has already."""
        n_common = self._nearest(self.longest_token_prefix(_upstream.tokens(self), prompt))

        def is_worthwhile(n_tokens: int) -> bool:
            return n_tokens >= N_MIN and n_tokens - n_common > n_tokens // _WORTHWHILE

        # a prompt that is too long for the context is refused later
        found, n_tokens = library.find(self._start, self._salt, prompt[: self.n_ctx()], self._n_before)
        if not is_worthwhile(n_tokens):
            return
        state: memoryview | None = None
        if self._checkpoints is not None:
            behind = library.find_state(found, self._salt, n_tokens)
            n_tokens = 0 if behind is None else behind.first + len(behind.tokens)
            if behind is None or not is_worthwhile(n_tokens) or (state := library.read_state(behind)) is None:
                return
            found = [block for block in found if block.first < n_tokens]
        blocks = library.checked(found)
        n_there = sum(len(block.tokens) for block in blocks)
        if n_there < n_tokens and state is not None:
            return
        n_tokens = min(n_tokens, n_there)
        if not is_worthwhile(n_tokens):
            return
        self.reset()
        _upstream.cut(self, 0)
        self.input_ids[:n_tokens] = prompt[:n_tokens]
        self.n_tokens = n_tokens
        try:
            self._system = _chat.system()
            for start, end in spans.resolve(self.kv_protect, self, self._system):
                native.protect(self.ctx, _SEQ_ID, start, end)
            native.library_open(self.ctx, _SEQ_ID, [library.path(block) for block in blocks], n_tokens)
            if self._checkpoints is not None and state is not None:
                self._checkpoints.put(_upstream.token_array(self), state)
                if not self._checkpoints.load(_upstream.token_array(self)):
                    raise CacheStateError("library: the state is not of this model, or of these cache types")
        except BaseException as error:  # it may be empty now
            self.reset()
            _upstream.cut(self, 0)
            if not isinstance(error, (CacheStateError, CacheMemoryError)):
                raise
            inform(f"{error}; the prompt is read", verbose=self.verbose)
            return
        _upstream.forget_logits(self)
        library.touch(blocks)
        self._n_exact = min(n_tokens, sum(len(block.tokens) for block in blocks if block.exact))
        self._n_opened += n_tokens
        self._tail = None

    def _keep(self, name: str = "") -> int:
        library, n_tokens = self._library, self.n_tokens
        if library is None or n_tokens < N_MIN or self.chat_handler is not None:
            return 0
        tokens = _upstream.tokens(self)[:n_tokens]
        blocks = blocks_of(self._start, self._salt, tokens, min(self._n_exact, n_tokens), self._n_before)
        written: list[Block] = []
        n_bytes = 0  # of this text
        try:
            for i, block in enumerate(blocks):
                if not library.has(block):
                    library.write(self.ctx, _SEQ_ID, block, self._n_before)
                    written.append(block)
                n_bytes += library.size(block)
                if n_bytes > library.limit:
                    if block in written:
                        library.remove(written.pop())
                    blocks = blocks[:i]
                    break
            if not blocks:
                raise CacheMemoryError(f"kv_library_limit={library.limit}: there is no room for one block")
            library.touch(blocks)
            self._keep_states(library, sum(len(block.tokens) for block in blocks))
            if written:
                self._replace_tail(library, blocks)
                library.trim()
            if name:
                library.name(name, blocks[-1])
                self._states = ()  # they stay
        except (CacheStateError, CacheMemoryError, OSError) as error:
            for block in written:  # a full disk needs the room
                library.remove(block)
            if not self._warned:
                self._warned = True
                inform(f"the library could not be written, and is left as it was: {error}", verbose=self.verbose)
            return 0
        return sum(len(block.tokens) for block in blocks)

    def _keep_states(self, library: Library, n_tokens: int) -> None:
        """Of the layers that are in no block: where the text ends, and before the request for its answer. They take the
        place of those that this Llama has written when the text was shorter."""
        if self._checkpoints is None:
            return
        read = _upstream.token_array(self)
        self._checkpoints.take(read)
        written = []
        for n, state in self._checkpoints.newest(read):
            if N_MIN <= n <= n_tokens:
                tokens = read[:n].tolist()
                block = blocks_of(self._start, self._salt, tokens, min(self._n_exact, n), self._n_before)[-1]
                if library.state_path(block).exists():
                    library.touch_state(block)
                else:
                    library.write_state(block, state)
                written.append((tokens, library.state_path(block)))
        for state_of in self._states:
            tokens, path = state_of
            if tokens != read[: len(tokens)].tolist():
                written.append(state_of)
            elif state_of not in written:
                with contextlib.suppress(OSError):
                    path.unlink()
        self._states = written

    def _replace_tail(self, library: Library, blocks: Sequence[Block]) -> None:
        """The last block that this Llama has written is of no use once one with more tokens has its place."""
        if (tail := self._tail) is not None and any(
            block.parent == tail.parent and block.tokens[: len(tail.tokens)] == tail.tokens and block != tail
            for block in blocks
        ):
            library.replace(tail, blocks[-1])
        self._tail = None if is_whole(blocks[-1], self._n_before) else blocks[-1]


def _read_with(llm: KeptSequence) -> dict[str, Any]:
    """What the numbers in a cache depend on, besides the tokens."""
    model = Path(llm.model_path)
    lora = None if llm.lora_path is None else [file_identity(Path(llm.lora_path)), llm.lora_scale]
    trained = int(next((value for key, value in llm.metadata.items() if key.endswith("original_context_length")), 0))
    return {
        "model": [file_identity(shard) for shard in shards(model)],
        "lora": lora,
        "kv_overrides": llm.kv_overrides,
        "long": llm.n_ctx() > trained > 0,  # some models have other frequencies then
        **{name: getattr(llm.context_params, name) for name in _CONTEXT_FIELDS},
    }
