"""A library of what tiny models have read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from support import load
from tiny import random_tokens

from refreekv_cpp import Llama, ReFreeKV

POLICY = ReFreeKV()
TEXT = random_tokens(1300)
QUESTION = random_tokens(40, seed=1)
MORE = random_tokens(6, seed=2)


def reader(model: Path, folder: Path | None, **options: Any) -> Llama:
    """A Llama that decodes with codes of what it evicts. folder: of its library."""
    policy = options.pop("policy", POLICY)
    return load(model, policy, codes=True, kv_library=folder, **{"n_batch": 256, **options})


def read(llm: Llama, tokens: list[int] = TEXT) -> Llama:
    """... after it has read and pruned a text."""
    llm.eval(tokens)
    llm.prune_kv()
    return llm


def write(model: Path, folder: Path, tokens: list[int] = TEXT, **options: Any) -> None:
    """Have a library keep a text."""
    llm = read(reader(model, folder, **options), tokens)
    assert llm.keep_kv() == len(tokens)
    llm.close()


def opened(model: Path, folder: Path, tokens: list[int] = TEXT, **options: Any) -> Llama:
    """A Llama that goes on from what the library has of a text, as before a prompt that begins with it."""
    llm = reader(model, folder, **options)
    llm._open(tokens)
    return llm


def files(folder: Path) -> list[Path]:
    """The blocks."""
    return sorted(folder.glob("*.block"), key=lambda path: path.name)


def in_order(folder: Path) -> list[Path]:
    """The blocks of the only text, the first one first."""

    def first(path: Path) -> int:
        return int(np.frombuffer(path.read_bytes()[:20], dtype="<u4")[4])

    return sorted(files(folder), key=first)
