"""What is loaded is what we built: no stock library can pass for ours."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import llama_cpp
import pytest
from native_build import ROOT

from refreekv_cpp import Llama, ReFreeKV, native
from refreekv_cpp._llama_cpp import library_dir

sys.path.insert(0, str(ROOT / "cmake"))

import dependencies
import licenses


def test_the_hooks_are_in_the_loaded_library_and_run(tiny_model: Path) -> None:
    assert native.library._name.startswith(str(library_dir()))
    llm = Llama(str(tiny_model), n_ctx=256, kv_policy=ReFreeKV(theta=0), verbose=False)  # looks at queries
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


@pytest.mark.parametrize(
    ("needed", "message"),
    [
        ("numpy>=1.20.0", None),
        ("Typing_Extensions>=4.5", None),  # another spelling of the same name
        ("starlette.context<0.5,>=0.3; extra == 'server'", None),
        ("pytest>=9; extra == 'test'", None),
        ("numpy>=99", "numpy of dependencies must be >=99"),
        ("starlette-context<0.3; extra == 'server'", "starlette-context of the extra server must be <0.3"),
        ("num>=1", "dependencies must name num,"),
        ("uvicorn", "dependencies must name uvicorn,"),  # only the extra has it
        ("anything; extra == 'server'", "the extra server must name anything,"),
    ],
)
def test_dependencies_of_upstream_are_among_ours(tmp_path: Path, needed: str, message: str | None) -> None:
    pkg_info = tmp_path / "PKG-INFO"
    pkg_info.write_text(f"Name: llama_cpp_python\nRequires-Dist: diskcache>=5.6.1\nRequires-Dist: {needed}\n")
    if message is None:
        dependencies.check_dependencies(pkg_info, ROOT / "pyproject.toml")
        return
    with pytest.raises(SystemExit, match=re.escape(f"pyproject.toml: {message}")):
        dependencies.check_dependencies(pkg_info, ROOT / "pyproject.toml")


def test_a_new_library_of_upstreams_is_noticed(tmp_path: Path) -> None:
    for path in licenses.SOURCES.values():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    licenses.check_listed(tmp_path)
    vendor = tmp_path / "vendor/llama.cpp/vendor"
    (vendor / "CMakeLists.txt").touch()
    licenses.check_listed(tmp_path)
    new = vendor / "hash" / "md5"
    new.mkdir()
    (new / "md5.c").touch()
    with pytest.raises(SystemExit, match=r"what is new in llama\.cpp: vendor/llama\.cpp/vendor/hash/md5$"):
        licenses.check_listed(tmp_path)
    shutil.rmtree(new)
    (tmp_path / "vendor/llama.cpp/licenses/LICENSE-new").touch()
    with pytest.raises(SystemExit, match="licenses/LICENSE-new"):
        licenses.check_listed(tmp_path)
