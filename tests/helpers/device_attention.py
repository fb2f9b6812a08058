"""Random attention to codes, exact rows and cells that are held: what the kernels for devices are to make of it."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import reference
from native_build import ROOT, upstream_tree

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

F32, F16, BF16, Q8_0 = range(4)
TYPES = {
    F32: gguf.GGMLQuantizationType.F32,
    F16: gguf.GGMLQuantizationType.F16,
    BF16: gguf.GGMLQuantizationType.BF16,
    Q8_0: gguf.GGMLQuantizationType.Q8_0,
}
BITS_K, BITS_V = 4, 2
CELLS = 64


class Call(ctypes.Structure):
    """tiles_call in device_tiles.cpp."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("n_tokens", "n_head_kv", "n_gqa", "n_k", "n_v", "n_coded", "n_held")),
        *((name, ctypes.c_float) for name in ("pre_scale", "soft_cap", "post_scale", "theta")),
        *((name, ctypes.c_int32) for name in ("type_cache", "type_exact", "mask_is_half", "v_is_transposed")),
        *((name, ctypes.c_void_p) for name in ("q", "mask", "sinks", "k", "v", "codes_k", "codes_v", "exact")),
        *((name, ctypes.c_void_p) for name in ("out", "n_read")),
    ]


@dataclass(frozen=True)
class Case:
    """The attention of some tokens to one layer."""

    n_gqa: int = 4
    n_k: int = 64
    n_v: int = 64
    n_head_kv: int = 2
    n_tokens: int = 2
    n_coded: int = 19 * CELLS
    n_held: int = 10 * CELLS
    theta: float = 0.003  # 0: no exact rows
    soft_cap: float = 0.0
    sinks: bool = False
    type_cache: int = F16
    type_exact: int = F16
    mask_is_half: bool = False
    v_is_transposed: bool = False
    missing: float = 0.0  # part of the exact rows that are not there
    hidden: float = 0.0  # part of the places that a token does not see

    @property
    def n_head(self) -> int:
        return self.n_head_kv * self.n_gqa


def compile_tiles(source: str, out: Path, *flags: str) -> None:
    compiler = shutil.which("g++") or shutil.which("c++")
    if not compiler:
        pytest.skip("no compiler")
    command = [compiler, "-std=c++17", "-w", "-pthread", *flags]
    include = [f"-I{ROOT / 'native'}", f"-I{upstream_tree() / 'ggml' / 'include'}"]
    subprocess.run([*command, *include, str(ROOT / "tests" / "helpers" / source), "-o", str(out)], check=True)


def pointer(x: npt.NDArray[Any] | None) -> ctypes.c_void_p:
    assert x is None or x.flags.c_contiguous
    return ctypes.c_void_p(None if x is None else x.ctypes.data)


def to_type(numbers: npt.NDArray[Any], type_: int) -> tuple[Bytes, Floats]:
    """Rows of a type, as bytes and as what these stand for."""
    data = gguf.quants.quantize(np.ascontiguousarray(numbers, dtype=np.float32), TYPES[type_])
    return np.ascontiguousarray(data).view(np.uint8), gguf.quants.dequantize(data, TYPES[type_])


class Attention:
    """A case with random numbers: what the tiles make of it, and what it should be."""

    def __init__(self, library: ctypes.CDLL, case: Case, seed: int = 0) -> None:
        self.library, self.case = library, case
        rng = np.random.default_rng(seed)
        n_places = case.n_coded + case.n_held

        def numbers(*shape: int) -> npt.NDArray[np.float64]:
            size, middle = np.exp(rng.normal(size=shape[-1])), rng.normal(size=shape[-1])
            return rng.normal(size=shape) * size + middle

        k, v = numbers(n_places, case.n_head_kv, case.n_k), numbers(n_places, case.n_head_kv, case.n_v)
        q = rng.normal(size=(case.n_tokens, case.n_head, case.n_k)) / k.std(axis=(0, 1))
        self.q = (2 * q).astype(np.float32)  # so that a few cells draw some percent of the attention
        self.sinks = rng.normal(size=case.n_head).astype(np.float32) * 4 if case.sinks else None
        self.mask = np.where(rng.random((case.n_tokens, n_places)) < case.hidden, -np.inf, 0).astype(np.float32)
        if case.hidden:
            self.mask[0, CELLS : 3 * CELLS] = -np.inf  # whole blocks
            self.mask[-1, case.n_coded - 5 :] = -np.inf

        coded, held = slice(0, case.n_coded), slice(case.n_coded, None)
        self.held_k, k_held = to_type(k[held], case.type_cache)
        self.held_v, v_held = to_type(v[held], case.type_cache)
        if case.v_is_transposed:
            width = {F32: np.uint32, F16: np.uint16, BF16: np.uint16}[case.type_cache]
            self.held_v = np.ascontiguousarray(self.held_v.view(width).transpose(1, 2, 0))
        rows_k, k_exact = to_type(k[coded], case.type_exact)
        rows_v, v_exact = to_type(v[coded], case.type_exact)

        # cells lie somewhere, in another order
        self.rows = np.concatenate([rows_k, rows_v], axis=2)
        order = rng.permutation(case.n_coded)
        self.rows[order] = self.rows.copy()
        self.there = rng.random(case.n_coded) >= case.missing
        self.exact = (self.rows.ctypes.data + order * self.rows.strides[0]).astype(np.uint64) * self.there

        self.codes_k, k_coded = self.encode(k_exact, BITS_K, False)
        self.codes_v, v_coded = self.encode(v_exact, BITS_V, True)
        self.by_codes = np.concatenate([k_coded, k_held]), np.concatenate([v_coded, v_held])
        self.exactly = np.concatenate([k_exact, k_held]), np.concatenate([v_exact, v_held])

    def encode(self, rows: Floats, bits: int, v: bool) -> tuple[Bytes, npt.NDArray[np.float64]]:
        n_cells, n_head_kv, n = rows.shape
        size = 4 * n + CELLS * n * bits // 8
        codes = np.empty((n_head_kv, n_cells // CELLS, size), np.uint8)
        for head in range(n_head_kv):
            for block in range(n_cells // CELLS):
                its = np.ascontiguousarray(rows[block * CELLS : (block + 1) * CELLS, head])
                sizes = [ctypes.c_int64(CELLS), ctypes.c_int64(n), bits, ctypes.c_bool(v)]
                self.library.codes_encode(pointer(its), *sizes, pointer(codes[head, block]))
        return codes, np.stack([reference.coded(rows[:, head], bits) for head in range(n_head_kv)], axis=1)

    def call(self) -> tuple[Call, Floats, npt.NDArray[np.uint64]]:
        """The call, and where its results go: the attention [n_tokens, n_head, n_v], and how many exact rows each KV
        head read."""
        case = self.case
        out = np.full((case.n_tokens, case.n_head, case.n_v), np.nan, np.float32)
        n_read = np.zeros(case.n_head_kv, np.uint64)
        self.mask_of_call = self.mask.astype(np.float16) if case.mask_is_half else self.mask
        sizes = [case.n_tokens, case.n_head_kv, case.n_gqa, case.n_k, case.n_v, case.n_coded, case.n_held]
        softmax = [self.pre_scale, case.soft_cap, self.post_scale, case.theta or math.inf]
        types = [case.type_cache, case.type_exact, case.mask_is_half, case.v_is_transposed]
        inputs = [self.q, self.mask_of_call, self.sinks, self.held_k, self.held_v, self.codes_k, self.codes_v]
        call = Call(*sizes, *softmax, *types, *map(pointer, inputs), pointer(self.exact), pointer(out), pointer(n_read))
        return call, out, n_read

    def run(self, n_threads: int = 0, n_at_once: int = 1000) -> tuple[Floats, list[int]]:
        """The attention, and how many exact rows each KV head read."""
        call, out, n_read = self.call()
        self.library.tiles_run(ctypes.byref(call), n_threads, min(n_at_once, self.case.n_tokens))
        return out, n_read.tolist()

    @property
    def pre_scale(self) -> float:
        return self.case.n_k**-0.5 / (self.case.soft_cap or 1)

    @property
    def post_scale(self) -> float:
        return 0.75 if self.case.soft_cap else 1.0

    def weights(self, token: int, head: int, keys: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Attention of the lines of a KV head [n_gqa, n_places]; a sink has the rest."""
        case = self.case
        heads = slice(head * case.n_gqa, (head + 1) * case.n_gqa)
        logits = self.q[token, heads].astype(np.float64) @ keys[:, head].T * np.float32(self.pre_scale)
        if case.soft_cap:
            logits = np.tanh(logits) * case.soft_cap
        logits = logits * self.post_scale + self.mask[token]
        if self.sinks is not None:
            logits = np.concatenate([logits, self.sinks[heads, None]], axis=1)
        if np.isneginf(logits).all():
            return np.zeros((case.n_gqa, keys.shape[0]))
        return reference.softmax(logits)[:, : keys.shape[0]]

    def expected(self) -> tuple[npt.NDArray[np.float64], list[int]]:
        case = self.case
        out = np.zeros((case.n_tokens, case.n_head, case.n_v))
        n_read = [0] * case.n_head_kv
        is_coded = np.arange(case.n_coded + case.n_held) < case.n_coded
        there = np.append(self.there, np.zeros(case.n_held, bool))
        for token in range(case.n_tokens):
            for head in range(case.n_head_kv):
                read = np.zeros(len(is_coded), bool)
                if case.theta:
                    estimate = self.weights(token, head, self.by_codes[0]) * there
                    read = reference.rows_for_theta(estimate, is_coded, case.theta)
                k, v = (
                    np.where(read[:, None, None], exact, coded)
                    for exact, coded in zip(self.exactly, self.by_codes, strict=True)
                )
                n_read[head] += int(read.sum())
                weights = self.weights(token, head, k)
                out[token, head * case.n_gqa : (head + 1) * case.n_gqa] = weights @ v[:, head]
        return out, n_read


CASES = {
    **{f"{n} query heads to a KV head": Case(n_gqa=n) for n in (1, 2, 3, 7, 16)},
    **{f"heads of {n}": Case(n_k=n, n_v=n) for n in (80, 96, 128, 256)},
    "keys longer than values": Case(n_k=192, n_v=128),
    "values longer than keys": Case(n_k=64, n_v=112),
    "soft-cap": Case(soft_cap=4.0),
    "sinks": Case(sinks=True),
    "no exact rows": Case(theta=0.0),
    "more rows than the budget": Case(theta=0.0005, n_tokens=3),
    "one row in a hundred": Case(theta=0.05),
    "rows that are missing": Case(missing=0.5),
    "places that are hidden": Case(hidden=0.3, n_tokens=5),
    "places that are hidden, half mask, sinks": Case(hidden=0.3, mask_is_half=True, sinks=True),
    "transposed V": Case(v_is_transposed=True, n_gqa=1),
    "f32": Case(type_cache=F32, type_exact=F32),
    "bf16, transposed V": Case(type_cache=BF16, type_exact=BF16, v_is_transposed=True),
    "q8_0": Case(type_cache=Q8_0, type_exact=Q8_0),
    "f16, and exact rows in q8_0": Case(type_exact=Q8_0, n_k=96, n_v=32),
    "many blocks": Case(n_coded=70 * CELLS, n_head_kv=1, n_tokens=1),
    "one block": Case(n_coded=CELLS, n_held=CELLS),
}
