"""llama-cpp-python's private names. No other module of this package uses them, but for `_llama_cpp`, which loads it.

A move of the pinned version can change these names; tests/llama/test_private_names.py checks that each is there.
`Llama` overrides some of upstream's private methods; the same test checks that their parameters are the same.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp import _internals
from llama_cpp._internals import LlamaContext, LlamaModel, LlamaSampler
from llama_cpp._utils import suppress_stdout_stderr
from llama_cpp.llama_chat_format import LlamaChatCompletionHandlerRegistry
from llama_cpp.llama_grammar import LlamaGrammar, SchemaConverter

__all__ = ["LlamaContext", "LlamaModel", "LlamaSampler", "SchemaConverter", "suppress_stdout_stderr"]


# -- classes -----------------------------------------------------------------------------------------------------------


def replace_classes(*, model: type[LlamaModel], sampler: type[LlamaSampler]) -> None:
    """From now on every `llama_cpp.Llama` of this process makes its models and samplers of these classes."""
    _internals.LlamaModel = model  # type: ignore[misc]
    _internals.LlamaSampler = sampler  # type: ignore[misc]


def replace_literal_format(format_literal: Callable[[SchemaConverter, str], str]) -> None:
    """From now on every grammar that this process makes of a JSON schema writes literal text by this function."""
    SchemaConverter._format_literal = format_literal  # type: ignore[method-assign]


def share_silence() -> None:
    """From now on threads that silence stdout and stderr at the same time do it together: the first one begins it, and
    the last one ends it. Each for itself, the last one would put back what it had found, which is silence.
    """
    begin, end = suppress_stdout_stderr.__enter__, suppress_stdout_stderr.__exit__
    lock = threading.RLock()
    inside: list[Any] = []  # the one that has begun it, once for each that has not ended

    def enter(self: Any) -> Any:
        if not self.disable:
            with lock:
                inside.append(inside[0] if inside else begin(self))
        return self

    def leave(self: Any, *_: Any) -> None:
        if not self.disable:
            with lock:
                first = inside.pop()
                if not inside:
                    end(first)

    suppress_stdout_stderr.__enter__ = enter  # type: ignore[method-assign]
    suppress_stdout_stderr.__exit__ = leave  # type: ignore[method-assign]


# -- a Llama's native objects ------------------------------------------------------------------------------------------


def has_begun(llm: llama_cpp.Llama) -> bool:
    """Whether its constructor came as far as to hold something that `close` frees."""
    return "_stack" in vars(llm)


def free_nothing(llm: llama_cpp.Llama) -> None:
    """Have `close` free nothing of what it holds now."""
    llm._stack = ExitStack()


def wrappers(llm: llama_cpp.Llama) -> dict[str, Any]:
    """The wrappers of its native batch, context and model, those that have been made, by their names."""
    return {name: vars(llm)[name] for name in ("_batch", "_ctx", "_model") if name in vars(llm)}


def replace_wrappers(llm: llama_cpp.Llama, stand_in: Any) -> list[Any]:
    """Have it hold this in the place of each of them. Returns them; `close` still frees what they hold."""
    replaced = wrappers(llm)
    vars(llm).update(dict.fromkeys(replaced, stand_in))
    return list(replaced.values())


def make_context(llm: llama_cpp.Llama, params: Any) -> LlamaContext:
    """Another context of its model. The caller closes it.

    Raises:
        ValueError: llama.cpp could not make it.
    """
    return LlamaContext(model=llm._model, params=params, verbose=False)


def vocab(llm: llama_cpp.Llama) -> Any:
    """The llama_vocab of its model."""
    return llm._model.vocab


def n_ctx_train(llm: llama_cpp.Llama) -> int:
    """Tokens of context that its model was made for."""
    return llm._model.n_ctx_train()


def adds_bos(llm: llama_cpp.Llama) -> bool:
    """Whether its model wants a token that begins a text."""
    return llm._model.add_bos_token()


def has_adapter(llm: llama_cpp.Llama) -> bool:
    """Whether its LoRA adapter was loaded. llama-cpp-python does not see that it is null."""
    return bool(llm._lora_adapter)


# -- what it has read --------------------------------------------------------------------------------------------------


def tokens(llm: llama_cpp.Llama) -> list[int]:
    """The tokens that it has read."""
    read: list[int] = llm._input_ids.tolist()
    return read


def token_array(llm: llama_cpp.Llama) -> npt.NDArray[np.intc]:
    """The same, where they are: the next tokens that it reads may overwrite them."""
    read: npt.NDArray[np.intc] = llm._input_ids
    return read


def is_recurrent(llm: llama_cpp.Llama) -> bool:
    """Whether no layer of the model has a cache that grows with the text."""
    return bool(llm._is_recurrent)


@contextmanager
def sampler_kept(llm: llama_cpp.Llama) -> Iterator[None]:
    """It has the same sampler afterwards. Upstream's `sample` leaves one that has raised, which the next call takes."""
    before = llm._sampler
    try:
        yield
    finally:
        llm._sampler = before


def seed(llm: llama_cpp.Llama) -> int:
    """What its next sampler begins with."""
    return llm._seed


def keeps_all_logits(llm: llama_cpp.Llama) -> bool:
    """Whether it keeps the logits of every token (logits_all=True, or a draft model)."""
    return llm._logits_all


def cut(llm: llama_cpp.Llama, n_tokens: int) -> bool:
    """Remove what lies behind the first n_tokens of its sequence from the cache. False: the cache refused."""
    return llm._ctx.kv_cache_seq_rm(-1, n_tokens, -1)


def clear(llm: llama_cpp.Llama) -> None:
    """Empty its cache."""
    llm._ctx.kv_cache_clear()


def has_logits(llm: llama_cpp.Llama) -> bool:
    """Whether the context has the logits of its last token."""
    return not llm._requires_eval


def forget_logits(llm: llama_cpp.Llama) -> None:
    """Have the next generation read its last token again, also where the cache has it: the logits are another one's."""
    llm._requires_eval = True


# -- batches -----------------------------------------------------------------------------------------------------------


def before_batches(llm: llama_cpp.Llama, call: Callable[[], None]) -> None:
    """Have this called before each batch that its context decodes; where it raises, the batch is not decoded."""
    decode = llm._ctx.decode

    def checked(batch: Any) -> None:
        call()
        decode(batch)

    llm._ctx.decode = checked  # type: ignore[method-assign]


@contextmanager
def after_batches(llm: llama_cpp.Llama, call: Callable[[int], None]) -> Iterator[None]:
    """Inside, have this called with the tokens of each batch that its context has decoded."""
    context = llm._ctx
    own = vars(context).get("decode")
    decode = context.decode

    def counted(batch: Any) -> None:
        decode(batch)
        call(batch.n_tokens())

    context.decode = counted  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del context.decode
        else:
            context.decode = own  # type: ignore[method-assign]


def decode_batch(llm: llama_cpp.Llama, batch: Sequence[int]) -> npt.NDArray[np.float32]:
    """Decode tokens, n_batch at most, behind the n_tokens that it has read.

    Returns:
        The logits after each: [n, n_vocab], which the next batch overwrites.
    """
    llm._batch.set_batch(batch, n_past=llm.n_tokens, logits_all=True)
    llm._ctx.decode(llm._batch)
    return np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(len(batch), llm.n_vocab()))


# -- tables ------------------------------------------------------------------------------------------------------------


def chat_formats() -> list[str]:
    """The names of the chat formats."""
    registry: Any = LlamaChatCompletionHandlerRegistry()
    return sorted(registry._chat_handlers)


def has_chat_format(llm: llama_cpp.Llama, name: str) -> bool:
    """Whether it is one of these, or a template of the model's file."""
    return name in chat_formats() or name in llm._chat_handlers


def grammar_text(grammar: LlamaGrammar) -> tuple[str, str]:
    """A grammar in GBNF, and the name of the rule that it begins with."""
    return grammar._grammar, grammar._root


# -- the server, whose state is in its module --------------------------------------------------------------------------


def _server() -> Any:
    return importlib.import_module("llama_cpp.server.app")  # it needs the extra `server`


def server_settings() -> Any:
    """The settings that the server was made with."""
    return _server()._server_settings


def served_models() -> Any:
    """The proxy of its models."""
    return _server()._llama_proxy


def ping_message() -> Any:
    """Makes what the server sends while a stream has nothing to say."""
    return _server()._ping_message_factory
