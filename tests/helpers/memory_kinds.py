"""The kinds of memory that llama.cpp makes for a context, each with a model that has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiny_architectures import ARCHITECTURES, DFLASH, EAGLE3, ENCODER, SHARING_DRAFT


@dataclass(frozen=True)
class MemoryKind:
    """
    Attributes:
        memory: llama.cpp's class.
        what: what is special about it.
        model: one of ours, or a file of upstream's program `test-llama-archs`.
        fields: of llama_context_params.
        draft: a model of ours that drafts for it; the model itself: its own draft heads.
    """

    memory: str
    what: str
    model: str
    fields: dict[str, int] = field(default_factory=dict)
    draft: str = ""

    @property
    def title(self) -> str:
        return f"{self.what} (`{self.memory}`)" if self.memory else self.what

    @property
    def is_ours(self) -> bool:
        return self.model in (*ARCHITECTURES, ENCODER.title)

    def case(self, path_of: Callable[[str], Path]) -> dict[str, Any]:
        """Of architecture_verdicts.py."""
        draft = str(path_of(self.draft)) if self.draft else ""
        return {"model": str(path_of(self.model)), "fields": self.fields, "draft": draft}


_TWO = {"n_seq_max": 2, "kv_unified": 1}
_STREAMS = {"n_seq_max": 2, "kv_unified": 0}
_HEADS = "qwen35 (hybrid, with a draft head)"

MEMORY_KINDS = [
    MemoryKind("llama_kv_cache", "one cache, shared by all sequences: kv_unified=True", "llama", _TWO),
    MemoryKind("llama_kv_cache", "one cache, with a stream for each sequence: kv_unified=False", "llama", _STREAMS),
    MemoryKind("llama_kv_cache", "MLA: one latent row for all heads", "deepseek2 (MLA, experts)"),
    MemoryKind("llama_kv_cache", "M-RoPE: positions with several dimensions", "qwen2vl (M-RoPE)"),
    MemoryKind(
        "llama_kv_cache_iswa",
        "layers with a window beside others: swa_full=False",
        "gemma2 (soft-cap, sliding window)",
        {"swa_full": 0},
    ),
    MemoryKind(
        "llama_kv_cache_iswa",
        "layers with a window beside others: swa_full=True",
        "gemma2 (soft-cap, sliding window)",
        {"swa_full": 1},
    ),
    MemoryKind(
        "llama_kv_cache_iswa",
        "the same with a stream for each sequence",
        "gemma2 (soft-cap, sliding window)",
        _STREAMS,
    ),
    MemoryKind(
        "llama_kv_cache_iswa",
        "layers that share K and V of another layer",
        "gemma4 (E2B: layers that share K and V)",
    ),
    MemoryKind("llama_kv_cache_iswa", "layers with a window alone", "gemma3 (all of it sliding window)"),
    MemoryKind("llama_memory_hybrid", "recurrent layers beside attention", _HEADS),
    MemoryKind("llama_memory_hybrid", "the same with a stream for each sequence", "jamba (hybrid)", _STREAMS),
    MemoryKind(
        "llama_memory_hybrid_iswa",
        "recurrent layers beside layers with a window",
        "lfm2 (hybrid, all of it sliding window)",
    ),
    MemoryKind("llama_memory_recurrent", "recurrent layers alone", "mamba (recurrent)"),
    MemoryKind("llama_memory_hybrid_idx", "an index and recurrent layers beside attention", "qwen4exp-moe"),
    MemoryKind("llama_kv_cache_dsa", "an index beside MLA", "deepseek32-moe"),
    MemoryKind("llama_kv_cache_dsa_iswa", "an index beside MLA, and layers with a window", "dots3note-moe"),
    MemoryKind("llama_kv_cache_dsv4", "an index beside rows that several tokens share", "deepseek4-moe"),
    MemoryKind("llama_kv_cache_msa", "an index of blocks", "minimax-m3-moe"),
    MemoryKind("", "none: encoders and diffusion models", ENCODER.title),
    MemoryKind("llama_memory_hybrid", "target of its own draft heads (MTP)", _HEADS, draft=_HEADS),
    MemoryKind("llama_kv_cache", "target of an eagle3 draft model", "qwen3", draft=EAGLE3.title),
    MemoryKind("llama_kv_cache", "target of a dflash draft model", "qwen3", draft=DFLASH.title),
    MemoryKind(
        "llama_kv_cache_iswa",
        "target of a draft model that attends to its K and V",
        "gemma4 (sliding window)",
        draft=SHARING_DRAFT.title,
    ),
]
