"""Runs the checks of tests/helpers/compatibility and writes docs/compatibility.md.

    python tests/tools/write_compatibility.py [features|architectures]

With a word it writes that section only. The section of architectures is of the models of upstream's program
`test-llama-archs`, which is built for it (build/stock). Exit code 1 when a check fails; its row says so.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import _helpers  # noqa: F401  (first: it makes the other imports possible)
from architecture_models import build_program, write_models
from architecture_verdicts import COLUMNS
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

_ARCHITECTURES = """\
## Architectures

What each architecture of the pinned llama.cpp can have, tried with tiny models of random weights: those of upstream's
program `test-llama-archs`, and those of `tests/helpers/tiny_architectures.py`. `full` is upstream's cache, `elastic`
the cache that grows and evicts nothing (`kv_elastic=True`), and `refreekv` the default policy.
`python tests/tools/write_compatibility.py architectures` wrote this section.

`yes` for `elastic`: the logits are those of `full`, bit for bit. `yes` for `refreekv`: after an eviction they are those
of the whole cache with the evicted cells masked; with all evicted rows read exactly they are those of `full`, about.
`full only`: refused by name before a context is made; `kv_policy="full"` runs it. `not tried`: there is no tiny model.

"""
_ARCHITECTURES_COLUMNS = "| architecture | full | elastic | refreekv | note |\n|---|---|---|---|---|\n"


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
    rows = table[table.index(_COLUMNS) + len(_COLUMNS) :].split("\n\n")[0].splitlines()
    return [line.split(" | ")[0].removeprefix("| ") for line in rows]


def _outcome(check: Check, name: str, folder: Path) -> Outcome:
    work = folder / f"{CHECKS.index(check)}-{name}"
    work.mkdir()
    try:
        return check.run(POLICIES[name], tiny_models(folder), work)
    except Exception as error:
        print(f"{check.feature}, {name}: {error!r}", file=sys.stderr)
        return Outcome("fails", f"{type(error).__name__}: {error}")


def architecture_row(name: str, verdicts: list[str]) -> str:
    """A line of the table of architectures. verdicts: as architecture_verdicts.py has them, for each of its columns."""
    full, *ours = verdicts
    refused = all(verdict.startswith(f"{re.sub(r' .*', '', name)}: ") for verdict in ours)
    cells = ["full only" if refused else "no" if verdict else "yes" for verdict in ours]
    note = "; ".join(dict.fromkeys(verdict for verdict in verdicts if verdict))
    return f"| {_cell(name)} | {'no' if full else 'yes'} | {' | '.join(cells)} | {_cell(note)} |".replace("  |", " |")


def _features(folder: Path) -> tuple[str, int]:
    """The section, and how many of its checks fail."""
    rows, n_failed = [], 0
    for check in CHECKS:
        outcomes = [_outcome(check, name, folder) for name in ("full", "refreekv")]
        n_failed += sum(outcome.verdict == "fails" for outcome in outcomes)
        rows.append(row(check.feature, *outcomes))
    return _HEAD + _COLUMNS + "\n".join(rows) + "\n", n_failed


def _architectures(folder: Path) -> tuple[str, int]:
    build_program()
    models, out = folder / "architectures", folder / "verdicts.json"
    models.mkdir()
    _, left_out = write_models(models, tiny_models(folder), all_of_ours=True)
    script = ROOT / "tests" / "helpers" / "architecture_verdicts.py"
    subprocess.run([sys.executable, script, out, *sorted(models.iterdir())], check=True, cwd=folder)
    verdicts: dict[str, list[str]] = json.loads(out.read_text())

    # dense and with experts: one row where there is no difference
    rows: dict[tuple[str, tuple[str, ...]], None] = {}
    for file, its in verdicts.items():
        rows[re.sub(r"-(dense|moe)$", "", file), tuple(its)] = None
    known = {name.split()[0] for name, _ in rows}
    lines = defaultdict(list)
    for name, its in rows:
        lines[name].append(architecture_row(name, list(its)))
    for name in sorted(set(left_out) - known):
        lines[name].append(f"| {name} |{' not tried |' * len(COLUMNS)} |")
    n_failed = sum(any(line.count("| no ") for line in its) for its in lines.values())
    body = "\n".join(line for name in sorted(lines) for line in lines[name])
    return _ARCHITECTURES + _ARCHITECTURES_COLUMNS + body + "\n", n_failed


_SECTIONS = {"features": _features, "architectures": _architectures}


def main() -> int:
    wanted = sys.argv[1:] or list(_SECTIONS)
    if unknown := set(wanted) - set(_SECTIONS):
        sys.exit(f"{', '.join(sorted(unknown))}: must be one of {', '.join(_SECTIONS)}")
    features, _, architectures = TABLE.read_text().partition("\n## Architectures\n")
    page = {"features": features, "architectures": f"## Architectures\n{architectures}"}
    n_failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in wanted:
            page[name], n = _SECTIONS[name](Path(folder))
            n_failed += n
    TABLE.write_text("\n\n".join(section.rstrip("\n") for section in page.values()) + "\n")
    print(f"{TABLE}: {n_failed} failures")
    return 1 if n_failed else 0


if __name__ == "__main__":
    sys.exit(main())
