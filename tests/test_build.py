"""What is loaded is what we built: no stock library can pass for ours."""

from __future__ import annotations

import re
from pathlib import Path

import llama_cpp
import pytest

from refreekv_cpp import Llama, native
from refreekv_cpp._llama_cpp import library_dir

ROOT = Path(__file__).parent.parent


def test_the_hooks_are_in_the_loaded_library_and_run(tiny_model: Path) -> None:
    assert native.library._name.startswith(str(library_dir()))
    llm = Llama(str(tiny_model), n_ctx=256, kv_policy="refreekv", verbose=False)
    llm.eval(list(range(5, 30)))
    # all of them but the update, which runs when something is pruned
    assert native.hooks_ran() & 0b01111 == 0b01111
    assert llm.kv_stats.bytes_ring > 0


def test_the_python_package_is_the_pinned_upstream() -> None:
    pinned = re.search(r"^llama-cpp-python==(\S+)", (ROOT / "upstream.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert llama_cpp.__version__ == pinned[1]


@pytest.mark.parametrize("path", sorted((ROOT / "patches").glob("*.patch")), ids=lambda path: path.name)
def test_patches_say_why_and_are_small(path: Path) -> None:
    header, body = path.read_text().split("\n--- ", 1)
    for entry in ("Why:", "Upstream status:", "Drop when:"):
        assert entry in header
    assert len(re.findall(r"^[+-](?!--|\+\+)", body, re.MULTILINE)) < 50
