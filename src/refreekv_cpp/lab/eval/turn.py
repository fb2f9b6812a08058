"""One prompt, read and pruned by one cache, and what it answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import llama_cpp

from refreekv_cpp.lab.divergence import Logits
from refreekv_cpp.lab.eval.prompts import Prompt
from refreekv_cpp.lab.eval.session import Session

Mode = Literal["seen", "hidden"]


@dataclass(frozen=True)
class Settings:
    """What a run depends on besides its items and caches.

    Attributes:
        n_continuation: tokens of an answer at most; so many are compared.
        n_second: tokens of a second answer at most.
        flash_attn: of caches that are not quantised.
        kv_memory_limit: of caches with a policy, in bytes; they read the prompt themselves then.
        options: further ones of `Llama`.
        same_kernel: the full cache is attended to by the kernel of pruned caches.
        template: whether the model's chat template is used.
        seed: items were drawn and made with it, intervals are.
    """

    n_continuation: int = 128
    n_second: int = 32
    n_threads: int | None = None
    flash_attn: bool = False
    n_gpu_layers: int = 0
    kv_memory_limit: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    same_kernel: bool = False
    template: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """What a cache said.

    Attributes:
        tokens: of the greedy answer.
        logits: what predicts each token of the reference's answer: [n, n_vocab].
        real_logits: ... of the text that really follows.
        second_tokens: of the second answer; None: there was no second question.
    """

    tokens: list[int]
    logits: Logits
    real_logits: Logits
    second_tokens: list[int] | None


class Turn:
    """One prompt, read and pruned by one cache."""

    def __init__(
        self,
        session: Session,
        prompt: Prompt,
        mode: Mode,
        settings: Settings,
        *,
        source: Turn | None = None,
        save: Sequence[Mode] = (),
    ) -> None:
        """
        Args:
            source: has read the prompt with a full cache, and its states are taken over.
            save: keep the states that caches of these modes are pruned in.
        """
        self.session, self.prompt, self.settings = session, prompt, settings
        self.real = prompt.real[: settings.n_continuation]
        self.states: dict[Mode, llama_cpp.LlamaState] = {}
        session.forget()
        prune_ms = session.stats.prune_ms
        start = time.perf_counter()
        # in two batches in both modes, so that nothing but the pruning differs
        parts: dict[Mode, list[int]] = {"hidden": prompt.context, "seen": prompt.question}
        for part, tokens in parts.items():
            if source is not None and part == mode:
                first = session.take_over(source.states[mode])
            elif tokens and (source is None or mode == "hidden"):
                first = session.read(tokens)
            if part in save:
                self.states[part] = session.save()
            if part == mode:
                session.prune()
        self.stats, self.n_bytes = session.stats, session.n_bytes
        self.prune_s = (self.stats.prune_ms - prune_ms) / 1000
        # None: another cache has read the prompt
        self.prefill_s = time.perf_counter() - start - self.prune_s if source is None else None
        self.decode_s: list[float] = []
        self._first, self._start = first, session.n_tokens

    def go_back(self) -> None:
        self.session.rewind(self._start)

    def answer(self, reference: Answer | None = None) -> Answer:
        """Answers, then reads what the reference said; without one: what it said itself."""
        tokens, self.decode_s = self.session.greedy(self._first, self.settings.n_continuation)
        said = reference.tokens if reference else tokens
        return Answer(tokens, self._follow(said), self._follow(self.real), self._second(said))

    def answer_again(self, answer: Answer) -> Answer:
        """The same answer, with its logits computed once more."""
        return Answer(answer.tokens, self._follow(answer.tokens), self._follow(self.real), answer.second_tokens)

    def _follow(self, tokens: Sequence[int]) -> Logits:
        self.go_back()
        return self.session.follow(self._first, tokens)

    def _second(self, said: Sequence[int]) -> list[int] | None:
        """After the same first answer with all caches, and without another pruning."""
        if self.prompt.second is None:
            return None
        ended = self.session.ends(said[-1])
        self.go_back()
        first = self.session.read([*(said[:-1] if ended else said), *self.prompt.second])
        return self.session.greedy(first, self.settings.n_second)[0]
