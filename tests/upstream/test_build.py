"""What is loaded is what we built: no stock library can pass for ours."""

from __future__ import annotations

import json
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
import mirrored
import rebase_patches


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


def test_a_change_of_what_native_does_in_its_own_way_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def sdist(name: str, rule: str) -> Path:
        path = tmp_path / name / "vendor/llama.cpp/src/cache.cpp"
        path.parent.mkdir(parents=True)
        path.write_text(f"int other() {{\n    return 0;\n}}\n\nvoid cache::mask(\n    int n) {{\n    {rule}\n}}\n")
        return tmp_path / name

    old, new = sdist("old", "causal();"), sdist("new", "causal_but_for_images();")
    piece = {"file": "src/cache.cpp", "begins": "void cache::mask(", "ours": "views.cpp", "sha256": ""}
    monkeypatch.setattr(mirrored, "TABLE", tmp_path / "mirrored.json")
    mirrored.TABLE.write_text(json.dumps([piece]))

    def read(old: Path, new: Path) -> str:
        monkeypatch.setattr(sys, "argv", ["mirrored.py", str(old), str(new)])
        mirrored.main()
        return capsys.readouterr().out

    assert read(old, old) == ""
    mirrored.check_mirrored(old)
    with pytest.raises(SystemExit, match=re.escape("src/cache.cpp: void cache::mask( (ours: views.cpp)")):
        mirrored.check_mirrored(new)
    assert "+    causal_but_for_images();" in read(old, new)
    mirrored.check_mirrored(new)
    (new / "vendor/llama.cpp/src/cache.cpp").unlink()
    with pytest.raises(SystemExit, match=re.escape("src/cache.cpp has no 'void cache::mask(' any more")):
        read(old, new)


def test_patches_are_brought_to_where_their_lines_are_now(tmp_path: Path) -> None:
    (tmp_path / "a.cpp").write_text("new\none\ntwo\nthree\nfour\nfive\nsix\n")
    first = "@@ -1,2 +1,3 @@ f()\n one\n+more\n two\n"
    second = "@@ -4,2 +5,2 @@\n four\n-five\n+5\n"
    patch = f"Why: x\n\n--- a/a.cpp\n+++ b/a.cpp\n{first}{second}"
    moved = patch.replace("@@ -1,2 +1,3 @@", "@@ -2,2 +2,3 @@").replace("@@ -4,2 +5,2 @@", "@@ -5,2 +6,2 @@")

    files: dict[str, list[str]] = {}
    messages = ["a.cpp: line 1 is line 2 now", "a.cpp: line 4 is line 5 now"]
    assert rebase_patches.rebase(patch, files, tmp_path) == (moved, messages)
    assert files["a.cpp"] == ["new", "one", "more", "two", "three", "four", "5", "six"]
    assert rebase_patches.rebase(moved, {}, tmp_path) == (moved, [])

    # lines that are gone, and lines that are there twice: where GNU patch would choose
    for text, where in (
        ("one\nTWO\nfour\nfive\n", "no place has"),
        ("one\ntwo\n" * 2 + "four\nfive\n", "2 places have"),
    ):
        (tmp_path / "a.cpp").write_text(text)
        _, (message, *_) = rebase_patches.rebase(patch, {}, tmp_path)
        assert message == f"a.cpp, line 1 before: {where} the lines of this hunk\n{first}"
