from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import llama_cpp
import typer
from rich.table import Table
from rich.text import Text

from refreekv_cpp import _upstream, fit, native
from refreekv_cpp._cache_types import CACHE_TYPES
from refreekv_cpp._units import mebibytes
from refreekv_cpp.cli import common
from refreekv_cpp.cli.common import ModelArgument
from refreekv_cpp.errors import CacheStateError
from refreekv_cpp.models import resolve


@dataclass(frozen=True)
class Cache:
    """The full memory of a context. No layers: it has nothing that a policy could work on."""

    n_ctx: int
    bytes: int
    bytes_other: int  # layers with a sliding window, recurrent states
    layers: tuple[Any, ...]


@common.user_errors()
def info(
    model: ModelArgument,
    n_ctx: Annotated[int, typer.Option(min=0, help="Tokens of context; 0: as many as the model was made for.")] = 0,
    type_k: Annotated[str, typer.Option(help=f"Type of the keys: {', '.join(CACHE_TYPES)}.")] = "f16",
    type_v: Annotated[str, typer.Option(help="Type of the values.")] = "f16",
) -> None:
    """What a model's KV cache needs, and whether it can have a KV policy."""
    types = _type(type_k), _type(type_v)
    table = Table(show_header=False)
    path = resolve(model)
    with fit.opened(path, kv_policy="full", type_k=types[0], type_v=types[1], n_gpu_layers=0) as loaded:
        n_train = _upstream.n_ctx_train(loaded)
        for name, value in [
            ("architecture", loaded.metadata.get("general.architecture", "?")),
            ("name", loaded.metadata.get("general.name", "?")),
            ("trained context", f"{n_train} tokens"),
            *_cache_rows(loaded, _read_cache(loaded, n_ctx or n_train)),
        ]:
            table.add_row(name, Text(value))
        refusal = native.model_refusal(loaded.model)
        table.add_row("KV policies", Text(f"no: {refusal}", "red") if refusal else Text("yes", "green"))
    common.print_tables(table)


def _read_cache(llm: fit.Unallocated, n_ctx: int) -> Cache | None:
    with fit.context(llm, n_ctx) as ctx:
        try:
            stats, layers = native.figures(ctx)
        except CacheStateError:  # an encoder has no memory
            return None
        n_cells = int(llama_cpp.llama_n_ctx(ctx))
    # some models have layers without attention, which hold no bytes
    return Cache(
        n_ctx=n_cells,
        bytes=stats.bytes,
        bytes_other=stats.bytes_other,
        layers=tuple(layer for layer in layers if layer.n_head_kv > 0),
    )


def _cache_rows(llm: fit.Unallocated, cache: Cache | None) -> Iterator[tuple[str, str]]:
    n_layer = llama_cpp.llama_model_n_layer(llm.model)
    if cache is None:
        yield "layers", f"{n_layer}, none with a KV cache"
        return
    if cache.layers:
        n_more = sum(layer.n_readers - 1 for layer in cache.layers)
        more = f", and {n_more} that share their K and V" if n_more else ""
        yield "attention layers", f"{len(cache.layers)} of {n_layer}{more}{_others(llm, cache)}"
        yield "heads", _range(layer.n_head for layer in cache.layers)
        yield "KV heads", _range(layer.n_head_kv for layer in cache.layers)
        yield "head size", _range(layer.n_embd_head for layer in cache.layers)
        yield "KV cache per token", f"{sum(layer.row_bytes for layer in cache.layers) / 1024:.2f} KiB"
    else:
        yield "layers", str(n_layer)
    yield f"KV cache of {cache.n_ctx} tokens (full)", mebibytes(cache.bytes)
    if cache.bytes_other:
        yield "  and sliding windows, recurrent states", mebibytes(cache.bytes_other)


def _others(llm: fit.Unallocated, cache: Cache) -> str:
    """What the other layers are that hold something of the context."""
    if not cache.bytes_other:
        return ""
    if llama_cpp.llama_model_is_hybrid(llm.model):
        return "; others are recurrent"
    return f"; others have a window of {llama_cpp.llama_model_n_swa(llm.model)} tokens"


def _range(values: Iterable[int]) -> str:
    """One number where all layers have the same."""
    distinct = sorted(set(values))
    return str(distinct[0]) if len(distinct) == 1 else f"{distinct[0]}..{distinct[-1]}, by layer"


def _type(name: str) -> int:
    if name not in CACHE_TYPES:
        raise ValueError(f"type {name!r}: must be one of {', '.join(CACHE_TYPES)}")
    return CACHE_TYPES[name]
