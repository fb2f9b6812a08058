"""How many alternatives a grammar in GBNF has open at one place.

llama.cpp follows every one of them, and for each token every one again for each character: so many optional rules in a
sequence, or alternatives that begin with the same alternatives, keep it busy for hours.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

TOKEN = re.compile(
    r'(?P<name>[\w-]+)\s*::=|(?P<rule>[\w-]+)|(?P<text>"(?:\\.|[^"\\])*"?|\[(?:\\.|[^\]\\])*\]?|!?<[^>\n]*>?|\.)'
    r"|(?P<comment>#[^\n]*)|(?P<repeat>[?*+]|\{[^}\n]*\}?)|(?P<sign>[()|])",
    re.DOTALL,
)


class Branches(NamedTuple):
    """The most alternatives at one place, and the most optional elements in a row."""

    n_alternatives: int
    n_optional: int


@dataclass
class _Element:
    """A rule, or text where `rule` is None, that may be left out where `optional`."""

    rule: str | None
    optional: bool = False


@dataclass
class _Rule:
    alternatives: list[list[_Element]] = field(default_factory=lambda: [[]])
    empty: bool = False  # it has an alternative without text
    n_first: int = 0  # texts that it can begin with
    n_run: int = 0  # optional elements in a row that it can begin with
    most: Branches = field(default_factory=lambda: Branches(0, 0))


def branches(grammar: str) -> Branches:
    """Those of the places in all rules. Text that does not parse is taken as it comes."""
    rules = _parse(grammar)
    for name in _leaves_first(rules):
        _count(rules[name], rules)
    most = [rule.most for rule in rules.values()] or [Branches(0, 0)]
    return Branches(max(each.n_alternatives for each in most), max(each.n_optional for each in most))


def _parse(grammar: str) -> dict[str, _Rule]:
    """A group in parentheses is a rule of its own."""
    rules: dict[str, _Rule] = {}
    open_rules = [_Rule()]
    for match in TOKEN.finditer(grammar):
        sequence = open_rules[-1].alternatives[-1]
        if match["name"]:
            open_rules = [rules.setdefault(match["name"], _Rule())]
        elif match["rule"] or match["text"]:
            sequence.append(_Element(match["rule"]))
        elif match["repeat"] and sequence:
            sequence[-1].optional |= (
                match["repeat"][0] in "?*" or re.match(r"\{\s*0*\s*[,}]", match["repeat"]) is not None
            )
        elif match["sign"] == "|":
            open_rules[-1].alternatives.append([])
        elif match["sign"] == "(":
            group = f"({len(rules)}"
            sequence.append(_Element(group))
            rules[group] = _Rule()
            open_rules.append(rules[group])
        elif match["sign"] == ")" and len(open_rules) > 1:
            open_rules.pop()
    return rules


def _leaves_first(rules: dict[str, _Rule]) -> list[str]:
    """The names, those that a rule refers to before its own, as far as there is no circle."""
    order: dict[str, None] = {}
    begun: set[str] = set()
    for start in rules:
        todo = [start]
        while todo:
            name = todo[-1]
            if name in begun:
                order.setdefault(todo.pop())
                continue
            begun.add(name)
            elements = (element.rule for sequence in rules[name].alternatives for element in sequence)
            todo += [rule for rule in elements if rule in rules and rule not in begun]
    return list(order)


def _count(rule: _Rule, rules: dict[str, _Rule]) -> None:
    most_run = 0
    most_alternatives = 0
    for sequence in rule.alternatives:
        n_first = n_run = 0  # of what begins after an element
        empty = True
        for element in reversed(sequence):
            referred = rules.get(element.rule or "", _Rule())
            optional = element.optional or referred.empty
            n_first = (1 if element.rule is None else referred.n_first) + (n_first if optional else 0)
            n_run = max(referred.n_run, 1) + n_run if optional else referred.n_run
            empty = empty and optional
            most_alternatives, most_run = max(most_alternatives, n_first), max(most_run, n_run)
        rule.n_first += n_first
        rule.n_run = max(rule.n_run, n_run)
        rule.empty |= empty
    rule.most = Branches(max(most_alternatives, rule.n_first), most_run)
