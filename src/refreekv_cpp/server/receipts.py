"""The `usage` of a response with the KV receipt in it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import jinja2

from refreekv_cpp.errors import CacheMemoryError
from refreekv_cpp.server.errors import RequestError, describe, request_error
from refreekv_cpp.server.models import CountingLlama, Interrupted
from refreekv_cpp.stats import KVStats

Chunk = dict[str, Any]

_logger = logging.getLogger(__name__)


def kv_receipt(llm: CountingLlama, *, before: KVStats) -> dict[str, Any]:
    """The memory of the process, and what the cache holds after a request; of the request itself, the milliseconds that
    pruning took, and the tokens that came from the library and were not read."""
    stats = llm.kv_stats
    return {
        "memory": asdict(stats.memory),
        "policy": stats.policy,
        "n_tokens": stats.n_tokens,
        "budget": round(stats.budget, 4),
        "bytes": stats.bytes,
        "bytes_full": stats.bytes_full,
        "prune_ms": round(stats.prune_ms - before.prune_ms, 3),
        "n_opened": stats.n_opened - before.n_opened,
    }


def complete(
    method: Callable[..., Any], llm: CountingLlama, *, include_usage: bool, options: dict[str, Any]
) -> Chunk | Iterator[Chunk]:
    """A completion method of `Llama`, called; the receipt is `usage.kv` of its response.

    A stream ends with a chunk for it, which has no choices, when include_usage says so (as OpenAI's stream_options).
    An error in a stream that has begun, which is too late for a status, is its last chunk.

    Raises:
        RequestError: the request is not valid.
    """
    before = llm.kv_stats
    n_prompt, n_completion = llm.n_prompt, llm.n_completion

    def blame(error: Exception) -> Exception:
        """The error as a RequestError where the request is its cause. Before the model reads a prompt, llama-cpp-python
        only works on the request, so that whatever fails there has its cause in the request, too."""
        if isinstance(error, (RequestError, ValueError, jinja2.TemplateError, CacheMemoryError)):
            return request_error(error)
        if isinstance(error, AssertionError):  # of llama-cpp-python's functions for chat formats
            return RequestError("The chat format of this model does not support this combination of parameters.")
        if llm.n_prompt == n_prompt and not isinstance(error, Interrupted):
            _logger.warning("llama-cpp-python failed at a request", exc_info=error)
            return request_error(error)
        return error

    try:
        response = method(llm, **options)
    except Exception as error:
        raise blame(error) from None
    if isinstance(response, dict):
        response["usage"]["kv"] = kv_receipt(llm, before=before)
        return response

    def usage() -> dict[str, Any]:
        prompt, completion = llm.n_prompt - n_prompt, llm.n_completion - n_completion
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "kv": kv_receipt(llm, before=before),
        }

    return _stream(response, usage if include_usage else None, blame)


def _stream(
    chunks: Iterator[Chunk],
    usage: Callable[[], dict[str, Any]] | None,
    blame: Callable[[Exception], Exception],
) -> Iterator[Chunk]:
    chunk: Chunk = {}
    try:
        for chunk in chunks:
            yield chunk
    except Exception as error:
        if not chunk or isinstance(error, Interrupted):
            raise blame(error) from None
        yield describe(blame(error))[1]
        return
    if usage:
        yield {**chunk, "choices": [], "usage": usage()}
