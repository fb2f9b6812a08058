"""A cache that grows gives what upstream's gives, bit for bit, for every architecture that upstream has.

The models are those of upstream's program `test-llama-archs`, tiny and random, so an architecture that upstream adds is
tested with the next pin. Those that the program makes no model of are ours, where we have them. A model that cannot
have our cache runs on upstream's in our library, which has to be the same, too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from architecture_models import FOLDER, build_program, write_models
from architecture_outputs import WAYS
from native_build import ROOT, stock_environment

pytestmark = pytest.mark.stock


@dataclass(frozen=True)
class Run:
    """What architecture_outputs.py has written with one of the libraries."""

    folder: Path

    def outputs(self, name: str, way: str) -> npt.NDArray[np.float32] | str:
        """Of a model, [n, n_vocab or n_embd]; or why there are none."""
        key = f"{name}.{way}"
        return self._read("reasons.json").get(key) or np.load(self.folder / f"{key}.npy")

    @property
    def refusals(self) -> dict[str, str]:
        """Why a model, by its name, cannot have our cache."""
        return self._read("refusals.json")

    def _read(self, name: str) -> dict[str, str]:
        res: dict[str, str] = json.loads((self.folder / name).read_text())
        return res


@dataclass(frozen=True)
class Runs:
    names: list[str]  # of the models
    n_upstream: int  # models that upstream knows how to make, those it leaves out among them
    stock: Run
    elastic: Run

    def compared(self, way: str) -> list[str]:
        """The models in which our cache was used, and numbers came out that say something."""
        return [
            name
            for name in self.names
            if name not in self.elastic.refusals
            and not isinstance(out := self.stock.outputs(name, way), str)
            and np.isfinite(out).all()
            and out.std() > 0
        ]


@pytest.fixture(scope="module")
def runs(tiny: Callable[[str], Path]) -> Iterator[Runs]:
    build_program()
    with tempfile.TemporaryDirectory() as folder:  # 1 GB
        yield _run(Path(folder), tiny)


def _run(folder: Path, tiny: Callable[[str], Path]) -> Runs:
    for name in ("models", "stock", "elastic"):
        (folder / name).mkdir()
    models = folder / "models"
    n_saved, left_out = write_models(models, tiny)

    environments = {"stock": stock_environment(FOLDER / "bin"), "elastic": dict(os.environ)}
    script = str(ROOT / "tests" / "helpers" / "architecture_outputs.py")
    programs = [
        subprocess.Popen(
            [sys.executable, script, str(folder / who), str(models), who], env={**environment, "GGML_NO_BACKTRACE": "1"}
        )
        for who, environment in environments.items()
    ]
    assert [program.wait() for program in programs] == [0, 0]
    names = sorted(path.stem for path in models.iterdir())
    return Runs(names, n_saved + len(left_out), Run(folder / "stock"), Run(folder / "elastic"))


def test_most_architectures_of_upstream_are_compared(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    n_compared = {way: len(runs.compared(way)) for way in WAYS}
    with capsys.disabled():
        print(
            f"\n{len(runs.names)} models; upstream has {runs.n_upstream}. Compared in our cache: {n_compared}. Refused:"
        )
        for name, why in runs.elastic.refusals.items():
            print(f"  {name}: {why}")
    assert len(runs.names) > 0.7 * runs.n_upstream
    assert n_compared["causal"] > 0.5 * len(runs.names)
    assert all(n >= 0.9 * n_compared["causal"] for way, n in n_compared.items() if way != "M-RoPE")
    assert n_compared["M-RoPE"] > 3


@pytest.mark.parametrize("way", WAYS)
def test_what_comes_out_is_upstreams(runs: Runs, way: str) -> None:
    others = []
    for name in runs.names:
        theirs, ours = runs.stock.outputs(name, way), runs.elastic.outputs(name, way)
        if isinstance(theirs, str) and theirs.startswith("ended by signal"):
            continue  # PLM with flash attention
        if isinstance(theirs, str) or isinstance(ours, str):
            if not (isinstance(theirs, str) and isinstance(ours, str) and theirs == ours):
                others.append(f"{name}: {_brief(theirs)} upstream, {_brief(ours)} here")
        elif theirs.tobytes() != ours.tobytes():
            others.append(f"{name}: up to {np.abs(theirs - ours).max():.3g} apart")
    assert not others


def test_the_ways_differ(runs: Runs) -> None:
    """... so that a way which is taken for another one is noticed."""
    for way in ("not causal", "flash attention"):
        names = runs.compared(way)
        same = [name for name in names if _same(runs.stock.outputs(name, way), runs.stock.outputs(name, "causal"))]
        assert len(same) < 0.1 * len(names), same


def _same(a: npt.NDArray[np.float32] | str, b: npt.NDArray[np.float32] | str) -> bool:
    return not isinstance(a, str) and not isinstance(b, str) and a.tobytes() == b.tobytes()


def _brief(outputs: npt.NDArray[np.float32] | str) -> str:
    return outputs.strip().splitlines()[-1] if isinstance(outputs, str) else f"outputs {outputs.shape}"
