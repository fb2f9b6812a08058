"""Runs the checks of tests/helpers/compatibility and writes docs/compatibility.md.

    python tests/tools/write_compatibility.py

Exit code 1 when a check fails; its row says so.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import _helpers  # noqa: F401  (first: it makes the other imports possible)
from compatibility import CHECKS, POLICIES, Check, Outcome
from native_build import ROOT
from tiny_architectures import tiny_models

TABLE = ROOT / "docs" / "compatibility.md"

_HEAD = """\
# Compatibility

This page shows which features of llama-cpp-python work with `refreekv_cpp.Llama` in its place. Each row is a check of
`tests/helpers/compatibility`. It runs with `kv_policy="full"`, and with `kv_policy=ReFreeKV(n_min=0)` after a prompt of
which cells were evicted, and its result is compared with that of another way to get it.
`python tests/tools/write_compatibility.py` wrote this page; the test suite runs the checks.

`yes`: right. `refused`: not done, in the note's words, and nothing harmed.

"""
_COLUMNS = "| feature | full | refreekv | note |\n|---|---|---|---|\n"


def row(feature: str, full: Outcome, refreekv: Outcome) -> str:
    """A line of the table. A note that is not both policies' says whose it is."""
    if full.note == refreekv.note:
        note = full.note
    else:
        notes = {"full": full.note, "refreekv": refreekv.note}
        note = "; ".join(f"{name}: {text}" for name, text in notes.items() if text)
    return f"| {_cell(feature)} | {full.verdict} | {refreekv.verdict} | {_cell(note)} |".replace("  |", " |")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def features(table: str) -> list[str]:
    """The features that a table has rows of."""
    rows = table[table.index(_COLUMNS) + len(_COLUMNS) :].splitlines()
    return [line.split(" | ")[0].removeprefix("| ") for line in rows]


def _outcome(check: Check, name: str, folder: Path) -> Outcome:
    work = folder / f"{CHECKS.index(check)}-{name}"
    work.mkdir()
    try:
        return check.run(POLICIES[name], tiny_models(folder), work)
    except Exception as error:
        print(f"{check.feature}, {name}: {error!r}", file=sys.stderr)
        return Outcome("fails", f"{type(error).__name__}: {error}")


def main() -> int:
    rows, n_failed = [], 0
    with tempfile.TemporaryDirectory() as folder:
        for check in CHECKS:
            outcomes = [_outcome(check, name, Path(folder)) for name in ("full", "refreekv")]
            n_failed += sum(outcome.verdict == "fails" for outcome in outcomes)
            rows.append(row(check.feature, *outcomes))
    TABLE.write_text(_HEAD + _COLUMNS + "\n".join(rows) + "\n")
    print(f"{TABLE}: {len(rows)} features, {n_failed} failures")
    return 1 if n_failed else 0


if __name__ == "__main__":
    sys.exit(main())
