"""flash_attn="auto"."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from support import CACHE_TYPES, load
from tiny import TinyModel

from refreekv_cpp import Llama, PolicyError
from refreekv_cpp._flash_attn import resolve

Q8_0 = CACHE_TYPES["q8_0"]


@pytest.mark.parametrize(
    ("options", "gpu", "with_full"),
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
def test_what_auto_means(monkeypatch: pytest.MonkeyPatch, options: Any, gpu: bool, with_full: bool) -> None:
    monkeypatch.setattr(llama_cpp, "llama_supports_gpu_offload", lambda: gpu)
    assert resolve(options, evicts=False) is with_full
    is_auto = options.get("flash_attn", "auto") == "auto"
    assert resolve(options, evicts=True) is (True if is_auto else with_full)


@pytest.mark.parametrize(
    ("policy", "options", "expected"),
    [
        ("full", {}, False),
        ("full", {"kv_elastic": True}, False),
        ("refreekv", {}, True),
        ("refreekv", {"flash_attn": False}, False),
        ("refreekv", {"embedding": True}, False),  # runs with the full cache
    ],
    ids=str,
)
def test_a_policy_that_evicts_uses_it(tiny_model: Path, policy: str, options: dict[str, Any], expected: bool) -> None:
    llm = load(tiny_model, policy, **options)
    kind = "ENABLED" if expected else "DISABLED"
    assert llm.context_params.flash_attn_type == getattr(llama_cpp, f"LLAMA_FLASH_ATTN_TYPE_{kind}")


def test_a_model_without_policies_is_loaded_as_upstream_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFREEKV_POLICY", "refreekv")
    TinyModel(causal=False).write(tmp_path / "refused.gguf")
    with pytest.warns(UserWarning, match="REFREEKV_POLICY"):
        llm = Llama(str(tmp_path / "refused.gguf"), verbose=False)
    assert llm.kv_policy.name == "full"
    assert llm.context_params.flash_attn_type == llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED


@pytest.mark.parametrize("policy", ["full", "refreekv"])
def test_a_quantised_cache_needs_no_further_option(tiny: Callable[[str], Path], policy: str) -> None:
    llm = load(tiny("gqa64"), policy, type_k=Q8_0, type_v=Q8_0)
    llm.eval([1, 5, 6])
    assert llm.context_params.flash_attn_type == llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED


def test_what_is_neither_is_refused_before_any_work() -> None:
    with pytest.raises(PolicyError, match=r"flash_attn='fast'.*must be one of True, False and 'auto'"):
        Llama("no such model", flash_attn="fast")
