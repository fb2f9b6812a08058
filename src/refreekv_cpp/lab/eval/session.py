"""One model with one cache, driven step by step: read, prune, decode, score."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from refreekv_cpp import _upstream, native
from refreekv_cpp.lab.divergence import Logits
from refreekv_cpp.lab.eval.spec import Spec
from refreekv_cpp.llama import Llama
from refreekv_cpp.stats import KVStats


class Session:
    """
    Args:
        others: further options of `Llama`; those of `spec` win.

    Raises:
        ValueError: no such file, or the model cannot have this cache.
    """

    def __init__(
        self, model: Path, spec: Spec, *, n_ctx: int, n_threads: int | None, flash_attn: bool, **others: Any
    ) -> None:
        self._rounding = spec.rounding
        options = {
            **others,
            "n_ctx": -(-n_ctx // 256) * 256,
            "n_threads": n_threads,
            "n_threads_batch": n_threads,
            "flash_attn": flash_attn,
            "verbose": False,
        }
        with _upstream.suppress_stdout_stderr(disable=False):
            self.llm = Llama(str(model), **{**options, **spec.llama_options()})

    def close(self) -> None:
        self.llm.close()

    @property
    def n_tokens(self) -> int:
        """In the cache, as the conversation goes; pruned ones among them."""
        return self.llm.n_tokens

    @property
    def stats(self) -> KVStats:
        return self.llm.kv_stats

    @property
    def n_bytes(self) -> float:
        """Of K, V and codes; of a rounded cache what it would have."""
        stats = self.stats
        return (stats.bytes + stats.bytes_codes) * (
            self._rounding.part_of_bytes(self.n_tokens) if self._rounding else 1
        )

    def forget(self) -> None:
        self.llm.reset()

    def save(self) -> llama_cpp.LlamaState:
        return self.llm.save_state()

    def take_over(self, state: llama_cpp.LlamaState) -> Logits:
        """What a full cache of the same type has read counts as read here (rounded, where the cache is), and the policy
        may judge it.

        The last tokens are read again, since no state holds their queries. Returns the last logits: [n_vocab].
        """
        if self._rounding is not None:
            layers = native.figures(self.llm.ctx)[1]
            heads = [(each.n_embd_head, each.row_numbers // each.n_head_kv - each.n_embd_head) for each in layers]
            state = self._rounding.of(state, heads)
        self.llm.load_state(state)
        tokens = state.input_ids[: state.n_tokens].tolist()
        n_tokens = len(tokens) - 1
        self.llm.n_tokens = (
            native.usable_prefix(self.llm.ctx, 0, n_tokens, n_tokens + 1) if self.llm.kv_elastic else n_tokens
        )
        return self.read(tokens[self.llm.n_tokens :])

    def rewind(self, n_tokens: int) -> None:
        """Back to so many tokens: not further than the last pruning."""
        self.llm.n_tokens = n_tokens

    def prune(self) -> None:
        self.llm.prune_kv()

    def read(self, tokens: Sequence[int]) -> Logits:
        """Returns the logits after the last of them: [n_vocab]."""
        self.llm.eval(tokens)
        pointer = llama_cpp.llama_get_logits_ith(self.llm.ctx, -1)
        logits: Logits = np.ctypeslib.as_array(pointer, shape=(self.llm.n_vocab(),)).copy()
        return logits

    def score(self, tokens: Sequence[int]) -> Logits:
        """Reads tokens in batches, and returns the logits after each: [n, n_vocab].

        One by one where evicted cells are attended to by codes, as an answer is decoded.
        """
        llm = self.llm
        n_batch = 1 if llm.kv_stats.theta > 0 else llm.n_batch
        _upstream.cut(llm, llm.n_tokens)  # as eval would: what lies behind is as good as gone
        rows = np.empty((len(tokens), llm.n_vocab()), dtype=np.float32)
        for i in range(0, len(tokens), n_batch):
            batch = tokens[i : i + n_batch]
            # not with eval: logits_all of a Llama holds rows for the whole context
            rows[i : i + len(batch)] = _upstream.decode_batch(llm, batch)
            llm.input_ids[llm.n_tokens : llm.n_tokens + len(batch)] = batch
            llm.n_tokens += len(batch)
        return rows

    def follow(self, first: Logits, tokens: Sequence[int]) -> Logits:
        """The logits that predict each of these tokens, `first` those before them: [n, n_vocab]."""
        return np.concatenate([first[np.newaxis], self.score(tokens[:-1])])[: len(tokens)]

    def greedy(self, first: Logits, n_max: int) -> tuple[list[int], list[float]]:
        """The likeliest tokens, from the logits `first` on, until the model ends its answer (with the token that does).

        Returns:
            The tokens, and the seconds that each but the last took to decode.
        """
        tokens, seconds = [int(first.argmax())], []
        while len(tokens) < n_max and not self.ends(tokens[-1]):
            start = time.perf_counter()
            logits = self.read(tokens[-1:])
            seconds.append(time.perf_counter() - start)
            tokens.append(int(logits.argmax()))
        return tokens, seconds

    def ends(self, token: int) -> bool:
        """Whether a token ends an answer."""
        return bool(llama_cpp.llama_vocab_is_eog(_upstream.vocab(self.llm), token))

    def text(self, tokens: Sequence[int]) -> str:
        """Of an answer, without the token that ends it."""
        ended = bool(tokens) and self.ends(tokens[-1])
        return self.llm.detokenize(list(tokens[:-1] if ended else tokens)).decode(errors="replace").strip()
