"""What a model gets of the machine when the user does not say."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import llama_cpp

from refreekv_cpp.cli import common

_MOST_CONTEXT = 32768


def gpu_layers(model: Path, **options: Any) -> int:
    """Layers on the GPU, -1 for all of them. `options`: those of `Llama`, with the context that is wanted."""
    return -1 if llama_cpp.llama_supports_gpu_offload() else 0


def n_ctx(model: Path, **options: Any) -> int:
    """Tokens of context. `options`: those of `Llama` without n_ctx."""
    with closing(common.load_without_weights(model)) as loaded:
        return min(loaded.n_ctx_train(), _MOST_CONTEXT)
