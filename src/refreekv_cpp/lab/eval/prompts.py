"""Items as tokens, in the parts that a cache is fed with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import llama_cpp
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from refreekv_cpp import _upstream
from refreekv_cpp.lab.eval.data import Item

# a text that no template touches, to find the place of a message in what it renders
_MARK = "<<message {}>>"
_BRIEFLY = "Answer in a few words: "


@dataclass(frozen=True)
class Prompt:
    """Tokens.

    Attributes:
        context: from the first token to the end of the item's context.
        question: all that follows until the model answers; [] for a continuation, and where nothing precedes it.
        real: the text that really follows: the answer, or the continuation.
        second: from the end of the first answer until the model answers again; None: there is no second question.
    """

    context: list[int]
    question: list[int]
    real: list[int]
    second: list[int] | None

    @property
    def n_tokens(self) -> int:
        """Without `real`."""
        return len(self.context) + len(self.question) + len(self.second or [])


class Prompter:
    """Makes prompts for one model, with its chat template where it has one.

    Args:
        llm: the model; its vocabulary is enough.
        template: False: plain text, "Question: ...", "Answer:".

    Raises:
        ValueError: the template changes the messages it is given.
    """

    def __init__(self, llm: llama_cpp.Llama, *, template: bool = True) -> None:
        self._llm = llm
        source = llm.metadata.get("tokenizer.chat_template") if template else None
        if source is None:
            self._parts = self._second_parts = [""] * 4
            self._ask = "Question: {}\nAnswer:"
            self._ask_again = f"\n\n{self._ask}"
        else:
            formatter = Jinja2ChatFormatter(
                source, eos_token=self._special(llm.token_eos()), bos_token=self._special(llm.token_bos())
            )
            self._parts = _render(formatter, ["user"])
            self._second_parts = _render(formatter, ["user", "assistant", "user"])
            self._ask = self._ask_again = "{}"

    def count(self, text: str) -> int:
        """The tokens of a text within a prompt."""
        return len(self._tokens(text))

    def _special(self, token: int) -> str:
        return self._llm.detokenize([token], special=True).decode(errors="replace") if token >= 0 else ""

    def prompt(self, item: Item) -> Prompt:
        answers = item.question.answers
        real = self._tokens(", ".join(answers) if item.score == "all_found" else answers[0])
        if item.is_continuation:
            return Prompt(self._start("", item.context), [], real, None)
        head, tail = self._parts[:2]
        second = None
        if item.second is not None:
            middle, end = self._second_parts[2:]
            second = [*self._markup(middle), *self._asked(item, item.second.text, self._ask_again), *self._markup(end)]
        context = self._start(head, f"{item.context}\n\n" if item.context else "")
        question = [*self._asked(item, item.question.text, self._ask), *self._markup(tail)]
        if not context:
            context, question = question, []
        return Prompt(context, question, real, second)

    def _asked(self, item: Item, question: str, ask: str) -> list[int]:
        briefly = _BRIEFLY if item.score in ("f1", "exact") else ""
        return self._tokens(ask.format(briefly + question))

    def _start(self, head: str, context: str) -> list[int]:
        llm = self._llm
        bos = [llm.token_bos()] if _upstream.adds_bos(llm) else []
        markup = self._markup(head)
        if markup[:1] == bos:  # the template writes it, too
            bos = []
        return [*bos, *markup, *self._tokens(context)]

    def _markup(self, text: str) -> list[int]:
        return self._llm.tokenize(text.encode(), add_bos=False, special=True) if text else []

    def _tokens(self, text: str) -> list[int]:
        """Of text that may hold what looks like a special token, and is none."""
        return self._llm.tokenize(text.encode(), add_bos=False, special=False) if text else []


def _render(formatter: Jinja2ChatFormatter, roles: Sequence[str]) -> list[str]:
    """What a template writes before, between and after messages of these roles."""
    marks = [_MARK.format(i) for i in range(len(roles))]
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    rest: str = formatter(messages=messages).prompt  # type: ignore[arg-type]
    parts = []
    for mark in marks:
        part, found, rest = rest.partition(mark)
        if not found:
            raise ValueError("the model's chat template changes the messages; use --no-template")
        parts.append(part)
    return [*parts, rest]
