"""llama-cpp-python's `Llama` with a KV policy."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any, ClassVar

import llama_cpp
import numpy as np

from refreekv_cpp import _cache_types, _chat, _checks, _closed, _flash_attn, _grammar, _upstream, native, spans
from refreekv_cpp._log import inform
from refreekv_cpp._model import Model
from refreekv_cpp._signatures import LlamaOptions, implemented_by
from refreekv_cpp._states import SavedStates
from refreekv_cpp.errors import CacheMemoryError, CacheStateError, UnsupportedModelError
from refreekv_cpp.options import OPTIONS, VARIABLES, Cold, ColdType, Evicted, KVOptions
from refreekv_cpp.policies import Policy
from refreekv_cpp.spans import Protect

if TYPE_CHECKING:
    from llama_cpp import LogitsProcessorList, StoppingCriteriaList
    from llama_cpp.llama_grammar import LlamaGrammar
    from llama_cpp.llama_types import (
        ChatCompletionFunction,
        ChatCompletionRequestFunctionCall,
        ChatCompletionRequestMessage,
        ChatCompletionRequestResponseFormat,
        ChatCompletionTool,
        ChatCompletionToolChoiceOption,
        CreateChatCompletionResponse,
        CreateChatCompletionStreamResponse,
        CreateCompletionResponse,
        CreateCompletionStreamResponse,
    )
    from typing_extensions import Unpack

_upstream.replace_classes(model=Model, sampler=_grammar.Sampler)
_upstream.share_silence()

_SAMPLE_IDX = list(inspect.signature(llama_cpp.Llama.sample).parameters).index("idx") - 1  # of its arguments after self


class Llama(SavedStates):
    """`llama_cpp.Llama` with a KV cache that is pruned once the prompt has been read.

    Everything else is llama-cpp-python's: https://llama-cpp-python.readthedocs.io

    Args:
        model_path: a GGUF file.
        kv_policy: which cells stay in the cache: "full" (upstream's own cache), "refreekv", another name in
            `refreekv_cpp.policies.REGISTRY`, a name with parameters such as "refreekv:theta=0.01", or an object such
            as `ReFreeKV(theta=0.01)`. See docs/reference/policies.md. Default: the environment variable
            REFREEKV_POLICY, else "full".
        kv_evicted: what becomes of evicted rows, and how the next prompt is read. "keep": they are in the cold store,
            and an answer or the next prompt reads those that it looks at. "restore": they are in the cold store, and
            all of them come back, bit for bit, before the next prompt. "recompute": they are discarded, and the next
            prompt reads the whole conversation again. "drop": they are discarded, and the next prompt goes on from
            what is left. With a policy that has no codes, "keep" is "restore"; where rows cannot be restored,
            "restore" is "recompute". Default: "keep".
        kv_protect: positions that are never evicted: a list of (start, end), ends excluded; or "system": the system
            message of a chat completion. Default: none beyond what the policy keeps.
        kv_cold: where the cold store is: "memory" of the host; a "file" without a name, which is removed with the
            process; "auto": a file if the cache is in host memory, else memory. Default: "auto".
        kv_cold_dir: the folder of that file. Default: the user's cache folder.
        kv_cold_limit: a cap on the bytes in the cold store, a number or a text such as "4GiB". Rows that do not fit are
            lost: their codes stand for them, or the conversation is read again. Default: none (the store cannot hold
            more than the full cache of n_ctx).
        kv_cold_type: "q8_0" rounds rows of an f16, bf16 or f32 cache while they are in the cold store, and halves its
            size; what comes back is then not bit for bit what was evicted. Default: None, rows are stored as they are.
        kv_cold_state: whether saved states (`save_state`, llama-cpp-python's caches) contain the evicted rows. With
            them, a state is as large as the full cache's. Without them, a conversation that continues from a state has
            only codes, or is read again. Default: True.
        kv_library: a folder (True: one in the user's cache folder) where what was read is kept in files. Before a
            prompt is read, the longest known beginning of it is opened; when a completion ends, what is new is
            written. It needs kv_policy="refreekv". See docs/how-to/documents.md. Default: none.
        kv_library_limit: a cap on the bytes in that folder, a number or a text such as "4GiB". What was unused for
            longest is removed first. Default: "4GiB".
        kv_elastic: memory follows the contents instead of being allocated for n_ctx at load. It is always so with a
            policy that evicts. With "full" it is a choice. Default: False with "full".
        kv_memory_limit: a cap on the bytes of K, V and codes, a number or a text such as "512MiB". With a policy that
            evicts, a prompt that would pass it is pruned while it is read (`kv_stats.n_limit_prunes`). With "full",
            such a prompt is refused. Default: none.
        flash_attn: True, False, or "auto". "auto" is True with a policy that evicts, because it takes far less memory;
            with "full" it is False unless the backend or the type of V needs True. Default: "auto".
        swa_full: for layers with a sliding window: True makes room for the whole context, False for the window and one
            batch. Default: False with a policy that evicts, where checkpoints let a conversation go back
            (docs/explanation/conversations.md); True with "full", as upstream.
        verbose: show upstream's messages and ours on stderr. Ours (what was pruned, what could not be restored) also go
            to the logger "refreekv_cpp" with level INFO. Where the program's logging shows them, they are not printed a
            second time. Default: True, as upstream.
        **options: those of `llama_cpp.Llama`. An unknown one is an error (except in the drop-in, see
            `refreekv_cpp.dropin`).

    Raises:
        PolicyError: unknown policy or option.
        UnsupportedModelError: the model's memory cannot have this policy. (If REFREEKV_POLICY has chosen it, this is a
            warning, and the model runs with "full".)
        ValueError: as llama-cpp-python, for a file that is missing or is no model.
    """

    ignore_unknown_options: ClassVar[bool] = False

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
        kv_library: bool | str | os.PathLike[str] | None = None,
        kv_library_limit: int | str | None = None,
        **options: Unpack[LlamaOptions],
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
            kv_library=kv_library,
            kv_library_limit=kv_library_limit,
        )
        others: dict[str, Any] = {**options}
        _checks.check_names(others, more=OPTIONS, ignore_unknown=self.ignore_unknown_options)
        for name in ("type_k", "type_v"):
            _cache_types.check(name, others.get(name))
        model_path = _checks.check_path("model_path", model_path)
        others = _checks.check_options(others)
        with _closed.loading:
            _checks.check_experts(others.get("kv_overrides") or {}, model_path)
        if "n_batch" in others and (n_ctx := others.get("n_ctx", 512)):
            others["n_batch"] = min(others["n_batch"], n_ctx)  # upstream allocates n_batch rows of logits
        if others.get("embedding") and kv.evicts:
            inform(
                "embedding=True keeps no cache between calls, kv_policy is ignored",
                verbose=others.get("verbose", True),
            )
            kv = KVOptions.of(kv_policy="full", kv_evicted=kv.kv_evicted, kv_elastic=kv_elastic, kv_protect=kv_protect)

        self._kv = kv
        vars(self).update(kv.public())
        self._make_locks()
        chosen: dict[str, Any] = {"flash_attn": _flash_attn.resolve(others, evicts=kv.evicts)}
        if kv.evicts and others.get("swa_full") is None:
            chosen["swa_full"] = False  # checkpoints go back where the windows cannot
        try:
            self._load(model_path, {**others, **chosen})
        except UnsupportedModelError as error:
            if not kv.from_environment:
                raise
            warnings.warn(f"{VARIABLES['kv_policy']}={kv.kv_policy.name} is ignored: {error}", stacklevel=2)
            Llama.__init__(self, model_path, kv_policy="full", kv_evicted=kv_evicted, kv_elastic=kv_elastic, **others)
            return
        self._loaded = True
        self._make_checkpoints()
        self._open_library()

    def _load(self, model_path: str, options: dict[str, Any]) -> None:
        if self._kv.native_params() is not None and options.get("split_mode") == llama_cpp.LLAMA_SPLIT_MODE_TENSOR:
            raise UnsupportedModelError(
                f"split_mode={options['split_mode']} (tensor): must be one of 0 (none), 1 (layer) and 2 (row) "
                "with a kv_policy or kv_elastic, since it divides each row of the cache between devices; "
                'kv_policy="full" runs it'
            )
        with _closed.loading, native.next_context(self._kv.native_params()):
            try:
                _closed.before_fork(self)
                super().__init__(model_path, **options)
                if self.lora_path and not _upstream.has_adapter(self):
                    raise ValueError(f"lora_path={self.lora_path!r}: must be a LoRA adapter for this model")
            except Exception as error:
                self.close()
                if isinstance(error, ValueError) and (reason := native.last_error()):
                    raise UnsupportedModelError(f'{reason}; kv_policy="full" runs it') from error
                raise
        n_ctx = self.n_ctx()
        if len(self.input_ids) != n_ctx:  # llama.cpp has rounded it up, upstream's arrays are as long as was asked for
            self.input_ids = np.ndarray((n_ctx,), dtype=np.intc)
            if _upstream.keeps_all_logits(self):
                self.scores = np.ndarray((n_ctx, self.n_vocab()), dtype=np.single)

    def _sample(self, *args: Any, **kwargs: Any) -> int:
        with self._using:
            idx = args[_SAMPLE_IDX] if len(args) > _SAMPLE_IDX else kwargs.get("idx")
            if not llama_cpp.llama_get_logits_ith(self.ctx, -1 if idx is None else idx - self.n_tokens):
                raise CacheStateError("there are no logits to sample from; eval() tokens before")
            with _upstream.sampler_kept(self):
                token: int = super().sample(*args, **kwargs)
            return token

    @implemented_by(_sample)
    def sample(
        self,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        temp: float = 0.8,
        repeat_penalty: float = 1.0,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_eta: float = 0.1,
        mirostat_tau: float = 5.0,
        penalize_nl: bool = True,
        logits_processor: LogitsProcessorList | None = None,
        grammar: LlamaGrammar | None = None,
        idx: int | None = None,
    ) -> int:
        """As upstream's.

        Raises:
            CacheStateError: the token to sample after was not read, or read without its logits.
            ClosedError: the Llama is closed.
        """
        raise NotImplementedError

    def _embed(self, input: str | Iterable[str], *args: Any, **kwargs: Any) -> Any:
        with self._using:
            texts = [input] if isinstance(input, str) else list(input) if isinstance(input, Iterable) else []
            if not texts or not all(isinstance(text, str) and self.tokenize(text.encode()) for text in texts):
                raise ValueError("the input must be a text, or a list of texts, each with one token at least")
            return super().embed(input if isinstance(input, str) else texts, *args, **kwargs)

    @implemented_by(_embed)
    def embed(
        self,
        input: str | list[str],
        normalize: bool = False,
        truncate: bool = True,
        return_count: bool = False,
    ) -> Any:
        """As upstream's.

        Raises:
            ValueError: no text, or one without tokens, of which there is no embedding.
            ClosedError: the Llama is closed.
        """
        raise NotImplementedError

    def _create_completion_in_turn(self, *args: Any, **kwargs: Any) -> Any:
        with self._completing:
            return super().create_completion(*args, **kwargs)

    @implemented_by(_create_completion_in_turn)
    def create_completion(
        self,
        prompt: str | list[int],
        suffix: str | None = None,
        max_tokens: int | None = 16,
        temperature: float = 0.8,
        top_p: float = 0.95,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        logprobs: int | None = None,
        echo: bool = False,
        stop: str | list[str] | None = [],  # noqa: B006
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        repeat_penalty: float = 1.0,
        top_k: int = 40,
        stream: bool = False,
        seed: int | None = None,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        model: str | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        logits_processor: LogitsProcessorList | None = None,
        grammar: LlamaGrammar | None = None,
        logit_bias: dict[int, float] | None = None,
    ) -> CreateCompletionResponse | Iterator[CreateCompletionStreamResponse]:
        """As upstream's. A second thread waits until the first one's completion is done. A stream ends with an error if
        another completion begins.

        Raises:
            CacheStateError: another completion began.
            ClosedError: the Llama is closed, or was closed meanwhile.
        """
        raise NotImplementedError

    def _tokenize(self, *args: Any, **kwargs: Any) -> list[int]:
        with self._reading:
            tokens: list[int] = super().tokenize(*args, **kwargs)
            return tokens

    @implemented_by(_tokenize)
    def tokenize(
        self,
        text: bytes,
        add_bos: bool = True,
        special: bool = False,
    ) -> list[int]:
        """As upstream's."""
        raise NotImplementedError

    def _detokenize(self, *args: Any, **kwargs: Any) -> bytes:
        with self._reading:
            text: bytes = super().detokenize(*args, **kwargs)
            return text

    @implemented_by(_detokenize)
    def detokenize(
        self,
        tokens: list[int],
        prev_tokens: list[int] | None = None,
        special: bool = False,
    ) -> bytes:
        """As upstream's.

        Raises:
            ValueError: one of the tokens is not in the vocabulary.
        """
        raise NotImplementedError

    def _init_sampler(self, *args: Any, **kwargs: Any) -> Any:
        """As upstream's, of which it is the one place where samplers are made.

        Raises:
            ValueError: the grammar does not parse.
        """
        _grammar.check(_upstream.vocab(self), kwargs.get("grammar"))
        return super()._init_sampler(*args, **kwargs)

    def _create_completion(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """As upstream's, which `create_completion` calls; but a grammar is checked at once, before a stream begins."""
        with self._reading:
            _grammar.check(_upstream.vocab(self), kwargs.get("grammar"))
        return self._with_reason(super()._create_completion(*args, **kwargs))

    def _with_reason(self, answers: Iterator[Any]) -> Iterator[Any]:
        """Where the context was too short for the rest of an answer, "length" is why it ends."""
        with closing(answers):  # type: ignore[type-var]
            for answer in answers:
                for choice in answer["choices"]:
                    if self._is_full and choice["finish_reason"] == "stop":
                        choice["finish_reason"] = "length"
                yield answer

    def _create_chat_completion(self, messages: Any, *args: Any, **kwargs: Any) -> Any:
        _ = self.ctx  # a handler of images has a context of its own, whose model may be gone
        if isinstance(messages, Iterator):
            messages = list(messages)
        system = spans.system_text(messages)
        locks = ExitStack()
        locks.enter_context(self._completing)
        if self.chat_handler is not None:  # it may read an image itself, past `eval`
            locks.enter_context(self._using)
        try:
            with locks, _chat.answering(system):
                self._chat_reads = self.chat_handler is not None
                locks.callback(setattr, self, "_chat_reads", False)
                native.clear_error()
                answer = super().create_chat_completion(messages, *args, **kwargs)
        except ValueError as error:  # of a handler that reads an image itself, past `eval`
            if (reason := native.last_error()) and str(error).startswith("Failed to evaluate chunk"):
                raise CacheMemoryError(reason) from error
            raise
        return _chat.stream(system, answer) if isinstance(answer, Iterator) else answer

    @implemented_by(_create_chat_completion)
    def create_chat_completion(
        self,
        messages: list[ChatCompletionRequestMessage],
        functions: list[ChatCompletionFunction] | None = None,
        function_call: ChatCompletionRequestFunctionCall | None = None,
        tools: list[ChatCompletionTool] | None = None,
        tool_choice: ChatCompletionToolChoiceOption | None = None,
        temperature: float = 0.2,
        top_p: float = 0.95,
        top_k: int = 40,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        stream: bool = False,
        stop: str | list[str] | None = [],  # noqa: B006
        seed: int | None = None,
        response_format: ChatCompletionRequestResponseFormat | None = None,
        max_tokens: int | None = None,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        repeat_penalty: float = 1.0,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        model: str | None = None,
        logits_processor: LogitsProcessorList | None = None,
        grammar: LlamaGrammar | None = None,
        logit_bias: dict[int, float] | None = None,
        logprobs: bool | None = None,
        top_logprobs: int | None = None,
    ) -> CreateChatCompletionResponse | Iterator[CreateChatCompletionStreamResponse]:
        """As upstream's.

        Raises:
            CacheMemoryError: the cache could not grow, or not within `kv_memory_limit`. An image is not read in parts
                with prunings between them, as text is.
            ClosedError: the Llama is closed.
        """
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        return {**state, **{name: getattr(self, name) for name in OPTIONS}}
