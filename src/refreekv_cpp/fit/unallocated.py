"""A model and contexts that take no memory, which llama.cpp can be asked about."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from ctypes import byref, c_void_p
from types import MappingProxyType
from typing import Any

import llama_cpp

from refreekv_cpp import _closed, _upstream, native
from refreekv_cpp._checks import check_n_ctx, check_options
from refreekv_cpp._files import check_file
from refreekv_cpp.errors import ContextError, PolicyError, UnsupportedModelError
from refreekv_cpp.llama import Llama

_LOG_LEVEL_ERROR = 4  # GGML_LOG_LEVEL_ERROR of ggml.h
_SHORT_CONTEXT = 512


class Unallocated(Llama):
    """A `Llama` that can tell what it would take: model and context are there, their memory is not. It cannot read.

    llama-cpp-python turns options into fields of `model_params` as it does for every model; here that says "no memory"
    whenever it is looked at.
    """

    asked: Mapping[str, Any] = MappingProxyType({})
    """The options that `opened` got."""

    @property
    def model_params(self) -> Any:
        params = self.__dict__["model_params"]
        params.no_alloc = True
        params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
        return params

    @model_params.setter
    def model_params(self, params: Any) -> None:
        self.__dict__["model_params"] = params


def check_model(model_path: str | os.PathLike[str]) -> str:
    """The path of a model's file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no GGUF file.
    """
    path = check_file(model_path)
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path}: not a GGUF file")
    return path


@contextmanager
def opened(model_path: str | os.PathLike[str], **options: Any) -> Iterator[Unallocated]:
    """The model without memory, and with a short context; `measure` makes those that are asked for.

    Args:
        model_path: a GGUF file.
        **options: those of `Llama`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no GGUF file, llama.cpp cannot load it, or only its vocabulary is asked for.
        PolicyError, TypeError: an option is not valid.
        UnsupportedModelError: the model cannot have this policy.
    """
    path = check_model(model_path)
    options = check_options(options)
    if options.get("vocab_only"):
        raise ValueError("vocab_only=True: a vocabulary alone has no context")
    if options.get("lora_path") is not None:
        check_file(options["lora_path"])
    # no context of n_ctx yet: llama-cpp-python makes a batch for it
    short = max(_SHORT_CONTEXT, options.get("n_batch", 0))
    # LoRA adapters are small, and would be read
    plain = {**options, "n_ctx": short, "verbose": False, "lora_path": None}
    with quiet() as errors:
        try:
            llm = Unallocated(path, **plain)
        except (PolicyError, UnsupportedModelError):
            raise
        except ValueError as error:
            raise ValueError(f"{path}: llama.cpp cannot load it: {errors[0] if errors else error}") from error
    with closing(llm):
        llm.asked = options
        yield llm


_collected: list[list[str]] = []  # errors of each `quiet` that has begun and not ended, one in the other


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _collect(level: int, text: bytes, _: Any) -> None:
    # it is never freed: another thread may be about to call it when `quiet` ends
    for errors in _collected[-1:] if level == _LOG_LEVEL_ERROR else []:
        errors.append(text.decode(errors="replace").strip().removeprefix("llama_model_load: "))


@contextmanager
def quiet() -> Iterator[list[str]]:
    """llama.cpp prints nothing inside; its errors come here. No other thread loads a model meanwhile."""
    errors: list[str] = []
    with _closed.loading:  # all threads have one callback
        before, data = llama_cpp.llama_log_callback(), c_void_p()
        llama_cpp.llama_log_get(byref(before), byref(data))
        _collected.append(errors)
        llama_cpp.llama_log_set(_collect, c_void_p(0))
        try:
            yield errors
        finally:
            llama_cpp.llama_log_set(before, data)
            _collected.pop()


@contextmanager
def context(llm: Unallocated, n_ctx: int) -> Iterator[Any]:
    """The llama_context of n_ctx tokens that the options ask for.

    Raises:
        ContextError: the model has no such context.
    """
    check_n_ctx(n_ctx)
    params = type(llm.context_params).from_buffer_copy(llm.context_params)
    params.n_ctx = n_ctx
    params.n_batch = min(n_ctx, params.n_batch)
    params.n_ubatch = min(params.n_batch, params.n_ubatch)
    with quiet() as errors:
        try:
            with native.next_context(llm._kv.native_params()):
                made = _upstream.make_context(llm, params)
        except ValueError as error:
            why = native.last_error() or (errors[0] if errors else str(error))
            raise ContextError(f"{llm.model_path}: there is no context of {n_ctx} tokens: {why}") from error
        try:
            yield made.ctx
        finally:
            made.close()
