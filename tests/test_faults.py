"""Faults while decoding: evicted blocks that an answer looks at take part in its attention, from the cold store."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from policies import Debug
from support import CACHE_TYPES, Sequences, ctx_of, feed, kept, load, logits
from test_python_policy import PythonStreaming
from tiny import TinyModel, random_tokens
from tiny_architectures import ARCHITECTURES, Architecture

from refreekv_cpp import Llama, PolicyError, SnapKV, UnsupportedModelError, native
from refreekv_cpp.faults import TOLERANCE as DEFAULT

PROMPT = random_tokens(1024)
ANSWER = random_tokens(8, seed=1)
POLICY = SnapKV(budget=384, n_min=0)

EVERY = 1e-12
"""A tolerance that everything is above: what decoding sees is the full cache."""

SHAPES = {
    "heads of 16": TinyModel(),
    "heads of 64": TinyModel(n_embd=128, n_embd_head=64),
    "heads of 128, 7 to a KV head": TinyModel(n_embd=128, n_embd_head=128, n_head=7, n_head_kv=1),
    "heads of 80": TinyModel(n_embd=128, n_embd_head=80),
}
CACHES: dict[str, dict[str, Any]] = {
    "f32": {"type_k": CACHE_TYPES["f32"], "type_v": CACHE_TYPES["f32"]},
    "f16": {},
    "f16, flash attention": {"flash_attn": True},
    "q8_0": {"flash_attn": True, "type_k": CACHE_TYPES["q8_0"], "type_v": CACHE_TYPES["q8_0"]},
}
# upstream rounds queries and weights; with flash attention, sums of V are f16
ERROR = {"f32": 1e-5, "f16": 1e-3, "f16, flash attention": 1e-2, "q8_0": 1e-2}


@pytest.fixture(autouse=True)
def all_writes_work() -> Iterator[None]:
    yield
    native.fail_cold(0)
    native.fail_allocation(0)


def read(path: Path, faults: float | bool, *, prune: bool = True, **options: Any) -> Llama:
    llm = load(path, POLICY, kv_faults=faults, **options)
    llm.eval(PROMPT)
    if prune:
        assert llm.prune_kv() > 0
    return llm


def assert_near(ours: npt.NDArray[np.float32], full: npt.NDArray[np.float32], error: float) -> None:
    assert np.abs(ours - full).max() <= error * np.abs(full).max()


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("shape", SHAPES)
def test_when_everything_counts_the_answer_is_the_full_caches(tmp_path: Path, shape: str, cache: str) -> None:
    if cache == "q8_0" and SHAPES[shape].n_embd_head % 32:
        pytest.skip("llama.cpp has no such cache")
    SHAPES[shape].write(tmp_path / "model.gguf")
    full = feed(read(tmp_path / "model.gguf", False, prune=False, **CACHES[cache]), ANSWER)
    without = feed(read(tmp_path / "model.gguf", False, **CACHES[cache]), ANSWER)

    llm = read(tmp_path / "model.gguf", EVERY, **CACHES[cache])
    ours = feed(llm, ANSWER)
    assert_near(ours, full, ERROR[cache])
    assert np.abs(without - full).max() > 3 * np.abs(ours - full).max(), "evicting makes no difference here"

    stats = llm.kv_stats
    assert stats.n_faults > 0
    assert 0 < stats.bytes_sketch < stats.bytes_cold


@pytest.mark.parametrize("kind", ["gemma2", "gpt-oss"], ids=["soft-cap, sliding windows", "sinks"])
def test_other_kinds_of_attention(tiny: Callable[[str], Path], kind: str) -> None:
    model = tiny(next(title for title in ARCHITECTURES if title.startswith(kind)))
    full, ours = (feed(read(model, EVERY, prune=prune, **CACHES["f32"]), ANSWER) for prune in (False, True))
    assert_near(ours, full, 1e-4)


@pytest.mark.parametrize("n", [5, 11, 32])
def test_batches_of_drafts_and_sequences_have_faults_too(tiny: Callable[[str], Path], n: int) -> None:
    """Batches of more than 4 tokens were decoded without what was evicted."""
    tokens, answers = random_tokens(n, seed=2), []
    for prune in (False, True):
        llm = read(tiny("gqa64"), EVERY, prune=prune, **CACHES["f32"])
        llm.eval(tokens)
        answers.append(logits(llm))
    assert_near(answers[1], answers[0], ERROR["f16, flash attention"])  # the full cache's by upstream's operations
    assert llm.kv_stats.n_faults > 0


def test_layers_with_other_numbers_of_heads(tmp_path: Path) -> None:
    # upstream pads rows of a transposed V to the widest layer's
    path = tmp_path / "model.gguf"
    Architecture("openelm", keys={"attention.head_count_kv": [1, 2, 4, 1]}).write(path)
    full = feed(read(path, False, prune=False, **CACHES["f32"]), ANSWER)
    llm = read(path, EVERY, **CACHES["f32"])
    assert_near(feed(llm, ANSWER), full, ERROR["f32"])
    assert llm.kv_stats.n_faults > 0


@pytest.mark.parametrize(
    "options",
    [
        {"kv_prune_every": 4},
        {"kv_policy": PythonStreaming()},
        {"kv_protect": [(100, 200)]},
        {"kv_cold": "memory"},
    ],
    ids=str,
)
def test_with_the_other_options(tiny: Callable[[str], Path], options: dict[str, Any]) -> None:
    def answer(**more: Any) -> list[int]:
        llm = Llama(str(tiny("gqa64")), n_ctx=2048, n_threads=1, verbose=False, **CACHES["f32"], **more)
        return [token for token, _ in zip(llm.generate(PROMPT, temp=0), range(12), strict=False)]

    assert answer(**{"kv_policy": POLICY, "kv_faults": EVERY, **options}) == answer(kv_policy="full")


def test_below_the_tolerance_nothing_changes(tiny: Callable[[str], Path]) -> None:
    with_faults, without = read(tiny("gqa64"), 0.999), read(tiny("gqa64"), False)
    np.testing.assert_array_equal(feed(with_faults, ANSWER), feed(without, ANSWER))
    assert with_faults.kv_stats.n_faults == 0
    assert without.kv_stats.bytes_sketch == 0


def test_blocks_count_by_what_they_would_draw(tiny: Callable[[str], Path]) -> None:
    faults, distance = [], []
    full = feed(read(tiny("gqa64"), False, prune=False), ANSWER)
    for tolerance in (0.3, 0.1, 0.03, EVERY):
        llm = read(tiny("gqa64"), tolerance)
        distance.append(np.abs(feed(llm, ANSWER) - full).max())
        faults.append(llm.kv_stats.n_faults)
    assert faults == sorted(faults)
    assert faults[0] < faults[-1]
    assert distance[-1] < distance[0]


def test_what_is_missed_is_below_the_tolerance_all_together(tmp_path: Path) -> None:
    TinyModel(n_layer=1).write(tmp_path / "model.gguf")
    full = read(tmp_path / "model.gguf", False, prune=False, **CACHES["f32"])
    full.eval(ANSWER[:1])
    attention = native.read_attention(ctx_of(full), 0, 0)[:, -1]  # of all heads, in cells

    def shares(llm: Llama) -> npt.NDArray[np.float32]:
        """What each head gives to each block of evicted cells: [n_head, n_block]."""
        evicted = sorted(set(range(len(PROMPT))) - set(kept(llm)[0]))
        return np.array([attention[:, evicted[i : i + 64]].sum(axis=1) for i in range(0, len(evicted), 64)]).T

    of_one_block, together = [], []
    for tolerance in (0.4, 0.2, 0.1, 0.05):
        llm = read(tmp_path / "model.gguf", tolerance, **CACHES["f32"])
        of_blocks = np.sort(shares(llm), axis=1)
        llm.eval(ANSWER[:1])
        missed = np.cumsum(of_blocks, axis=1) <= tolerance
        together.append(max(np.sum(~missed, axis=1)))  # of one head, at least
        of_one_block.append(np.any(of_blocks > tolerance, axis=0).sum())
        assert together[-1] <= llm.kv_stats.n_faults <= np.sum(~missed)
    assert max(np.subtract(together, of_one_block)) >= 3, "blocks that count by themselves would do"


def test_the_number_of_threads_changes_no_bit_of_it(tiny: Callable[[str], Path]) -> None:
    answers = []
    for n_threads in (1, 3):
        llm = read(tiny("gqa64"), 0.03)
        llama_cpp.llama_set_n_threads(ctx_of(llm), n_threads, 1)
        answers.append(feed(llm, ANSWER))
    np.testing.assert_array_equal(*answers)


@pytest.mark.parametrize("kv_unified", [True, False])
def test_two_sequences_see_their_own(tiny: Callable[[str], Path], kv_unified: bool) -> None:
    cold = {"cold": native.enum_value("COLD_MEMORY"), "fault_mass": EVERY}

    def answers(prune: bool) -> list[npt.NDArray[np.float32]]:
        sequences = Sequences(tiny("gqa64"), POLICY, cold=cold, kv_unified=kv_unified)
        for i in range(4):
            sequences.read_together({s: random_tokens(230, seed=10 * i + s) for s in range(2)})
        for s in range(2):
            if prune:
                assert native.prune(sequences.ctx, s) > 0
        res = [sequences.read_together({s: [ANSWER[i]] for s in range(2)}) for i in range(4)]
        assert native.stats(sequences.ctx).n_faults > 0 or not prune
        return [row[s] for row in res for s in range(2)]

    for ours, full in zip(answers(True), answers(False), strict=True):
        assert_near(ours, full, 1e-5)


def test_a_copied_sequence_has_them_too(tiny: Callable[[str], Path]) -> None:
    cold = {"cold": native.enum_value("COLD_MEMORY"), "fault_mass": EVERY}
    for kv_unified in (True, False):
        answers = []
        for prune in (False, True):
            sequences = Sequences(tiny("gqa64"), POLICY, cold=cold, kv_unified=kv_unified)
            sequences.read(0, PROMPT)
            if prune:
                assert native.prune(sequences.ctx, 0) > 0
            sequences.copy(0, 1)
            sequences.remove(0)
            answers.append(sequences.read(1, ANSWER[:1]))
        assert_near(answers[1], answers[0], 1e-5)


def test_what_came_back_is_not_there_twice(tiny: Callable[[str], Path]) -> None:
    llm, full = read(tiny("gqa64"), EVERY), read(tiny("gqa64"), EVERY, prune=False)
    native.restore(ctx_of(llm), 0)
    assert llm.kv_stats.bytes_sketch == 0
    np.testing.assert_array_equal(feed(llm, ANSWER), feed(full, ANSWER))
    assert llm.kv_stats.n_faults == 0


def test_going_back_and_pruning_again(tiny: Callable[[str], Path]) -> None:
    # cells that are written anew have other keys
    llm, full = read(tiny("gqa64"), EVERY, **CACHES["f32"]), read(tiny("gqa64"), EVERY, prune=False, **CACHES["f32"])
    for each in (llm, full):
        each.n_tokens = 500
        each.eval(random_tokens(400, seed=7))
    assert llm.prune_kv() > 0
    assert_near(feed(llm, ANSWER), feed(full, ANSWER), ERROR["f32"])
    llm.prune_kv()  # what was generated, on top of what is gone
    for each in (llm, full):
        each.eval(random_tokens(300, seed=8)[:1])
    assert_near(feed(llm, ANSWER), feed(full, ANSWER), ERROR["f32"])


def test_they_survive_saving_and_loading(tiny: Callable[[str], Path]) -> None:
    llm = read(tiny("gqa64"), EVERY, **CACHES["f32"])
    other = load(tiny("gqa64"), POLICY, kv_faults=EVERY, **CACHES["f32"])
    other.load_state(llm.save_state())
    assert other.kv_stats.bytes_sketch > 0
    assert_near(feed(other, ANSWER), feed(llm, ANSWER), 1e-6)
    assert other.kv_stats.n_faults > 0

    llm.reset()
    llm.eval(PROMPT[:100])
    assert llm.kv_stats.bytes_sketch == 0


def test_smaller_rows_wait_for_faults_too(tiny: Callable[[str], Path]) -> None:
    full = feed(read(tiny("gqa64"), False, prune=False), ANSWER)
    assert_near(feed(read(tiny("gqa64"), EVERY, kv_cold_type="q8_0"), ANSWER), full, 2e-2)


def test_rows_that_the_store_has_no_room_for_are_missed_and_nothing_else(tiny: Callable[[str], Path]) -> None:
    llm = read(tiny("gqa64"), EVERY, prune=False)
    native.fail_cold(1)
    assert llm.prune_kv() > 0
    assert llm.kv_stats.cold_full
    assert llm.kv_stats.bytes_sketch == 0
    np.testing.assert_array_equal(feed(llm, ANSWER), feed(read(tiny("gqa64"), False), ANSWER))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="finds the file there")
def test_a_file_that_is_cut_is_no_end_of_the_answer(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    llm = read(tiny("gqa64"), EVERY, kv_cold="file", kv_cold_dir=tmp_path)
    for fd in Path("/proc/self/fd").iterdir():
        if os.path.exists(fd) and str(tmp_path) in os.readlink(fd):
            os.truncate(fd, 0)
    np.testing.assert_array_equal(feed(llm, ANSWER), feed(read(tiny("gqa64"), False), ANSWER))
    assert llm.kv_stats.n_faults == 0


@pytest.mark.parametrize("value", [-0.1, 1, 1.5, "yes"])
def test_tolerances_that_are_none(value: Any) -> None:
    with pytest.raises(PolicyError, match=r"kv_faults=.*: valid are True, False, and a tolerance between 0 and 1"):
        Llama("no such model", kv_policy="refreekv", kv_faults=value)


def test_options_that_exclude_them(tiny: Callable[[str], Path]) -> None:
    with pytest.raises(PolicyError, match="kv_faults=True: needs kv_evicted='restore', not 'drop'"):
        Llama("no such model", kv_policy="refreekv", kv_faults=True, kv_evicted="drop")
    alibi = tiny(next(title for title in ARCHITECTURES if title.startswith("mpt")))
    with pytest.raises(
        UnsupportedModelError, match="faults: attention with ALiBi is not supported; leave kv_faults out"
    ):
        load(alibi, POLICY, kv_faults=True)
    assert load(tiny("gqa64"), "full", kv_faults=True).kv_faults == 0  # nothing is evicted


def test_they_are_there_where_they_can_be(tiny: Callable[[str], Path]) -> None:
    assert load(tiny("gqa64"), POLICY, kv_faults=None).kv_faults == pytest.approx(DEFAULT)
    assert load(tiny("gqa64"), POLICY, kv_faults=0.2).kv_faults == pytest.approx(0.2)
    assert load(tiny("gqa64"), POLICY, kv_faults=None, kv_evicted="drop").kv_faults == 0
    assert load(tiny("gqa64"), "full", kv_faults=None).kv_faults == 0
    alibi = tiny(next(title for title in ARCHITECTURES if title.startswith("mpt")))
    llm = load(alibi, POLICY, kv_faults=None)
    assert llm.kv_faults == 0
    llm.eval(PROMPT)
    assert llm.prune_kv() > 0
    feed(llm, ANSWER)


def test_where_rows_are_moved_by_graphs(tiny: Callable[[str], Path]) -> None:
    # as on a device, but for the memory: sketches are made of rows that the host can see
    llm = load(tiny("gqa64"), Debug(policy=POLICY, by_graph=True), kv_faults=EVERY)
    llm.eval(PROMPT)
    llm.prune_kv()
    full = feed(read(tiny("gqa64"), False, prune=False), ANSWER)
    assert_near(feed(llm, ANSWER), full, ERROR["f16"])


def whole_state(sequences: Sequences) -> Any:
    size = llama_cpp.llama_state_get_size(sequences.ctx)
    buffer = (ctypes.c_uint8 * size)()
    assert llama_cpp.llama_state_get_data(sequences.ctx, buffer, size) == size
    return buffer


def test_a_loaded_block_is_of_one_sequence(tiny: Callable[[str], Path]) -> None:
    # evicted before a copy and shared with it, and evicted after it: in the state they lie beside each other
    cold = {"cold": native.enum_value("COLD_MEMORY"), "fault_mass": EVERY}
    policy = Debug(policy=PythonStreaming())
    sequences = Sequences(tiny("gqa64"), policy, cold=cold)

    def keep(positions: list[int]) -> None:
        for layer in range(4):
            native.keep(sequences.ctx, 0, layer, np.array(positions))

    sequences.read(0, random_tokens(300))
    keep([0, *range(280, 300)])
    sequences.copy(0, 1)
    sequences.read(0, random_tokens(300, seed=3))
    keep([0, *range(580, 600)])
    state = whole_state(sequences)

    other = Sequences(tiny("gqa64"), policy, cold=cold)
    assert llama_cpp.llama_state_set_data(other.ctx, state, len(state)) == len(state)
    for seq_id in range(2):
        assert_near(other.read(seq_id, [5]), sequences.read(seq_id, [5]), 1e-5)


def test_a_copy_that_the_store_has_no_room_for_is_missed(tiny: Callable[[str], Path]) -> None:
    answers = []
    for faults in (EVERY, 0.0):
        cold = {"cold": native.enum_value("COLD_MEMORY"), "fault_mass": faults}
        sequences = Sequences(tiny("gqa64"), POLICY, cold=cold, kv_unified=False)
        sequences.read(0, PROMPT)
        assert native.prune(sequences.ctx, 0) > 0
        native.fail_cold(1)
        sequences.copy(0, 1)
        native.fail_cold(0)
        answers.append(sequences.read(1, ANSWER[:1]))
        assert native.stats(sequences.ctx).n_faults == 0
        sequences.close()
    np.testing.assert_array_equal(*answers)
