"""Every script and notebook in examples/ runs.

Those that ask for a number of tokens run a real model: llama-cpp-python does not count tokens that leave a character
unfinished, which a tiny model with random weights may say without end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from native_build import ROOT
from serving import serving

EXAMPLES = ROOT / "examples"
N_BYTES = 4000  # of the document: some 900 tokens of a real model


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "report.txt"
    path.write_text(("The ship left the harbour with salt and barley. " * 100)[:N_BYTES], encoding="utf-8")
    return path


def run(script: Path, *args: object, folder: Path) -> str:
    """What it prints, with a cache folder of its own."""
    environment = {**os.environ, "REFREEKV_CACHE_DIR": str(folder / "cache"), "MPLBACKEND": "Agg"}
    done = subprocess.run(
        [sys.executable, str(script), *map(str, args)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.model
def test_chat_over_a_document(default_model: Path, document: Path, tmp_path: Path) -> None:
    script = EXAMPLES / "chat_over_document.py"
    printed = run(script, default_model, document, "Who signed it?", "What did it cost?", folder=tmp_path)
    assert "> Who signed it?\n" in printed
    assert "> What did it cost?\n" in printed
    assert "pruned" in printed


@pytest.mark.model
def test_a_memory_cap(default_model: Path, document: Path, tmp_path: Path) -> None:
    printed = run(EXAMPLES / "memory_cap.py", default_model, document, "16MiB", folder=tmp_path)
    assert "the cap is 16MiB" in printed
    assert int(printed.splitlines()[-1].split()[-1]) > 0


@pytest.mark.model
def test_a_document_is_opened_the_second_time(default_model: Path, document: Path, tmp_path: Path) -> None:
    printed = [
        run(EXAMPLES / "keep_document.py", default_model, document, question, folder=tmp_path)
        for question in ("Who signed it?", "What did it cost?")
    ]
    n_opened = [int(text.splitlines()[-1].split()[0]) for text in printed]
    assert n_opened[0] == 0
    assert n_opened[1] > 500


@pytest.mark.model
def test_a_server(default_model: Path, document: Path, tmp_path: Path) -> None:
    with serving(default_model, "--n-ctx", "4096") as client:
        url = str(client.base_url)
        printed = run(EXAMPLES / "openai_client.py", url, document, "Who signed it?", folder=tmp_path)
    assert "tokens are exact in the cache" in printed


@pytest.mark.model
def test_a_policy_of_ones_own(default_model: Path, document: Path, tmp_path: Path) -> None:
    printed = run(EXAMPLES / "own_policy.py", default_model, document, folder=tmp_path)
    n_kept = [int(word) for word in printed.splitlines()[-1].split(":")[1].split()]
    assert n_kept
    assert all(n < 700 for n in n_kept)


def test_the_notebook(tiny_model: Path, tmp_path: Path) -> None:
    notebook = json.loads((EXAMPLES / "tour.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    script = tmp_path / "tour.py"
    script.write_text("\n".join(cells), encoding="utf-8")
    (tmp_path / "model.gguf").symlink_to(tiny_model)
    assert "rows read exactly" in run(script, folder=tmp_path)


def test_every_example_is_tested() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    names = [path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")]
    assert names
    assert [name for name in names if name not in source] == []
