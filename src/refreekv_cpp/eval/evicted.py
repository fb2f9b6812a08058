"""Does the attention that evicted cells would have drawn say how far the pruned cache is off, and who could know it?

An answer is scored on the pruned cache, token by token, against the full cache's. Beside each token's KL stands the
part of every head's attention that the evicted cells would have drawn: as it is, and as it looks to someone who has
kept less of their keys than the keys themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import llama_cpp
import numpy as np
import numpy.typing as npt

from refreekv_cpp import native
from refreekv_cpp.divergence import kl
from refreekv_cpp.guard import next_token
from refreekv_cpp.llama import Llama

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

# logits of evicted keys [n_keys, n_embd_head] for queries [n, n_embd_head] (scaled already), and how many cells each
# stands for: [n, m], [m]
Summary = Callable[[Floats, Floats], tuple[Floats, npt.NDArray[np.int64]]]


def exact(queries: Floats, keys: Floats) -> tuple[Floats, npt.NDArray[np.int64]]:
    return queries @ keys.T, np.ones(len(keys), dtype=np.int64)


def rounded(n_bits: int) -> Summary:
    """Keys of so many bits a number, with the least and the greatest of every 32 (as ggml's quantised types have)."""

    def summary(queries: Floats, keys: Floats) -> tuple[Floats, npt.NDArray[np.int64]]:
        blocks = keys.reshape(-1, min(32, keys.shape[1]))
        low = blocks.min(axis=1, keepdims=True)
        step = (blocks.max(axis=1, keepdims=True) - low) / (2**n_bits - 1)
        step[step == 0] = 1
        return exact(queries, (np.round((blocks - low) / step) * step + low).reshape(keys.shape))

    return summary


def boxed(n_cells: int) -> Summary:
    """The least and the greatest of every channel over so many neighbouring cells: no key of theirs has a larger logit
    than this (after Quest, arXiv 2406.10774)."""

    def summary(queries: Floats, keys: Floats) -> tuple[Floats, npt.NDArray[np.int64]]:
        starts = np.arange(0, len(keys), n_cells)
        low, high = np.minimum.reduceat(keys, starts), np.maximum.reduceat(keys, starts)
        logits = np.maximum(queries, 0) @ high.T + np.minimum(queries, 0) @ low.T
        return logits, np.diff(np.append(starts, len(keys)))

    return summary


SUMMARIES: dict[str, Summary] = {
    "the keys themselves": exact,
    "keys of 4 bits": rounded(4),
    "keys of 2 bits": rounded(2),
    "bounds over 16 cells": boxed(16),
    "bounds over 64 cells": boxed(64),
}


@dataclass(frozen=True)
class Study:
    """
    Attributes:
        budget: the part of the cells that was kept.
        kl: per token of the answer, KL(full || pruned) of the next one in nats: [n].
        mass: by summary, the part of the attention that evicted cells would have drawn: [n, heads of all layers that
            lost cells].
    """

    budget: float
    kl: Doubles
    mass: dict[str, Doubles]


def study(llm: Llama, prompt: Sequence[int], n_answer: int) -> Study:
    """
    Args:
        llm: with a policy that looks at queries. Its model's attention has to be a softmax of scaled products alone
            (no soft-cap, ALiBi or sinks).

    Raises:
        ValueError: its policy does not, or evicted nothing; or the model is a hybrid.
    """
    if not (llm.kv_policy.native_options() or {}).get("n_window"):
        raise ValueError(f"{llm.kv_policy.name}: valid are policies that look at attention")
    if llama_cpp.llama_model_is_hybrid(llm.model):
        raise ValueError("a hybrid model cannot take tokens back")
    ctx = llm.ctx
    llm.reset()
    llm.eval(prompt)
    n_groups = native.stats(ctx).n_group
    keys = [native.read_keys(ctx, 0, group)[0] for group in range(n_groups)]

    answer, full = [], [next_token(llm)]
    for _ in range(n_answer):
        answer.append(int(full[-1].argmax()))
        llm.eval(answer[-1:])
        full.append(next_token(llm))

    # the queries of the prompt's end, which the answer's have replaced
    llm.n_tokens = max(0, len(prompt) - 256)
    llm.eval(prompt[llm.n_tokens :])
    llm.prune_kv()
    budget = llm.kv_stats.budget
    kept = [native.kept(ctx, 0, group) for group in range(n_groups)]
    if budget == 1:
        raise ValueError(f"{llm.kv_policy.name}: nothing was evicted of {len(prompt)} tokens")

    divergence, queries = [], []
    for i, token in enumerate(answer):
        llm.eval([token])
        divergence.append(kl(full[i + 1], next_token(llm)))
        queries.append([native.read_queries(ctx, 0, group)[0][-1] for group in range(n_groups)])

    mass: dict[str, list[Doubles]] = {name: [] for name in SUMMARIES}
    for group in range(n_groups):
        evicted = keys[group][np.setdiff1d(np.arange(len(prompt)), kept[group])]
        if len(evicted) == 0:
            continue
        info = native.group(ctx, group)
        own, positions = native.read_keys(ctx, 0, group)
        unseen = positions[None, :] > np.arange(len(prompt), len(prompt) + n_answer)[:, None]
        for head in range(info.n_head):
            of_kv = head // (info.n_head // info.n_head_kv)
            q = np.stack([rows[group][head] for rows in queries]) * info.kq_scale
            logits = np.where(unseen, -np.inf, q @ own[:, of_kv].T).astype(np.float64)
            top = logits.max(axis=1, keepdims=True)
            kept_sum = np.exp(logits - top).sum(axis=1)
            for name, summary in SUMMARIES.items():
                others, n_cells = summary(q, evicted[:, of_kv])
                lost_sum = (n_cells * np.exp(np.minimum(others - top, 500.0))).sum(axis=1)
                mass[name].append(lost_sum / (lost_sum + kept_sum))
    return Study(budget, np.array(divergence), {name: np.stack(parts, axis=1) for name, parts in mass.items() if parts})


def rank_correlation(a: Doubles, b: Doubles) -> float:
    """Spearman's, of values without ties; nan where one of them is constant."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(a.argsort().argsort(), b.argsort().argsort())[0, 1])
