"""How fast decoding could be: each step reads the weights, the kept cells and the codes of evicted ones once, at the
speed of the memory."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np

_N_BYTES = 2**28  # per thread, far beyond the caches
_N_PASSES = 5


def weight_bytes(model: Path) -> int:
    """Those that a step reads: all but the embeddings of the input, of which it takes a row."""
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(model).tensors}
    if "output.weight" in sizes:  # else they are the output's weights, too
        sizes.pop("token_embd.weight", None)
    return sum(sizes.values())


def read_bandwidth(n_threads: int) -> float:
    """Bytes per second that so many threads read from memory together: the best of a few passes."""
    arrays = [np.ones(_N_BYTES // 8) for _ in range(n_threads)]

    def read() -> float:
        start = time.perf_counter()
        list(pool.map(np.max, arrays))  # releases the GIL, and is not bound by additions
        return time.perf_counter() - start

    with ThreadPoolExecutor(n_threads) as pool:
        seconds = min(read() for _ in range(_N_PASSES))
    return n_threads * _N_BYTES / seconds
