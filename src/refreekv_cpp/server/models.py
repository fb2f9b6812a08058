"""The models of the server: loaded one at a time by upstream's proxy, each with its KV policy."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import llama_cpp
import llama_cpp.server.settings
from llama_cpp.server.model import LlamaProxy

from refreekv_cpp import dropin
from refreekv_cpp.errors import RefreeKVError
from refreekv_cpp.llama import Llama
from refreekv_cpp.server.settings import ModelSettings


class UnknownModelError(RefreeKVError, ValueError):
    """A request for a model that the server does not have."""


class CountingLlama(Llama):
    """Counts the tokens of all generations, which upstream does not do for streams.

    Attributes:
        n_prompt: tokens of prompts.
        n_completion: tokens generated, without those that end a generation.
    """

    # the server's settings have some that Llama no longer has
    ignore_unknown_options = True
    n_prompt = 0
    n_completion = 0

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        self.n_prompt += len(tokens)
        for token in super().generate(tokens, *args, **kwargs):
            self.n_completion += not llama_cpp.llama_vocab_is_eog(self._model.vocab, token)
            yield token


class Models(LlamaProxy):
    """Upstream's proxy; what it loads is a `CountingLlama`."""

    def __call__(self, model: str | None = None) -> llama_cpp.Llama:
        self.check(model)
        return super().__call__(model)

    def check(self, model: str | None) -> None:
        """Raises UnknownModelError where one of several models is asked for. A single one answers to any name."""
        valid = list(self)
        if model is not None and len(valid) > 1 and model not in valid:
            raise UnknownModelError(f"The model `{model}` does not exist; valid are {', '.join(valid)}")

    @staticmethod
    def load_llama_from_model_settings(settings: llama_cpp.server.settings.ModelSettings) -> llama_cpp.Llama:
        assert isinstance(settings, ModelSettings)
        options = settings.kv_options()

        class Configured(CountingLlama):
            def __init__(self, model_path: str, **others: Any) -> None:
                super().__init__(model_path, **options, **others)

        with dropin.replaced_by(Configured):
            return LlamaProxy.load_llama_from_model_settings(settings)
