"""Graphs run on the plan that ggml's allocator made for their reservation: a plan of their own lays tensors at odd
multiples of 32 bytes, where the product of K and Q takes 1.5 times as long (docs/results/speed.md)."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from policies import Debug, PythonStreaming
from support import Sequences
from tiny import TinyModel, random_tokens

from refreekv_cpp import PyramidKV, ReFreeKV, native
from refreekv_cpp._llama_cpp import library_dir


class Places:
    """Where the products of K and Q lay while it watched."""

    def __init__(self) -> None:
        ggml = ctypes.CDLL(str(next(library_dir().glob("*ggml-base*"))))
        ggml.ggml_get_name.restype = ctypes.c_char_p
        ggml.ggml_get_data.restype = ctypes.c_void_p

        self.seen: list[int] = []

        @ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)
        def watch(tensor: int, ask: bool, _: Any) -> bool:
            pointer = ctypes.c_void_p(tensor)
            if ask and ggml.ggml_get_name(pointer).decode().split("-")[0] == "kq":
                self.seen.append(ggml.ggml_get_data(pointer))
            return False

        self._watch = watch  # C does not keep it
        self.callback = ctypes.cast(watch, llama_cpp.ggml_backend_sched_eval_callback)

    def of(self, run: Any) -> list[int]:
        self.seen.clear()
        run()
        return list(self.seen)


def test_a_prompt_after_a_decoded_token_runs_on_the_reserved_plan(tmp_path: Path) -> None:
    # heads whose tokens are decoded by upstream's operations: our kernel's graph has another plan
    TinyModel(n_embd_head=24).write(tmp_path / "model.gguf")
    places = Places()
    sequences = Sequences(tmp_path / "model.gguf", ReFreeKV(), cb_eval=places.callback)

    first = places.of(lambda: sequences.read(0, random_tokens(512)))
    places.of(lambda: sequences.read(0, [1]))
    second = places.of(lambda: sequences.read(0, random_tokens(512)))
    sequences.close()

    assert first
    assert first == second


class Views:
    """Views of a mask that graphs had while it watched: one for each layout that shares it."""

    def __init__(self) -> None:
        ggml = ctypes.CDLL(str(next(library_dir().glob("*ggml-base*"))))
        ggml.ggml_get_name.restype = ctypes.c_char_p

        self.n = 0

        @ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)
        def watch(tensor: int, ask: bool, _: Any) -> bool:
            self.n += ask and ggml.ggml_get_name(ctypes.c_void_p(tensor)).startswith(b"attn_inp_kq_mask (view)")
            return False

        self._watch = watch  # C does not keep it
        self.callback = ctypes.cast(watch, llama_cpp.ggml_backend_sched_eval_callback)


def pruned_apart(sequences: Sequences, seq_id: int, n_last: list[int]) -> None:
    """Layer by layer, keep the last so many of what a sequence has: none, all of it."""
    last = sequences.n_tokens(seq_id)
    for layer, n in enumerate(n_last):
        if n:
            native.keep(sequences.ctx, seq_id, layer, np.arange(last - n, last))


@pytest.mark.parametrize("flash_attn", [False, True])
def test_layouts_that_end_alike_share_a_mask(tiny_model: Path, flash_attn: bool) -> None:
    # kept lengths that differ by whole blocks: a token comes to the same distance from the end of each
    views = Views()
    answers = []
    for length in (1024, 1000):  # 1000 - 256 and 1000 - 300 do not
        fields = {"flash_attn_type": int(flash_attn), "cb_eval": views.callback, "n_batch": 2048}
        sequences = Sequences(tiny_model, Debug(policy=PythonStreaming()), **fields)
        sequences.read(0, random_tokens(length))
        pruned_apart(sequences, 0, [0, 512, 256, 256] if length == 1024 else [0, 700, 300, 301])
        assert native.stats(sequences.ctx).n_layout == (3 if length == 1024 else 4)
        views.n = 0
        answers.append([sequences.read(0, [token]) for token in random_tokens(300, seed=1)[1:]])
        assert views.n == len(answers[-1]) * (3 if length == 1024 else 1)  # the longest shares it with itself
        sequences.close()


@pytest.mark.parametrize("flash_attn", [False, True])
def test_what_shares_a_mask_answers_as_what_has_its_own(tiny_model: Path, flash_attn: bool) -> None:
    # a batch of two tokens has a mask for each layout
    def answers(together: bool) -> list[Any]:
        sequences = Sequences(
            tiny_model, Debug(policy=PythonStreaming()), flash_attn_type=int(flash_attn), n_batch=2048
        )
        sequences.read(0, random_tokens(1024))
        pruned_apart(sequences, 0, [0, 512, 256, 768])
        res = []
        tokens = random_tokens(280, seed=1)  # past the end of a block
        for i in range(0, len(tokens), 2):
            pair = tokens[i : i + 2]
            res.append(sequences.read(0, pair) if together else [sequences.read(0, [t]) for t in pair][-1])
        sequences.close()
        return res

    np.testing.assert_allclose(answers(False), answers(True), atol=5e-3 if flash_attn else 1e-4)


@pytest.mark.parametrize(
    ("policy", "n_layouts"),
    [
        (Debug(policy=PyramidKV(budget=0.4, beta=2, n_min=0)), 3),
        (Debug(policy=ReFreeKV(), by_graph=True, theta=0.003), 1),
    ],
    ids=["layouts that end alike", "codes"],
)
def test_k_is_stored_directly_behind_its_rope(tmp_path: Path, policy: Debug, n_layouts: int) -> None:
    """Backends make one operation of the three, where nothing is between them."""
    TinyModel().write(tmp_path / "model.gguf")
    ggml = ctypes.CDLL(str(next(library_dir().glob("*ggml-base*"))))
    ggml.ggml_op_desc.restype = ctypes.c_char_p
    operations: list[str] = []

    @ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)
    def watch(tensor: int, ask: bool, _: Any) -> bool:
        if ask:
            operations.append(ggml.ggml_op_desc(ctypes.c_void_p(tensor)).decode())
        return False

    callback = ctypes.cast(watch, llama_cpp.ggml_backend_sched_eval_callback)
    sequences = Sequences(tmp_path / "model.gguf", policy, codes=True, cb_eval=callback, flash_attn_type=1)
    sequences.read(0, random_tokens(1024))
    assert native.prune(sequences.ctx, 0) > 0
    stats = native.stats(sequences.ctx)
    assert stats.n_layout == n_layouts
    operations.clear()
    sequences.read(0, [1])
    sequences.close()

    three = list(zip(operations, operations[1:], operations[2:], strict=False))
    assert three.count(("ROPE", "VIEW", "SET_ROWS")) == stats.n_layer
