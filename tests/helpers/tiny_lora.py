"""A LoRA adapter for the tiny models, and the same change made to a model's own weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import numpy as np

_RANK = 2
_ALPHA = 4.0


def write_lora(path: Path, model: Path, *, seed: int = 0) -> None:
    """An adapter of the queries and the output of every layer, with random weights."""
    rng = np.random.default_rng(seed)
    out = gguf.GGUFWriter(path, "llama")
    out.add_type(gguf.GGUFType.ADAPTER)
    out.add_string(gguf.Keys.Adapter.TYPE, "lora")
    out.add_float32(gguf.Keys.Adapter.LORA_ALPHA, _ALPHA)
    for tensor in gguf.GGUFReader(model).tensors:
        if tensor.name.endswith(("attn_q.weight", "attn_output.weight")):
            n_in, n_out = map(int, tensor.shape)
            a, b = rng.standard_normal((_RANK, n_in)) / np.sqrt(n_in), rng.standard_normal((n_out, _RANK)) / 4
            out.add_tensor(f"{tensor.name}.lora_a", a.astype(np.float32))
            out.add_tensor(f"{tensor.name}.lora_b", b.astype(np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def merge_lora(path: Path, model: Path, adapter: Path, *, scale: float) -> None:
    """A copy of the model whose weights are W + scale * alpha / rank * B A."""
    shutil.copyfile(model, path)
    parts = {tensor.name: tensor.data for tensor in gguf.GGUFReader(adapter).tensors}
    for tensor in gguf.GGUFReader(path, "r+").tensors:
        if f"{tensor.name}.lora_a" in parts:
            tensor.data[:] += scale * _ALPHA / _RANK * parts[f"{tensor.name}.lora_b"] @ parts[f"{tensor.name}.lora_a"]
            tensor.data.flush()
