"""flash_attn="auto"."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from support import CACHE_TYPES, load

from refreekv_cpp import Llama, PolicyError
from refreekv_cpp._flash_attn import resolve

Q8_0 = CACHE_TYPES["q8_0"]


@pytest.mark.parametrize(
    ("options", "gpu", "expected"),
    [
        ({}, False, False),
        ({"flash_attn": "auto"}, False, False),
        ({"type_k": Q8_0, "type_v": Q8_0}, False, True),
        ({"type_k": Q8_0}, False, False),
        ({"n_gpu_layers": -1}, False, False),
        ({"n_gpu_layers": -1}, True, True),
        ({"n_gpu_layers": -1, "offload_kqv": False}, True, False),
        ({}, True, False),
        ({"flash_attn": True}, False, True),
        ({"flash_attn": None, "n_gpu_layers": 99}, True, False),
        ({"flash_attn": False, "n_gpu_layers": 99}, True, False),
    ],
    ids=str,
)
def test_the_faster_setting(monkeypatch: pytest.MonkeyPatch, options: Any, gpu: bool, expected: bool) -> None:
    monkeypatch.setattr(llama_cpp, "llama_supports_gpu_offload", lambda: gpu)
    assert resolve(options) is expected


@pytest.mark.parametrize("policy", ["full", "window"])
def test_a_quantised_cache_needs_no_further_option(tiny: Callable[[str], Path], policy: str) -> None:
    llm = load(tiny("gqa64"), policy, type_k=Q8_0, type_v=Q8_0)
    llm.eval([1, 5, 6])
    assert llm.context_params.flash_attn_type == llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    plain = load(tiny("gqa64"), policy)
    assert plain.context_params.flash_attn_type == llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED


def test_what_is_neither_is_refused_before_any_work() -> None:
    with pytest.raises(PolicyError, match=r"flash_attn='fast'.*valid are True, False and 'auto'"):
        Llama("no such model", flash_attn="fast")
