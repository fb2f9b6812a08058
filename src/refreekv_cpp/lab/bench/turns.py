"""A conversation about a long document, whose every question asks for another fact in it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from refreekv_cpp.document import write_document
from refreekv_cpp.lab.eval.data import Question
from refreekv_cpp.lab.eval.generators import facts
from refreekv_cpp.llama import Llama


@dataclass(frozen=True)
class Turn:
    """
    Attributes:
        found: the fact is in the answer.
        first_token: seconds until it is there, reading and restoring and all; the pruning comes after it.
        restore: seconds of these that bringing back what was evicted took.
        bytes: of the KV cache after the answer.
        bytes_cold: of evicted rows that wait.
    """

    answer: str
    found: bool
    first_token: float
    restore: float
    bytes: int
    bytes_cold: int


@dataclass(frozen=True)
class Conversation:
    document: str
    questions: list[Question]

    @classmethod
    def make(cls, llm: Llama, *, n_tokens: int, n_turns: int, seed: int) -> Conversation:
        """A document of about so many tokens; the facts are asked for in another order than they come in it."""
        chosen = facts(n_turns, seed=seed)
        places = [((i * 7 + 3) % n_turns + 0.5) / n_turns for i in range(n_turns)]
        document = write_document(
            n_tokens,
            lambda text: len(llm.tokenize(text.encode(), add_bos=False)),
            facts=[(place, sentence) for place, (sentence, _) in zip(places, chosen, strict=True)],
            seed=seed,
        )
        return cls(document, [question for _, question in chosen])

    def hold(self, llm: Llama, *, max_tokens: int) -> Iterator[Turn]:
        """Asks one question after the other, greedily answered; the conversation goes on from these answers."""
        history: list[Any] = []
        for question in self.questions:
            text = question.text if history else f"{self.document}\n\n{question.text}"
            history.append({"role": "user", "content": text})
            restore_ms = llm.kv_stats.restore_ms
            start = time.perf_counter()
            first_token, answer = 0.0, ""
            chunks: Any = llm.create_chat_completion(history, stream=True, max_tokens=max_tokens, temperature=0.0)
            for chunk in chunks:
                first_token = first_token or time.perf_counter() - start
                answer += chunk["choices"][0]["delta"].get("content") or ""
            history.append({"role": "assistant", "content": answer})
            stats = llm.kv_stats
            yield Turn(
                answer.strip(),
                any(text in answer for text in question.answers),
                first_token,
                (stats.restore_ms - restore_ms) / 1000,
                stats.bytes,
                stats.bytes_cold,
            )
