"""Contestants side by side: each in its own process, the same prompt. They read it batch by batch, and go on
burst by burst, in turn.

What else the machine does then meets all of them alike.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refreekv_cpp._cache_types import CACHE_TYPES
from refreekv_cpp._llama_cpp import python_dir
from refreekv_cpp.errors import RefreeKVError

WORKER = Path(__file__).parent / "worker.py"
N_BATCH = 512  # tokens read at a turn; llama-cpp-python's n_batch
BURST = 8  # tokens decoded at a turn


@dataclass(frozen=True)
class Contestant:
    """kv_policy None: stock llama-cpp-python on the library in `library`.

    options: further ones of `Llama`; stock leaves out those that start with kv_.
    cache_type: of K and V, one of CACHE_TYPES.
    """

    name: str
    flash_attn: bool
    kv_policy: str | None
    library: Path | None = None
    n_gpu_layers: int = 0
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    cache_type: str = "f16"


@dataclass
class Result:
    """Seconds and bytes of one contestant at one prompt length.

    Attributes:
        load_s: to load the model, per repetition.
        rss_loaded: resident then.
        read_s: per batch of the prompt, in the order of all contestants' turns, over all repetitions.
        prune_s: per repetition.
        decode_s: per token.
        n_reused: decoded tokens that ran on the graph of the one before, of n_decoded.
        rss: resident after the last token; rss_peak: the most there was (Linux's VmHWM).
        kv: what `kv_stats` says then; None for stock.
    """

    contestant: Contestant
    n_tokens: int
    load_s: list[float] = field(default_factory=list)
    read_s: list[float] = field(default_factory=list)
    prune_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    n_decoded: int = 0
    n_reused: int = 0
    rss_loaded: int = 0
    rss: int = 0
    rss_peak: int = 0
    kv: dict[str, Any] | None = None

    @property
    def decode_ms(self) -> float:
        return statistics.median(self.decode_s) * 1000

    @property
    def decode_quartiles_ms(self) -> tuple[float, float]:
        low, _, high = statistics.quantiles(self.decode_s, n=4)
        return low * 1000, high * 1000

    @property
    def tokens_per_second(self) -> float:
        return self.n_tokens * len(self.load_s) / sum(self.read_s)

    def read_ratio(self, other: Result) -> float:
        """How long reading took, over the other's: the median over the batches, which took turns."""
        return statistics.median(own / theirs for own, theirs in zip(self.read_s, other.read_s, strict=True))

    def as_dict(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "contestant"}
        c = self.contestant
        return {
            "name": c.name,
            "flash_attn": c.flash_attn,
            "kv_policy": c.kv_policy,
            "cache_type": c.cache_type,
            "decode_ms": self.decode_ms,
            "decode_ms_quartiles": self.decode_quartiles_ms,
            "tokens_per_second": self.tokens_per_second,
            **values,
        }


class WorkerError(RefreeKVError):
    """A contestant's process could not load its model, or ended early."""


class Worker:
    def __init__(self, contestant: Contestant, model: Path, n_ctx: int, n_threads: int) -> None:
        self.name = contestant.name
        spec = {
            "model": str(model),
            "n_ctx": n_ctx,
            "n_threads": n_threads,
            "flash_attn": contestant.flash_attn,
            "kv_policy": contestant.kv_policy,
            "n_gpu_layers": contestant.n_gpu_layers,
            "options": contestant.options,
            "cache_type": CACHE_TYPES[contestant.cache_type],
            "python": str(python_dir()),
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
            raise WorkerError(f"{self.name}: its process ended with {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.name}: {answer['error']}")
        return answer

    def ask(self, **command: Any) -> dict[str, Any]:
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):  # of a process that has ended, which `answer` says
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
    repeats: int = 1,
) -> list[Result]:
    """`repeats` times, each with new processes: every contestant reads `tokens`, batch by batch in turn; then `rounds`
    bursts of BURST decoded tokens each, in turn."""
    results = [Result(contestant, len(tokens)) for contestant in contestants]
    for _ in range(repeats):
        _run_once(results, model, tokens, n_ctx=n_ctx, n_threads=n_threads, rounds=rounds)
    return results


def _run_once(
    results: list[Result], model: Path, tokens: Sequence[int], *, n_ctx: int, n_threads: int, rounds: int
) -> None:
    workers: list[Worker] = []
    try:
        for result in results:
            worker = Worker(result.contestant, model, n_ctx, n_threads)
            workers.append(worker)
            answer = worker.answer()
            result.load_s.append(answer["load_s"])
            result.rss_loaded = answer["rss"]
        pairs = list(zip(workers, results, strict=True))

        for worker in workers:
            worker.ask(begin=len(tokens))
        for i in range(0, len(tokens), N_BATCH):
            for worker, result in pairs:
                result.read_s.append(worker.ask(read=list(tokens[i : i + N_BATCH]))["read_s"])
        for worker, result in pairs:
            result.prune_s.append(worker.ask(prune=None)["prune_s"])
        for _ in range(rounds):
            for worker, result in pairs:
                answer = worker.ask(decode=BURST)
                # the first token after the others' turn finds cold caches
                result.decode_s += answer["decode_s"][1:]
                result.n_decoded += BURST
                result.n_reused += answer["n_reused"]
                result.rss, result.rss_peak, result.kv = answer["rss"], answer["rss_peak"], answer["kv"]
    finally:
        for worker in workers:
            worker.close()
