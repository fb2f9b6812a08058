"""Tiny projectors (mmproj GGUFs) with random weights. They make embeddings of an image for a model of tiny.py or
tiny_architectures.py.

The smallest that libmtmd loads: it asks nothing of an image but that its embeddings depend on its pixels.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Literal

import gguf
import numpy as np
import numpy.typing as npt

Kind = Literal["mlp", "qwen2vl_merger"]

N_PATCH = 4  # pixels a side
IMAGE_SIZE = 64  # what a projector of fixed size makes of every image

_N_EMBD = 16

_N_LAYER = {"mlp": 0, "qwen2vl_merger": 1}


def write_projector(path: Path, kind: Kind, n_embd_text: int, *, seed: int = 0) -> None:
    """A projector for models whose embeddings are this long.

    kind: libmtmd's name. "mlp" (LLaVA) makes (IMAGE_SIZE / N_PATCH)**2 embeddings of any image; "qwen2vl_merger", for
        models with M-RoPE, one of each 2 x 2 patches of the image as it is.
    """
    rng = np.random.default_rng(seed)
    out = gguf.GGUFWriter(path, "clip")
    out.add_clip_has_vision_encoder(True)
    out.add_clip_projector_type(kind)
    out.add_vision_image_size(IMAGE_SIZE)
    out.add_vision_patch_size(N_PATCH)
    out.add_vision_embedding_length(_N_EMBD)
    out.add_vision_feed_forward_length(_N_EMBD)
    out.add_vision_projection_dim(n_embd_text)
    out.add_vision_block_count(_N_LAYER[kind])
    out.add_vision_head_count(1)
    out.add_vision_attention_layernorm_eps(1e-5)
    out.add_vision_image_mean([0.5] * 3)
    out.add_vision_image_std([0.25] * 3)
    for name, shape in _shapes(kind, n_embd_text).items():
        # no biases, and positions that do not drown the pixels
        size = 0.0 if name.endswith("bias") else 0.1 if "position" in name else 1.0
        out.add_tensor(name, (size * rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def _shapes(kind: Kind, n_embd_text: int) -> dict[str, tuple[int, ...]]:
    patch = (_N_EMBD, 3, N_PATCH, N_PATCH)
    if kind == "mlp":
        return {
            "v.patch_embd.weight": patch,
            "v.position_embd.weight": ((IMAGE_SIZE // N_PATCH) ** 2, _N_EMBD),
            "mm.0.weight": (_N_EMBD, _N_EMBD),
            "mm.0.bias": (_N_EMBD,),
            "mm.2.weight": (n_embd_text, _N_EMBD),
            "mm.2.bias": (n_embd_text,),
        }
    layer: dict[str, tuple[int, ...]] = {}
    for name in ("attn_q", "attn_k", "attn_v", "attn_out", "ffn_up", "ffn_down"):
        layer |= {f"v.blk.0.{name}.weight": (_N_EMBD, _N_EMBD), f"v.blk.0.{name}.bias": (_N_EMBD,)}
    return {
        **layer,
        "v.patch_embd.weight": patch,
        "v.patch_embd.weight.1": patch,  # of the second frame: an image is a film of two equal ones
        "mm.0.weight": (4 * _N_EMBD, 4 * _N_EMBD),
        "mm.0.bias": (4 * _N_EMBD,),
        "mm.2.weight": (n_embd_text, 4 * _N_EMBD),
        "mm.2.bias": (n_embd_text,),
    }


def random_png(width: int, height: int, *, seed: int = 0) -> bytes:
    """Squares in random colours, large enough to survive a scaling. Both sides are multiples of theirs."""
    n = 16
    squares = np.random.default_rng(seed).integers(0, 256, (height // n, width // n, 3), dtype=np.uint8)
    return png(squares.repeat(n, axis=0).repeat(n, axis=1))


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """RGB pixels [height, width, 3] as a file."""
    height, width, _ = pixels.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    lines = b"".join(b"\0" + line.tobytes() for line in pixels)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
