"""What was read once is opened from the library: the same numbers, the same answers, without reading."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from books import MORE, POLICY, QUESTION, TEXT, files, in_order, opened, read, reader, write
from restoring import cache_of, restore
from support import CACHE_TYPES, HELPERS, ctx_of, feed, generate, kept, logits
from tiny import random_tokens
from tiny_lora import write_lora

from refreekv_cpp import CacheStateError, Llama, PolicyError, ReFreeKV, SnapKV, native
from refreekv_cpp._library import Library

Tiny = Callable[[str], Path]

CACHES: dict[str, dict[str, Any]] = {
    "f16": {},
    "f32, cold store in memory": {"type_k": CACHE_TYPES["f32"], "type_v": CACHE_TYPES["f32"], "kv_cold": "memory"},
    "q8_0": {"flash_attn": True, "type_k": CACHE_TYPES["q8_0"], "type_v": CACHE_TYPES["q8_0"]},
    "transposed V": {"flash_attn": False},
}


@pytest.fixture(autouse=True)
def all_writes_work() -> Iterator[None]:
    yield
    native.fail_cold(0)


# -- the same as after reading ----------------


@pytest.mark.parametrize("evicted", ["restore", "drop"])
@pytest.mark.parametrize("options", CACHES.values(), ids=CACHES)
def test_it_is_what_a_pruning_has_left(tiny: Tiny, tmp_path: Path, options: dict[str, Any], evicted: str) -> None:
    options = {**options, "kv_evicted": evicted}
    write(tiny("gqa64"), tmp_path, **options)
    other = read(reader(tiny("gqa64"), tmp_path / "other", **options))
    llm = opened(tiny("gqa64"), tmp_path, **options)

    assert llm.kv_stats.n_opened == len(TEXT)
    assert kept(llm) == kept(other)
    assert native.pruned_pos(ctx_of(llm), 0) == native.pruned_pos(ctx_of(other), 0)
    assert llm.kv_stats.bytes_codes == other.kv_stats.bytes_codes
    np.testing.assert_array_equal(feed(llm, MORE), feed(other, MORE))
    assert native.stats(ctx_of(llm)).n_rows_read == native.stats(ctx_of(other)).n_rows_read
    assert restore(llm) == restore(other) > 0
    assert cache_of(llm) == cache_of(other)


@pytest.mark.parametrize("evicted", ["restore", "drop"])
def test_a_prompt_goes_on_from_it(tiny_model: Path, tmp_path: Path, evicted: str) -> None:
    write(tiny_model, tmp_path, kv_evicted=evicted)
    other = read(reader(tiny_model, tmp_path / "other", kv_evicted=evicted))
    llm = reader(tiny_model, tmp_path, kv_evicted=evicted)
    prompt = [*TEXT, *QUESTION]
    assert generate(llm, prompt) == generate(other, prompt)
    assert llm.kv_stats.n_opened == len(TEXT)
    assert "1300 tokens from the library" in llm.kv_stats.receipt()
    np.testing.assert_array_equal(logits(llm), logits(other))


def test_it_is_opened_in_another_process(tiny_model: Path, tmp_path: Path) -> None:
    write(tiny_model, tmp_path)
    script = """
import sys
sys.path.insert(0, sys.argv[3])
from pathlib import Path
from books import QUESTION, TEXT, reader
from support import generate
llm = reader(Path(sys.argv[1]), Path(sys.argv[2]))
print(generate(llm, [*TEXT, *QUESTION]), llm.kv_stats.n_opened)
"""
    command = [sys.executable, "-c", script, str(tiny_model), str(tmp_path), str(HELPERS)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=120)
    other = read(reader(tiny_model, tmp_path / "other"))
    assert done.stdout.strip() == f"{generate(other, [*TEXT, *QUESTION])} {len(TEXT)}"


@pytest.mark.parametrize("n", [100, 259, 260, 261, 600, 1299])
def test_a_part_of_it_is_opened(tiny_model: Path, tmp_path: Path, n: int) -> None:
    """Of the last block, only the tokens that both texts have."""
    write(tiny_model, tmp_path)
    llm = opened(tiny_model, tmp_path, [*TEXT[:n], *QUESTION])
    other = read(reader(tiny_model, tmp_path / "other"), TEXT[:n])
    assert llm.n_tokens == n
    assert kept(llm) == kept(other)
    # it was read in other batches
    np.testing.assert_allclose(feed(llm, MORE), feed(other, MORE), atol=1e-3)


def test_a_conversation_goes_on_where_it_stopped(tiny_model: Path, tmp_path: Path) -> None:
    first = reader(tiny_model, tmp_path)
    tokens = [*TEXT, *generate(first, TEXT, 40)]
    second = reader(tiny_model, tmp_path)
    answers = [generate(llm, [*tokens, *QUESTION]) for llm in (second, first)]
    assert answers[0] == answers[1]
    assert second.kv_stats.n_opened == len(tokens) - 1  # the last one was not read by the first


def test_conversations_do_not_destroy_each_other(tiny_model: Path, tmp_path: Path) -> None:
    llm = reader(tiny_model, tmp_path)
    alone = [reader(tiny_model, None) for _ in range(3)]
    talks = [TEXT, random_tokens(900, seed=7), random_tokens(150, seed=8)]
    n_read = 0
    decode = llm._ctx.decode

    def counted(batch: Any) -> None:
        nonlocal n_read
        n_read += batch.n_tokens()
        decode(batch)

    llm._ctx.decode = counted
    for turn in range(4):
        n_read = 0
        for i, other in enumerate(alone):
            talks[i] = [*talks[i], *random_tokens(30, seed=10 * turn + i)]
            answer = generate(llm, talks[i], 10)
            assert answer == generate(other, talks[i], 10)
            talks[i] += answer
        if turn > 0:
            assert n_read == 3 * (30 + 1 + 9)  # the last token of an answer is read with the next prompt


def test_what_is_opened_can_be_rewound_and_written_over(tiny_model: Path, tmp_path: Path) -> None:
    write(tiny_model, tmp_path)
    others = random_tokens(700, seed=3)
    llm, other = opened(tiny_model, tmp_path), read(reader(tiny_model, tmp_path / "other"))
    for each in (llm, other):
        each.n_tokens = 500
        read(each, others)
        assert restore(each) > 0
    assert cache_of(llm) == cache_of(other)
    assert kept(llm) == [list(range(1200))] * 4


def test_tokens_can_be_taken_out_of_it(tiny_model: Path, tmp_path: Path) -> None:
    """Rows on both sides of a gap in the files are read one by one."""
    write(tiny_model, tmp_path)
    llm, other = opened(tiny_model, tmp_path), read(reader(tiny_model, tmp_path / "other"))
    for each in (llm, other):
        assert each._ctx.kv_cache_seq_rm(0, 600, 602)
    np.testing.assert_array_equal(feed(llm, MORE), feed(other, MORE))
    assert restore(llm) == restore(other) > 0
    assert cache_of(llm) == cache_of(other)


def test_a_saved_state_has_its_rows(tiny_model: Path, tmp_path: Path) -> None:
    write(tiny_model, tmp_path)
    llm, other = opened(tiny_model, tmp_path), reader(tiny_model, None)
    other.load_state(llm.save_state())
    for file in files(tmp_path):
        file.unlink()
    assert restore(other) == restore(llm) > 0
    assert cache_of(other) == cache_of(llm)


def test_protected_tokens_stay(tiny_model: Path, tmp_path: Path) -> None:
    options = {"kv_protect": [(100, 140)], "kv_evicted": "drop"}
    write(tiny_model, tmp_path, **options)
    llm = opened(tiny_model, tmp_path, **options)
    assert all(set(range(100, 140)) <= set(layer) for layer in kept(llm))
    assert restore(llm) > 0


# -- what it depends on ----------------


def test_texts_share_what_they_begin_with(tiny_model: Path, tmp_path: Path) -> None:
    write(tiny_model, tmp_path, TEXT)
    n_files = len(files(tmp_path))
    write(tiny_model, tmp_path, [*TEXT[:1028], *random_tokens(256, seed=4)])
    assert len(files(tmp_path)) == n_files + 1
    write(tiny_model, tmp_path, TEXT)
    assert len(files(tmp_path)) == n_files + 1


@pytest.mark.parametrize(
    "options",
    [
        {"type_k": CACHE_TYPES["f32"]},
        {"rope_freq_base": 5000.0},
        {"kv_cold_type": "q8_0"},
        {"policy": ReFreeKV(n_sink=8)},
        {"kv_overrides": {"llama.attention.layer_norm_rms_epsilon": 1e-3}},
    ],
    ids=str,
)
def test_with_other_numbers_it_is_another_text(tiny_model: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    write(tiny_model, tmp_path)
    assert opened(tiny_model, tmp_path, **options).n_tokens == 0


def test_with_another_model_it_is_another_text(tiny: Tiny, tmp_path: Path) -> None:
    write(tiny("gqa"), tmp_path)
    assert opened(tiny("mha"), tmp_path).n_tokens == 0


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_model_may_be_a_link(tiny_model: Path, tmp_path: Path, link: Callable[[Path, Path], None]) -> None:
    """As in the folders where downloads are kept."""
    link(tiny_model, tmp_path / "model.gguf")
    write(tmp_path / "model.gguf", tmp_path / "library")
    assert opened(tiny_model, tmp_path / "library").n_tokens == len(TEXT)


def test_what_was_opened_is_not_written_again(tiny_model: Path, tmp_path: Path) -> None:
    """A block that is gone may have been damaged after it was opened."""
    write(tiny_model, tmp_path)
    llm = opened(tiny_model, tmp_path)
    for path in files(tmp_path):
        path.unlink()
    llm.eval(MORE)
    assert llm.keep_kv() == 0
    assert files(tmp_path) == []


def test_what_came_with_a_state_is_not_kept(tiny_model: Path, tmp_path: Path) -> None:
    """It may be of another model, which its bytes do not say."""
    other = read(reader(tiny_model, None))
    llm = reader(tiny_model, tmp_path)
    llm.load_state(other.save_state())
    assert llm.keep_kv() == 0
    assert files(tmp_path) == []
    llm.reset()
    llm.eval(TEXT)
    assert llm.keep_kv() == len(TEXT)


def test_with_an_adapter_it_is_another_text(tiny_model: Path, tmp_path: Path) -> None:
    write_lora(adapter := tmp_path / "adapter.gguf", tiny_model)
    write(tiny_model, tmp_path / "library", lora_path=str(adapter))
    assert opened(tiny_model, tmp_path / "library", lora_path=str(adapter)).n_tokens == len(TEXT)
    assert opened(tiny_model, tmp_path / "library", lora_path=str(adapter), lora_scale=0.5).n_tokens == 0
    assert opened(tiny_model, tmp_path / "library").n_tokens == 0


def test_answers_depend_on_the_policy_too(tiny_model: Path, tmp_path: Path) -> None:
    first = reader(tiny_model, tmp_path)
    tokens = [*TEXT, *generate(first, TEXT, 40)]
    assert opened(tiny_model, tmp_path, tokens).n_tokens == len(tokens) - 1
    other = opened(tiny_model, tmp_path, tokens, policy=ReFreeKV(theta=0.01))
    assert other.n_tokens == len(TEXT) - (len(TEXT) - 4) % 256  # whole blocks of what was read before


# -- damage ----------------


def answer(llm: Llama) -> list[int]:
    return generate(llm, [*TEXT, *QUESTION])


def test_a_bit_that_flipped_is_seen(tiny_model: Path, tmp_path: Path) -> None:
    write(tiny_model, tmp_path)
    path = in_order(tmp_path)[1]
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    places = [*range(0, 1600, 40), *rng.integers(0, len(whole), 40).tolist()]
    padding = 0
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            native.library_check(path)
        except CacheStateError:
            continue
        assert whole[place] == 0  # between two sections, where nothing is
        padding += 1
    assert padding < 5


@pytest.mark.parametrize("damage", ["bit", "cut", "longer", "empty", "version", "another block", "gone"])
def test_what_is_damaged_is_read_again(
    tiny_model: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(tiny_model, tmp_path)
    llm = reader(tiny_model, tmp_path)
    blocks = in_order(tmp_path)
    path = blocks[2]
    data = bytearray(path.read_bytes())
    if damage == "bit":
        data[len(data) // 2] ^= 4
    elif damage == "cut":
        data = data[:-1]
    elif damage == "longer":
        data += b"\0"
    elif damage == "empty":
        data = bytearray()
    elif damage == "version":
        data[4] += 1
    elif damage == "another block":
        data = bytearray(blocks[1].read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data)
    other = read(reader(tiny_model, tmp_path / "other"), TEXT[: 4 + 2 * 256])
    assert answer(llm) == answer(other)
    assert llm.kv_stats.n_opened == 4 + 2 * 256
    assert ("a damaged file, which is removed" in caplog.text) == (damage != "gone")
    assert opened(tiny_model, tmp_path).n_tokens == len(TEXT)  # it was written anew


def test_a_block_without_layers_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    write(tiny_model, tmp_path)
    path = files(tmp_path)[0]
    data = bytearray(path.read_bytes())
    data[12:16] = bytes(4)  # the number of layers
    path.write_bytes(data)
    with pytest.raises(CacheStateError, match="damaged, or cut off"):
        native.library_check(path)


# -- files ----------------


def test_a_name_follows_a_text_that_grows(tiny_model: Path, tmp_path: Path) -> None:
    llm = read(reader(tiny_model, tmp_path))
    llm.keep_kv("a text")
    write(tiny_model, tmp_path, random_tokens(500, seed=6))
    n_files = len(files(tmp_path))
    llm.eval(MORE)
    llm.keep_kv()
    assert len(files(tmp_path)) == n_files  # one end took the place of the other
    assert [(text.name, text.n_tokens) for text in llm._library.texts()] == [("a text", 1306), ("", 500)]


def test_a_text_that_another_process_removes_while_they_are_listed(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # once a FileNotFoundError
    write(tiny_model, tmp_path)
    there = set(files(tmp_path))
    write(tiny_model, tmp_path, random_tokens(500, seed=6))
    library, find = Library(tmp_path), Library._blocks

    def found(library: Library) -> Iterator[Any]:
        for path, match in find(library):
            if path not in there:
                path.unlink()
            yield path, match

    monkeypatch.setattr(Library, "_blocks", found)
    assert [text.n_tokens for text in library.texts()] == [1300]


def test_a_name_that_another_process_gives_stays(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # once it was taken for that of a text that is gone
    write(tiny_model, tmp_path)
    library = Library(tmp_path)
    (text,) = library.texts()

    def none_yet(library: Library) -> Iterator[Any]:
        monkeypatch.undo()
        library.name("a name", text.key)
        return iter(())

    monkeypatch.setattr(Library, "_blocks", none_yet)
    Library(tmp_path)
    assert [text.name for text in library.texts()] == ["a name"]


def test_nobody_else_can_read_it(tiny_model: Path, tmp_path: Path) -> None:
    write(tiny_model, tmp_path / "new")
    if os.name != "nt":
        assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
        assert {path.stat().st_mode & 0o777 for path in files(tmp_path / "new")} == {0o600}


def test_the_files_may_be_removed_while_they_are_open(tiny_model: Path, tmp_path: Path) -> None:
    write(tiny_model, tmp_path)
    llm = opened(tiny_model, tmp_path)
    for path in files(tmp_path):
        path.unlink()
    other = read(reader(tiny_model, tmp_path / "other"))
    np.testing.assert_array_equal(feed(llm, MORE), feed(other, MORE))
    assert restore(llm) == restore(other)
    assert cache_of(llm) == cache_of(other)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the system does not list open files")
def test_descriptors_are_closed(tiny_model: Path, tmp_path: Path) -> None:
    def n_open() -> int:
        links = [Path("/proc/self/fd") / each for each in os.listdir("/proc/self/fd")]
        return sum(str(tmp_path) in os.readlink(link) for link in links if link.is_symlink())

    write(tiny_model, tmp_path)
    assert n_open() == 0
    llm = opened(tiny_model, tmp_path)
    assert n_open() == len(files(tmp_path))
    native.restore(ctx_of(llm), 0)
    llm.n_tokens = 300
    llm.eval(random_tokens(20, seed=5))
    assert n_open() == 2  # of 260 and 256 tokens
    llm.reset()
    llm.eval(random_tokens(20, seed=5))
    assert n_open() == 0
    llm._open(TEXT)
    llm.close()
    assert n_open() == 0


@pytest.mark.parametrize("n", [1, 5, 12])
def test_a_full_disk(tiny_model: Path, tmp_path: Path, n: int) -> None:
    write(tiny_model, tmp_path, TEXT[:300])
    before = files(tmp_path)
    llm = read(reader(tiny_model, tmp_path))
    native.fail_cold(n)
    assert llm.keep_kv() == 0
    native.fail_cold(0)
    assert files(tmp_path) == before
    assert sorted(tmp_path.iterdir()) == sorted(before)
    assert answer(llm) == answer(read(reader(tiny_model, tmp_path / "other")))
    assert opened(tiny_model, tmp_path).n_tokens == len(TEXT)  # written after the answer


def test_an_interrupted_opening_leaves_nothing(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    write(tiny_model, tmp_path)
    llm = reader(tiny_model, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(native, "library_open", interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm._open(TEXT)
    assert llm.n_tokens == 0


def test_there_is_no_room_to_open_it(tiny_model: Path, tmp_path: Path) -> None:
    write(tiny_model, tmp_path)
    llm = opened(tiny_model, tmp_path, kv_memory_limit="140KiB")
    assert llm.n_tokens == 0
    assert native.stats(ctx_of(llm)).n_tokens == 0
    llm.eval(TEXT[:50])
    other = reader(tiny_model, None)
    other.eval(TEXT[:50])
    np.testing.assert_array_equal(feed(llm, MORE), feed(other, MORE))


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_file_of_two_names_is_not_damaged(tiny_model: Path, tmp_path: Path) -> None:
    """A backup that shares files with the folder: they are not opened, and stay."""
    write(tiny_model, tmp_path / "library")
    before = files(tmp_path / "library")
    for path in before:
        os.link(path, tmp_path / path.name)
    llm = opened(tiny_model, tmp_path / "library")
    assert llm.n_tokens == 0
    assert llm._library.check_all()[0] == 0
    assert files(tmp_path / "library") == before


def test_the_library_keeps_to_its_limit(tiny_model: Path, tmp_path: Path) -> None:
    write(tiny_model, tmp_path)
    limit = sum(path.stat().st_size for path in files(tmp_path)) * 3 // 2
    write(tiny_model, tmp_path, random_tokens(1300, seed=6), kv_library_limit=limit)
    assert sum(path.stat().st_size for path in files(tmp_path)) <= limit
    assert opened(tiny_model, tmp_path, random_tokens(1300, seed=6)).n_tokens == 1300
    assert 0 < opened(tiny_model, tmp_path).n_tokens < len(TEXT)  # its end went first


def test_a_text_that_is_larger_than_the_limit(tiny_model: Path, tmp_path: Path) -> None:
    write(tiny_model, tmp_path / "whole")
    limit = sum(path.stat().st_size for path in files(tmp_path / "whole")) // 2
    llm = read(reader(tiny_model, tmp_path / "part", kv_library_limit=limit))
    n_kept = llm.keep_kv("part")
    assert 0 < n_kept < len(TEXT)
    assert [(text.name, text.n_tokens) for text in llm._library.texts()] == [("part", n_kept)]
    assert opened(tiny_model, tmp_path / "part").n_tokens == n_kept
    llm = read(reader(tiny_model, tmp_path / "none", kv_library_limit=1))
    assert llm.keep_kv("none") == 0
    assert list((tmp_path / "none").rglob("*")) == []


def test_files_of_others_in_the_folder(tiny_model: Path, tmp_path: Path) -> None:
    """Copies that a program has made of blocks are not read, and nothing but our own files is removed."""
    write(tiny_model, tmp_path)
    others = [tmp_path / ".notes.tmp", tmp_path / ".a-b-c.tmp", tmp_path / "a.block"]
    others += [path.with_name(f"{path.stem} (copy).block") for path in files(tmp_path)]
    for path in others:
        path.write_text("x")
        os.utime(path, (0, 0))
    llm = reader(tiny_model, tmp_path, kv_library_limit=1)
    assert answer(llm) == answer(read(reader(tiny_model, tmp_path / "other")))
    assert llm.kv_stats.n_opened == len(TEXT)
    native.library_tidy(tmp_path, 1)
    llm._library.check_all()
    llm._library.clear()
    assert files(tmp_path) == sorted(path for path in others if path.suffix == ".block")
    assert all(path.exists() for path in others)


@pytest.mark.skipif(os.name == "nt", reason="there are no limits on open files")
def test_what_cannot_be_opened_now_is_not_damaged(tiny_model: Path, tmp_path: Path) -> None:
    import resource

    write(tiny_model, tmp_path)
    llm = reader(tiny_model, tmp_path)
    before = files(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(lowest := os.dup(0))
    # the folder can be listed, and no file in it can be opened
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        llm._open(TEXT)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert llm.n_tokens == 0
    assert files(tmp_path) == before
    llm._open(TEXT)
    assert llm.n_tokens == len(TEXT)


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names of files are text")
def test_names_that_are_no_text(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"\xff")
    llm = read(reader(tiny_model, folder))
    assert llm.keep_kv(os.fsdecode(b"a \xff")) == len(TEXT)
    assert [text.name for text in llm._library.texts()] == ["a \udcff"]
    for path in files(folder):
        path.write_bytes(path.read_bytes()[:-1])
    assert opened(tiny_model, folder).n_tokens == 0


def test_a_prompt_longer_than_the_context(tiny_model: Path, tmp_path: Path) -> None:
    write(tiny_model, tmp_path)
    llm = opened(tiny_model, tmp_path, n_ctx=512)
    assert llm.n_tokens == 512


CHILD = """
import os, signal, sys
sys.path.insert(0, sys.argv[3])
from pathlib import Path
from books import TEXT, read, reader
llm = read(reader(Path(sys.argv[1]), Path(sys.argv[2]), **eval(sys.argv[4])))
"""


def child(model: Path, folder: Path, script: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD + script, str(model), str(folder), str(HELPERS), repr(options)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def run(model: Path, folder: Path, script: str) -> int:
    with child(model, folder, script) as process:
        process.communicate(timeout=60)
    return process.returncode


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
def test_a_writer_that_is_killed(tiny_model: Path, tmp_path: Path) -> None:
    """It has written blocks and a part of one."""
    script = """
import threading
def kill():
    while len(list(Path(sys.argv[2]).glob("*"))) < 4 or not list(Path(sys.argv[2]).glob(".*.tmp")):
        pass
    os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=kill, daemon=True).start()
while True:
    llm.keep_kv()
    for path in Path(sys.argv[2]).glob("*.block"):
        path.unlink()
"""
    assert run(tiny_model, tmp_path, script) == -9
    llm = opened(tiny_model, tmp_path)
    assert llm.n_tokens in {0, len(TEXT), *range(260, len(TEXT), 256)}
    assert [path for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def test_what_is_being_written_stays(tiny_model: Path, tmp_path: Path) -> None:
    """By another machine, unless that began long ago."""
    write(tiny_model, tmp_path)
    mine = tmp_path / ".00000000-1-00000000.tmp"  # of another machine
    old = tmp_path / ".00000000-1-00000001.tmp"
    for path in (mine, old):
        path.write_text("x")
    os.utime(old, (0, 0))
    reader(tiny_model, tmp_path)
    assert mine.exists()
    assert not old.exists()


@pytest.mark.skipif(os.name == "nt", reason="there are no limits on files")
def test_a_file_cannot_grow(tiny_model: Path, tmp_path: Path) -> None:
    """A full disk, as the system says it: a write is refused, or is a part of what was to be written."""
    script = """
import resource
from support import generate
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
print(llm.keep_kv(), len(generate(llm, TEXT)))
"""
    with child(tiny_model, tmp_path, script, kv_cold="memory") as process:
        assert process.communicate(timeout=60)[0] == "0 6\n"
    assert list(tmp_path.iterdir()) == []


def test_two_processes_write_the_same(tiny_model: Path, tmp_path: Path) -> None:
    script = 'print("ready", flush=True); input(); print(llm.keep_kv())'
    children = [child(tiny_model, tmp_path, script) for _ in range(2)]
    for each in children:
        assert each.stdout.readline() == "ready\n"
    for each in children:
        each.stdin.write("\n")
        each.stdin.flush()
    assert [each.communicate(timeout=60)[0] for each in children] == [f"{len(TEXT)}\n"] * 2
    assert len(files(tmp_path)) == 6
    assert opened(tiny_model, tmp_path).n_tokens == len(TEXT)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_child_opens_what_its_parent_has_written(tiny_model: Path, tmp_path: Path) -> None:
    script = """
llm.keep_kv()
if os.fork() == 0:
    other = reader(Path(sys.argv[1]), Path(sys.argv[2]))
    other._open(TEXT)
    os._exit(other.n_tokens != len(TEXT))
raise SystemExit(os.wait()[1])
"""
    assert run(tiny_model, tmp_path, script) == 0


# -- options ----------------


@pytest.mark.parametrize(
    "options", [{"kv_policy": "full"}, {"kv_policy": SnapKV()}, {"kv_evicted": "recompute"}, {"kv_policy": "paper"}]
)
def test_it_needs_codes_and_a_cold_store(tiny_model: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match=r"kv_library: .* must be 'refreekv'"):
        Llama(str(tiny_model), kv_library=tmp_path, **{"kv_policy": POLICY, **options})


def test_a_model_that_cannot_have_it_is_run_without(tiny: Tiny, tmp_path: Path, capsys: Any) -> None:
    llm = reader(tiny("qwen2vl (M-RoPE)"), tmp_path, verbose=True)
    assert "kv_library is not used: positions of this model have several dimensions" in capsys.readouterr().err
    assert llm.keep_kv() == 0
    assert files(tmp_path) == []


@pytest.mark.parametrize("folder", ["", "a\0b", "~nobody-of-this-name/library", 5])
def test_a_folder_that_cannot_be(tiny_model: Path, folder: Any) -> None:
    with pytest.raises(PolicyError, match="kv_library="):
        Llama(str(tiny_model), kv_policy=POLICY, kv_library=folder)


def test_a_name_is_text(tiny_model: Path, tmp_path: Path) -> None:
    llm = read(reader(tiny_model, tmp_path))
    with pytest.raises(TypeError, match="must be text"):
        llm.keep_kv(5)
    assert files(tmp_path) == []
