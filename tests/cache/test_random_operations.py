"""Random operations on sequences that share a context, each step against a NumPy model of every sequence by itself.

Hypothesis picks the operations and, when a step fails, looks for the shortest list that fails. A few hundred steps by
default; `pytest tests/cache/test_random_operations.py --hypothesis-profile=long` takes 10,000 (see conftest.py).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
import reference
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support import Sequences
from tiny import N_SPECIAL, N_VOCAB, TinyModel

from refreekv_cpp import CacheStateError, ReFreeKV, native

N_SEQ = 3
N_MAX = 900  # tokens of a sequence
MODEL = TinyModel(n_layer=3, n_head=6, n_head_kv=3)

SEQ_IDS = st.integers(0, N_SEQ - 1)
LENGTHS = st.sampled_from([1, 3, 40, 150, 500])
SEEDS = st.integers(0, 2**16)


class Sequence:
    """What one sequence should be."""

    def __init__(self, model: reference.LlamaReference) -> None:
        self.model = model
        self.cells: list[int] = []  # one for each token; a copy within a table has the original's
        self.held: list[set[int]] = [set() for _ in range(model.n_layer)]  # positions
        self.pruned = -1
        self.lost: list[set[int]] = [set() for _ in range(model.n_layer)]  # positions that no cold store has
        self.spans: list[range] = []  # protected positions

    def copy(self) -> Sequence:
        res = Sequence(self.model.copy())
        res.cells, res.held, res.pruned = list(self.cells), [set(layer) for layer in self.held], self.pruned
        res.lost = [set(layer) for layer in self.lost]
        res.spans = list(self.spans)
        return res

    @property
    def missing(self) -> list[set[int]]:
        return [set(range(len(self.cells))) - layer for layer in self.held]

    def protects(self, pos: int) -> bool:
        return any(pos in span for span in self.spans)

    def bring_back(self, cells: set[int]) -> None:
        """Those of these that it has, in every layer."""
        positions = {pos for pos, cell in enumerate(self.cells) if cell in cells}
        for layer, held in enumerate(self.held):
            held |= positions
            self.model.bring_back(layer, positions)

    def keep(self, layer: int, positions: set[int]) -> None:
        if positions != self.held[layer]:
            self.pruned = len(self.cells) - 1
        self.held[layer] = positions
        self.model.keep(layer, sorted(positions))

    def rewind(self, n_tokens: int) -> None:
        self.model.rewind(n_tokens)
        del self.cells[n_tokens:]
        self.held = [{pos for pos in layer if pos < n_tokens} for layer in self.held]
        self.lost = [{pos for pos in layer if pos < n_tokens} for layer in self.lost]
        self.spans = [range(span.start, min(span.stop, n_tokens)) for span in self.spans]


class State:
    """A state of some sequences, as llama.cpp saved it, and what they should be once it is loaded."""

    def __init__(self, data: bytes, saved: list[Sequence], context: list[Sequence], *, has_cold: bool) -> None:
        self.data = data
        self.sequences = [sequence.copy() for sequence in saved]
        # it knows of cells which lie behind a pruning, not of which sequence
        behind = {cell for sequence in context for cell in sequence.cells[: sequence.pruned + 1]}
        for sequence in self.sequences:
            if not has_cold:
                sequence.lost = sequence.missing
            sequence.spans = []
            sequence.pruned = max((pos for pos, cell in enumerate(sequence.cells) if cell in behind), default=-1)

    def buffer(self) -> ctypes.Array[ctypes.c_uint8]:
        return (ctypes.c_uint8 * len(self.data)).from_buffer_copy(self.data)


# without it most steps would find nothing to work on
filled = precondition(lambda machine: not machine.is_empty)


class Operations(RuleBasedStateMachine):
    states = Bundle("states")
    whole_states = Bundle("whole_states")

    def __init__(self, path: Path, unified: bool, cold: str | None, cold_state: bool) -> None:
        super().__init__()
        self.unified = unified
        self.cold_state = cold_state
        self.has_cold = cold is not None
        self.model = reference.LlamaReference(path)
        self.sequences = [self.empty() for _ in range(N_SEQ)]
        cold_options = (
            {"cold": native.enum_value(cold), "cold_dir": str(path.parent), "cold_state": cold_state} if cold else {}
        )
        self.native = Sequences(
            path,
            ReFreeKV(n_min=0),
            cold=cold_options,
            n_seq_max=N_SEQ,
            kv_unified=unified,
            n_ctx=N_SEQ * 1024,
            n_batch=N_SEQ * 1024,
        )
        self.n_cells = 0

    def teardown(self) -> None:
        self.native.close()  # a machine that failed is part of cycles, which are freed in any order

    @property
    def is_empty(self) -> bool:
        return not any(sequence.cells for sequence in self.sequences)

    def empty(self) -> Sequence:
        return Sequence(self.model.copy())

    def new_cells(self, n: int) -> list[int]:
        self.n_cells += n
        return list(range(self.n_cells - n, self.n_cells))

    def shared(self, cell: int) -> bool:
        return sum(cell in sequence.cells for sequence in self.sequences) > 1

    @filled
    @rule(data=st.booleans())
    def clear(self, data: bool) -> None:
        llama_cpp.llama_memory_clear(self.native.memory, data)
        self.sequences = [self.empty() for _ in range(N_SEQ)]

    @rule(seq_id=SEQ_IDS, length=LENGTHS, seed=SEEDS)
    def read(self, seq_id: int, length: int, seed: int) -> None:
        self.read_together({seq_id: length}, seed)

    @rule(lengths=st.dictionaries(SEQ_IDS, LENGTHS, min_size=2), seed=SEEDS)
    def read_together(self, lengths: dict[int, int], seed: int) -> None:
        rng = np.random.default_rng(seed)
        batch = {
            seq_id: rng.integers(N_SPECIAL, N_VOCAB, n_tokens).tolist()
            for seq_id, n_tokens in lengths.items()
            if len(self.sequences[seq_id].cells) + n_tokens <= N_MAX
        }
        if not batch:
            return
        logits = self.native.read_together(batch)
        for seq_id, tokens in batch.items():
            sequence = self.sequences[seq_id]
            first = len(sequence.cells)
            sequence.cells += self.new_cells(len(tokens))
            for layer in sequence.held:
                layer.update(range(first, len(sequence.cells)))
            expected = sequence.model.read(tokens)[-1]
            assert np.abs(logits[seq_id] - expected).max() < 1e-3 * expected.std(), f"logits of {seq_id}"

    @filled
    @rule(seq_id=SEQ_IDS, layer=st.integers(0, 100), part=st.floats(0, 1), seed=SEEDS)
    def keep(self, seq_id: int, layer: int, part: float, seed: int) -> None:
        sequence = self.sequences[seq_id]
        layer %= self.model.n_layer
        n = len(sequence.cells)
        if n == 0:
            return
        wanted = set(np.random.default_rng(seed).choice(n, int(part * n), replace=False).tolist())
        before = sequence.held[layer]
        after = {pos for pos in before if pos in wanted or self.shared(sequence.cells[pos]) or sequence.protects(pos)}
        n_evicted = native.keep(self.native.ctx, seq_id, layer, np.array(sorted(wanted), dtype=np.int32))
        assert n_evicted == len(before) - len(after)
        sequence.keep(layer, after)

    @filled
    @rule(seq_id=SEQ_IDS)
    def prune(self, seq_id: int) -> None:
        sequence = self.sequences[seq_id]
        if not sequence.cells:
            return
        try:
            n_evicted = native.prune(self.native.ctx, seq_id)
        except CacheStateError:
            return  # no query is left: checked elsewhere, here just that it changes nothing
        # which cells is checked elsewhere; none that another sequence needs
        n_expected = 0
        for layer, after in enumerate(map(set, self.native.kept(seq_id))):
            before = sequence.held[layer]
            assert after <= before
            assert not any(self.shared(sequence.cells[pos]) or sequence.protects(pos) for pos in before - after)
            n_expected += len(before - after)
            sequence.keep(layer, after)
        assert n_evicted == n_expected

    @filled
    @rule(seq_id=SEQ_IDS, start=st.integers(0, N_MAX), length=st.integers(0, 300))
    def protect(self, seq_id: int, start: int, length: int) -> None:
        if self.sequences[seq_id].cells:
            native.protect(self.native.ctx, seq_id, start, start + length)
            self.sequences[seq_id].spans.append(range(start, start + length))

    @filled
    @rule(seq_id=SEQ_IDS, back=st.integers(1, N_MAX))
    def rewind(self, seq_id: int, back: int) -> None:
        sequence = self.sequences[seq_id]
        n = len(sequence.cells)
        if n == 0:
            return
        to = max(0, sequence.pruned - 20, n - back)
        allowed = to == 0 or to > sequence.pruned or self.can_restore(seq_id, to)
        assert self.native.remove(seq_id, to) == allowed
        if to == 0:
            self.sequences[seq_id] = self.empty()
        elif allowed:
            if to <= sequence.pruned:
                self.restored(seq_id, to)
            sequence.rewind(to)

    def can_restore(self, seq_id: int, n_tokens: int) -> bool:
        """The first tokens of a sequence."""
        sequence = self.sequences[seq_id]
        missing = [{pos for pos in layer if pos < n_tokens} for layer in sequence.missing]
        if not self.has_cold:
            return not any(missing)
        return not any(layer & lost for layer, lost in zip(missing, sequence.lost, strict=True))

    def restored(self, seq_id: int, n_tokens: int) -> None:
        cells = set(self.sequences[seq_id].cells[:n_tokens])
        for sequence in self.sequences:
            sequence.bring_back(cells)
        self.sequences[seq_id].pruned = -1
        for sequence in self.sequences:
            if (self.unified or sequence is self.sequences[seq_id]) and not any(sequence.missing):
                sequence.pruned = -1

    @filled
    @rule(to=st.integers(0, N_MAX))
    def rewind_all(self, to: int) -> None:
        for seq_id, sequence in enumerate(self.sequences):
            n = len(sequence.cells)
            if 0 < to < n and to <= sequence.pruned:
                if not self.can_restore(seq_id, n):
                    assert not self.native.remove(-1, to)
                    return
                self.restored(seq_id, n)  # a later one may refuse: it stays whole
        assert self.native.remove(-1, to)
        for seq_id, sequence in enumerate(self.sequences):
            if to == 0:
                self.sequences[seq_id] = self.empty()
            elif to < len(sequence.cells):
                sequence.rewind(to)

    @filled
    @rule(seq_id=SEQ_IDS)
    def restore(self, seq_id: int) -> None:
        n_tokens = len(self.sequences[seq_id].cells)
        if n_tokens == 0:
            return
        if not self.can_restore(seq_id, n_tokens):
            with pytest.raises(CacheStateError, match="were not kept"):
                native.restore(self.native.ctx, seq_id)
            return
        native.restore(self.native.ctx, seq_id)
        self.restored(seq_id, n_tokens)

    @filled
    @rule(seq_id=SEQ_IDS)
    def remove(self, seq_id: int) -> None:
        assert self.native.remove(seq_id)
        self.sequences[seq_id] = self.empty()

    @filled
    @rule(seq_id=SEQ_IDS, to=SEQ_IDS)
    def copy(self, seq_id: int, to: int) -> None:
        sequence = self.sequences[seq_id]
        if to == seq_id or not sequence.cells:
            return
        occupied = bool(self.sequences[to].cells)
        if occupied and self.sequences[to].pruned < 0 and self.unified:
            return  # they would be one sequence with every position twice
        self.native.copy(seq_id, to)
        if occupied and self.sequences[to].pruned >= 0:
            assert "was pruned; remove it" in native.last_error()
            return
        self.sequences[to] = sequence.copy()
        if not self.unified:
            self.sequences[to].cells = self.new_cells(len(sequence.cells))

    @filled
    @rule(seq_id=SEQ_IDS, to=SEQ_IDS, part=st.floats(0.01, 0.99))
    def copy_the_beginning(self, seq_id: int, to: int, part: float) -> None:
        sequence = self.sequences[seq_id]
        n = len(sequence.cells)
        end = int(part * n)
        if to == seq_id or self.sequences[to].cells or not 0 < end < n:
            return
        self.native.copy(seq_id, to, 0, end)
        if not self.unified:
            assert "only whole sequences" in native.last_error()
            return
        if sequence.pruned >= 0:
            if not self.can_restore(seq_id, n):
                assert "a part of sequence" in native.last_error()
                return
            self.restored(seq_id, n)
        self.sequences[to] = sequence.copy()
        self.sequences[to].spans = [*sequence.spans]
        self.sequences[to].rewind(end)
        self.sequences[to].spans = [*sequence.spans]  # of what is still to come, too

    @filled
    @rule(seq_id=SEQ_IDS)
    def seq_keep(self, seq_id: int) -> None:
        llama_cpp.llama_memory_seq_keep(self.native.memory, seq_id)
        if self.unified:
            for other in set(range(N_SEQ)) - {seq_id}:
                self.sequences[other] = self.empty()

    @filled
    @rule(target=states, seq_id=SEQ_IDS)
    def save(self, seq_id: int) -> State | MultipleResults[State]:
        if not self.sequences[seq_id].cells:
            return multiple()  # upstream loads the state of an empty sequence by doing nothing
        ctx = self.native.ctx
        buffer = (ctypes.c_uint8 * llama_cpp.llama_state_seq_get_size(ctx, seq_id))()
        assert llama_cpp.llama_state_seq_get_data(ctx, buffer, len(buffer), seq_id) == len(buffer)
        return State(bytes(buffer), [self.sequences[seq_id]], self.sequences, has_cold=self.cold_state)

    @rule(seq_id=SEQ_IDS, state=states)
    def load(self, seq_id: int, state: State) -> None:
        n_read = llama_cpp.llama_state_seq_set_data(self.native.ctx, state.buffer(), len(state.data), seq_id)
        assert n_read == len(state.data)
        self.sequences[seq_id] = state.sequences[0].copy()
        self.sequences[seq_id].cells = self.new_cells(len(state.sequences[0].cells))

    @rule(target=whole_states)
    def save_all(self) -> State:
        ctx = self.native.ctx
        buffer = (ctypes.c_uint8 * llama_cpp.llama_state_get_size(ctx))()
        n_written = llama_cpp.llama_state_get_data(ctx, buffer, len(buffer))
        return State(bytes(buffer[:n_written]), self.sequences, self.sequences, has_cold=self.cold_state)

    @rule(state=whole_states)
    def load_all(self, state: State) -> None:
        n_read = llama_cpp.llama_state_set_data(self.native.ctx, state.buffer(), len(state.data))
        assert n_read == len(state.data)
        self.sequences = [sequence.copy() for sequence in state.sequences]

    @invariant()
    def every_sequence_is_as_expected(self) -> None:
        for seq_id, sequence in enumerate(self.sequences):
            assert self.native.n_tokens(seq_id) == len(sequence.cells)
            assert native.pruned_pos(self.native.ctx, seq_id) == sequence.pruned, f"pruned_pos of {seq_id}"
            assert self.native.kept(seq_id) == [sorted(layer) for layer in sequence.held], f"cells of {seq_id}"


@pytest.mark.parametrize(
    ("unified", "cold", "cold_state"),
    [
        (True, None, True),
        (False, None, True),
        (True, "COLD_MEMORY", False),
        (True, "COLD_FILE", True),
        (False, "COLD_FILE", True),
    ],
)
def test_random_operations(tmp_path: Path, unified: bool, cold: str | None, cold_state: bool) -> None:
    path = tmp_path / "model.gguf"
    MODEL.write(path)
    machine: Callable[[], Operations] = lambda: Operations(path, unified, cold, cold_state)  # noqa: E731
    run_state_machine_as_test(machine)
