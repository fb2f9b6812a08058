"""llama-cpp-python's wrapper of a model, except that it refuses tokens that the model does not have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from refreekv_cpp._upstream import LlamaModel
from refreekv_cpp.errors import TokenError


def check_tokens(tokens: Iterable[int], n_vocab: int) -> None:
    """
    Raises:
        TokenError: one of the tokens is not in a vocabulary of n_vocab.
    """
    for token in tokens:
        if not 0 <= token < n_vocab:
            raise TokenError(f"token {token}: must be from 0 to {n_vocab - 1}")


class Model(LlamaModel):
    """llama.cpp throws a C++ exception at a token that is not there, which nothing catches: it ends the process."""

    def detokenize(self, tokens: Sequence[int], special: bool = False) -> bytes:
        """
        Raises:
            TokenError: one of the tokens is not in the vocabulary.
        """
        check_tokens(tokens, self.n_vocab())
        text: bytes = super().detokenize(list(tokens), special)
        return text
