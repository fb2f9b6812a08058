"""Records of evaluations that are kept beside the pages: each can be reported on, and a page says what is in them."""

from __future__ import annotations

import re
import shutil
import statistics
from pathlib import Path

import pytest
from native_build import ROOT

from refreekv_cpp.lab.eval.records import PACKED, SETTINGS, read_records
from refreekv_cpp.lab.eval.report import write_report

RUNS = sorted((ROOT / "docs/results/records").iterdir())


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_kept_run_is_reported_on(run: Path, tmp_path: Path) -> None:
    for name in (PACKED, SETTINGS):
        shutil.copy(run / name, tmp_path)
    report = write_report(tmp_path)
    assert "Fidelity: along the full cache's greedy answer" in report


OTHERS = [(cache, mode) for cache in ("refreekv", "full@q4_0+0", "snapkv:0.25") for mode in ("seen", "hidden")]
PAGE = (ROOT / "docs/results/tasks.md").read_text(encoding="utf-8")
RULER = {
    "ruler-qwen2.5-coder-0.5b": "Qwen2.5-Coder-0.5B, 4,096",
    "ruler-8k-qwen2.5-coder-0.5b": "Qwen2.5-Coder-0.5B, 8,192",
    "ruler-qwen2.5-coder-1.5b": "Qwen2.5-Coder-1.5B, 4,096",
    "ruler-smollm2-135m": "SmolLM2-135M, 4,096",
}


@pytest.mark.parametrize("run", RULER)
def test_the_mean_scores_of_ruler_are_those_of_its_records(run: str) -> None:
    scores: dict[tuple[str, str], list[float]] = {}
    same = 0
    for record in read_records(ROOT / "docs/results/records" / run):
        scores.setdefault((record["cache"], record["mode"]), []).append(record["score"])
        same += record["cache"] == "refreekv" and record["divergence"] is None
    n = len(scores["full", "seen"])
    means = [f"{statistics.fmean(scores[key]):.2f}" for key in [("full", "seen"), *OTHERS]]
    assert f"| {RULER[run]} | {n} | {' | '.join(means)} |\n" in PAGE
    assert re.search(rf"^\| {RULER[run]} \| [^|]* \| {same} of {2 * n} \|", PAGE, re.MULTILINE)


def test_the_scores_of_each_task_are_those_of_the_records() -> None:
    scores: dict[tuple[str, str, str], list[float]] = {}
    for record in read_records(ROOT / "docs/results/records/ruler-qwen2.5-coder-0.5b"):
        key = (record["dataset"].removesuffix("-4096"), record["cache"], record["mode"])
        scores.setdefault(key, []).append(record["score"])
    tasks = {task for task, _, _ in scores}
    assert len(tasks) == 13
    for task in tasks:
        means = [f"{statistics.fmean(scores[task, cache, mode]):.2f}" for cache, mode in [("full", "seen"), *OTHERS]]
        assert f"| {task} | {len(scores[task, 'full', 'seen'])} | {' | '.join(means)} |\n" in PAGE
