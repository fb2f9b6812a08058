"""Unpacks the weights of a model to f32.

    python tests/tools/f32.py MODEL OUT

With quantised weights llama.cpp rounds activations to 8 bits, which adds a divergence of its own to any change, however
small (docs/results/fidelity.md). OUT takes 4 bytes per weight on the disk, and as much memory.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import llama_cpp
import typer


def unpack(model: Path, out: Path) -> None:
    """
    Raises:
        ValueError: llama.cpp cannot read the model, or write the other file.
    """
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize = llama_cpp.LLAMA_FTYPE_ALL_F32, True
    if llama_cpp.llama_model_quantize(str(model).encode(), str(out).encode(), ctypes.byref(options)):
        raise ValueError(f"{model}: its weights cannot be unpacked into {out}")


if __name__ == "__main__":
    typer.run(unpack)
