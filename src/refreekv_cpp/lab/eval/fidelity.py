"""How far the next-token distributions of a pruned cache are from the full cache's, over the same continuation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from refreekv_cpp.lab.divergence import Logits, kl, log_softmax


@dataclass(frozen=True)
class Fidelity:
    """One entry per scored token of a continuation.

    Attributes:
        kl: KL(full || pruned) of the distributions, in nats.
        same_top: whether both find the same token likeliest.
        delta_p: probability of the continuation's token, pruned minus full.
        nll: -log of that probability with the pruned cache, in nats.
        nll_full: ... with the full cache.
    """

    kl: tuple[float, ...]
    same_top: tuple[bool, ...]
    delta_p: tuple[float, ...]
    nll: tuple[float, ...]
    nll_full: tuple[float, ...]


def compare(full: Logits, pruned: Logits, tokens: Sequence[int]) -> Fidelity:
    """Distributions [n, n_vocab] with either cache; row i predicts tokens[i]."""
    rows: list[tuple[float, bool, float, float, float]] = []
    # row by row: a batch of them in float64 would be large for large vocabularies
    for full_row, pruned_row, token in zip(full, pruned, tokens, strict=True):
        p, q = log_softmax(full_row), log_softmax(pruned_row)
        row = (
            kl(p, q),
            bool(np.argmax(p) == np.argmax(q)),
            float(np.exp(q[token]) - np.exp(p[token])),
            -float(q[token]),
            -float(p[token]),
        )
        rows.append(row)
    return Fidelity(*zip(*rows, strict=True)) if rows else Fidelity((), (), (), (), ())


def first_divergence(tokens: Sequence[int], reference: Sequence[int]) -> int | None:
    """The index of the first token that differs; None: they are the same to the end."""
    for i, (token, other) in enumerate(zip(tokens, reference, strict=False)):
        if token != other:
            return i
    return None if len(tokens) == len(reference) else min(len(tokens), len(reference))


@dataclass(frozen=True)
class Summary:
    """Over all scored tokens: KL in nats, parts of 1 for the rest; `perplexity_ratio` is pruned over full."""

    n: int
    kl_mean: float
    kl_median: float
    kl_95: float
    kl_99: float
    kl_999: float
    kl_max: float
    same_top: float
    delta_p_rms: float
    perplexity_ratio: float


def summarise(parts: Sequence[Fidelity]) -> Summary | None:
    """None: not one token was scored."""
    kl = np.concatenate([np.asarray(part.kl, dtype=np.float64) for part in parts]) if parts else np.empty(0)
    if len(kl) == 0:
        return None
    same_top, delta_p, nll, nll_full = (
        np.concatenate([np.asarray(getattr(part, name), dtype=np.float64) for part in parts])
        for name in ("same_top", "delta_p", "nll", "nll_full")
    )
    median, p95, p99, p999 = np.percentile(kl, [50, 95, 99, 99.9])
    return Summary(
        n=len(kl),
        kl_mean=float(kl.mean()),
        kl_median=float(median),
        kl_95=float(p95),
        kl_99=float(p99),
        kl_999=float(p999),
        kl_max=float(kl.max()),
        same_top=float(same_top.mean()),
        delta_p_rms=float(np.sqrt(np.mean(delta_p**2))),
        perplexity_ratio=float(np.exp(np.mean(nll - nll_full))),
    )
