"""Alternatives of plain text in a grammar, such as the values of an enum, in a form that llama.cpp is quick with.

For each token llama.cpp compares the whole vocabulary with every alternative, so ten thousand words take seconds. Here
words with the same beginning become one alternative: "car" | "cat" | "dog" becomes "ca" ("r" | "t") | "dog". What the
grammar allows stays the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby, takewhile

from refreekv_cpp._branches import TOKEN

_LEAST = 16  # words for which it is worth while
_DEPTH = 50  # of the parentheses; what is below stays a list

# a character as a grammar writes it
_CHARACTER = re.compile(r"\\x..|\\u.{4}|\\U.{8}|\\.|.", re.DOTALL)

_Word = tuple[str, ...]  # its characters


def factored(grammar: str) -> str:
    """The same grammar, in which words between two signs "|" share their beginnings."""
    res = []
    done = 0
    for start, end, words in _lists(grammar):
        res += [grammar[done:start], "(", _tree(sorted(words), _DEPTH), ")"]
        done = end
    return "".join([*res, grammar[done:]])


def _lists(grammar: str) -> Iterator[tuple[int, int, set[_Word]]]:
    """Where there are words and nothing else between signs "|", and which."""
    tokens = list(TOKEN.finditer(grammar))
    is_bar = [token["sign"] == "|" for token in tokens]
    is_word = [len(token[0]) > 1 and token[0][0] == token[0][-1] == '"' for token in tokens]
    i = 0
    while i < len(tokens):
        end = i
        while end + 2 < len(tokens) and is_bar[end] and is_word[end + 1] and is_bar[end + 2]:
            end += 2
        if end - i >= 2 * _LEAST:
            words = {tuple(_CHARACTER.findall(token[0][1:-1])) for token in tokens[i + 1 : end : 2]}
            yield tokens[i + 1].start(), tokens[end - 1].end(), words
        i = max(end, i + 1)


def _tree(words: list[_Word], depth: int) -> str:
    res = []
    for _, group in groupby(words, key=lambda word: word[:1]):
        same = list(group)
        # they are sorted: what the first and the last begin with, all do
        start = tuple(
            first for first, _ in takewhile(lambda pair: pair[0] == pair[1], zip(same[0], same[-1], strict=False))
        )
        if len(same) == 1 or depth == 0:
            res += [_quoted(word) for word in same]
        else:
            res.append(f"{_quoted(start)} ({_tree([word[len(start) :] for word in same], depth - 1)})")
    return " | ".join(res)


def _quoted(word: _Word) -> str:
    return f'"{"".join(word)}"'
