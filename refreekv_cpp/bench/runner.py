"""Contestants side by side: each in its own process, the same prompt, their decoding interleaved burst by burst.

What else the machine does then meets all of them alike.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WORKER = Path(__file__).parent / "worker.py"


@dataclass(frozen=True)
class Contestant:
    """kv_policy None: stock llama-cpp-python on the library in `library`."""

    name: str
    flash_attn: bool
    kv_policy: str | None
    library: Path | None = None


@dataclass
class Result:
    """Seconds and bytes of one contestant at one prompt length; `decode_s` has one entry per token."""

    contestant: Contestant
    n_tokens: int
    load_s: float
    rss_load: int
    prefill_s: float = 0.0
    prune_s: float = 0.0
    rss: int = 0
    kv: dict[str, Any] | None = None
    decode_s: list[float] = field(default_factory=list)

    @property
    def decode_ms(self) -> float:
        return statistics.median(self.decode_s) * 1000

    def as_dict(self) -> dict[str, Any]:
        c = self.contestant
        return {
            "name": c.name,
            "flash_attn": c.flash_attn,
            "kv_policy": c.kv_policy,
            "n_tokens": self.n_tokens,
            "load_s": self.load_s,
            "rss_load": self.rss_load,
            "prefill_s": self.prefill_s,
            "prune_s": self.prune_s,
            "rss": self.rss,
            "decode_ms": self.decode_ms,
            "decode_ms_quartiles": [q * 1000 for q in statistics.quantiles(self.decode_s, n=4)],
            "kv": self.kv,
        }


class Worker:
    def __init__(self, contestant: Contestant, model: Path, n_ctx: int, n_threads: int) -> None:
        spec = {
            "model": str(model),
            "n_ctx": n_ctx,
            "n_threads": n_threads,
            "flash_attn": contestant.flash_attn,
            "kv_policy": contestant.kv_policy,
        }
        environment = dict(os.environ)
        if contestant.library:
            environment.update(LLAMA_CPP_LIB_PATH=str(contestant.library), MTMD_CPP_LIB=str(contestant.library))
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a benchmark process ended with {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, **command: Any) -> dict[str, Any]:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream:
                stream.close()


def run(
    contestants: Sequence[Contestant],
    model: Path,
    tokens: Sequence[int],
    *,
    n_ctx: int,
    n_threads: int,
    rounds: int = 8,
    burst: int = 8,
) -> list[Result]:
    """Prefill `tokens` with every contestant, then `rounds` bursts of `burst` decoded tokens each, in turn."""
    workers: list[Worker] = []
    try:
        results = []
        for contestant in contestants:
            worker = Worker(contestant, model, n_ctx, n_threads)
            workers.append(worker)
            loaded = worker.answer()
            results.append(Result(contestant, len(tokens), loaded["load_s"], loaded["rss"]))

        for worker, result in zip(workers, results, strict=True):
            answer = worker.ask(prefill=list(tokens))
            result.prefill_s, result.prune_s = answer["prefill_s"], answer["prune_s"]
            result.rss, result.kv = answer["rss"], answer["kv"]

        for _ in range(rounds):
            for worker, result in zip(workers, results, strict=True):
                # the first token after the others' turn finds cold caches
                result.decode_s += worker.ask(decode=burst)["decode_s"][1:]
        return results
    finally:
        for worker in workers:
            worker.close()
