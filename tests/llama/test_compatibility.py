"""Every feature in docs/reference/compatibility.md works as the table says, with the full cache and a pruned one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from compatibility import CHECKS, POLICIES, Check
from memory_kinds import MEMORY_KINDS
from tiny_architectures import ARCHITECTURES
from write_compatibility import TABLE, features, memory_rows, row


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.feature)
def test_a_feature_does_what_the_table_says(check: Check, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    outcomes = []
    for name, policy in POLICIES.items():
        folder = tmp_path / name
        folder.mkdir()
        outcomes.append(check.run(policy, tiny, folder))
    assert row(check.feature, *outcomes) in TABLE.read_text().splitlines(), (
        "run tests/tools/write_compatibility.py again"
    )


def test_a_memory_can_have_what_the_table_says(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    lines = TABLE.read_text().splitlines()
    for kind in MEMORY_KINDS:
        assert any(line.startswith(f"| {kind.title} |") for line in lines), kind.title
    rows = memory_rows(tmp_path, [kind for kind in MEMORY_KINDS if kind.is_ours], tiny)
    assert [row for row in rows if row not in lines] == [], "run tests/tools/write_compatibility.py again"


def test_architectures_have_rows_that_agree_with_their_checks() -> None:
    """Both tables are generated, and not by the same program."""
    of_features, _, of_architectures = TABLE.read_text().partition("\n## Architectures\n")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in of_architectures.splitlines() if "| " in line]
    verdicts = {name: refreekv for name, _, _, refreekv, _ in rows[1:]}
    assert set(verdicts.values()) == {"yes", "full only", "no"}
    for title in ARCHITECTURES:
        if title in verdicts:  # dense and with experts, an architecture of upstream's program has no title
            line = next(line for line in of_features.splitlines() if line.startswith(f"| architecture: {title} |"))
            assert ("refused" in line) == (verdicts[title] == "full only"), title
    assert len(verdicts) > 130


def test_the_table_has_a_row_for_each_check_and_no_other() -> None:
    assert features(TABLE.read_text()) == [check.feature for check in CHECKS]
    assert len({check.feature for check in CHECKS}) == len(CHECKS)
