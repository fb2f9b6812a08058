"""How right an answer is, 0 to 1, and how sure a difference between two caches is."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def normalise(text: str) -> str:
    """Lower case, without punctuation and English articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact(answer: str, expected: str) -> float:
    """Whether both are the same text once normalised."""
    return float(normalise(answer) == normalise(expected))


def found(answer: str, expected: str) -> float:
    """Whether the answer says the expected text somewhere; upper and lower case are the same."""
    return float(expected.lower().strip() in answer.lower())


def number(answer: str, expected: str) -> float:
    """Whether the last number of the answer is the expected one; `found` where a number is not what is expected."""
    if not _NUMBER.fullmatch(expected.strip()):
        return found(answer, expected)
    numbers = _NUMBER.findall(answer)
    return float(bool(numbers) and _value(numbers[-1]) == _value(expected))


def _value(text: str) -> float:
    return float(text.strip().replace(",", ""))


def f1(answer: str, expected: str) -> float:
    """Of the words they have in common, once normalised."""
    words, right = normalise(answer).split(), normalise(expected).split()
    return _f1(sum((Counter(words) & Counter(right)).values()), len(words), len(right))


def rouge_l(answer: str, expected: str) -> float:
    """F1 of the longest common subsequence of their words (letters and digits, lower case; no stemming)."""
    words, right = (re.findall(r"[a-z0-9]+", text.lower()) for text in (answer, expected))
    return _f1(_common_subsequence(words, right), len(words), len(right))


def _f1(n_common: int, n_answer: int, n_expected: int) -> float:
    if n_answer == 0 or n_expected == 0:
        return float(n_answer == n_expected)
    return 2 * n_common / (n_answer + n_expected)


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    lengths = [0] * (len(b) + 1)
    for word in a:
        before = 0  # of a's words so far and b[:j], without this word
        for j, other in enumerate(b):
            before, lengths[j + 1] = (
                lengths[j + 1],
                before + 1 if word == other else max(lengths[j + 1], lengths[j]),
            )
    return lengths[-1]


SCORES: dict[str, Callable[[str, str], float]] = {
    "f1": f1,
    "rouge_l": rouge_l,
    "exact": exact,
    "found": found,
    "all_found": found,
    "number": number,
}
_OF_ALL = frozenset({"all_found"})


def score(name: str, answer: str, expected: Sequence[str]) -> float:
    """The best over the texts that count as right; with `all_found`, the share of the texts that the answer says."""
    each = [SCORES[name](answer, text) for text in expected]
    return sum(each) / len(each) if name in _OF_ALL else max(each)


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


def bootstrap(
    values: Sequence[float] | npt.NDArray[np.float64], *, seed: int = 0, n_resamples: int = 10_000
) -> Interval:
    """Of the mean of `values`, one per item (for two caches: their paired differences), by percentiles.

    With a handful of items such an interval is too narrow; it is no test.
    """
    array = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = array[rng.integers(0, len(array), (n_resamples, len(array)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(array.mean()), float(low), float(high))
