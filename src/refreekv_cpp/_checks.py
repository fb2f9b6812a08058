"""Checks of the options that `Llama` passes on to llama-cpp-python.

llama-cpp-python passes them to C unchecked: there a number that is out of range is cut to 32 bits, or ends the process.
`check_options` takes the options as a mapping, so that whatever else passes them to native code calls it first.
"""

from __future__ import annotations

import inspect
import operator
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from numbers import Real
from typing import Any, NamedTuple

import llama_cpp
import numpy as np

from refreekv_cpp._machine import host_free
from refreekv_cpp._suggest import did_you_mean
from refreekv_cpp._upstream import LlamaModel
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
# What follows are keys of a GGUF, without the architecture before them, that llama.cpp takes unchecked and aborts on.
# Those that say how large tensors are have a name that ends so, but for a few:
_SHAPE = re.compile(r"(?:^|[._])(?:count|length|rank|size|dim|layers|kernel|groups)(?:_kv)?(?:_mla)?(?:_swa)?$")
_NO_SHAPES = ("context_length", "rope.scaling.original_context_length", "attention.temperature_length")
_CHOICES: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none", "linear", "yarn", "longrope"),
    "pooling_type": (-1, 0, 1, 2, 3, 4),
    "expert_gating_func": (1, 2, 3, 4),
}
_EXPERTS_USED = "expert_used_count"
_NUMBERS = (
    "rope_freq_base",
    "rope_freq_scale",
    "yarn_ext_factor",
    "yarn_attn_factor",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "lora_scale",
)
_SWITCHES = (
    "vocab_only",
    "use_mmap",
    "use_mlock",
    "embedding",
    "offload_kqv",
    "logits_all",
    "op_offload",
    "swa_full",
    "no_perf",
    "spm_infill",
    "verbose",
)


_NAMES = [
    name
    for name, parameter in inspect.signature(llama_cpp.Llama.__init__).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
]


def check_names(options: Iterable[str], *, more: Iterable[str], ignore_unknown: bool) -> None:
    """llama-cpp-python swallows what it does not know; a mistyped option must not vanish.

    Args:
        more: names to suggest beside upstream's.
        ignore_unknown: leave unknown ones to it, but for those that can only be meant for this package.

    Raises:
        TypeError: one of them is no option of `llama_cpp.Llama`.
    """
    for option in options:
        if option not in _NAMES and not (ignore_unknown and not option.startswith("kv_")):
            hint = did_you_mean(option, [*_NAMES, *more]) or ";"
            raise TypeError(f"Llama() got an unexpected keyword argument {option!r}{hint} see llama_cpp.Llama")


def check_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `llama_cpp.Llama`, with whole numbers of any type (NumPy's) as `int`. Unknown names pass.

    Raises:
        ValueError: a value is not valid; the message names the option and says what is.
    """
    res = dict(options)
    for name in options.keys() & _INTEGERS.keys():
        res[name] = check_integer(name, options[name], *_INTEGERS[name])
    if "n_ctx" in options:
        check_n_ctx(res["n_ctx"])
    for name in options.keys() & set(_NUMBERS):
        check_number(name, options[name])
    for name in options.keys() & set(_SWITCHES):
        res[name] = _check_switch(name, options[name])
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


def _check_switch(name: str, value: Any) -> bool | None:
    """
    Raises:
        ValueError: neither true nor false, nor None. Python would take any text for true, "false" as well.
    """
    if value is None:
        return None
    if not isinstance(value, (int, np.bool_, np.integer)) or value not in (0, 1):
        raise ValueError(f"{name}={value!r}: must be True or False")
    return bool(value)


def check_path(name: str, value: Any) -> str:
    """
    Raises:
        ValueError: neither text nor an object such as `pathlib.Path`, empty, or with a character that no path has.
    """
    if not isinstance(value, (str, os.PathLike)) or not isinstance(path := os.fspath(value), str) or not path:
        raise ValueError(f"{name}={value!r}: must be a path, as text or a pathlib.Path")
    if "\0" in path:
        raise ValueError(f"{name}={value!r}: a path cannot have a null character in it")
    try:
        os.fsencode(path)
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}={value!r}: a path cannot have {path[error.start]!r} in it") from None
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
        ValueError: no dict of keys and values that a GGUF can have, or llama.cpp would abort on one of them.
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
        _check_override(key, key.partition(".")[2], value)


def _check_override(key: str, name: str, value: Any) -> None:
    """name: the key without the architecture.

    Raises:
        ValueError: llama.cpp would abort.
    """
    if key.startswith(("general.", "tokenizer.")) or name in (*_NO_SHAPES, _EXPERTS_USED):
        return
    if _SHAPE.search(name):
        raise ValueError(f"kv_overrides: {key} must be left as it is in the file, whose tensors it describes")
    if value not in (choices := _CHOICES.get(name, (value,))):
        raise ValueError(f"kv_overrides: {key}={value!r} must be one of {', '.join(map(str, choices))}")
    if name.endswith(("_epsilon", "temperature_scale")) and isinstance(value, float) and value < 0:
        raise ValueError(f"kv_overrides: {key}={value!r} must not be negative")


def check_experts(overrides: Mapping[str, Any], model_path: str) -> None:
    """For `kv_overrides` that say how many experts of each layer are used: whether the model has them.

    Raises:
        ValueError: it has fewer, or the number is not positive.
    """
    for key in (key for key in overrides if key.partition(".")[2] == _EXPERTS_USED):
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        with closing(LlamaModel(path_model=model_path, params=params, verbose=False)) as model:
            n_experts = int(model.metadata().get(key.replace(_EXPERTS_USED, "expert_count"), 0))
        check_integer(f"kv_overrides: {key}", overrides[key], min(n_experts, 1), n_experts)
