"""Documents and conversations that the command line keeps in the library."""

from __future__ import annotations

import builtins
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command import assert_one_error_line, assert_one_line, refreekv
from tiny import N_SPECIAL

from refreekv_cpp import Llama
from refreekv_cpp._cache_dir import VARIABLE
from refreekv_cpp._library import Library
from refreekv_cpp.cli.documents import ask_about, read_document
from refreekv_cpp.cli.sessions import Session

_OPTIONS = ["--n-ctx", "2048", "--gpu-layers", "0", "--threads", "1"]
_SHORT = [*_OPTIONS, "--max-tokens", "4", "--temperature", "0"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder, with no library in it."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def only_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    """llama-cpp-python does not count tokens that leave a character unfinished."""
    bias = {N_SPECIAL + byte: -1000.0 for byte in range(128, 256)}
    create = Llama.create_chat_completion
    monkeypatch.setattr(
        Llama, "create_chat_completion", lambda *args, **kwargs: create(*args, logit_bias=bias, **kwargs)
    )


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "document.md"
    path.write_text("The ship left the harbour. " * 40)
    return path


def opened(stderr: str) -> int:
    """Tokens that came from the library, by the receipt."""
    found = re.findall(r"(\d+) tokens from the library", stderr)
    return int(found[-1]) if found else 0


def test_a_document_is_read_once(tiny_model: Path, document: Path, cache: Path) -> None:
    result = refreekv("read", tiny_model, document, *_OPTIONS)
    assert result.exit_code == 0
    n_tokens = int(re.search(r"(\d+) tokens are in the library", result.stderr)[1])
    assert n_tokens > 1000
    for command in (["run", "--prompt", "Where?"], ["chat"]):
        result = refreekv(command[0], tiny_model, "--file", document, *command[1:], *_SHORT, stdin="Why?\n")
        assert result.exit_code == 0
        assert opened(result.stderr) > n_tokens - 20
    listed = refreekv("library")
    assert "document.md" in listed.stdout
    assert str(n_tokens) in listed.stdout
    names = {text.name for text in Library(cache / "library").texts()}
    assert names == {"document.md", "question about document.md", "chat about document.md"}


def test_chat_reads_a_document_on_request(tiny_model: Path, document: Path) -> None:
    refreekv("read", tiny_model, document, *_OPTIONS)
    result = refreekv("chat", tiny_model, *_SHORT, stdin=f"/read {document}\nWhere?\n/read\n/read none.txt\n")
    assert opened(result.stderr) > 1000
    assert f"{document}: the next question is about it" in result.stderr
    assert "/read: must be /read FILE" in result.stderr
    assert "none.txt: no such file" in result.stderr


def test_a_document_that_is_too_long_is_refused_at_once(tiny_model: Path, document: Path) -> None:
    document.write_text("The ship left the harbour. " * 100)
    for command in (["run", "--prompt", "Where?"], ["chat"]):
        result = refreekv(command[0], tiny_model, "--file", document, *command[1:], *_SHORT, stdin="Why?\n")
        assert_one_error_line(result, "document.md: ", " tokens, more than the context of 2048", "--n-ctx")
    result = refreekv("chat", tiny_model, *_SHORT, stdin=f"/read {document}\nWhere?\n")
    assert result.exit_code == 0
    assert "more than the context of 2048" in result.stderr
    assert "the next question is about it" not in result.stderr


def test_chat_knows_its_commands(tiny_model: Path, document: Path) -> None:
    result = refreekv("chat", tiny_model, "--file", document, *_SHORT, stdin="/help\n/reed note.md\n/clear\n/exit\n")
    assert result.exit_code == 0
    assert "/help: no such command; /read FILE" in result.stderr
    assert "/reed: no such command" in result.stderr
    assert "document.md: no longer part of the conversation" in result.stderr
    assert "process " not in result.stderr  # nothing was asked


def test_a_named_conversation_goes_on(tiny_model: Path, document: Path, cache: Path) -> None:
    command = ["chat", tiny_model, *_SHORT, "--session", "ships"]
    assert refreekv(*command, "--file", document, stdin="Where?\n").exit_code == 0
    messages = json.loads((cache / "sessions" / "ships.json").read_text())
    assert [message["role"] for message in messages] == ["user", "assistant"]
    result = refreekv(*command, stdin="Why?\n")
    assert "session ships: it has 2 messages" in result.stderr
    assert opened(result.stderr) > 1000
    assert "session ships" in refreekv("library").stdout
    result = refreekv(*command, stdin="/clear\n")
    assert Session("ships").messages == []


def test_a_conversation_has_a_name_that_a_file_can_have(tiny_model: Path, cache: Path) -> None:
    for name in ("../x", "", "a/b", ".hidden"):
        assert_one_error_line(refreekv("chat", tiny_model, "--session", name), "--session", "must be letters")
    Session("x").write([{"role": "user", "content": "a"}])
    result = refreekv("chat", tiny_model, "--session", "x", "--system", "b")
    assert_one_error_line(result, "the conversation has begun without this system message")
    path = cache / "sessions" / "x.json"
    for content in (
        "[1]",
        "[" * 100_000,
        '[{"role": ["a"], "content": "x"}]',
        r'[{"role": "user", "content": "\ud800"}]',
    ):
        path.write_text(content)
        assert_one_error_line(refreekv("chat", tiny_model, "--session", "x"), "x.json is damaged")
    path.unlink()
    path.mkdir()
    assert_one_error_line(refreekv("chat", tiny_model, "--session", "x"), "x.json is damaged")


def test_without_a_library(tiny_model: Path, document: Path, cache: Path) -> None:
    for options in (["--no-library"], ["--kv-policy", "full"], ["--kv-evicted", "recompute"]):
        result = refreekv("chat", tiny_model, "--file", document, *_SHORT, *options, stdin="Where?\n")
        assert result.exit_code == 0
        assert not (cache / "library").exists()
    result = refreekv("run", tiny_model, "--prompt", "x", *_SHORT)
    assert result.exit_code == 0
    assert not (cache / "library").exists()
    result = refreekv("read", tiny_model, document, *_OPTIONS, "--kv-policy", "full")
    assert_one_error_line(result, "kv_library", "kv_policy must be 'refreekv'")
    assert_one_error_line(refreekv("read", tiny_model, document, "--no-library"), "--no-library")


def test_texts_are_removed_and_checked(tiny_model: Path, tmp_path: Path, cache: Path) -> None:
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path in paths:
        path.write_text(f"{path.name} " * 120)
    refreekv("read", tiny_model, *paths, *_OPTIONS)
    library = cache / "library"
    block = max(library.glob("*.block"), key=lambda path: path.stat().st_mtime)
    damaged = bytearray(block.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    block.write_bytes(damaged)
    result = refreekv("library", "check")
    assert result.exit_code == 1
    assert "damaged" in result.stderr
    assert not block.exists()
    assert refreekv("library", "check").exit_code == 0

    refreekv("read", tiny_model, *paths, *_OPTIONS)
    assert refreekv("library", "remove", "a.txt").exit_code == 0
    listed = refreekv("library").stdout
    assert "a.txt" not in listed
    assert "b.txt" in listed
    assert_one_error_line(refreekv("library", "remove", "a.txt"), "a.txt: must be a name or a key")
    text = next(text for text in Library(library).texts() if text.name == "b.txt")
    for wanted in ("", text.key[0]):
        assert_one_error_line(refreekv("library", "remove", wanted), "must be a name or a key")
    assert "b.txt" in refreekv("library").stdout
    assert refreekv("library", "remove", text.key[:12]).exit_code == 0
    assert "b.txt" not in refreekv("library").stdout
    assert refreekv("library", "remove", "all").exit_code == 0
    assert list(library.glob("*.block")) == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_renamed_files_and_pipes_are_listed_in_time(tiny_model: Path, cache: Path, document: Path) -> None:
    refreekv("read", tiny_model, document, *_OPTIONS)
    library = cache / "library"
    for block in library.glob("*.block"):
        key = block.stem.partition("-")[2]
        block.rename(library / f"{key}-{key}.block")  # it comes before itself
    os.mkfifo(library / "names" / "x.json")
    done = subprocess.run([sys.executable, "-m", "refreekv_cpp", "library"], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr.count(b"\n")) == (0, 1)


def test_the_folder_may_come_before_the_command(tiny_model: Path, tmp_path: Path, cache: Path, document: Path) -> None:
    refreekv("read", tiny_model, document, *_OPTIONS)
    (tmp_path / "other").mkdir()
    assert refreekv("library", "--folder", tmp_path / "other", "remove", "all").exit_code == 0
    assert "document.md" in refreekv("library").stdout
    for command in ([], ["check"], ["remove", "all"]):
        assert_one_error_line(refreekv("library", "--folder", tmp_path / "none", *command), "there is no such folder")
    assert not (tmp_path / "none").exists()


def test_only_what_was_named_is_removed(tiny_model: Path, cache: Path, document: Path) -> None:
    refreekv("read", tiny_model, document, *_OPTIONS)
    before = sorted((cache / "library").glob("*.block"))
    key = max(before, key=lambda path: path.stat().st_mtime).stem.partition("-")[2]
    for wanted in ("", key[0], key[:11]):
        assert_one_error_line(refreekv("library", "remove", wanted), "must be a name or a key")
    assert sorted((cache / "library").glob("*.block")) == before


def test_documents_that_cannot_be_kept(tiny: Any, tiny_model: Path, document: Path) -> None:
    (short := document.with_name("short.txt")).write_text("x")
    result = refreekv("read", tiny_model, short, document, *_OPTIONS)
    assert result.exit_code == 0
    assert f"{short}: " in result.stderr
    assert "not kept" in result.stderr
    assert f"{document}: 1" in result.stderr
    result = refreekv("read", tiny_model, document, "--n-ctx", "512", "--gpu-layers", "0")
    assert_one_error_line(result, f"{document}: Requested tokens", "exceed context window of 512")
    result = refreekv("read", tiny("qwen2vl (M-RoPE)"), document, *_OPTIONS)
    assert_one_error_line(result, "nothing can be kept in the library: positions of this model have several dimensions")


def test_a_chat_goes_on_after_a_file_that_is_not_there(tiny_model: Path, cache: Path) -> None:
    result = refreekv("chat", tiny_model, *_SHORT, stdin="/read ~nobody-of-this-name/a.txt\nWhere?\n")
    assert result.exit_code == 0
    assert "home directory" in result.stderr
    assert "tokens" in result.stderr
    cache.mkdir(exist_ok=True)
    (cache / "sessions").write_text("")  # no folder
    result = refreekv("chat", tiny_model, *_SHORT, "--session", "a", stdin="Where?\nWhy?\n")
    assert result.exit_code == 0
    assert result.stderr.count("the session could not be written") == 2


def test_a_name_of_a_conversation_is_that_of_a_file(tiny_model: Path) -> None:
    result = refreekv("chat", tiny_model, "--session", "\u5b57" * 100)
    assert_one_error_line(result, "must be letters, digits, _, - and dots, at most 200 bytes")
    Session("\u5b57" * 66).write([])


def test_documents_come_before_the_question(document: Path) -> None:
    assert ask_about(["a\n", " b"], "c?") == "a\n\nb\n\nc?"
    assert ask_about([], "c?") == "c?"
    document.write_text("a", encoding="utf-8-sig")  # as Windows writes it
    assert read_document(document) == "a"
    (empty := document.with_name("empty.txt")).write_text(" \n")
    with pytest.raises(ValueError, match="there is no text in it"):
        read_document(empty)


def test_a_pdf_is_read(tmp_path: Path) -> None:
    pytest.importorskip("pypdf")
    stream = b"BT /F1 12 Tf 72 720 Td (The ship left the harbour.) Tj ET"
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>",
        b"<</Length %d>>stream\n%s\nendstream" % (len(stream), stream),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    data, places = b"%PDF-1.4\n", []
    for i, text in enumerate(objects, start=1):
        places.append(len(data))
        data += b"%d 0 obj%s endobj\n" % (i, text)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    data += b"xref\n0 6\n0000000000 65535 f \n%strailer<</Size 6/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF" % (
        table,
        data.__len__(),
    )
    path = tmp_path / "ship.pdf"
    path.write_bytes(data)
    assert "The ship left the harbour." in read_document(path)
    path.write_bytes(b"Annual report")
    with pytest.raises(ValueError, match="not a PDF, although"):
        read_document(path)
    path.write_bytes(b"%PDF-1.4 nothing")
    with pytest.raises(ValueError, match="cannot be read as a PDF"):
        read_document(path)


def test_a_pdf_needs_an_extra(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_pypdf(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("pypdf"):
            raise ModuleNotFoundError("no pypdf", name="pypdf")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pypdf)
    (path := tmp_path / "a.pdf").write_bytes(b"%PDF")
    result = refreekv("run", tiny_model, "--file", path, "--prompt", "x")
    assert_one_line(result.stderr, 'a PDF needs pypdf, which is not installed: run `pip install "refreekv-cpp[pdf]"`')


def test_the_python_api_names_a_text(tiny_model: Path, cache: Path) -> None:
    llm = Llama(str(tiny_model), n_ctx=2048, kv_policy="refreekv", kv_library=True, verbose=False)
    llm.create_completion("The ship left the harbour. " * 10, max_tokens=1)
    assert llm.keep_kv("harbour") > 200
    llm.close()
    assert "harbour" in refreekv("library", "--folder", cache / "library").stdout
