"""Texts of models with recurrent layers or sliding windows in the library, which had none of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from books import MORE, QUESTION, TEXT, files, opened, read, reader, write
from support import ctx_of, feed, generate, kept
from tiny import random_tokens

from refreekv_cpp import _upstream, native
from refreekv_cpp._checkpoints import N_REQUEST
from refreekv_cpp._library import Library

Tiny = Callable[[str], Path]

MODELS = ["gemma3 (sliding window)", "gpt-oss (attention sinks, sliding window, experts)", "jamba (hybrid)"]
MODELS += ["lfm2 (hybrid)"]


def states(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.state"))


@pytest.mark.parametrize("evicted", ["restore", "drop"])
@pytest.mark.parametrize("name", MODELS)
def test_it_is_what_a_pruning_has_left(tiny: Tiny, tmp_path: Path, name: str, evicted: str) -> None:
    options = {"kv_evicted": evicted, "flash_attn": False}
    write(tiny(name), tmp_path, **options)
    other = read(reader(tiny(name), tmp_path / "other", **options))
    llm = opened(tiny(name), tmp_path, **options)
    assert llm.kv_stats.n_opened == llm.n_tokens == len(TEXT)
    assert kept(llm) == kept(other)
    # the windows' cells lie in other places, and are summed in another order
    np.testing.assert_allclose(feed(llm, MORE), feed(other, MORE), atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_a_conversation_goes_on_where_it_stopped(tiny: Tiny, tmp_path: Path, name: str) -> None:
    first = reader(tiny(name), tmp_path)
    tokens = [*TEXT, *generate(first, TEXT, 40)]
    second = reader(tiny(name), tmp_path)
    batches: list[int] = []
    with _upstream.after_batches(second, batches.append):
        answer = generate(second, [*tokens, *QUESTION])
    assert second.kv_stats.n_opened == len(tokens) - 1  # the last one was not read by the first
    assert sum(batches) == 1 + len(QUESTION) + len(answer) - 1
    assert answer == generate(first, [*tokens, *QUESTION])


def test_with_swa_full_there_is_none(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The layers with a window have room for the whole context then, and are neither in blocks nor in states."""
    llm = reader(tiny(MODELS[0]), tmp_path, swa_full=True, verbose=True)
    assert "kv_library is not used: swa_full=True" in capsys.readouterr().err
    generate(llm, TEXT)
    assert files(tmp_path) == []


def test_a_text_that_grows_has_two(tiny: Tiny, tmp_path: Path) -> None:
    llm = reader(tiny(MODELS[2]), tmp_path)
    texts = [TEXT[:600], random_tokens(300, seed=4)]
    for _ in range(3):
        for i, text in enumerate(texts):
            texts[i] = [*text, *generate(llm, text), *QUESTION]
    assert len(states(tmp_path)) == 4
    llm = reader(tiny(MODELS[2]), tmp_path)
    for text in texts:
        before = llm.kv_stats.n_opened
        generate(llm, text)
        assert llm.kv_stats.n_opened - before == len(text) - len(QUESTION) - 1
    generate(llm, TEXT)
    llm.keep_kv("a text")
    n_named = len(states(tmp_path))
    generate(llm, [*TEXT, *QUESTION])
    assert len(states(tmp_path)) == n_named + 2


@pytest.mark.parametrize("name", MODELS)
def test_another_question_follows_a_document(tiny: Tiny, tmp_path: Path, name: str) -> None:
    generate(reader(tiny(name), tmp_path), TEXT)
    prompt = [*TEXT[:-5], *QUESTION]
    llm = reader(tiny(name), tmp_path, kv_evicted="restore")
    answer = generate(llm, prompt)
    assert llm.kv_stats.n_opened == len(TEXT) - N_REQUEST
    assert answer == generate(reader(tiny(name), None, kv_evicted="restore"), prompt)


def test_where_no_state_is_nothing_is_opened(tiny: Tiny, tmp_path: Path) -> None:
    write(tiny(MODELS[2]), tmp_path)
    llm = reader(tiny(MODELS[2]), tmp_path)
    generate(llm, [*TEXT[:1000], *QUESTION])
    assert llm.kv_stats.n_opened == 0
    for path in states(tmp_path):
        path.unlink()
    assert opened(tiny(MODELS[2]), tmp_path).n_tokens == 0


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:10], lambda data: b"", None])
@pytest.mark.parametrize("name", MODELS[1:3])
def test_a_damaged_state_is_a_miss(
    tiny: Tiny,
    tmp_path: Path,
    name: str,
    damage: Callable[[bytes], bytes] | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write(tiny(name), tmp_path)
    (path,) = states(tmp_path)
    data = path.read_bytes()
    if damage is None:
        for at in np.random.default_rng(0).integers(0, len(data), 20):
            path.write_bytes(bytes([*data[:at], data[at] ^ 1, *data[at + 1 :]]))
            assert opened(tiny(name), tmp_path).n_tokens == 0
            assert states(tmp_path) == []
    else:
        path.write_bytes(damage(data))
        assert opened(tiny(name), tmp_path).n_tokens == 0
        assert states(tmp_path) == []
    assert "a damaged file, which is removed" in caplog.text


def test_a_state_of_another_model_is_not_taken(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name and its checksum are right, its contents are not: what is in the cache then is nothing."""
    path = tiny("jamba (hybrid)")
    write(path, tmp_path)
    llm = reader(path, tmp_path)
    monkeypatch.setattr(native, "library_state", lambda _: memoryview(b"of another model"))
    llm._open(TEXT)
    assert (llm.n_tokens, native.stats(ctx_of(llm)).n_tokens) == (0, 0)
    assert generate(llm, TEXT) == generate(reader(path, None), TEXT)


def test_states_count_and_go_with_their_texts(tiny: Tiny, tmp_path: Path) -> None:
    write(tiny(MODELS[2]), tmp_path)
    library = Library(tmp_path)
    assert library.n_bytes() == sum(path.stat().st_size for path in [*files(tmp_path), *states(tmp_path)])
    n_bytes = library.n_bytes()
    assert library.remove_text(library.texts()[0]) == n_bytes
    assert states(tmp_path) == files(tmp_path) == []
    write(tiny(MODELS[2]), tmp_path)
    native.library_tidy(tmp_path, 1)
    assert states(tmp_path) == files(tmp_path) == []
    write(tiny(MODELS[2]), tmp_path)
    library.clear()
    assert states(tmp_path) == []
    write(tiny(MODELS[2]), tmp_path)
    n_files = len([*states(tmp_path), *files(tmp_path)])
    assert library.check_all() == (n_files, [])
    states(tmp_path)[0].write_bytes(b"RFKS")
    n_good, (error,) = library.check_all()
    assert n_good == n_files - 1
    assert error.endswith("cut off, or cannot be read")
    assert states(tmp_path) == []
