"""Run as a program by run_upstream_tests.py, in the folder of an unpacked llama-cpp-python sdist:

    upstream_tests_child.py stock|full|refreekv MODELS.json OUT.json

Its tests run on the model files of MODELS.json (by the file name they would download), with stock `llama_cpp.Llama` or
with ours in its place. OUT.json: outcome and reason of each test.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import _helpers  # noqa: F401  (first: it makes the other imports possible)
import pytest


def use_ours(name: str) -> None:
    """Change what `llama_cpp.Llama` is: what a program does that changes one import."""
    import llama_cpp

    import refreekv_cpp

    policy: refreekv_cpp.Policy = refreekv_cpp.Full()
    if name == "refreekv":
        from policies import CellByCell

        policy = CellByCell()

    class Llama(refreekv_cpp.Llama):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{"kv_policy": policy, **options})

        def prune_kv(self) -> int:
            n_evicted = super().prune_kv()
            Recorder.n_evicted += n_evicted
            return n_evicted

    llama_cpp.Llama = Llama


def stand_in(models: dict[str, str]) -> None:
    """What the test files import that need not be installed: the download, and a function of SciPy they never call."""
    hub = ModuleType("huggingface_hub")
    hub.__dict__["hf_hub_download"] = lambda _repo, filename: models[filename]
    sys.modules["huggingface_hub"] = hub
    scipy = ModuleType("scipy.special")
    scipy.__dict__["log_softmax"] = None
    sys.modules.setdefault("scipy", ModuleType("scipy"))
    sys.modules.setdefault("scipy.special", scipy)


class Recorder:
    n_evicted = 0

    def __init__(self) -> None:
        self.outcomes: dict[str, dict[str, Any]] = {}

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            reason = ""
            if report.failed:
                crash = getattr(report.longrepr, "reprcrash", None)
                reason = (crash.message if crash else str(report.longrepr)).splitlines()[0]
            self.outcomes[report.nodeid] = {"outcome": report.outcome, "reason": reason, "evicted": Recorder.n_evicted}
            Recorder.n_evicted = 0


def main() -> None:
    name, models, out = sys.argv[1:4]
    stand_in(json.loads(Path(models).read_text()))
    if name != "stock":
        use_ours(name)
    recorder = Recorder()
    pytest.main(["-q", "-p", "no:cacheprovider", "tests"], plugins=[recorder])
    Path(out).write_text(json.dumps(recorder.outcomes))


if __name__ == "__main__":
    main()
