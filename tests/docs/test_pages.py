"""The pages: no line is too long, no phrase of the old pages comes back, and Python in them can be compiled."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from native_build import ROOT

PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md"), ROOT / "native/README.md"]
GENERATED = {"compatibility.md", "upstream-server-tests.md", "upstream-tests.md"}
MOST_COLUMNS = 120

# of pages that had to be read twice
OLD_PHRASES = [
    r"meets all of them alike",
    r"so little showed",
    r"is there goes on",
    r"of which decoding knows",
    r"by way of",
    r"for want of",
    r"in the place of",
    r"in a way of its own",
    r"are no whole number",
    r"That is so for",
    r"as ever\b",
    r"On a GPU it does not yet",
    r"\bthe rest of these\b",
    r"must be had",
    r"has next to nothing",
]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(text: str) -> str:
    """Without blocks of code."""
    return re.sub(r"^( *)```.*?^\1```", "", text, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_lines_are_short(page: Path) -> None:
    lines = prose(page.read_text(encoding="utf-8")).splitlines()
    assert [line for line in lines if len(line) > MOST_COLUMNS and "|" not in line and "://" not in line] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in GENERATED], ids=name)
def test_old_phrases_do_not_come_back(page: Path) -> None:
    text = " ".join(page.read_text(encoding="utf-8").split())
    assert [phrase for phrase in OLD_PHRASES if re.search(phrase, text, re.IGNORECASE)] == []


def test_python_in_pages_can_be_compiled() -> None:
    n_blocks = 0
    for page in PAGES:
        for code in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
            if not code.startswith("--8<--"):
                compile(code, str(page), "exec")
                n_blocks += 1
    assert n_blocks


def test_the_page_of_examples_shows_each_script() -> None:
    text = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    for script in (ROOT / "examples").glob("*.py"):
        assert f'--8<-- "examples/{script.name}"' in text
