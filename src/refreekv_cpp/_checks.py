"""Checks of the options that `Llama` passes on to llama-cpp-python.

llama-cpp-python passes them to C unchecked: there a number that is out of range is cut to 32 bits, or ends the process.
`check_options` takes the options as a mapping, so that whatever else passes them to native code calls it first.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping
from numbers import Real
from typing import Any, NamedTuple

_INT_MAX = 2**31 - 1
_THREADS_MAX = 512  # GGML_MAX_N_THREADS


class _Range(NamedTuple):
    """Whole numbers from `low` to `high`."""

    low: int
    high: int
    none: bool = False  # whether None is valid, too


_INTEGERS = {
    "n_ctx": _Range(0, _INT_MAX),
    "n_batch": _Range(1, _INT_MAX),
    "n_ubatch": _Range(0, _INT_MAX),
    "n_threads": _Range(0, _THREADS_MAX, none=True),
    "n_threads_batch": _Range(0, _THREADS_MAX, none=True),
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
    for name in options.keys() & set(_NUMBERS):
        if not isinstance(options[name], Real):
            raise ValueError(f"{name}={options[name]!r}: must be a number")
    if "numa" in options and not isinstance(options["numa"], bool):
        res["numa"] = check_integer("numa", options["numa"], 0, 4)
    if options.get("lora_path") is not None:
        res["lora_path"] = check_path("lora_path", options["lora_path"])
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


def check_path(name: str, value: Any) -> str:
    """
    Raises:
        ValueError: neither text nor an object such as `pathlib.Path`, or empty.
    """
    if not isinstance(value, (str, os.PathLike)) or not isinstance(path := os.fspath(value), str) or not path:
        raise ValueError(f"{name}={value!r}: must be a path, as text or a pathlib.Path")
    return path
