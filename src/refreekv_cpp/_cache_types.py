"""The types that K and V can be stored in, by the names llama.cpp's tools have for them."""

from __future__ import annotations

from typing import Any

import llama_cpp

CACHE_TYPES: dict[str, int] = {
    "f32": llama_cpp.GGML_TYPE_F32,
    "f16": llama_cpp.GGML_TYPE_F16,
    "bf16": 30,  # GGML_TYPE_BF16, which llama_cpp does not name
    "q8_0": llama_cpp.GGML_TYPE_Q8_0,
    "q5_1": llama_cpp.GGML_TYPE_Q5_1,
    "q5_0": llama_cpp.GGML_TYPE_Q5_0,
    "q4_1": llama_cpp.GGML_TYPE_Q4_1,
    "q4_0": llama_cpp.GGML_TYPE_Q4_0,
    "iq4_nl": llama_cpp.GGML_TYPE_IQ4_NL,
}


def check(option: str, value: Any) -> None:
    """llama.cpp aborts on a type that it does not know.

    Raises:
        ValueError: it is no type of a cache, and not None.
    """
    if value is not None and value not in CACHE_TYPES.values():
        types = ", ".join(f"{number} ({name})" for name, number in CACHE_TYPES.items())
        raise ValueError(f"{option}={value!r}: must be None or one of ggml's numbers {types}")
