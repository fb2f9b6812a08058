"""Checks of the options that `Llama` passes on to llama-cpp-python.

llama-cpp-python passes them to C unchecked: there a number that is out of range is cut to 32 bits, or ends the process.
`check_options` takes the options as a mapping, so that whatever else passes them to native code calls it first.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import llama_cpp
import numpy as np

from refreekv_cpp._machine import host_free
from refreekv_cpp.errors import ContextError

_INT_MAX = 2**31 - 1
_FLOAT_MAX = 3.4028234663852886e38  # FLT_MAX
_THREADS_MAX = 512  # GGML_MAX_N_THREADS
_CELL_BYTES = 200  # of llama.cpp's table of the cells, for each; the process ends where it cannot have that


class _Range(NamedTuple):
    """Whole numbers from `low` to `high`."""

    low: int
    high: int
    none: bool = False  # whether None is valid, too


_INTEGERS = {
    "n_ctx": _Range(0, _INT_MAX),
    "n_batch": _Range(1, _INT_MAX),
    "n_ubatch": _Range(0, _INT_MAX),
    "n_threads": _Range(-1, _THREADS_MAX, none=True),
    "n_threads_batch": _Range(-1, _THREADS_MAX, none=True),
    "n_gpu_layers": _Range(-_INT_MAX, _INT_MAX),
    "split_mode": _Range(0, 3),
    "main_gpu": _Range(-1, _INT_MAX),
    "seed": _Range(-_INT_MAX, 2**32 - 1, none=True),
    "rope_scaling_type": _Range(-1, 3, none=True),
    "pooling_type": _Range(-1, 4),
    "attention_type": _Range(-1, 1),
    "yarn_orig_ctx": _Range(0, _INT_MAX),
    "last_n_tokens_size": _Range(-1, 2**24),  # llama.cpp allocates them for each completion
}
# keys of a GGUF, without the architecture, that say what the tensors look like: llama.cpp aborts where they do not fit
_SHAPES = (
    "block_count",
    "embedding_length",
    "feed_forward_length",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
    "nextn_predict_layers",
    "expert_count",
)
_NUMBERS = (
    "rope_freq_base",
    "rope_freq_scale",
    "yarn_ext_factor",
    "yarn_attn_factor",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "lora_scale",
)


def check_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `llama_cpp.Llama`, with whole numbers of any type (NumPy's) as `int`. Unknown names pass.

    Raises:
        ValueError: a value is not valid; the message names the option and says what is.
    """
    res = dict(options)
    for name in options.keys() & _INTEGERS.keys():
        res[name] = check_integer(name, options[name], *_INTEGERS[name])
    check_n_ctx(res.get("n_ctx", 0))
    for name in options.keys() & set(_NUMBERS):
        check_number(name, options[name])
    if options.get("tensor_split") is not None:
        _check_split(options["tensor_split"])
    if "numa" in options and not isinstance(options["numa"], bool):
        res["numa"] = check_integer("numa", options["numa"], 0, 4)
    if options.get("lora_path") is not None:
        res["lora_path"] = _check_adapter(options["lora_path"])
    if options.get("kv_overrides") is not None:
        _check_overrides(options["kv_overrides"])
    return res


def check_integer(name: str, value: Any, low: int, high: int, none: bool = False) -> int | None:
    """
    Raises:
        ValueError: not a whole number from `low` to `high`, nor None where `none` says that it is valid.
    """
    if value is None and none:
        return None
    try:
        res = low - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        res = low - 1
    if not low <= res <= high:
        other = ", or None" if none else ""
        raise ValueError(f"{name}={value!r}: must be a whole number from {low} to {high}{other}")
    return res


def check_n_ctx(n_ctx: int) -> None:
    """
    Raises:
        ContextError: llama.cpp's table of so many cells would take more than half of the memory that is free.
    """
    most = host_free() // 2 // _CELL_BYTES
    if n_ctx > most:
        raise ContextError(f"n_ctx={n_ctx}: must be at most {most}, by the memory that is free")


def check_number(name: str, value: Any) -> None:
    """
    Raises:
        ValueError: not a number, or one that a C float does not hold: NaN, infinity, or a larger one.
    """
    if not isinstance(value, Real):
        raise ValueError(f"{name}={value!r}: must be a number")
    if not abs(value) <= _FLOAT_MAX:  # type: ignore[operator]
        raise ValueError(f"{name}={value!r}: must be a finite number, from {-_FLOAT_MAX:.3g} to {_FLOAT_MAX:.3g}")


def check_path(name: str, value: Any) -> str:
    """
    Raises:
        ValueError: neither text nor an object such as `pathlib.Path`, or empty.
    """
    if not isinstance(value, (str, os.PathLike)) or not isinstance(path := os.fspath(value), str) or not path:
        raise ValueError(f"{name}={value!r}: must be a path, as text or a pathlib.Path")
    return path


def _check_split(split: Any) -> None:
    """
    Raises:
        ValueError: no list of numbers, one for each device, none of them negative.
    """
    most = llama_cpp.LLAMA_MAX_DEVICES
    if isinstance(split, str) or not isinstance(split, (Sequence, np.ndarray)) or not len(split) <= most:
        raise ValueError(f"tensor_split={split!r}: must be a list of numbers, {most} at most")
    for value in split:
        check_number("tensor_split", value)
        if value < 0:
            raise ValueError(f"tensor_split={split!r}: no number may be negative")


def _check_adapter(value: Any) -> str:
    """
    Raises:
        ValueError: there is no GGUF file.
    """
    path = check_path("lora_path", value)
    try:
        with open(path, "rb") as file:
            if file.read(4) == b"GGUF":
                return path
    except OSError as error:
        raise ValueError(f"lora_path={path!r}: {error.strerror}") from error
    raise ValueError(f"lora_path={path!r}: must be a GGUF file")


def _check_overrides(overrides: Any) -> None:
    """
    Raises:
        ValueError: no dict of keys and values that a GGUF can have, or it would change the shapes of tensors.
    """
    if not isinstance(overrides, dict):
        raise ValueError(f"kv_overrides={overrides!r}: must be a dict")
    for key, value in overrides.items():
        if not isinstance(key, str) or not 0 < len(key.encode()) < 128:
            raise ValueError(f"kv_overrides: the key {key!r} must be text of 1 to 127 bytes")
        if not isinstance(value, (bool, int, float, str)):
            raise ValueError(f"kv_overrides: {key}={value!r} must be a bool, a number or text")
        if isinstance(value, float):
            check_number(f"kv_overrides: {key}", value)
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"kv_overrides: {key}={value} must fit in 64 bits")
        if isinstance(value, str) and len(value.encode()) > 127:
            raise ValueError(f"kv_overrides: {key}={value!r} must be text of 127 bytes at most")
        if key.partition(".")[2] in _SHAPES:
            raise ValueError(f"kv_overrides: {key} must be left as it is in the file, whose tensors it describes")
