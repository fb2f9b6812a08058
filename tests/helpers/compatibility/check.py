"""A check: a feature's name, and a function that raises unless the feature does what it should."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import llama_cpp
import numpy as np
import numpy.typing as npt
from support import Sequences, load
from tiny import N_SPECIAL, random_tokens

from refreekv_cpp import Full, Llama, Policy, ReFreeKV, native

# lenient enough to evict something of every tiny model
POLICIES: dict[str, Policy] = {"full": Full(), "refreekv": ReFreeKV()}

# long enough for a pruning to evict something of every tiny model: it does so in blocks of 256 cells
PROMPT = random_tokens(700)
TEXT = " ".join(f"In the year {1000 + 7 * i} the harbour counted {i * i} ships." for i in range(15))


def _printable_only(_tokens: npt.NDArray[np.intc], scores: npt.NDArray[np.single]) -> npt.NDArray[np.single]:
    """The tiny models' tokens are bytes; of these any sequence is text, which others are not."""
    res = np.full_like(scores, -np.inf)
    printable = slice(N_SPECIAL + 0x20, N_SPECIAL + 0x7F)
    res[printable] = scores[printable]
    return res


def printable() -> llama_cpp.LogitsProcessorList:
    return llama_cpp.LogitsProcessorList([_printable_only])


class _Counting(Llama):
    """Tells its run what its prunings evicted."""

    run: Run

    def prune_kv(self) -> int:
        n_evicted = super().prune_kv()
        self.run.n_evicted += n_evicted
        return n_evicted


@dataclass
class Run:
    """One run of a check: its policy, and where its models come from."""

    policy: Policy
    model: Callable[[str], Path]  # tests/helpers/tiny.py's and tests/helpers/tiny_architectures.py's, by name
    folder: Path
    n_evicted: int = 0

    @property
    def evicts(self) -> bool:
        return not isinstance(self.policy, Full)

    def load(self, model: str | Path = "gqa", *, policy: Policy | None = None, **options: Any) -> Llama:
        path = model if isinstance(model, Path) else self.model(model)
        llm = load(path, policy or self.policy, kind=_Counting, codes=True, **options)
        llm.run = self
        return llm

    def by_hand(self, llm: Llama, tokens: list[int], n: int = 8, **sampling: Any) -> list[int]:
        """A generation without `generate`: read, prune, then sample and read in turn."""
        llm.reset()
        llm.eval(tokens)
        llm.prune_kv()
        llm._sampler = llm._init_sampler(**{"temp": 0.0, "logits_processor": printable(), **sampling})
        res: list[int] = []
        while len(res) < n:
            res.append(llm.sample())
            llm.eval([res[-1]])
        return res

    def sequences(self, **fields: Any) -> Sequences:
        return Sequences(self.model("gqa"), self.policy, codes=True, **fields)

    def prune(self, sequences: Sequences, seq_id: int) -> None:
        if self.evicts:
            self.n_evicted += native.prune(sequences.ctx, seq_id)


class Refused(Exception):
    """What was asked for is refused, in these words, and nothing was harmed."""


Verdict = Literal["yes", "refused", "fails"]


@dataclass(frozen=True)
class Outcome:
    """Of a check with one policy. The note is what the check had to say: of a refusal its exact words."""

    verdict: Verdict
    note: str = ""


@dataclass(frozen=True)
class Check:
    """
    Attributes:
        feature: what it is called in the table.
        function: raises `Refused`, or anything else when the feature does not do what it should; returns a note or
            nothing.
        prunes: whether a run with an evicting policy has to evict something.
    """

    feature: str
    function: Callable[[Run], str | None] = field(repr=False)
    prunes: bool = True

    def run(self, policy: Policy, model: Callable[[str], Path], folder: Path) -> Outcome:
        """Raises what the function raises when the feature does not work."""
        run = Run(policy, model, folder)
        try:
            note = self.function(run)
        except Refused as error:
            return Outcome("refused", str(error))
        assert run.n_evicted > 0 or not (run.evicts and self.prunes), "nothing was evicted, so nothing was checked"
        return Outcome("yes", note or "")


_CHECKS: list[Check] = []


def check(feature: str, *, prunes: bool = True) -> Callable[[Callable[[Run], str | None]], Callable[[Run], str | None]]:
    """Registers a function as a check."""

    def register(function: Callable[[Run], str | None]) -> Callable[[Run], str | None]:
        _CHECKS.append(Check(feature, function, prunes))
        return function

    return register


def registered_in(module: ModuleType) -> list[Check]:
    return [check for check in _CHECKS if check.function.__module__ == module.__name__]
