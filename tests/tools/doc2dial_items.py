"""Dialogues over a long document, for `refreekv turns --data`, from the doc2dial part of ChatRAG-Bench.

    python tests/tools/doc2dial_items.py DOC2DIAL MODEL --tokens 6000 --items 30 --out dialogues.jsonl

DOC2DIAL is a folder with its `documents.json` (passages of four collections) and `questions.json`, which this project
does not have. A document is the passages that a dialogue is about, between others of the same collection, in a random
order, so many tokens in all as MODEL counts them. Each dialogue has all of its user's turns.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Annotated, Any

import typer

from refreekv_cpp import Llama


def main(
    doc2dial: Path,
    model: Path,
    out: Annotated[Path, typer.Option(help="File to write.")],
    tokens: Annotated[int, typer.Option(help="Of each document.")] = 6000,
    items: Annotated[int, typer.Option(help="Dialogues.")] = 30,
    least: Annotated[int, typer.Option(help="Turns of a dialogue at least.")] = 4,
    seed: Annotated[int, typer.Option(help="Which dialogues, and the order of passages.")] = 1,
) -> None:
    llm = Llama(str(model), vocab_only=True, verbose=False)
    passages = json.loads((doc2dial / "documents.json").read_text())
    rng = random.Random(seed)
    dialogues = [
        each for each in _dialogues(json.loads((doc2dial / "questions.json").read_text())) if len(each) >= least
    ]
    with out.open("w") as file:
        for dialogue in rng.sample(dialogues, min(items, len(dialogues))):
            own = {question["ground_truth_ctx"] for question in dialogue}
            collection = passages[dialogue[0]["document"]]
            context = _document(llm, collection, own, tokens, rng)
            turns = [{"question": each["messages"][-1]["content"], "answers": each["answers"]} for each in dialogue]
            file.write(json.dumps({"context": context, "turns": turns, "score": "f1"}) + "\n")


def _dialogues(questions: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Each question has the messages before it; those that continue each other are one dialogue."""
    dialogues: list[list[dict[str, Any]]] = []
    for question in questions:
        before = dialogues[-1][-1]["messages"] if dialogues else None
        if before is not None and question["messages"][: len(before)] == before:
            dialogues[-1].append(question)
        else:
            dialogues.append([question])
    return dialogues


def _document(llm: Llama, collection: list[str], own: set[int], tokens: int, rng: random.Random) -> str:
    chosen = sorted(own)
    others = [i for i in range(len(collection)) if i not in own]
    rng.shuffle(others)
    length = sum(_count(llm, collection[i]) for i in chosen)
    for i in others:
        length += _count(llm, collection[i])
        if length > tokens:
            break
        chosen.append(i)
    rng.shuffle(chosen)
    return "\n\n".join(collection[i] for i in chosen)


def _count(llm: Llama, text: str) -> int:
    return len(llm.tokenize(text.encode(), add_bos=False)) + 2


if __name__ == "__main__":
    typer.run(main)
