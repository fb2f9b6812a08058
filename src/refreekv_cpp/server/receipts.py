"""The `usage` of a response with the KV receipt in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from refreekv_cpp.server.models import CountingLlama

Chunk = dict[str, Any]


def kv_receipt(llm: CountingLlama, *, prune_ms_before: float) -> dict[str, Any]:
    """What the cache holds after a request, and the milliseconds that pruning took in it."""
    stats = llm.kv_stats
    return {
        "policy": stats.policy,
        "n_tokens": stats.n_tokens,
        "budget": round(stats.budget, 4),
        "bytes": stats.bytes,
        "bytes_full": stats.bytes_full,
        "prune_ms": round(stats.prune_ms - prune_ms_before, 3),
    }


def complete(
    method: Callable[..., Any],
    llm: CountingLlama,
    *,
    include_usage: bool,
    describe_error: Callable[[Exception], tuple[int, Any]],
    **options: Any,
) -> Chunk | Iterator[Chunk]:
    """A completion method of `Llama`, called; the receipt is `usage.kv` of its response.

    A stream ends with a chunk for it, which has no choices, when include_usage says so (as OpenAI's stream_options).
    An error in a stream, which is too late for a status, is its last chunk; describe_error gives status and error.
    """
    prune_ms = llm.kv_stats.prune_ms
    n_prompt, n_completion = llm.n_prompt, llm.n_completion
    response = method(llm, **options)
    if isinstance(response, dict):
        response["usage"]["kv"] = kv_receipt(llm, prune_ms_before=prune_ms)
        return response

    def usage() -> dict[str, Any]:
        prompt, completion = llm.n_prompt - n_prompt, llm.n_completion - n_completion
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "kv": kv_receipt(llm, prune_ms_before=prune_ms),
        }

    return _stream(response, usage if include_usage else None, describe_error)


def _stream(
    chunks: Iterator[Chunk],
    usage: Callable[[], dict[str, Any]] | None,
    describe_error: Callable[[Exception], tuple[int, Any]],
) -> Iterator[Chunk]:
    chunk: Chunk = {}
    try:
        for chunk in chunks:
            yield chunk
    except Exception as error:
        yield {"error": describe_error(error)[1]}
        return
    if usage:
        yield {**chunk, "choices": [], "usage": usage()}
