"""Random chats for a long time: nothing grows, and the logits stay as close to the full cache's as they were.

    python tests/tools/soak.py [--tokens 1000000] [--model MODEL] [--seed 0]

A model (by default a tiny one that is written for the purpose) reads and answers random chats, with a cold store in a
file and a library with a limit. Chats take several turns, are cut, saved, loaded and given up. At 20 checkpoints a
fixed text is read, and the divergence of the next tokens from those of the full cache is measured. After the first
quarter of the tokens, which fills caches and pools, the resident memory, the open files, the threads and the files on
disk may not grow. Linux.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import _helpers  # noqa: F401  (first: it makes the other imports possible)
import numpy as np
import numpy.typing as npt
import psutil
import typer
from support import feed, load
from tiny import TinyModel, random_tokens

from refreekv_cpp import Llama, ReFreeKV

N_CTX = 2048
N_CHECKS = 20
LIBRARY_LIMIT = 8 << 20
PROBE = random_tokens(900, seed=12345)
NEXT = random_tokens(9, seed=54321)[1:]

# what may come in after the first quarter: pools of malloc's and Python's own
_MOST_GROWTH = 16 << 20


@dataclass
class Figures:
    """What the process holds at a checkpoint; sizes are in bytes."""

    n_tokens: int
    resident: int
    cold: int
    library: int
    n_files: int
    n_threads: int
    divergence: float

    def __str__(self) -> str:
        sizes = " ".join(f"{name} {value / 2**20:.1f} MiB" for name, value in self._sizes())
        return (
            f"{self.n_tokens} tokens: {sizes}, {self.n_files} open files, {self.n_threads} threads, "
            f"KL to full {self.divergence:.6f}"
        )

    def _sizes(self) -> list[tuple[str, int]]:
        return [("resident", self.resident), ("cold", self.cold), ("library", self.library)]


def probe(llm: Llama) -> npt.NDArray[np.float64]:
    """Log-probabilities after each of some tokens that follow a fixed text, which is read anew and pruned."""
    llm.reset()
    llm.eval(PROBE)
    if llm.kv_policy.name != "full":
        llm.prune_kv()
    rows = feed(llm, NEXT).astype(np.float64)
    llm.reset()
    rows -= rows.max(axis=1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))


class Soak:
    """Random chats of one `Llama`, and their count of tokens."""

    def __init__(self, model: Path, folder: Path, seed: int) -> None:
        self.folder = folder
        self.rng = np.random.default_rng(seed)
        self.n_tokens = 0
        (folder / "cold").mkdir()
        self.llm = load(
            model,
            ReFreeKV(),
            codes=True,
            n_ctx=N_CTX,
            n_batch=256,
            kv_evicted="keep",
            kv_cold="file",
            kv_cold_dir=folder / "cold",
            kv_library=folder / "library",
            kv_library_limit=LIBRARY_LIMIT,
        )
        full = load(model, "full", n_ctx=N_CTX, n_batch=256)
        self.expected = probe(full)
        full.close()

    def text(self, most: int) -> list[int]:
        n_vocab = min(self.llm.n_vocab(), 259)  # bytes of a tiny model
        return self.rng.integers(3, n_vocab, int(self.rng.integers(1, most))).tolist()

    def chat(self) -> None:
        """Some turns of a conversation, which may go on from a part of it, or from a state that was saved."""
        tokens = [1, *self.text(900)]
        state: Any = None
        n_cached = 0
        for _ in range(int(self.rng.integers(1, 6))):
            n_most = int(self.rng.integers(1, 60))
            generator = self.llm.generate(tokens, temp=1.0)
            before = len(tokens)
            for token in generator:
                tokens.append(token)
                if len(tokens) - before >= n_most:
                    break
            generator.close()
            self.n_tokens += len(tokens) - n_cached
            what = self.rng.random()
            if what < 0.1:
                state = (self.llm.save_state(), list(tokens))
            elif what < 0.2 and state is not None:
                self.llm.load_state(state[0])
                tokens = list(state[1])
            elif what < 0.3:
                tokens = tokens[: int(self.rng.integers(1, len(tokens)))]
            n_cached = len(tokens)
            tokens += self.text(200)
            if len(tokens) > N_CTX - 80:
                return
        if self.rng.random() < 0.2:
            self.llm.reset()

    def look(self) -> Figures:
        log_p = probe(self.llm)
        divergence = float((np.exp(self.expected) * (self.expected - log_p)).sum(axis=1).mean())
        process = psutil.Process()
        descriptors = list(Path("/proc/self/fd").iterdir())
        return Figures(
            n_tokens=self.n_tokens,
            resident=process.memory_info().rss,
            cold=sum(_bytes_on_disk(path) for path in descriptors if _is_in(path, self.folder / "cold")),
            library=sum(path.stat().st_size for path in (self.folder / "library").iterdir()),
            n_files=len(descriptors),
            n_threads=process.num_threads(),
            divergence=divergence,
        )


def _is_in(descriptor: Path, folder: Path) -> bool:
    try:
        return os.readlink(descriptor).startswith(str(folder))
    except FileNotFoundError:  # the one that listed them
        return False


def _bytes_on_disk(descriptor: Path) -> int:
    return os.stat(descriptor).st_blocks * 512


def growth(figures: list[Figures]) -> list[str]:
    """What is larger in the rest than in the first quarter, though it may not be."""
    n_first = max(1, len(figures) // 4)
    first, rest = figures[:n_first], figures[n_first:]

    def most(name: str, of: list[Figures]) -> float:
        return float(max(getattr(each, name) for each in of))

    res = []
    for name, room in (("resident", _MOST_GROWTH), ("cold", _MOST_GROWTH), ("n_files", 0), ("n_threads", 0)):
        if most(name, rest) > most(name, first) + room:
            res.append(f"{name} grew from {most(name, first):.0f} to {most(name, rest):.0f}")
    if most("library", figures) > LIBRARY_LIMIT:
        res.append(f"the library has {most('library', figures):.0f} bytes, its limit is {LIBRARY_LIMIT}")
    off = max(abs(each.divergence - figures[0].divergence) for each in figures)
    if off > 0.01 * figures[0].divergence + 1e-6:
        res.append(f"the divergence from the full cache changed by {off:.3g}")
    return res


def main(
    tokens: Annotated[int, typer.Option(help="Tokens of all chats.")] = 1_000_000,
    model: Annotated[Path | None, typer.Option(help="A GGUF file; by default a tiny model is written.")] = None,
    seed: int = 0,
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if model is None:
            model = folder / "tiny.gguf"
            TinyModel(n_layer=2).write(model)
        soak = Soak(model, folder, seed)
        figures = [soak.look()]
        print(figures[0], flush=True)
        while soak.n_tokens < tokens:
            soak.chat()
            if soak.n_tokens >= len(figures) * tokens / N_CHECKS:
                figures.append(soak.look())
                print(figures[-1], flush=True)
        found = growth(figures)
        soak.llm.close()
    print("\n".join(found) if found else "nothing grew, and the divergence from the full cache is what it was")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    typer.run(main)
