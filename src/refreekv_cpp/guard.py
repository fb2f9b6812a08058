"""Whether a pruned cache still says what the whole one does (`kv_guard`)."""

from __future__ import annotations

from collections.abc import Iterator

import llama_cpp
import numpy as np

from refreekv_cpp.divergence import LogProbs, log_softmax
from refreekv_cpp.errors import PolicyError
from refreekv_cpp.policies import Policy


def check(limit: float | None, evicted: str) -> float | None:
    """
    Raises:
        PolicyError: not a positive number, or what was evicted could not be had back.
    """
    if limit is None:
        return None
    if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit > 0:
        raise PolicyError(f"kv_guard={limit!r}: valid are a positive number of nats, and None")
    if evicted != "restore":
        raise PolicyError(f"kv_guard={limit}: needs kv_evicted='restore', not {evicted!r}")
    return float(limit)


def attempts(policy: Policy) -> Iterator[Policy]:
    """What to prune by, one after the other, before everything is kept."""
    yield policy
    gentler = policy.gentler()
    if gentler is not None:
        yield gentler


def next_token(llm: llama_cpp.Llama) -> LogProbs:
    """The distribution of the next token after the last one that was decoded: log probabilities, [n_vocab]."""
    logits = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
    return log_softmax(np.ctypeslib.as_array(logits, shape=(llm.n_vocab(),)))
