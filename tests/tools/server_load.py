"""Several conversations at once on llama.cpp's server, with a policy and without one.

    python tests/tools/server_load.py MODEL [--conversations 8] [--tokens 3000] [--slots 4] [--rounds 2]

Each conversation is about a document of its own. Both servers answer all of them at once, in turn. A third one, with
one slot, answers one after the other.
"""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import _helpers  # noqa: F401  (first: it makes the other imports possible)
import openai
import psutil
import typer
from serving import serving

from refreekv_cpp import Llama
from refreekv_cpp.document import QUESTION, write_document

_N_ANSWER = 64


def prompts(model: Path, n: int, n_tokens: int) -> list[str]:
    """... which differ from their first token on, so that no server has a part of one from another one."""
    llm = Llama(str(model), vocab_only=True, verbose=False)

    def count(text: str) -> int:
        return len(llm.tokenize(text.encode(), add_bos=False))

    return [f"Document {i}. {write_document(n_tokens, count, seed=i)}\n\n{QUESTION}" for i in range(n)]


def answers(client: openai.OpenAI, texts: list[str], n_at_once: int) -> tuple[list[str], float]:
    """... and the seconds until all of them are there."""

    def ask(text: str) -> str:
        messages = [{"role": "user", "content": text}]
        answer = client.chat.completions.create(model="any", messages=messages, max_tokens=_N_ANSWER, temperature=0)
        return answer.choices[0].message.content or ""

    start = time.perf_counter()
    with ThreadPoolExecutor(n_at_once) as threads:
        found = list(threads.map(ask, texts))
    return found, time.perf_counter() - start


def resident() -> list[float]:
    """MiB of the servers that run."""
    found = [process for process in psutil.process_iter(["name"]) if process.info["name"] == "llama-server"]
    return [process.memory_info().rss / 2**20 for process in sorted(found, key=lambda process: process.create_time())]


def main(model: Path, conversations: int = 8, tokens: int = 3000, slots: int = 4, rounds: int = 2) -> None:
    texts = prompts(model, conversations * rounds, tokens)
    parts = [texts[i * conversations : (i + 1) * conversations] for i in range(rounds)]
    n_ctx = str(tokens + 1024)
    common = ["--log-verbosity", "1", "--no-library", "--cache-ram", "0"]
    with contextlib.ExitStack() as stack:
        servers = {
            policy: stack.enter_context(
                serving(model, *common, "--parallel", str(slots), "--kv-policy", policy, "--n-ctx", n)
            )
            # with "full", the slots share n_ctx
            for policy, n in (("full", str((tokens + 1024) * slots)), ("refreekv", n_ctx))
        }
        said: dict[str, list[str]] = {policy: [] for policy in servers}
        seconds: dict[str, list[float]] = {policy: [] for policy in servers}
        for part in parts:
            for policy, client in servers.items():
                found, duration = answers(client, part, conversations)
                said[policy] += found
                seconds[policy].append(duration)
        memory = dict(zip(servers, resident(), strict=True))
    with serving(model, *common, "--parallel", "1", "--kv-policy", "refreekv", "--n-ctx", n_ctx) as client:
        alone, _ = answers(client, texts, 1)
    for policy in servers:
        times = ", ".join(f"{duration:.1f}" for duration in seconds[policy])
        print(f"{policy}: {times} s for {conversations} conversations at once; resident {memory[policy]:.0f} MiB")
    ratio = sum(seconds["refreekv"]) / sum(seconds["full"])
    same = sum(a == b for a, b in zip(said["refreekv"], alone, strict=True))
    full = sum(a == b for a, b in zip(said["refreekv"], said["full"], strict=True))
    print(f"time, full = 1: {ratio:.2f}; {same} of {len(texts)} answers as if alone, {full} as the full cache's")


if __name__ == "__main__":
    typer.run(main)
