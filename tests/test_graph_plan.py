"""Graphs run on the plan that ggml's allocator made for their reservation: a plan of their own lays tensors at odd
multiples of 32 bytes, where the product of K and Q takes 1.5 times as long (docs/benchmarks.md)."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from support import Sequences
from tiny import random_tokens

from refreekv_cpp import ReFreeKV
from refreekv_cpp._library import library_dir

import llama_cpp  # isort: skip


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


def test_a_prompt_after_a_decoded_token_runs_on_the_reserved_plan(tiny_model: Path) -> None:
    places = Places()
    sequences = Sequences(tiny_model, ReFreeKV(), cb_eval=places.callback)

    first = places.of(lambda: sequences.read(0, random_tokens(512)))
    places.of(lambda: sequences.read(0, [1]))
    second = places.of(lambda: sequences.read(0, random_tokens(512)))
    sequences.close()

    assert first
    assert first == second
