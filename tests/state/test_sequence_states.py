"""States of contexts with several sequences: llama.cpp's C API, which llama-cpp-python's Llama does not reach."""

from __future__ import annotations

import ctypes
import struct
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from support import Sequences

from refreekv_cpp import ReFreeKV, Streaming, native
from refreekv_cpp.policies import as_policy

POLICY = Streaming(budget=0.3)


def random_tokens(n: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 259, n).tolist()


def whole_state(sequences: Sequences) -> bytes:
    size = llama_cpp.llama_state_get_size(sequences.ctx)
    buffer = (ctypes.c_uint8 * size)()
    return bytes(buffer[: llama_cpp.llama_state_get_data(sequences.ctx, buffer, size)])


def load_whole(sequences: Sequences, state: bytes) -> int:
    return llama_cpp.llama_state_set_data(
        sequences.ctx, (ctypes.c_uint8 * len(state)).from_buffer_copy(state), len(state)
    )


def assert_alike(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> None:
    assert np.abs(a - b).max() < 1e-4 * b.std()


@pytest.mark.parametrize("unified", [True, False])
def test_a_whole_state_of_several_sequences(tiny_model: Path, unified: bool) -> None:
    # with a stream per sequence, the rows of the first moved before what was read for it had been written
    first, second = (Sequences(tiny_model, POLICY, kv_unified=unified) for _ in range(2))
    for seq_id, n in ((0, 1000), (1, 900)):
        first.read(seq_id, random_tokens(n, seq_id))
        native.prune(first.ctx, seq_id)
    state = whole_state(first)
    assert load_whole(second, state) == len(state)
    for seq_id in (0, 1):
        assert second.kept(seq_id) == first.kept(seq_id)
        more = random_tokens(9, 5)
        assert_alike(second.read(seq_id, more), first.read(seq_id, more))


@pytest.mark.parametrize("unified", [True, False])
def test_a_restored_sequence_holds_what_was_saved_and_no_more(tiny_model: Path, unified: bool) -> None:
    # the cells of the sequence that was there before are used again; rows that the state lacks must not stay visible
    saved, other = (Sequences(tiny_model, POLICY, kv_unified=unified) for _ in range(2))
    saved.read(0, random_tokens(1000, 0))
    native.prune(saved.ctx, 0)
    other.read(0, random_tokens(1000, 1))
    assert other.restore(saved.save(0), 0) > 0
    assert other.kept(0) == saved.kept(0)
    assert native.pruned_pos(other.ctx, 0) == 999
    more = random_tokens(9, 5)
    assert_alike(other.read(0, more), saved.read(0, more))


def test_a_damaged_file_harms_no_other_sequence(tiny_model: Path, tmp_path: Path) -> None:
    # its bytes were written as they came; a NaN among them reached the others with weight 0
    sequences, alone = (Sequences(tiny_model, POLICY) for _ in range(2))
    for each in (sequences, alone):
        each.read(1, random_tokens(100, 1))
    sequences.read(0, random_tokens(300, 0))
    path = str(tmp_path / "state").encode()
    tokens = (llama_cpp.llama_token * 1)()
    assert llama_cpp.llama_state_seq_save_file(sequences.ctx, path, 0, tokens, 0) > 0
    data = bytearray((tmp_path / "state").read_bytes())
    data[len(data) // 2 :] = b"\xff" * (len(data) // 4)  # and the rest is missing
    (tmp_path / "state").write_bytes(data)
    assert llama_cpp.llama_state_seq_load_file(sequences.ctx, path, 0, tokens, 1, ctypes.byref(ctypes.c_size_t())) == 0
    more = random_tokens(9, 5)
    assert_alike(sequences.read(1, more), alone.read(1, more))


@pytest.mark.parametrize("policy", [as_policy("full"), POLICY, ReFreeKV(n_min=0)], ids=lambda policy: policy.name)
def test_a_file_whose_end_is_missing_is_refused(tiny_model: Path, tmp_path: Path, policy: Any) -> None:
    # upstream read on beyond the end, and an assertion ended the process
    sequences = Sequences(tiny_model, policy, codes=True)
    sequences.read(0, random_tokens(300, 0))
    if policy.name != "full":
        native.prune(sequences.ctx, 0)
    path = tmp_path / "state"
    tokens = (llama_cpp.llama_token * 1)()
    assert llama_cpp.llama_state_seq_save_file(sequences.ctx, str(path).encode(), 0, tokens, 0) > 0
    data = path.read_bytes()
    for missing in (1, 2, 50, 1000, len(data) - 13, len(data) - 12, len(data) - 3):
        path.write_bytes(data[:-missing])
        n_read = ctypes.c_size_t()
        assert (
            llama_cpp.llama_state_seq_load_file(sequences.ctx, str(path).encode(), 0, tokens, 1, ctypes.byref(n_read))
            == 0
        )
        assert sequences.n_tokens(0) == 0


def test_a_removed_sequence_gives_its_memory_back(tiny_model: Path) -> None:
    sequences = Sequences(tiny_model, POLICY, n_seq_max=3)
    for seq_id in range(3):
        sequences.read(seq_id, random_tokens(1000, seq_id))
    before = native.stats(sequences.ctx).bytes
    assert sequences.remove(1)
    sequences.read(0, [5])
    assert native.stats(sequences.ctx).bytes <= before * 3 // 4


def test_a_layer_that_holds_nothing_can_be_pruned(tiny_model: Path) -> None:
    sequences = Sequences(tiny_model, Streaming(budget=0.3, n_min=0))
    sequences.read(0, random_tokens(600, 0))
    native.keep(sequences.ctx, 0, 2, np.array([], dtype=np.int32))
    native.prune(sequences.ctx, 0)
    assert sequences.kept(0)[2] == []


@pytest.mark.parametrize("budget", [2.0**32 + 300, 1e300, float("inf")])
def test_a_budget_beyond_all_cells_keeps_them(tiny_model: Path, budget: float) -> None:
    sequences = Sequences(tiny_model, Streaming(budget=budget))
    sequences.read(0, random_tokens(1000, 0))
    assert native.prune(sequences.ctx, 0) == 0


def test_a_part_cannot_be_copied_to_another_stream(tiny_model: Path) -> None:
    # upstream ends the process there
    streams = Sequences(tiny_model, POLICY, kv_unified=False)
    streams.read(0, random_tokens(100, 0))
    streams.copy(0, 1, 10, 50)
    assert "only whole sequences" in native.last_error()
    assert streams.n_tokens(1) == 0


def test_states_with_other_layouts_one_after_the_other(tiny_model: Path) -> None:
    """As many layouts, in other layers: ggml's allocator must not take the one graph for the other."""
    for first, second in [([3], [0]), ([0], [3]), ([1], [2]), ([1, 3], [1, 2])]:
        sequences = Sequences(tiny_model, ReFreeKV(n_min=0))
        states = []
        for layers in (first, second):
            sequences.read(0, random_tokens(300, 0))
            for layer in layers:
                native.keep(sequences.ctx, 0, layer, np.delete(np.arange(300, dtype=np.int32), 50))
            states.append(sequences.save(0))
            sequences.remove(0)
        for tokens in ([77], random_tokens(64, seed=7)):
            for state in states:
                sequences.remove(0)
                assert sequences.restore(state, 0)
                logits = sequences.read(0, tokens)
            alone = Sequences(tiny_model, ReFreeKV(n_min=0))
            alone.restore(states[1], 0)
            np.testing.assert_array_equal(logits, alone.read(0, tokens))


@pytest.mark.parametrize("whole", [False, True])
def test_positions_that_cannot_be_removed_are_refused(tiny_model: Path, whole: bool) -> None:
    # once the cells were taken, and could not be removed any more: after some such states there was no room
    sequences = Sequences(tiny_model, POLICY)
    sequences.read(0, random_tokens(100, 0))
    state = bytearray(whole_state(sequences) if whole else sequences.save(0))
    cell = struct.pack("<iIi", 5, 1, 0)  # position, number of sequences, sequence
    at = state.index(cell)
    for pos in (-2, -1, -(2**31), 2**31 - 1):
        state[at : at + 4] = struct.pack("<i", pos)
        assert (load_whole(sequences, state) if whole else sequences.restore(state, 0)) == 0
        assert sequences.remove(0)
        assert native.stats(sequences.ctx).n_tokens == 0


@pytest.mark.parametrize("policy", [POLICY, "full"], ids=["policy", "full"])
def test_a_cell_that_names_a_sequence_twice_is_refused(tiny_model: Path, policy: Any) -> None:
    # once it was taken, and counted twice: the sequence had a last position after its removal
    sequences = Sequences(tiny_model, as_policy(policy))
    sequences.read(0, random_tokens(100, 0))
    sequences.copy(0, 1)
    state = bytearray(whole_state(sequences))
    cell = struct.pack("<iIii", 99, 2, 0, 1)  # position, number of sequences, sequences
    at = state.index(cell)
    state[at : at + 16] = struct.pack("<iIii", 99, 2, 0, 0)
    assert load_whole(sequences, state) == 0
    for seq_id in (0, 1):
        assert sequences.remove(seq_id)
        assert sequences.n_tokens(seq_id) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="it asks for the peak of the memory")
def test_a_name_that_is_too_long_or_empty_is_refused_and_takes_no_memory(tiny_model: Path) -> None:
    # once 4 GiB were allocated and cleared before the state was refused
    import resource

    sequences = Sequences(tiny_model, POLICY)
    sequences.read(0, random_tokens(100, 0))
    state = bytearray(whole_state(sequences))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for length in (2**32 - 1, 0):
        state[:4] = struct.pack("<I", length)  # of the architecture's name
        assert load_whole(sequences, state) == 0
    unit = 1 if sys.platform == "darwin" else 1024
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < 2**28
