"""A rival that the engine does not have: a cache whose last tokens are exact, and all before them are of few bits.

The full cache's state is rounded to a quantised type and back, so that what is measured is the rounding alone.
"""

from __future__ import annotations

import copy
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import llama_cpp
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

# native/state/state.cpp: the state's header, and one of each layer
_MAGIC, _MAGIC_V = b"RFKV", b"RFVV"
_HEADER = struct.Struct("<4sIIII")  # magic, version, V is transposed, layers, cells
_LAYER = struct.Struct("<iiiIQQ")  # layer, type of K, type of V, cells held, numbers of a row of K, of a row of V
_F16 = llama_cpp.GGML_TYPE_F16
_LEAST_ROTATED = 64


@dataclass(frozen=True)
class Rounding:
    """
    Attributes:
        type_k, type_v: of the rounded cells; a block of each has 32 numbers.
        n_exact: so many tokens at the end of the prompt stay as they are. Those of the answer do, too.
    """

    TYPES: ClassVar = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")

    type_k: str
    type_v: str
    n_exact: int

    def part_of_bytes(self, n_tokens: int) -> float:
        """What the cache would take, as a part of the same in f16."""
        n_exact = min(self.n_exact, n_tokens)
        part = (_bytes_of(self.type_k) + _bytes_of(self.type_v)) / 4
        return (n_exact + (n_tokens - n_exact) * part) / n_tokens

    def of(self, state: llama_cpp.LlamaState, heads: Sequence[tuple[int, int]]) -> llama_cpp.LlamaState:
        """A copy of the state of a full cache in f16 (kv_elastic), rounded.

        Args:
            heads: of each layer, the numbers of a head of K and of one of V.

        Raises:
            ValueError: the state is of another kind of cache.
        """
        data = bytearray(state.llama_state)
        at = data.find(_MAGIC)
        if at < 0:
            raise ValueError("the state has no rows in the format of native/state/state.cpp")
        _, _, v_trans, n_layers, n_cells = _HEADER.unpack_from(data, at)
        at += _HEADER.size + n_cells
        for _, (n_head_k, n_head_v) in zip(range(n_layers), heads, strict=True):
            _, type_k, type_v, n_held, n_embd_k, n_embd_v = _LAYER.unpack_from(data, at)
            if (type_k, type_v, n_held) != (_F16, _F16, n_cells) or not n_embd_v:
                raise ValueError("only a full cache in f16, of K and V, can be rounded")
            at += _LAYER.size
            index = np.frombuffer(data, np.uint32, n_held, at)
            rounded = index < n_held - self.n_exact
            at += index.nbytes
            at = _round(data, at, rounded, (n_embd_k, n_head_k), self.type_k, transposed=False)
            if data[at : at + len(_MAGIC_V)] != _MAGIC_V:
                raise ValueError("the state is damaged")
            at += len(_MAGIC_V)
            at = _round(data, at, rounded, (n_embd_v, n_head_v), self.type_v, transposed=bool(v_trans))
        other = copy.copy(state)
        other.llama_state = bytes(data)
        return other


def _round(
    data: bytearray,
    at: int,
    rounded: npt.NDArray[np.bool_],
    sizes: tuple[int, int],
    cache_type: str,
    *,
    transposed: bool,
) -> int:
    """In place. Returns where what follows begins.

    sizes: the numbers of a row, and of a head.
    """
    n_embd, n_head = sizes
    rows = np.frombuffer(data, np.float16, len(rounded) * n_embd, at)  # of the bytearray: what is written is in it
    rows = rows.reshape(n_embd, len(rounded)).T if transposed else rows.reshape(len(rounded), n_embd)
    if rounded.any():
        rows[rounded] = _rotate(_quantised(_rotate(rows[rounded].astype(np.float32), n_head), cache_type), n_head)
    return at + rows.nbytes


def _quantised(rows: Floats, cache_type: str) -> Floats:
    """To the type and back."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    quant = GGMLQuantizationType[cache_type.upper()]
    values: Floats = dequantize(quantize(rows, quant), quant)
    return values


def _bytes_of(cache_type: str) -> float:
    """Of a number, in bytes."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    n, size = GGML_QUANT_SIZES[GGMLQuantizationType[cache_type.upper()]]
    return size / n


def _rotate(rows: Floats, n_head: int) -> Floats:
    """Numbers of a head by a Hadamard matrix (its own inverse), as llama.cpp does with quantised caches: of the largest
    power of two that divides the head; not at all if that is less than 64."""
    size = n_head & -n_head
    if size < _LEAST_ROTATED:
        return rows
    hadamard = np.ones((1, 1), np.float32)
    while len(hadamard) < size:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]]) / np.sqrt(2).astype(np.float32)
    turned: Floats = (rows.reshape(-1, size) @ hadamard).reshape(rows.shape)
    return turned
