"""flash_attn="auto"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import llama_cpp

from refreekv_cpp._cache_types import CACHE_TYPES
from refreekv_cpp.errors import PolicyError

_PLAIN = [None, *(CACHE_TYPES[name] for name in ("f32", "f16", "bf16"))]


def resolve(options: Mapping[str, Any], *, evicts: bool) -> bool:
    """Whether a `Llama` with these options uses flash attention.

    True, False and None (no, as upstream) are taken as they are. "auto", or no option, means:

    - With a policy that evicts: yes. Without flash attention the compute buffers grow with n_ctx times the number of
      heads. On the CPU, prompts are also read faster with it; single tokens are decoded by our own kernel, which is
      as fast with it as without (native/kernels/decode.h).
    - With "full": no on the CPU, as upstream, where it can make decoding slower. Yes where a GPU holds the cache,
      which is faster there, and where V is quantised, which needs it.

    Args:
        options: those of a `Llama`.
        evicts: its policy is not "full".

    Raises:
        PolicyError: flash_attn is something else.
    """
    flash_attn = options.get("flash_attn", "auto")
    if flash_attn != "auto":
        if not isinstance(flash_attn, (bool, int, type(None))):
            raise PolicyError(f"flash_attn={flash_attn!r}: must be one of True, False and 'auto'")
        return bool(flash_attn)
    on_device = (
        options.get("n_gpu_layers", 0) != 0
        and options.get("offload_kqv", True)
        and llama_cpp.llama_supports_gpu_offload()
    )
    return evicts or on_device or options.get("type_v") not in _PLAIN
