"""flash_attn="auto": the setting that decodes faster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import llama_cpp

from refreekv_cpp._cache_types import CACHE_TYPES
from refreekv_cpp.errors import PolicyError

_PLAIN = [None, *(CACHE_TYPES[name] for name in ("f32", "f16", "bf16"))]


def resolve(options: Mapping[str, Any]) -> bool:
    """Of the options of a `Llama`: what flash_attn says (None: no, as upstream), or where it is "auto" or missing, the
    faster setting.

    On CPU it makes llama.cpp's decoding several times slower on long contexts, and prefill some 10 % faster (`refreekv
    bench` shows both). A pruned cache decodes as fast with it as without (native/refreekv-decode.h), but it is still
    left out: it adds V up in f16 there, and answers are to be those of the full cache as llama-cpp-python runs it. On
    a GPU that holds the cache it is faster, and a quantised V needs it.

    Raises:
        PolicyError: neither.
    """
    flash_attn = options.get("flash_attn", "auto")
    if flash_attn != "auto":
        if not isinstance(flash_attn, (bool, int, type(None))):
            raise PolicyError(f"flash_attn={flash_attn!r}: valid are True, False and 'auto'")
        return bool(flash_attn)
    on_device = (
        options.get("n_gpu_layers", 0) != 0
        and options.get("offload_kqv", True)
        and llama_cpp.llama_supports_gpu_offload()
    )
    return on_device or options.get("type_v") not in _PLAIN
