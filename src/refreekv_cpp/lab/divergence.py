"""How far apart two next-token distributions are."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]
LogProbs = npt.NDArray[np.float64]


def log_softmax(logits: npt.NDArray[Any]) -> LogProbs:
    """Of each row: [..., n_vocab]."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return wide


def kl(full: LogProbs, pruned: LogProbs) -> float:
    """KL(full || pruned) in nats, of one row each: [n_vocab]."""
    probabilities = np.exp(full)
    possible = probabilities > 0
    return max(0.0, float(np.sum(probabilities[possible] * (full[possible] - pruned[possible]))))
