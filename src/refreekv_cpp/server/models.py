"""The models of the server: loaded one at a time by upstream's proxy, each with its KV policy."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import anyio
import llama_cpp
import llama_cpp.server.settings
from llama_cpp.server.model import LlamaProxy

from refreekv_cpp import _upstream, dropin, fit
from refreekv_cpp._option_text import LLAMA_OPTIONS
from refreekv_cpp.llama import Llama
from refreekv_cpp.server.errors import RequestError
from refreekv_cpp.server.settings import ModelSettings


class Interrupted(Exception):
    """The client that asked for this answer has disconnected."""


def _never() -> bool:
    return False


class CountingLlama(Llama):
    """Counts the tokens of all generations, which upstream does not do for streams, and stops when it is told to.

    Attributes:
        n_prompt: tokens of prompts.
        n_completion: tokens generated, without those that end a generation.
        takes_images: the model has a projector.
        interrupted: called before each batch of a prompt and each token; where it returns True, Interrupted is raised.
    """

    # the server's settings have some that Llama no longer has
    ignore_unknown_options = True
    takes_images = False
    n_prompt = 0
    n_completion = 0
    interrupted: Callable[[], bool] = staticmethod(_never)

    def __init__(self, model_path: str, **options: Any) -> None:
        super().__init__(model_path, **options)
        _upstream.before_batches(self, self._stop_if_interrupted)

    def _stop_if_interrupted(self) -> None:
        if self.interrupted():
            raise Interrupted

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        """As upstream's.

        Raises:
            RequestError: there are no tokens to go on from.
            Interrupted: see `interrupted`.
        """
        if not len(tokens):
            raise RequestError("The prompt is empty, and this model has no token that begins a text.", param="prompt")
        self.n_prompt += len(tokens)
        for token in super().generate(tokens, *args, **kwargs):
            self.n_completion += not llama_cpp.llama_vocab_is_eog(_upstream.vocab(self), token)
            yield token


class Models(LlamaProxy):
    """Upstream's proxy; what it loads is a `CountingLlama`.

    Attributes:
        turn: the lock that a response holds while it uses the model.
    """

    def __init__(self, models: list[llama_cpp.server.settings.ModelSettings]) -> None:
        self.turn = anyio.Lock()
        super().__init__(models)

    def load(self, model: str | None) -> CountingLlama:
        """The model with this name, in place of the one that was loaded; None: the first. One alone has any name.

        Raises:
            RequestError: there is none.
            ValueError: it cannot be loaded.
        """
        names = list(self)
        if model is not None and len(names) > 1 and model not in names:
            raise RequestError(
                f"The model `{model}` does not exist; it must be one of {', '.join(names)}",
                param="model",
                code="model_not_found",
                status=404,
            )
        llm = self(model)
        assert isinstance(llm, CountingLlama)
        return llm

    @staticmethod
    def load_llama_from_model_settings(settings: llama_cpp.server.settings.ModelSettings) -> llama_cpp.Llama:
        assert isinstance(settings, ModelSettings)
        more = settings.llama_options()

        class Configured(CountingLlama):
            takes_images = settings.clip_model_path is not None

            def __init__(self, model_path: str, **options: Any) -> None:
                options |= more
                if options["embedding"]:
                    # a model without causal attention needs a text in one physical batch, else llama.cpp aborts
                    options["n_batch"] = min(options["n_batch"], options["n_ubatch"])
                # llama-cpp-python keeps the logits of all tokens for a draft, but makes room for them only with this
                options["logits_all"] |= options["draft_model"] is not None
                try:
                    super().__init__(model_path, **fitted(model_path, options))
                except (TypeError, AttributeError, ctypes.ArgumentError) as error:
                    raise ValueError(f"an option of the model has a value of a wrong kind: {error}") from error

        with dropin.replaced_by(Configured):
            try:
                return LlamaProxy.load_llama_from_model_settings(settings)
            except AssertionError as error:  # of a chat format that needs another setting
                raise ValueError(f"chat_format={settings.chat_format!r}: {error}") from error


def fitted(model_path: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a model, with numbers in the place of "auto" and "all"."""
    known = {name: value for name, value in options.items() if name in LLAMA_OPTIONS}
    layers, n_ctx = known.pop("n_gpu_layers"), known.pop("n_ctx")
    if options["vocab_only"]:
        return {**options, "n_gpu_layers": 0, "n_ctx": 512 if n_ctx == "auto" else n_ctx}
    layers = fit.chosen_layers(layers, model_path, **known, **({} if n_ctx == "auto" else {"n_ctx": n_ctx}))
    if n_ctx == "auto":
        n_ctx = fit.n_ctx(model_path, **known, n_gpu_layers=layers)
    return {**options, "n_gpu_layers": layers, "n_ctx": n_ctx}
