"""What a server reads again when the requests of a chat app alternate: docs/results/conversations.md.

    python tests/tools/server_chat_app.py MODEL [--rounds 10]

One chat. After each answer the app asks for a title, from the last two messages, and for tags, from the last six, as
Open WebUI words it: instructions, and then the history as text. A token is read again if it belongs to the beginning
that a prompt has in common with one that the server was given before, or with what was answered there, and is read
nevertheless. This is done with one slot and with four, and prints a table for each.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import _helpers  # noqa: F401  (first: it makes the other imports possible)
import openai
import typer
from serving import send, serving, user

from refreekv_cpp._cache_dir import VARIABLE

_QUESTIONS = [
    "I would like to plant a small garden behind my house. What should I think about first?",
    "The soil is heavy clay and the place has shade until noon. Which vegetables can grow there?",
    "How often do I have to water them in summer, and at what time of the day?",
    "Something eats the leaves of my cabbage at night. What can I do without poison?",
    "Can I build a compost heap in a corner of four square metres, and how?",
    "Which plants should not stand next to each other, and why is that so?",
    "When do I have to sow carrots and onions so that I can harvest them in autumn?",
    "How do I keep what I harvest over the winter in a cellar that is a little damp?",
    "What do bees like, so that they come to my garden?",
    "Please write a list of the tools that I need, the cheapest ones first.",
]
_TITLE = """### Task:
Write a short title of three to five words that sums up the history of the chat.
### Guidelines:
- The title names the main theme or subject of the conversation.
- Leave out quotation marks and special formatting.
- Write it in the language of the chat; if there are several languages, use English.
- Accuracy is more important than creativity; keep it clear and simple.
- The whole answer is the JSON object, without other text, code fences or explanations.
### Output:
JSON format: { "title": "your short title here" }
### Examples:
- { "title": "Trends of the Stock Market" },
- { "title": "A Recipe for Chocolate Cookies" },
- { "title": "Streaming of Music" }
"""
_TAGS = """### Task:
Name one to three broad tags that sort the main themes of the history of the chat, and one to three narrow ones.
### Guidelines:
- Begin with large fields (Science, Technology, Philosophy, Arts, Politics, Business, Health, Sports, Education).
- Add smaller fields if much of the conversation is about them.
- If there are fewer than three messages, or if they are about too many things, use only ["General"].
- Write the tags in the language of the chat; if there are several languages, use English.
- Accuracy is more important than detail.
### Output:
JSON format: { "tags": ["tag1", "tag2", "tag3"] }
"""


def history(talk: list[dict[str, str]], n_messages: int) -> str:
    lines = [f"{message['role'].upper()}: {message['content']}" for message in talk[-n_messages:]]
    return "### Chat History:\n<chat_history>\n" + "\n".join(lines) + "\n</chat_history>"


def n_common(tokens: list[int], other: list[int]) -> int:
    """Tokens of the beginning that both have."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(tokens, other, strict=False)))


class Asked:
    """A server, and all that it was asked and has answered.

    Attributes:
        counts: by the kind of request, for each one: tokens of its prompt, those that were not known before, those that
            were read, and those that were read again.
    """

    def __init__(self, client: openai.OpenAI) -> None:
        self.client = client
        self.known: list[list[int]] = []
        self.counts: dict[str, list[tuple[int, int, int, int]]] = {}

    def post(self, path: str, body: Any) -> Any:
        status, text = send(self.client, path, body)
        assert status == 200, text
        return json.loads(text)

    def tokens(self, text: str) -> list[int]:
        res: list[int] = self.post("/tokenize", {"content": text, "add_special": True})["tokens"]
        return res

    def ask(self, kind: str, messages: list[Any], max_tokens: int) -> str:
        prompt = self.post("/apply-template", {"messages": messages})["prompt"]
        tokens = self.tokens(prompt)
        answer: Any = self.client.chat.completions.create(
            model="any", messages=messages, max_tokens=max_tokens, temperature=0
        )
        said: str = answer.choices[0].message.content
        n_read = answer.timings["prompt_n"]
        assert n_read + answer.timings["cache_n"] == len(tokens)
        n_known = max((n_common(tokens, other) for other in self.known), default=0)
        n_new = max(1, len(tokens) - n_known)  # the last one is always read
        self.counts.setdefault(kind, []).append((len(tokens), n_new, n_read, max(0, n_read - n_new)))
        self.known.append(self.tokens(prompt + said))
        return said


def alternate(client: openai.OpenAI, rounds: int) -> Asked:
    asked = Asked(client)
    talk: list[dict[str, str]] = []
    for i in range(rounds):
        talk += user(_QUESTIONS[i % len(_QUESTIONS)])
        talk.append({"role": "assistant", "content": asked.ask("chat", talk, 48)})
        asked.ask("title", user(_TITLE + history(talk, 2)), 16)
        asked.ask("tags", user(_TAGS + history(talk, 6)), 24)
    return asked


def main(model: Path, rounds: int = 10) -> None:
    print("| slots | request | tokens of the prompts | not known before | read | read again |")
    print("|---|---|---|---|---|---|")
    for slots in (1, 4):
        options = ["--n-ctx", "8192", "--parallel", str(slots), "--log-verbosity", "1"]
        with (
            tempfile.TemporaryDirectory() as folder,
            serving(model, *options, env={**os.environ, VARIABLE: folder}) as client,
        ):
            counts = alternate(client, rounds).counts
        for kind, rows in counts.items():
            sums = " | ".join(f"{sum(column):,}" for column in zip(*rows, strict=True))
            print(f"| {slots} | {kind} | {sums} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
