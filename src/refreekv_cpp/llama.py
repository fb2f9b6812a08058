"""llama-cpp-python's `Llama` with a KV policy."""

from __future__ import annotations

import inspect
import os
import threading
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import llama_cpp
import numpy as np

from refreekv_cpp import (
    _cache_types,
    _checks,
    _closed,
    _flash_attn,
    _grammar,
    _states,
    native,
    spans,
)
from refreekv_cpp._log import inform, logger
from refreekv_cpp._model import Model
from refreekv_cpp._suggest import did_you_mean
from refreekv_cpp.errors import CacheMemoryError, CacheStateError, ClosedError, UnsupportedModelError
from refreekv_cpp.options import OPTIONS, VARIABLES, Cold, ColdType, Evicted, KVOptions
from refreekv_cpp.policies import Policy
from refreekv_cpp.spans import Protect
from refreekv_cpp.stats import KVStats

# from now on every `llama_cpp.Llama` of this process makes its samplers and models of these classes
llama_cpp._internals.LlamaSampler = _grammar.Sampler  # type: ignore[misc]
llama_cpp._internals.LlamaModel = Model  # type: ignore[misc]

# llama-cpp-python keeps one sequence per Llama
_SEQ_ID = 0

# the system message of the chat that this thread is answering
_chat_system: ContextVar[str | None] = ContextVar("system", default=None)


class Llama(llama_cpp.Llama):
    """`llama_cpp.Llama`, whose KV cache is pruned once the prompt has been read.

    Everything else is llama-cpp-python's: https://llama-cpp-python.readthedocs.io

    Args:
        model_path: a GGUF file.
        kv_policy: "full" (upstream's own cache), "refreekv", another name in `refreekv_cpp.policies.REGISTRY`, one with
            parameters such as "refreekv:theta=0.01", or an object such as `ReFreeKV(theta=0.01)`; see docs/policies.md.
            Default: what the environment variable REFREEKV_POLICY says, else "full".
        kv_evicted: what happens when the next prompt goes on from a pruned cache, or from an earlier place in it, and
            may ask for what was evicted. "restore": evicted rows wait in a cold store and come back, bit for bit,
            before the prompt is read, so that the new question decides what stays; where they cannot, as "recompute":
            the conversation is read again; "drop": it goes on from what is left (arXiv 2502.16886 says nothing of a
            second turn), which with "refreekv" are codes of all that was evicted. Default: "restore".
        kv_protect: positions that are never evicted: a list of (start, end), ends excluded; or "system": those of the
            system message of a chat completion. Default: none but what the policy keeps.
        kv_cold: the cold store: "memory" of the host; a "file" without a name, which is gone with the process; "auto"
            takes the file where the cache itself is in host memory. Default: "auto".
        kv_cold_dir: folder of the file. Default: the user's cache folder.
        kv_cold_limit: a cap on the bytes in the cold store, as a number or like "4GiB"; rows that do not fit are lost,
            and read again when they are wanted. Default: none (it cannot hold more than the full cache of n_ctx).
        kv_cold_type: "q8_0": evicted rows are rounded to it, where the cache's type is no quantised one, and take about
            half of the room; what comes back is then not bit for bit what went. Default: None, it is.
        kv_cold_state: whether saved states (`save_state`, llama-cpp-python's caches) carry what is evicted, too.
            They are as large as the full cache's then; without, a conversation that goes on from one is read again.
            Default: True.
        kv_elastic: memory follows the contents instead of being allocated for n_ctx at load. Always so with a policy
            that evicts; with "full" it is a choice (default False: upstream's cache, bit for bit).
        kv_memory_limit: a cap on the bytes of K and V, and of codes, as a number or like "512MiB". With a policy that
            evicts, a prompt that would pass it is pruned while it is read (`kv_stats.n_limit_prunes`); with "full" such
            a prompt is refused.
        flash_attn: True, False, or "auto": with a policy that evicts, True, which takes far less memory; with "full",
            False unless the backend or the type of V makes True the better setting. Default: "auto".
        verbose: show upstream's messages and ours on stderr. Ours (what was pruned, what could not be restored) also go
            to the logger "refreekv_cpp" with level INFO, whatever this says; where the program's logging shows them,
            they are not printed besides. Default: True, as upstream.
        **options: those of `llama_cpp.Llama`. Unlike there, an unknown one is an error (not in the drop-in, see
            `refreekv_cpp.dropin`).

    Raises:
        PolicyError: unknown policy or option.
        UnsupportedModelError: the model's memory cannot have this policy. (Where REFREEKV_POLICY has chosen it, this is
            a warning, and the model runs with "full".)
        ValueError: as llama-cpp-python, for a file that is missing or no model.
    """

    ignore_unknown_options: ClassVar[bool] = False

    # as they were passed, or as `KVOptions` made them of what was not
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

    def __init__(
        self,
        model_path: str,
        *,
        kv_policy: str | Policy | None = None,
        kv_evicted: Evicted | None = None,
        kv_elastic: bool | None = None,
        kv_memory_limit: int | str | None = None,
        kv_protect: Protect | None = None,
        kv_cold: Cold | None = None,
        kv_cold_dir: str | os.PathLike[str] | None = None,
        kv_cold_limit: int | str | None = None,
        kv_cold_type: ColdType | None = None,
        kv_cold_state: bool | None = None,
        **options: Any,
    ) -> None:
        kv = KVOptions.of(
            kv_policy=kv_policy,
            kv_evicted=kv_evicted,
            kv_elastic=kv_elastic,
            kv_memory_limit=kv_memory_limit,
            kv_protect=kv_protect,
            kv_cold=kv_cold,
            kv_cold_dir=kv_cold_dir,
            kv_cold_limit=kv_cold_limit,
            kv_cold_type=kv_cold_type,
            kv_cold_state=kv_cold_state,
        )
        _check_options(options, ignore_unknown=self.ignore_unknown_options)
        for name in ("type_k", "type_v"):
            _cache_types.check(name, options.get(name))
        model_path = _checks.check_path("model_path", model_path)
        options = _checks.check_options(options)
        with _closed.loading:
            _checks.check_experts(options.get("kv_overrides") or {}, model_path)
        if "n_batch" in options and (n_ctx := options.get("n_ctx", 512)):
            options["n_batch"] = min(options["n_batch"], n_ctx)  # upstream allocates n_batch rows of logits
        if options.get("embedding") and kv.evicts:
            inform(
                "embedding=True keeps no cache between calls, kv_policy is ignored",
                verbose=options.get("verbose", True),
            )
            kv = KVOptions.of(kv_policy="full", kv_evicted=kv.kv_evicted, kv_elastic=kv_elastic, kv_protect=kv_protect)

        self._kv = kv
        vars(self).update(kv.public())
        self._make_locks()
        self._refused_state = False  # an entry of the cache of states did not fit, and the log says so
        self._generation: object = None  # the one that began last
        self._prompt_next = False  # what is read next is the prompt of that generation
        self._chat_reads = False  # a chat handler is reading its prompt, with images, before that generation begins
        self._n_limit_prunes = 0
        self._system: str | None = None  # message of the chat that is in the cache

        try:
            self._load(model_path, {**options, "flash_attn": _flash_attn.resolve(options, evicts=kv.evicts)})
        except UnsupportedModelError as error:
            if not kv.from_environment:
                raise
            warnings.warn(f"{VARIABLES['kv_policy']}={kv.kv_policy.name} is ignored: {error}", stacklevel=2)
            Llama.__init__(self, model_path, kv_policy="full", kv_evicted=kv_evicted, kv_elastic=kv_elastic, **options)
            return
        self._loaded = True

    def _make_locks(self) -> None:
        """Where one thread holds several, it takes them in this order."""
        self._completing = threading.RLock()  # held during a completion that is no stream
        self._using = threading.RLock()  # held while the native context is used, by one step of a generation at a time
        self._reading = threading.RLock()  # held while figures or the vocabulary are read; `close` takes it, too

    def _load(self, model_path: str, options: dict[str, Any]) -> None:
        with _closed.loading, native.next_context(self._kv.native_params()):
            try:
                _closed.before_fork(self)
                super().__init__(model_path, **options)
                if self.lora_path and not self._lora_adapter:  # llama-cpp-python does not see that it is null
                    raise ValueError(f"lora_path={self.lora_path!r}: must be a LoRA adapter for this model")
            except Exception as error:
                self.close()
                if isinstance(error, ValueError) and (reason := native.last_error()):
                    raise UnsupportedModelError(f'{reason}; kv_policy="full" runs it') from error
                raise
        n_ctx = self.n_ctx()
        if len(self.input_ids) != n_ctx:  # llama.cpp has rounded it up, upstream's arrays are as long as was asked for
            self.input_ids = np.ndarray((n_ctx,), dtype=np.intc)
            if self._logits_all:
                self.scores = np.ndarray((n_ctx, self.n_vocab()), dtype=np.single)

    @property
    def kv_stats(self) -> KVStats:
        """The memory of the process and what the KV cache holds. Reading it changes nothing.

        Any thread may read it, also while another one generates: the figures are those of the end of the last batch or
        operation. A prompt is pruned when the token after the first one is read, or when the generation ends.

        Raises:
            ClosedError: the Llama is closed.
        """
        with self._reading:
            return KVStats.read(self.kv_policy.name, self._ctx.ctx, self._n_limit_prunes)

    def prune_kv(self) -> int:
        """Apply the policy to what has been read so far. Returns the cells evicted, over all layers.

        Completions do this by themselves after the prompt; this is for those who call `eval` and `sample`.

        Raises:
            CacheStateError: there is nothing to prune, or the cache was rewound and its last query is gone.
            PolicyError: a `PythonPolicy` did not answer with a mask of the cells.
            ClosedError: the Llama is closed.
        """
        with self._using:
            ctx = self._ctx.ctx
            if not self._kv.evicts or self.n_tokens == 0:
                return 0
            native.prompt(ctx, _SEQ_ID, -1)  # none is due from now on, even if this one fails
            self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1)  # as eval would: what lies behind is as good as gone
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
        """Read tokens. As upstream's; the first call of a generation is its prompt, and is pruned after.

        Raises:
            CacheStateError: `n_tokens` was set back into what a pruning has looked at, and what was evicted there
                cannot be restored.
            CacheMemoryError: the cache could not grow, or not within `kv_memory_limit`. It is what it was before the
                batch that failed.
        """
        with self._using:
            self._eval_and_prune(tokens)

    def _eval_and_prune(self, tokens: Sequence[int]) -> None:
        if not self.kv_elastic:
            super().eval(tokens)
            return

        self._prune_due()
        if self._prompt_next or _chat_system.get() is not None:  # what comes is not a caller's own `eval`
            self._system = _chat_system.get()
        pruned_pos = native.pruned_pos(self._ctx.ctx, _SEQ_ID)
        # removing the rest brings back what was evicted of it, where that was kept
        if 0 < self.n_tokens <= pruned_pos and not self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1):
            raise CacheStateError(
                f"n_tokens={self.n_tokens}: the cache was pruned at position {pruned_pos}; go on from {pruned_pos + 1} "
                "or later, or reset()"
            )
        if self._prompt_next:
            self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1)  # as upstream's eval; an emptied sequence has no turn
            native.prompt(self._ctx.ctx, _SEQ_ID, len(tokens))
        elif self._chat_reads and self._kv.evicts:
            native.prompt(self._ctx.ctx, _SEQ_ID, self._n_ctx)  # more of it follows
        try:
            if self.kv_memory_limit is None:
                self._eval(tokens)
            else:
                self._eval_within(tokens, self.kv_memory_limit)
        except BaseException:
            native.prompt(self._ctx.ctx, _SEQ_ID, -1)
            raise
        finally:
            self._prompt_next = False

    def _prune_due(self) -> None:
        """Prune a prompt that was read and is not pruned yet. The first token of its answer did not wait for this."""
        if self._kv.evicts and native.is_due(self._ctx.ctx, _SEQ_ID):
            self.prune_kv()

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

    def _eval(self, tokens: Sequence[int]) -> None:
        if len(tokens) > self.n_batch:
            native.expect(self._ctx.ctx, len(tokens))
        try:
            super().eval(tokens)
        except RuntimeError as error:
            if reason := native.last_error():
                raise CacheMemoryError(reason) from error
            raise
        finally:
            if len(tokens) > self.n_batch:
                native.expect(self._ctx.ctx, 0)  # what is left of it will not come

    def _eval_within(self, tokens: Sequence[int], limit: int) -> None:
        """Batch by batch; one that does not fit is tried again after a pruning of what has been read."""
        if not self._kv.evicts:
            bytes_per_token = sum(layer.row_bytes for layer in native.figures(self._ctx.ctx)[1])
            needed = bytes_per_token * (self.n_tokens + len(tokens))
            if needed > limit:
                raise CacheMemoryError(
                    f"{self.n_tokens + len(tokens)} tokens need {needed} bytes of KV cache; kv_memory_limit is {limit}"
                )
        for i in range(0, len(tokens), self.n_batch):
            batch = tokens[i : i + self.n_batch]
            try:
                self._eval(batch)
            except CacheMemoryError:
                if self.n_tokens == 0 or self.prune_kv() == 0:
                    raise
                self._n_limit_prunes += 1
                self._eval(batch)

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        """As upstream's; the cache is pruned once `tokens` have been read and the first token is out: before the next
        one is read, or when the generator ends or is closed.
        """
        generation = object()
        tokens = list(tokens)
        steps = super().generate(tokens, *args, **kwargs)
        with self._completing, self._using:  # a stream begins once another thread's completion is done
            if self._kv.evicts:
                self._prepare(tokens, _GENERATE.bind(self, tokens, *args, **kwargs).arguments.get("reset", True))
                self._prompt_next = True
            self._chat_reads = False
            self._generation = generation
        sent: Sequence[int] | None = None
        try:
            while True:
                with self._using:
                    self._check_generation(generation, sent)
                    try:
                        token = steps.send(sent)
                    except StopIteration:
                        return
                    finally:
                        self._generation = generation  # a reset() of its own does not end it
                sent = yield token
        finally:
            steps.close()
            self._end(generation)

    def _prepare(self, prompt: Sequence[int], reset: bool) -> None:
        """Have the cache ready for a prompt that may ask for what was evicted."""
        self._prune_due()
        if not reset:
            return
        read = self._input_ids.tolist()
        n_common = self.longest_token_prefix(read, prompt[:-1])
        n_usable = native.usable_prefix(self._ctx.ctx, _SEQ_ID, n_common, len(prompt))
        whole = native.pruned_pos(self._ctx.ctx, _SEQ_ID) < 0
        # the prompt that was read last can be sampled from at once
        if not whole and self.kv_evicted != "drop" and list(prompt) != read:
            if not self._restore(n_usable):
                self.reset()
        elif n_usable < n_common and (whole or self.kv_evicted != "drop"):
            self._go_back(n_usable)

    def _check_generation(self, generation: object, sent: Sequence[int] | None) -> None:
        if self._generation is not generation:
            raise CacheStateError(
                "this generation cannot go on: another one, embed(), load_state() or reset() has changed the cache"
            )
        if sent and not self._logits_all:
            raise ValueError(
                "tokens can be sent only to a Llama with logits_all=True, which has the logits before them"
            )

    def sample(self, *args: Any, **kwargs: Any) -> int:
        """As upstream's.

        Raises:
            CacheStateError: the token to sample after was not read, or read without its logits.
            ClosedError: the Llama is closed.
        """
        with self._using:
            idx = args[_SAMPLE_IDX] if len(args) > _SAMPLE_IDX else kwargs.get("idx")
            if not llama_cpp.llama_get_logits_ith(self.ctx, -1 if idx is None else idx - self.n_tokens):
                raise CacheStateError("there are no logits to sample from; eval() tokens before")
            token: int = super().sample(*args, **kwargs)
            return token

    def embed(self, input: str | Iterable[str], *args: Any, **kwargs: Any) -> Any:
        """As upstream's.

        Raises:
            ValueError: no text, or one without tokens, of which there is no embedding.
            ClosedError: the Llama is closed.
        """
        with self._using:
            texts = [input] if isinstance(input, str) else list(input) if isinstance(input, Iterable) else []
            if not texts or not all(isinstance(text, str) and self.tokenize(text.encode()) for text in texts):
                raise ValueError("the input must be a text, or a list of texts, each with one token at least")
            return super().embed(input if isinstance(input, str) else texts, *args, **kwargs)

    def create_completion(self, *args: Any, **kwargs: Any) -> Any:
        """As upstream's. A second thread waits until the first one's is done; a stream ends with an error when another
        completion begins.

        Raises:
            CacheStateError: another completion began.
            ClosedError: the Llama is closed, or was closed meanwhile.
        """
        with self._completing:
            return super().create_completion(*args, **kwargs)

    def tokenize(self, *args: Any, **kwargs: Any) -> list[int]:
        """As upstream's."""
        with self._reading:
            tokens: list[int] = super().tokenize(*args, **kwargs)
            return tokens

    def detokenize(self, *args: Any, **kwargs: Any) -> bytes:
        """As upstream's.

        Raises:
            ValueError: one of the tokens is not in the vocabulary.
        """
        with self._reading:
            text: bytes = super().detokenize(*args, **kwargs)
            return text

    def _init_sampler(self, *args: Any, **kwargs: Any) -> Any:
        """As upstream's, of which it is the one place where samplers are made.

        Raises:
            ValueError: the grammar does not parse.
        """
        _grammar.check(self._model.vocab, kwargs.get("grammar"))
        return super()._init_sampler(*args, **kwargs)

    def _go_back(self, n_tokens: int) -> bool:
        """Remove what lies behind these tokens, which brings back what was evicted of them. False: it was refused."""
        if not self._ctx.kv_cache_seq_rm(-1, n_tokens, -1):
            return False
        self.n_tokens = n_tokens
        self._requires_eval = True  # the logits are not those of the last token that is left
        return True

    def _restore(self, n_tokens: int) -> bool:
        """Bring back what was evicted of the first tokens, without the others. False: they have to be read again."""
        try:
            if self.kv_evicted == "restore" and n_tokens > 0 and self._go_back(n_tokens):
                native.restore(self._ctx.ctx, _SEQ_ID)
                return True
        except (CacheStateError, CacheMemoryError) as error:
            inform(f"{error}; the conversation is read again", verbose=self.verbose)
        return False

    def _create_completion(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """As upstream's, which `create_completion` calls; but a grammar is checked at once, before a stream begins."""
        _grammar.check(self._model.vocab, kwargs.get("grammar"))
        completion: Iterator[Any] = super()._create_completion(*args, **kwargs)
        return completion

    def save_state(self) -> llama_cpp.LlamaState:
        """As upstream's, but without `scores` that were not asked for (`logits_all`); and with what was evicted, unless
        `kv_cold_state` is False.

        Raises:
            CacheStateError: what was evicted cannot be read any more.
        """
        with self._using, _states.without_scores(self):
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
        """
        with self._using:
            self._load_state(state)

    def _load_state(self, state: llama_cpp.LlamaState) -> None:
        self._generation = None
        native.clear_error()
        try:
            with _states.without_scores(self):
                super().load_state(_states.fitted(state, self))
        except (RuntimeError, ValueError) as error:
            self._ctx.kv_cache_clear()
            self.reset()
            reason = native.last_error() or "it was not written by a context like this one (model, cache types, policy)"
            message = f"{error}: {reason.removeprefix('state: ')}"
            if self.cache is not None and not self._refused_state:
                self._refused_state = True
                logger.warning("an entry of the cache of states does not fit, and is not used: %s", message)
            raise _states.UnfitStateError(message) from error

    def reset(self) -> None:
        """As upstream's."""
        with self._using:
            self._generation = None
            super().reset()

    def create_chat_completion(self, messages: Any, *args: Any, **kwargs: Any) -> Any:
        """As upstream's.

        Raises:
            CacheMemoryError: the cache could not grow, or not within `kv_memory_limit`. An image is not read in parts
                with prunings between them, as text is.
            ClosedError: the Llama is closed.
        """
        _ = self.ctx  # a handler of images has a context of its own, whose model may be gone
        if isinstance(messages, Iterator):
            messages = list(messages)
        system = spans.system_text(messages)
        locks = ExitStack()
        locks.enter_context(self._completing)
        if self.chat_handler is not None:  # it may read an image itself, past `eval`
            locks.enter_context(self._using)
        try:
            with locks, _chat_with(system):
                self._chat_reads = self.chat_handler is not None
                locks.callback(setattr, self, "_chat_reads", False)
                native.clear_error()
                answer = super().create_chat_completion(messages, *args, **kwargs)
        except ValueError as error:  # of a handler that reads an image itself, past `eval`
            if (reason := native.last_error()) and str(error).startswith("Failed to evaluate chunk"):
                raise CacheMemoryError(reason) from error
            raise
        return _chat_stream(system, answer) if isinstance(answer, Iterator) else answer

    def close(self) -> None:
        """Free the model and the context. All that needs them raises ClosedError from now on."""
        if "_stack" not in self.__dict__:  # not there yet when an argument was refused
            return
        with self._using, self._reading:
            super().close()
            for name in ("_batch", "_ctx", "_model"):
                if name in self.__dict__:
                    _closed.mark_closed(self.__dict__[name])

    def _forked(self) -> None:
        """In a child process, which has the context but none of the threads that work on it."""
        self._make_locks()  # one may have been held
        self._stack = ExitStack()  # nothing is freed here
        for name in ("_batch", "_ctx", "_model"):
            if name in self.__dict__:
                _closed.mark_closed(self.__dict__[name], _closed.Forked)

    if not TYPE_CHECKING:  # for a type checker, any attribute would be there

        def __getattr__(self, name: str) -> Any:
            if "_loaded" not in self.__dict__ and not name.startswith("__"):
                _closed.raise_closed()
            return self.__getattribute__(name)  # raises its own error

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        return {**state, **{name: getattr(self, name) for name in OPTIONS}}


@contextmanager
def _chat_with(system: str | None) -> Iterator[None]:
    """Prompts that this thread reads inside are those of a chat with this system message."""
    token = _chat_system.set(system)
    try:
        yield
    finally:
        _chat_system.reset(token)


def _chat_stream(system: str | None, chunks: Iterator[Any]) -> Iterator[Any]:
    """The chunks, whose generation begins with the first one, or later: other chats may be answered between them."""
    try:
        while True:
            with _chat_with(system):
                try:
                    chunk = next(chunks)
                except StopIteration:
                    return
            yield chunk
    finally:
        if isinstance(chunks, Generator):
            chunks.close()


_GENERATE = inspect.signature(llama_cpp.Llama.generate)
_SAMPLE_IDX = list(inspect.signature(llama_cpp.Llama.sample).parameters).index("idx") - 1  # of its arguments after self
_OPTIONS = [
    name
    for name, parameter in inspect.signature(llama_cpp.Llama.__init__).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
]


def _check_options(options: dict[str, Any], *, ignore_unknown: bool) -> None:
    """llama-cpp-python swallows what it does not know; a mistyped option must not vanish.

    ignore_unknown: leave them to it, but for those that can only be meant for this package.
    """
    for option in options:
        if option not in _OPTIONS and not (ignore_unknown and not option.startswith("kv_")):
            hint = did_you_mean(option, [*_OPTIONS, *OPTIONS]) or ";"
            raise TypeError(f"Llama() got an unexpected keyword argument {option!r}{hint} see llama_cpp.Llama")
