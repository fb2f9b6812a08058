"""The attention of single tokens to a cache with a policy that evicts, which on the CPU is a kernel of our own: what
upstream's operations answer, which still read a batch of tokens."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from policies import Elastic
from support import CACHE_TYPES, Sequences
from tiny import TinyModel, random_tokens
from tiny_architectures import ARCHITECTURES

from refreekv_cpp import Full, SnapKV, native
from refreekv_cpp._llama_cpp import library_dir

SHAPES = {
    "heads of 16": TinyModel(),
    "heads of 64": TinyModel(n_embd=128, n_embd_head=64),
    "heads of 128, 7 to a KV head": TinyModel(n_embd=128, n_embd_head=128, n_head=7, n_head_kv=1),
    "heads of 80": TinyModel(n_embd=128, n_embd_head=80),
    "heads of 24": TinyModel(n_embd=128, n_embd_head=24),
}
OWN_KERNEL = {name: name != "heads of 24" for name in SHAPES}
"""Whether it is used: its vectors have 16 numbers."""

CACHES = ["f32", "f16", "bf16", "q8_0", "q4_0"]

TOLERANCE = {"f32": 1e-5, "f16": 5e-4, "bf16": 3e-3}
"""What upstream rounds where the kernel does not: queries and weights, to the type of the cache."""
TOLERANCE_FLASH_ATTN = 5e-3
"""With flash attention, on x86, sums of V are f16."""


class Operations:
    """How many graph nodes of ours ran while it watched."""

    def __init__(self) -> None:
        ggml = ctypes.CDLL(str(next(library_dir().glob("*ggml-base*"))))
        ggml.ggml_op_desc.restype = ctypes.c_char_p

        self.n_own = 0

        @ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)
        def watch(tensor: int, ask: bool, _: Any) -> bool:
            self.n_own += ask and ggml.ggml_op_desc(ctypes.c_void_p(tensor)) == b"CUSTOM"
            return False

        self._watch = watch  # C does not keep it
        self.callback = ctypes.cast(watch, llama_cpp.ggml_backend_sched_eval_callback)


def pruned(path: Path, **fields: Any) -> Sequences:
    """A context whose layers hold 384 of 1024 cells; the graph looks at 512 slots."""
    sequences = Sequences(path, SnapKV(budget=384, n_min=0), **fields)
    sequences.read(0, random_tokens(1024))
    assert native.prune(sequences.ctx, 0) > 0
    return sequences


def one_by_one(sequences: Sequences, tokens: list[int]) -> npt.NDArray[np.float32]:
    return [sequences.read(0, [token]) for token in tokens][-1]


@pytest.mark.parametrize("flash_attn", [False, True], ids=["", "flash attention"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("shape", list(SHAPES))
def test_tokens_one_by_one_in_pieces_and_together(tmp_path: Path, shape: str, cache: str, flash_attn: bool) -> None:
    quantised = cache.startswith("q")
    if quantised and (not flash_attn or SHAPES[shape].n_embd_head % 32):
        pytest.skip("llama.cpp has no such cache")

    SHAPES[shape].write(tmp_path / "model.gguf")
    operations = Operations()
    fields = {
        "type_k": CACHE_TYPES[cache],
        "type_v": CACHE_TYPES[cache],
        "flash_attn_type": int(flash_attn),
        "cb_eval": operations.callback,
    }
    tokens = random_tokens(70, seed=1)

    def answer(*batches: list[int]) -> npt.NDArray[np.float32]:
        operations.n_own = 0
        sequences = pruned(tmp_path / "model.gguf", **fields)
        assert operations.n_own == 0
        res = [sequences.read(0, batch) for batch in batches][-1]
        sequences.close()
        return res

    together = answer(tokens)
    assert operations.n_own == 0  # 64 tokens and more are upstream's
    tolerance = TOLERANCE_FLASH_ATTN if flash_attn else TOLERANCE[cache]
    for batches in ([[token] for token in tokens], [tokens[:63], tokens[63:]]):
        ours = answer(*batches)
        assert (operations.n_own > 0) == OWN_KERNEL[shape]
        assert np.abs(ours - together).max() <= tolerance * np.abs(together).max()


@pytest.mark.parametrize("flash_attn", [False, True], ids=["", "flash attention"])
@pytest.mark.parametrize("architecture", ["gemma2", "mpt", "gpt-oss"], ids=["soft-cap", "ALiBi", "sinks"])
def test_logits_of_other_kinds(tiny: Callable[[str], Path], architecture: str, flash_attn: bool) -> None:
    operations = Operations()
    fields = {"flash_attn_type": int(flash_attn), "cb_eval": operations.callback}
    tokens = random_tokens(12, seed=1)

    model = tiny(next(title for title in ARCHITECTURES if title.startswith(architecture)))

    sequences = pruned(model, **fields)
    together = sequences.read(0, tokens)
    sequences.close()

    operations.n_own = 0
    sequences = pruned(model, **fields)
    alone = one_by_one(sequences, tokens)
    assert operations.n_own > 0
    sequences.close()

    tolerance = TOLERANCE_FLASH_ATTN if flash_attn else TOLERANCE["f16"]
    assert np.abs(alone - together).max() <= tolerance * np.abs(together).max()


@pytest.mark.parametrize("flash_attn", [False, True], ids=["", "flash attention"])
def test_the_number_of_threads_changes_no_bit_of_it(tmp_path: Path, flash_attn: bool) -> None:
    SHAPES["heads of 64"].write(tmp_path / "model.gguf")

    def run(n_threads: int) -> npt.NDArray[np.float32]:
        sequences = pruned(tmp_path / "model.gguf", flash_attn_type=int(flash_attn))
        llama_cpp.llama_set_n_threads(sequences.ctx, n_threads, 1)
        res = one_by_one(sequences, random_tokens(4, seed=1))
        sequences.close()
        return res

    assert np.array_equal(run(1), run(3))


@pytest.mark.parametrize("shape", list(SHAPES))
def test_it_decodes_from_the_first_token_on(tmp_path: Path, shape: str) -> None:
    """Not only after an eviction; and with the same answer as the full cache, but for rounding."""
    SHAPES[shape].write(tmp_path / "model.gguf")
    operations = Operations()
    policy = SnapKV(budget=384, n_min=0)
    answers = {}
    for of in (policy, Full()):
        sequences = Sequences(tmp_path / "model.gguf", of, cb_eval=operations.callback)
        sequences.read(0, random_tokens(600))
        assert operations.n_own == 0
        answers[of.name] = [sequences.read(0, [token]) for token in random_tokens(8, seed=1)]
        assert (operations.n_own > 0) == (OWN_KERNEL[shape] and of is policy)
        operations.n_own = 0
        sequences.close()
    full = np.array(answers["full"])
    assert np.abs(answers[policy.name] - full).max() <= TOLERANCE["f32"] * np.abs(full).max()


@pytest.mark.parametrize("flash_attn", [False, True], ids=["", "flash attention"])
def test_the_elastic_full_cache_is_left_to_upstream(tiny_model: Path, flash_attn: bool) -> None:
    operations = Operations()
    answers = []
    for policy in (Elastic(), Full()):
        sequences = Sequences(tiny_model, policy, flash_attn_type=int(flash_attn), cb_eval=operations.callback)
        sequences.read(0, random_tokens(600))
        answers.append([sequences.read(0, [token]) for token in random_tokens(8, seed=1)])
        assert operations.n_own == 0
        sequences.close()
    np.testing.assert_array_equal(*answers)


def test_sequences_side_by_side(tmp_path: Path) -> None:
    """Two tokens of two sequences in one batch, with a mask for each; the second sequence is whole."""
    SHAPES["heads of 64"].write(tmp_path / "model.gguf")
    operations = Operations()

    def context() -> Sequences:
        sequences = pruned(tmp_path / "model.gguf", cb_eval=operations.callback)
        sequences.read(1, random_tokens(700, seed=2))
        return sequences

    sequences = context()
    alone = [sequences.read(0, [5]), sequences.read(1, [6])]
    sequences.close()

    operations.n_own = 0
    sequences = context()
    together = sequences.read_together({0: [5], 1: [6]})
    assert operations.n_own > 0
    sequences.close()

    for seq_id in (0, 1):
        assert np.allclose(alone[seq_id], together[seq_id], rtol=0, atol=1e-5)
