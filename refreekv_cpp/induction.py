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

import numpy as np
import platformdirs

from refreekv_cpp import native

import llama_cpp  # isort: skip  (after native, which has loaded our library)

# of one half; on two models scores from 256 tokens and from 512 agree (correlation .98)
N_RANDOM = 128

Head = tuple[int, int]  # layer of the model, KV head
Scores = dict[Head, float]

_FORMAT = 1


def random_tokens(model: Any) -> list[int]:
    """N_RANDOM ordinary tokens of the vocabulary, twice; always the same ones."""
    vocab = llama_cpp.llama_model_get_vocab(model)
    n_vocab = llama_cpp.llama_vocab_n_tokens(vocab)
    rng = np.random.default_rng(0)
    tokens: list[int] = []
    while len(tokens) < N_RANDOM:
        token = int(rng.integers(n_vocab))
        if not llama_cpp.llama_vocab_is_control(vocab, token) and not llama_cpp.llama_vocab_is_eog(vocab, token):
            tokens.append(token)
    return tokens * 2


def measure(ctx: Any) -> Scores:
    """The scores of the KV heads of a context that has read `random_tokens`, and nothing else, as sequence 0."""
    scores: Scores = {}
    next_head: dict[int, int] = {}
    for index in range(native.stats(ctx).n_group):
        info = native.group(ctx, index)
        queries, query_pos = native.read_queries(ctx, 0, index)
        keys, key_pos = native.read_keys(ctx, 0, index)
        second = query_pos >= N_RANDOM
        hidden = key_pos[None, :] > query_pos[second, None]
        target = query_pos[second] - N_RANDOM + 1
        n_gqa = info.n_head // info.n_head_kv
        for head in range(info.n_head_kv):
            best = 0.0
            for query in queries[second, head * n_gqa : (head + 1) * n_gqa].swapaxes(0, 1):
                logits = np.where(hidden, -np.inf, query @ keys[:, head].T * info.kq_scale)
                weights = np.exp(logits - logits.max(axis=1, keepdims=True))
                weights /= weights.sum(axis=1, keepdims=True)
                best = max(best, float(weights[np.arange(len(target)), target].mean()))
            number = next_head.get(info.il, 0)
            next_head[info.il] = number + 1
            scores[info.il, number] = best
    return scores


def load(model_path: Path) -> Scores | None:
    """What an earlier measurement of this model file has left; None: there is none."""
    try:
        content = json.loads(_file_of(model_path).read_text())
        if content["format"] != _FORMAT:
            return None
        return {(int(layer), int(head)): float(score) for layer, head, score in content["scores"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save(model_path: Path, scores: Mapping[Head, float]) -> None:
    """For the next time; where the cache folder cannot be written, nothing happens."""
    content = {"format": _FORMAT, "scores": [[layer, head, score] for (layer, head), score in scores.items()]}
    try:
        file = _file_of(model_path)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(content))
        part.replace(file)
    except OSError:
        pass


def _file_of(model_path: Path) -> Path:
    """Named by the model's size, beginning and end: enough to tell files apart, and quick for large ones."""
    size = model_path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with model_path.open("rb") as file:
        digest.update(file.read(2**20))
        file.seek(max(0, size - 2**20))
        digest.update(file.read())
    return platformdirs.user_cache_path("refreekv-cpp") / "induction" / f"{digest.hexdigest()[:32]}.json"
