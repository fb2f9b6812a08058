"""What a model needs of a machine's memory, before its weights are read, and what fits.

The figures are llama.cpp's own: it makes a model and a context that allocate nothing, and says what they would take. So
sliding windows, hybrids and quantised caches are counted exactly as they are allocated later.
"""

from __future__ import annotations

from refreekv_cpp._checks import check_n_ctx
from refreekv_cpp._machine import host_free, host_total
from refreekv_cpp.errors import ContextError
from refreekv_cpp.fit.base import base_bytes
from refreekv_cpp.fit.needs import Device, Needs, measure, process_bytes
from refreekv_cpp.fit.search import (
    MOST_CONTEXT,
    chosen_layers,
    fits,
    gpu_layers,
    largest_n_ctx,
    layers_number,
    missing_bytes,
    n_ctx,
    n_ctx_train,
    needed_bytes,
)
from refreekv_cpp.fit.unallocated import Unallocated, check_model, context, opened

__all__ = [
    "MOST_CONTEXT",
    "ContextError",
    "Device",
    "Needs",
    "Unallocated",
    "base_bytes",
    "check_model",
    "check_n_ctx",
    "chosen_layers",
    "context",
    "fits",
    "gpu_layers",
    "host_free",
    "host_total",
    "largest_n_ctx",
    "layers_number",
    "measure",
    "missing_bytes",
    "n_ctx",
    "n_ctx_train",
    "needed_bytes",
    "opened",
    "process_bytes",
]
