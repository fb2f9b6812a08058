"""Caches whose evicted rows are in a cold store: how tests read, prune, restore and compare them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llama_cpp
from support import CACHE_TYPES, ctx_of, load
from tiny import random_tokens

from refreekv_cpp import Llama, ReFreeKV, native

PROMPT = random_tokens(700)
MORE = random_tokens(40, seed=1)
POLICY = ReFreeKV(n_min=0)
COLD = ["memory", "file"]
CACHES = [
    {},
    {"flash_attn": True},
    {"flash_attn": True, "type_k": CACHE_TYPES["q8_0"], "type_v": CACHE_TYPES["q4_0"]},
    {"type_k": CACHE_TYPES["f32"], "type_v": CACHE_TYPES["f32"]},
]


def read(path: Path, *, prune: bool = True, policy: Any = POLICY, **options: Any) -> Llama:
    llm = load(path, policy, **options)
    llm.eval(PROMPT)
    if prune:
        assert llm.prune_kv() > 0
    return llm


def restore(llm: Llama) -> int:
    return native.restore(ctx_of(llm), 0)


def cache_of(llm: Llama) -> bytes:
    """All that is in it, and where."""
    size = llama_cpp.llama_state_seq_get_size(ctx_of(llm), 0)
    buffer = (llama_cpp.ctypes.c_uint8 * size)()
    assert llama_cpp.llama_state_seq_get_data(ctx_of(llm), buffer, size, 0) == size
    return bytes(buffer)
