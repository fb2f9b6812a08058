"""Random operations on sequences that share a context, each step against a NumPy model of every sequence by itself."""

from __future__ import annotations

from pathlib import Path

import llama_cpp
import numpy as np
import pytest
import reference
from support import Sequences
from tiny import N_SPECIAL, N_VOCAB

from refreekv_cpp import CacheStateError, ReFreeKV, native

N_SEQ = 3
N_STEPS = 40
N_MAX = 900  # tokens of a sequence

OPERATIONS = {
    "read": 6,
    "read_together": 3,
    "keep": 4,
    "prune": 3,
    "rewind": 3,
    "remove": 1,
    "copy": 4,
    "seq_keep": 1,
}


class Sequence:
    """What one sequence should be."""

    def __init__(self, model: reference.LlamaReference) -> None:
        self.model = model
        self.cells: list[int] = []  # one for each token; a copy within a table has the original's
        self.held: list[set[int]] = [set() for _ in range(model.n_layer)]  # positions
        self.pruned = -1

    def copy(self) -> Sequence:
        res = Sequence(self.model.copy())
        res.cells, res.held, res.pruned = list(self.cells), [set(layer) for layer in self.held], self.pruned
        return res

    def keep(self, layer: int, positions: set[int]) -> None:
        if positions != self.held[layer]:
            self.pruned = len(self.cells) - 1
        self.held[layer] = positions
        self.model.keep(layer, sorted(positions))

    def rewind(self, n_tokens: int) -> None:
        self.model.rewind(n_tokens)
        del self.cells[n_tokens:]
        self.held = [{pos for pos in layer if pos < n_tokens} for layer in self.held]


class Machine:
    def __init__(self, path: Path, *, unified: bool, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.unified = unified
        self.model = reference.LlamaReference(path)
        self.sequences = [Sequence(self.model.copy()) for _ in range(N_SEQ)]
        self.native = Sequences(path, ReFreeKV(n_min=0), n_seq_max=N_SEQ, kv_unified=unified, n_ctx=N_SEQ * 1024)
        self.n_cells = 0
        self.log: list[str] = []

    def run(self, operation: str) -> None:
        seq_id = int(self.rng.integers(N_SEQ))
        self.log.append(f"{operation} {seq_id} of {len(self.sequences[seq_id].cells)}")
        getattr(self, operation)(seq_id, self.sequences[seq_id])

    def new_cells(self, n: int) -> list[int]:
        self.n_cells += n
        return list(range(self.n_cells - n, self.n_cells))

    def shared(self, cell: int) -> bool:
        return sum(cell in sequence.cells for sequence in self.sequences) > 1

    # operations

    def read(self, seq_id: int, sequence: Sequence) -> None:
        self.read_batch([seq_id])

    def read_together(self, seq_id: int, sequence: Sequence) -> None:
        self.read_batch(range(N_SEQ))

    def read_batch(self, seq_ids) -> None:
        batch = {}
        for seq_id in seq_ids:
            n_tokens = int(self.rng.choice([1, 3, 40, 150]))
            if len(self.sequences[seq_id].cells) + n_tokens <= N_MAX:
                batch[seq_id] = self.rng.integers(N_SPECIAL, N_VOCAB, n_tokens).tolist()
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
            assert np.abs(logits[seq_id] - expected).max() < 1e-3 * expected.std(), f"logits of {seq_id}: {self.log}"

    def keep(self, seq_id: int, sequence: Sequence) -> None:
        n = len(sequence.cells)
        if n == 0:
            return
        layer = int(self.rng.integers(self.model.n_layer))
        wanted = set(self.rng.choice(n, self.rng.integers(0, n + 1), replace=False).tolist())
        before = sequence.held[layer]
        after = {pos for pos in before if pos in wanted or self.shared(sequence.cells[pos])}
        n_evicted = native.keep(self.native.ctx, seq_id, layer, np.array(sorted(wanted), dtype=np.int32))
        assert n_evicted == len(before) - len(after), self.log
        sequence.keep(layer, after)

    def prune(self, seq_id: int, sequence: Sequence) -> None:
        if not sequence.cells:
            return
        try:
            n_evicted = native.prune(self.native.ctx, seq_id)
        except CacheStateError:
            return  # no query is left: checked elsewhere, here just that it changes nothing
        # which cells is checked elsewhere; none that another sequence needs
        kept = self.native.kept(seq_id)
        assert n_evicted == sum(map(len, sequence.held)) - sum(map(len, kept)), self.log
        for layer, (before, after) in enumerate(zip(sequence.held, map(set, kept), strict=True)):
            assert after <= before, self.log
            assert not any(self.shared(sequence.cells[pos]) for pos in before - after), self.log
            sequence.keep(layer, after)

    def rewind(self, seq_id: int, sequence: Sequence) -> None:
        n = len(sequence.cells)
        if n == 0:
            return
        to = int(self.rng.integers(max(0, sequence.pruned - 20), n))
        allowed = to == 0 or to > sequence.pruned
        assert self.native.remove(seq_id, to) == allowed, f"to {to}: {self.log}"
        if to == 0:
            self.sequences[seq_id] = Sequence(self.model.copy())
        elif allowed:
            sequence.rewind(to)

    def remove(self, seq_id: int, sequence: Sequence) -> None:
        assert self.native.remove(seq_id)
        self.sequences[seq_id] = Sequence(self.model.copy())

    def copy(self, seq_id: int, sequence: Sequence) -> None:
        target = int(self.rng.integers(N_SEQ))
        if target == seq_id or not sequence.cells:
            return
        occupied = bool(self.sequences[target].cells)
        if occupied and self.sequences[target].pruned < 0 and self.unified:
            return  # they would be one sequence with every position twice
        self.native.copy(seq_id, target)
        if occupied and self.sequences[target].pruned >= 0:
            assert "was pruned; remove it" in native.last_error(), self.log
            return
        self.sequences[target] = sequence.copy()
        if not self.unified:
            self.sequences[target].cells = self.new_cells(len(sequence.cells))

    def seq_keep(self, seq_id: int, sequence: Sequence) -> None:
        llama_cpp.llama_memory_seq_keep(self.native.memory, seq_id)
        if self.unified:
            for other in set(range(N_SEQ)) - {seq_id}:
                self.sequences[other] = Sequence(self.model.copy())

    def check(self) -> None:
        for seq_id, sequence in enumerate(self.sequences):
            assert self.native.n_tokens(seq_id) == len(sequence.cells), self.log
            assert native.pruned_pos(self.native.ctx, seq_id) == sequence.pruned, f"{seq_id}: {self.log}"
            assert self.native.kept(seq_id) == [sorted(layer) for layer in sequence.held], f"{seq_id}: {self.log}"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
def test_random_operations(tiny_model: Path, unified: bool, seed: int) -> None:
    machine = Machine(tiny_model, unified=unified, seed=seed)
    weights = np.array(list(OPERATIONS.values()))
    for operation in machine.rng.choice(list(OPERATIONS), N_STEPS, p=weights / weights.sum()):
        machine.run(operation)
        machine.check()
    # at last, what every sequence would say next
    machine.read_batch(range(N_SEQ))
