"""What a policy looks at in a context, computed by the definition in reference.py."""

from __future__ import annotations

import gguf
import numpy as np
import numpy.typing as npt
import reference
from policies import Debug
from support import F16, Q8_0, ctx_of

from refreekv_cpp import Policy, native

# Graph and kernel compute the rows in single precision from the same queries (f16) and keys as the reference.
MODEL_TOLERANCE = 1e-4

# model, type of the K cache, flash attention, tokens in the prompt
CONTEXTS = {
    "gqa-f16-plain": ("gqa", F16, False, 1060),
    "gqa-f16-flash": ("gqa", F16, True, 1060),
    "mha-f16-plain": ("mha", F16, False, 1060),
    "mha-f16-flash": ("mha", F16, True, 1060),
    "gqa-q8_0-plain": ("gqa64", Q8_0, False, 1060),
    "mha-q8_0-plain": ("mha64", Q8_0, False, 1060),
    # the one slow path of ggml among them
    "gqa-q8_0-flash": ("gqa64", Q8_0, True, 804),
    "mha-q8_0-flash": ("mha64", Q8_0, True, 804),
}


def by_graph(llm) -> bool:
    """Whether its attention is looked at by a graph, and not by the kernel."""
    return isinstance(llm.kv_policy, Debug) and llm.kv_policy.by_graph


def attention_of(llm, policy: Policy, layer: int, type_k: int) -> npt.NDArray[np.float64]:
    """The attention rows of the queries that a policy looks at, from what the context holds."""
    queries, query_pos = native.read_queries(ctx_of(llm), 0, layer)
    step = getattr(policy, "window_step", 1)
    queries, query_pos = queries[::-step][::-1], query_pos[::-step][::-1]
    keys, key_pos = native.read_keys(ctx_of(llm), 0, layer)
    if type_k == Q8_0 and by_graph(llm) and len(queries):  # streaming keeps none
        # ggml multiplies a quantised matrix with a vector that it quantises too
        shape = queries.shape
        queries = queries.reshape(len(queries), -1)
        kind = gguf.GGMLQuantizationType.Q8_0
        queries = gguf.quants.dequantize(gguf.quants.quantize(queries, kind), kind).reshape(shape)
    scale = native.layer(ctx_of(llm), layer).kq_scale
    return reference.attention_rows(queries, query_pos, keys, key_pos, scale)
