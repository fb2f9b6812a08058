"""Items to evaluate on: a context, a question, and what counts as an answer. docs/how-to/evaluate.md has the format."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from refreekv_cpp._suggest import did_you_mean
from refreekv_cpp.lab.eval.scores import SCORES

# datasets whose answers are not short spans (f1); a field "score" of an item comes first
_SCORE_OF_DATASET = {
    "qmsum": "rouge_l",
    "gsm8k": "number",
    "theoremqa": "number",
    "needle_wiki": "found",
    "ruler_niah_mk3": "found",
    "kv_retrieval": "found",
}


@dataclass(frozen=True)
class Question:
    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Item:
    """One prompt.

    Attributes:
        question: its text is "" for an item whose context just goes on, with `answers[0]`.
        score: a name in `scores.SCORES`.
        second: asked in the same conversation, after the first was answered.
        meta: anything; "depth" (0 to 1) and "length" (tokens) place an item on the retrieval map.
    """

    id: str
    dataset: str
    context: str
    question: Question
    score: str
    second: Question | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def is_continuation(self) -> bool:
        return not self.question.text

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_items(folder: Path) -> list[Item]:
    """The items of every *.jsonl in a folder, in order of file name and line.

    Raises:
        ValueError: there is none, a line is not an item (the message says which, and what is wrong), or an id is there
            twice.
    """
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise ValueError(f"{folder}: there is no *.jsonl in it")
    items: dict[str, Item] = {}
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
            if not line.strip():
                continue
            try:
                item = _item(json.loads(line))
                if item.id in items:
                    raise ValueError(f"the id {item.id!r} was there before")
            except ValueError as error:
                raise ValueError(f"{file}:{number}: {error}") from error
            items[item.id] = item
    return list(items.values())


def _item(data: Any) -> Item:
    if not isinstance(data, dict):
        raise ValueError("an item is a JSON object")
    for name in ("id", "dataset", "context", "question"):
        if not isinstance(data.get(name), str):
            raise ValueError(f"{name!r} must be a text")
    if not isinstance(data.get("meta", {}), dict):
        raise ValueError("'meta' must be an object")
    score = data.get("score", _SCORE_OF_DATASET.get(data["dataset"], "f1"))
    if score not in SCORES:
        raise ValueError(f"score {score!r}: must be one of {', '.join(SCORES)}")
    question = _question(data)
    if not question.text and not data["context"]:
        raise ValueError("neither context nor question")
    second = data.get("second")
    return Item(
        id=data["id"],
        dataset=data["dataset"],
        context=data["context"],
        question=question,
        score=score,
        second=None if second is None else _question(second),
        meta=data.get("meta", {}),
    )


def _question(data: Any) -> Question:
    if not isinstance(data, dict) or not isinstance(data.get("question"), str):
        raise ValueError("'second' must be an object with a question and answers")
    answers = data.get("answers")
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError("'answers' must be a list of texts, one at least")
    return Question(data["question"], tuple(answers))


def of_datasets(items: Sequence[Item], names: Sequence[str]) -> list[Item]:
    """The items of these datasets; without names: all.

    Raises:
        ValueError: there is no such dataset.
    """
    valid = dict.fromkeys(item.dataset for item in items)
    for name in names:
        if name not in valid:
            hint = did_you_mean(name, valid) or ";"
            raise ValueError(f"dataset {name!r}: not there{hint} there are {', '.join(valid)}")
    return [item for item in items if not names or item.dataset in names]


def draw(items: Sequence[Item], n: int, *, seed: int) -> list[Item]:
    """At most `n` items of each dataset; which ones, does not depend on the other datasets."""
    by_dataset: dict[str, list[Item]] = {}
    for item in items:
        by_dataset.setdefault(item.dataset, []).append(item)
    drawn: list[Item] = []
    for name, rows in by_dataset.items():
        indices = random.Random(f"{seed} {name}").sample(range(len(rows)), min(n, len(rows)))
        drawn += [rows[i] for i in sorted(indices)]
    return drawn
