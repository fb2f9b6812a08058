"""Records of evaluations that are kept beside the pages: each can be reported on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from native_build import ROOT

from refreekv_cpp.lab.eval.records import PACKED, SETTINGS
from refreekv_cpp.lab.eval.report import write_report

RUNS = sorted((ROOT / "docs/results/records").iterdir())


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_kept_run_is_reported_on(run: Path, tmp_path: Path) -> None:
    for name in (PACKED, SETTINGS):
        shutil.copy(run / name, tmp_path)
    report = write_report(tmp_path)
    assert "Fidelity: along the full cache's greedy answer" in report
