"""Which KV heads copy: induction heads, found by a test of their own.

An induction head attends to what followed the previous occurrence of the current token. It is what a model copies text
with, and what it will copy is not seen in the attention of the prompt's end: a continuation that begins to repeat a
passage needs that passage in these heads, word by word. So a policy does better to leave them whole.

The test: a row of random tokens, twice. In the second half, the attention from each token to the one after its
previous occurrence is next to nothing in most heads, and near 1 in a head that copies. The score of a KV head is the
highest among its query heads. It belongs to the model, and is kept on disk beside others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from refreekv_cpp import native
from refreekv_cpp._cache_dir import cache_dir

# of one half; on two models scores from 256 tokens and from 512 agree (correlation .98)
N_RANDOM = 128

Head = tuple[int, int]  # layer of the model, KV head
Scores = dict[Head, float]

_FORMAT = 1
_CONTEXT_OPTIONS = (
    "type_k",
    "rope_scaling_type",
    "rope_freq_base",
    "rope_freq_scale",
    "yarn_ext_factor",
    "yarn_attn_factor",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_orig_ctx",
)


def random_tokens(model: Any) -> list[int]:
    """N_RANDOM ordinary tokens of the vocabulary, twice; always the same ones."""
    vocab = llama_cpp.llama_model_get_vocab(model)
    ordinary = np.arange(llama_cpp.llama_vocab_n_tokens(vocab))
    if llama_cpp.llama_vocab_type(vocab) != llama_cpp.LLAMA_VOCAB_TYPE_NONE:
        special = [
            llama_cpp.llama_vocab_is_control(vocab, token) or llama_cpp.llama_vocab_is_eog(vocab, token)
            for token in ordinary.tolist()
        ]
        ordinary = ordinary if all(special) else ordinary[~np.array(special)]
    tokens: list[int] = np.random.default_rng(0).choice(ordinary, N_RANDOM).tolist()
    return tokens * 2


def measure(ctx: Any) -> Scores:
    """The scores of the KV heads of a context that has read `random_tokens`, and nothing else, as sequence 0."""
    scores: Scores = {}
    next_head: dict[int, int] = {}
    for index in range(native.stats(ctx).n_group):
        info = native.group(ctx, index)
        attention = native.read_attention(ctx, 0, index)  # of the last queries, to all 2 * N_RANDOM tokens
        n_rows = min(attention.shape[1], N_RANDOM)
        positions = np.arange(2 * N_RANDOM - n_rows, 2 * N_RANDOM)
        copied = attention[:, np.arange(-n_rows, 0), positions - N_RANDOM + 1].mean(axis=1)
        for score in copied.reshape(info.n_head_kv, -1).max(axis=1).tolist():
            number = next_head.get(info.il, 0)
            next_head[info.il] = number + 1
            scores[info.il, number] = score
    return scores


def options_of(llm: llama_cpp.Llama, n_window: int) -> str:
    """What the scores depend on beside the model: the queries that are looked at, positions, the rounding of keys."""
    options = [getattr(llm.context_params, name) for name in _CONTEXT_OPTIONS]
    return repr((n_window, options, sorted((llm.kv_overrides or {}).items())))


def load(model_path: Path, options: str) -> Scores | None:
    """What an earlier measurement of this file, with such options, has left; None: there is none."""
    try:
        content = json.loads(_file_of(model_path, options).read_text())
        if content["format"] != _FORMAT:
            return None
        return {(int(layer), int(head)): float(score) for layer, head, score in content["scores"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save(model_path: Path, options: str, scores: Mapping[Head, float]) -> None:
    """For the next time; where the cache folder cannot be written, nothing happens."""
    content = {"format": _FORMAT, "scores": [[layer, head, score] for (layer, head), score in scores.items()]}
    try:
        file = _file_of(model_path, options)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(content))
        part.replace(file)
    except OSError:
        pass


def _file_of(model_path: Path, options: str) -> Path:
    """Named by the model's size, beginning and end, which are enough to tell files apart and quick for large ones."""
    size = model_path.stat().st_size
    digest = hashlib.sha256(f"{size} {options}".encode())
    with model_path.open("rb") as file:
        digest.update(file.read(2**20))
        file.seek(max(0, size - 2**20))
        digest.update(file.read())
    return cache_dir() / "induction" / f"{digest.hexdigest()[:32]}.json"
