"""What `refreekv bench` holds decoding against."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from refreekv_cpp.lab.bench.bound import weight_bytes


def test_a_step_reads_every_weight_but_the_embeddings_of_its_input(tiny_model: Path) -> None:
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(tiny_model).tensors}
    separate = "output.weight" in sizes
    assert weight_bytes(tiny_model) == sum(sizes.values()) - (sizes["token_embd.weight"] if separate else 0)
    assert weight_bytes(tiny_model) > 0


def test_tied_embeddings_are_read_for_the_output(tmp_path: Path) -> None:
    path = tmp_path / "tied.gguf"
    writer = gguf.GGUFWriter(path, "llama")

    writer.add_tensor("token_embd.weight", np.zeros((8, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert weight_bytes(path) == 8 * 4 * 4
