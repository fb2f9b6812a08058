"""A conversation about a long document, turn by turn: one that is made up, or one from a file."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refreekv_cpp.document import write_document
from refreekv_cpp.lab.eval.data import Question
from refreekv_cpp.lab.eval.generators import facts
from refreekv_cpp.lab.eval.scores import SCORES, score
from refreekv_cpp.llama import Llama


@dataclass(frozen=True)
class Turn:
    """
    Attributes:
        score: how right the answer is, 0 to 1.
        first_token: seconds until it is there, reading and restoring and all; the pruning comes after it.
        restore: seconds of these that bringing back what was evicted took.
        bytes: of the KV cache after the answer.
        bytes_cold: of evicted rows that wait.
    """

    answer: str
    score: float
    first_token: float
    restore: float
    bytes: int
    bytes_cold: int


@dataclass(frozen=True)
class Conversation:
    """
    Attributes:
        questions: one per turn; the first one follows the document.
        replies: the answers with which the conversation goes on; None: with those of the model.
        score_name: a name in `scores.SCORES`.
    """

    document: str
    questions: list[Question]
    replies: list[str] | None
    score_name: str

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
        return cls(document, [question for _, question in chosen], None, "found")

    @classmethod
    def read(cls, file: Path) -> list[Conversation]:
        """The dialogues of a *.jsonl: {"context", "turns": [{"question", "answers", "score"}, ...]} in each line.

        Each goes on with the first of a turn's answers, so that all caches have the same text before each question.

        Raises:
            ValueError: there is none, or a line is no dialogue (the message says which).
        """
        dialogues = []
        for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
            if not line.strip():
                continue
            try:
                data = json.loads(line)
                questions = [Question(turn["question"], tuple(turn["answers"])) for turn in data["turns"]]
                name = data.get("score", "f1")
                if name not in SCORES or not questions:
                    raise ValueError(f"score {name!r}: must be one of {', '.join(SCORES)}; one turn at least")
                dialogues.append(cls(data["context"], questions, [question.answers[0] for question in questions], name))
            except (KeyError, TypeError, IndexError, ValueError) as error:
                raise ValueError(f"{file}:{number}: no dialogue ({error})") from error
        if not dialogues:
            raise ValueError(f"{file}: there is no dialogue in it")
        return dialogues

    def count(self, llm: Any) -> int:
        """Its tokens, but for the chat template and answers of the model."""
        texts = [self.document, *(question.text for question in self.questions), *(self.replies or [])]
        return sum(len(llm.tokenize(text.encode(), add_bos=False)) for text in texts)

    def hold(self, llm: Llama, *, max_tokens: int) -> Iterator[Turn]:
        """Asks one question after the other, greedily answered."""
        history: list[Any] = []
        for i, question in enumerate(self.questions):
            text = question.text if history else f"{self.document}\n\n{question.text}"
            history.append({"role": "user", "content": text})
            restore_ms = llm.kv_stats.restore_ms
            start = time.perf_counter()
            first_token, answer = 0.0, ""
            chunks: Any = llm.create_chat_completion(history, stream=True, max_tokens=max_tokens, temperature=0.0)
            for chunk in chunks:
                first_token = first_token or time.perf_counter() - start
                answer += chunk["choices"][0]["delta"].get("content") or ""
            history.append({"role": "assistant", "content": self.replies[i] if self.replies else answer})
            stats = llm.kv_stats
            yield Turn(
                answer.strip(),
                score(self.score_name, answer, question.answers),
                first_token,
                (stats.restore_ms - restore_ms) / 1000,
                stats.bytes,
                stats.bytes_cold,
            )
