"""Tiny llama-architecture models with random weights: they load in milliseconds and say nothing sensible, which is all
that a cache needs.

Their attention is not left to chance. With plain random weights it is nearly uniform, and no policy has anything to
choose; here every layer draws, with strengths of its own, on three things that real heads do: a sink (the first token),
the recent past, and content. So every preset keeps something else, and something else in each layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

BOS = 1
N_SPECIAL = 3  # <unk>, <s>, </s>
N_VOCAB = N_SPECIAL + 256

_ROPE_BASE = 10000.0

# attention logits that each layer's sink, recent past and content are worth, about; cycled over the layers
_STRENGTHS = ((4.0, 4.0, 1.5), (14.0, 8.0, 1.0), (11.0, 16.0, 1.0), (18.0, 8.0, 2.0))


@dataclass(frozen=True)
class TinyModel:
    n_layer: int = 4
    n_embd: int = 64
    n_head: int = 4
    n_head_kv: int = 2
    n_embd_head: int = 16
    n_ff: int = 128
    causal: bool = True

    def write(self, path: Path, *, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        out = gguf.GGUFWriter(path, "llama")
        out.add_context_length(4096)
        out.add_embedding_length(self.n_embd)
        out.add_block_count(self.n_layer)
        out.add_feed_forward_length(self.n_ff)
        out.add_head_count(self.n_head)
        out.add_head_count_kv(self.n_head_kv)
        out.add_key_length(self.n_embd_head)
        out.add_value_length(self.n_embd_head)
        out.add_rope_dimension_count(self.n_embd_head)
        out.add_rope_freq_base(_ROPE_BASE)
        out.add_layer_norm_rms_eps(1e-5)
        out.add_causal_attention(self.causal)
        write_tokenizer(out)
        for name, weights in self._weights(rng):
            out.add_tensor(name, weights.astype(np.float32))
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
        out.close()

    def _weights(self, rng: np.random.Generator) -> list[tuple[str, npt.NDArray[np.float64]]]:
        def matrix(n_out: int, n_in: int) -> npt.NDArray[np.float64]:
            return rng.standard_normal((n_out, n_in)) / np.sqrt(n_in)

        # every token's embedding holds the same `ordinary`, but for the first one's, which holds `first`: from these
        # queries and keys learn what has nothing to do with content
        ordinary, first = np.linalg.qr(rng.standard_normal((self.n_embd, 2)))[0].T * np.sqrt(self.n_embd)
        embeddings = rng.standard_normal((N_VOCAB, self.n_embd)) + 1.5 * ordinary
        embeddings[BOS] = 2 * first

        res = [
            ("token_embd.weight", 4 * embeddings),
            ("output.weight", matrix(N_VOCAB, self.n_embd)),
            ("output_norm.weight", rng.uniform(0.5, 1.5, self.n_embd)),
        ]
        for layer in range(self.n_layer):
            sink, recent, content = _STRENGTHS[layer % len(_STRENGTHS)]
            queries, keys = [], []
            for _ in range(self.n_head_kv):
                # the slowest pair of RoPE hardly turns: what is stored there is found from anywhere. The fast ones
                # turn away within a few hundred tokens.
                slow, fast = np.zeros(self.n_embd_head), np.zeros(self.n_embd_head)
                slow[-2] = self.n_embd_head**0.25
                fast[self.n_embd_head // 4 : self.n_embd_head // 2] = 1
                fast *= self.n_embd_head**0.25 / np.linalg.norm(fast)

                def head(*pairs: tuple[float, npt.NDArray[np.float64], npt.NDArray[np.float64]], noise: float = 0.0):
                    weights = matrix(self.n_embd_head, self.n_embd) * noise
                    for strength, to, of in pairs:
                        weights += np.sqrt(strength) * np.outer(to, of) / self.n_embd
                    return weights

                noise = np.sqrt(content)
                keys.append(head((sink, slow, first), (recent, fast, ordinary), noise=noise))
                for _ in range(self.n_head // self.n_head_kv):
                    queries.append(head((sink, slow, ordinary), (recent, fast, ordinary), noise=noise))
            block = f"blk.{layer}"
            res += [
                (f"{block}.attn_norm.weight", rng.uniform(0.9, 1.1, self.n_embd)),
                (f"{block}.attn_q.weight", np.concatenate(queries)),
                (f"{block}.attn_k.weight", np.concatenate(keys)),
                (f"{block}.attn_v.weight", matrix(self.n_head_kv * self.n_embd_head, self.n_embd)),
                (f"{block}.attn_output.weight", matrix(self.n_embd, self.n_head * self.n_embd_head)),
                (f"{block}.ffn_norm.weight", rng.uniform(0.9, 1.1, self.n_embd)),
                (f"{block}.ffn_gate.weight", matrix(self.n_ff, self.n_embd)),
                (f"{block}.ffn_up.weight", matrix(self.n_ff, self.n_embd)),
                (f"{block}.ffn_down.weight", matrix(self.n_embd, self.n_ff)),
            ]
        return res


# the cache's row sizes and head counts that differ in kind
TINY_MODELS = {
    "gqa": TinyModel(),
    "mha": TinyModel(n_head_kv=4),
    # 64 numbers a head: quantised caches (blocks of 32) whose keys and values are rotated; heads wider than n_embd
    "gqa64": TinyModel(n_embd=128, n_embd_head=64),
    "mha64": TinyModel(n_embd=128, n_embd_head=64, n_head=2, n_head_kv=2),
    # so many heads that the eviction graph takes a layer in several slices (256 queries of 2048 cells: 2 MiB a head)
    "many-heads": TinyModel(n_layer=1, n_head=40, n_head_kv=4),
}


def write_tokenizer(out: gguf.GGUFWriter, *, n_vocab: int = N_VOCAB, short_spaces: bool = False) -> None:
    """The smallest SentencePiece vocabulary that llama.cpp takes: special tokens and bytes.

    n_vocab: more than these are tokens that are not used.
    short_spaces: a token for the space, which else is three bytes, in the place of the byte 0xFF, which no text has.
    """
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL, *[gguf.TokenType.BYTE] * 256]
    if short_spaces:
        tokens[-1], kinds[-1] = "▁", gguf.TokenType.NORMAL
    for i in range(N_VOCAB, n_vocab):
        tokens.append(f"<{i}>")
        kinds.append(gguf.TokenType.UNUSED)
    out.add_tokenizer_model("llama")
    out.add_token_list(tokens)
    out.add_token_scores([0.0] * len(tokens))
    out.add_token_types(kinds)
    out.add_unk_token_id(0)
    out.add_bos_token_id(BOS)
    out.add_eos_token_id(2)


def random_tokens(n: int, *, seed: int = 0) -> list[int]:
    """A prompt: BOS, then ordinary tokens."""
    return [BOS, *np.random.default_rng(seed).integers(N_SPECIAL, N_VOCAB, n - 1).tolist()]
