"""One contestant of a benchmark, in a process of its own (two libllama do not go into one). Run by path, by runner.py.

    worker.py '{"model", "n_ctx", "flash_attn", "n_threads", "n_gpu_layers", "options", "cache_type", "kv_policy",
     "python"}'

kv_policy null is stock: llama-cpp-python from the folder "python", on the library that LLAMA_CPP_LIB_PATH names.

Reads commands from stdin, one JSON a line, and answers each with one JSON line on stdout:

    {"begin": null}         a new conversation
    {"read": [tokens]}      more of its prompt
    {"prune": null}         the policy is applied
    {"prefill": [tokens]}   the three together
    {"decode": n}           n tokens after it, greedily
    {"turn": [tokens]}      more tokens of the same conversation, and one decoded after them

Its first line is the answer to none: the model is loaded. Where it cannot be, it is {"error": why}, and the last.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np


def _load_by_path(path: Path) -> ModuleType:
    """A module of the package, without the package, which would bring its libllama."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


process = _load_by_path(Path(__file__).parents[2] / "_process.py")


def load(spec: dict[str, Any]) -> Any:
    options = {key: spec[key] for key in ("n_ctx", "flash_attn", "n_threads", "n_gpu_layers")}
    options |= {"type_k": spec["cache_type"], "type_v": spec["cache_type"]}
    options |= spec["options"]
    if spec["kv_policy"] is None:
        sys.path.insert(0, spec["python"])
        from llama_cpp import Llama

        stock = {name: value for name, value in options.items() if not name.startswith("kv_")}
        return Llama(spec["model"], verbose=False, **stock)

    from refreekv_cpp import Llama as OurLlama

    if spec["kv_policy"] == "elastic":  # the full cache, growing with its contents
        return OurLlama(spec["model"], verbose=False, kv_policy="full", **{**options, "kv_elastic": True})

    return OurLlama(spec["model"], verbose=False, kv_policy=spec["kv_policy"], **options)


def begin(llm: Any, n_tokens: int) -> dict[str, Any]:
    """Before a prompt of so many tokens, which will be read batch by batch."""
    llm.reset()
    llm.eval([0])  # what is done once, before a first prompt
    llm.reset()
    if getattr(llm, "kv_elastic", False):
        from refreekv_cpp import native

        native.expect(llm.ctx, n_tokens)  # as `eval` of all of it would
    return {}


def read(llm: Any, tokens: list[int]) -> dict[str, Any]:
    start = time.perf_counter()
    llm.eval(tokens)
    import llama_cpp  # the library that `load` took

    llama_cpp.llama_synchronize(llm._ctx.ctx)  # a GPU may still be at it
    return {"read_s": time.perf_counter() - start}


def prune(llm: Any, _: None) -> dict[str, Any]:
    start = time.perf_counter()
    if hasattr(llm, "prune_kv"):
        llm.prune_kv()
    return {"prune_s": time.perf_counter() - start}


def prefill(llm: Any, tokens: list[int]) -> dict[str, Any]:
    begin(llm, len(tokens))
    seconds = read(llm, tokens)
    rss = process.rss()
    kv = llm.kv_stats.as_dict() if hasattr(llm, "kv_stats") else None
    return {**seconds, **prune(llm, None), "rss_prompt": rss, "kv_prompt": kv}


def turn(llm: Any, tokens: list[int]) -> dict[str, Any]:
    llm.eval(tokens)
    if hasattr(llm, "prune_kv"):
        llm.prune_kv()
    return decode(llm, 1)


def decode(llm: Any, n_tokens: int) -> dict[str, Any]:
    before = n_reused(llm)
    seconds = []
    for _ in range(n_tokens):
        start = time.perf_counter()
        llm.eval([likeliest(llm)])
        seconds.append(time.perf_counter() - start)
    return {"decode_s": seconds, "n_reused": n_reused(llm) - before}


def likeliest(llm: Any) -> int:
    """The greedy choice. `Llama.sample` leaves 12 bytes for each token of the vocabulary behind at every call, until
    Python collects them, and they would count as memory of the cache."""
    import llama_cpp

    logits = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
    return int(np.ctypeslib.as_array(logits, shape=(llm.n_vocab(),)).argmax())


def n_reused(llm: Any) -> int:
    """Decodes so far that ran on the graph of the one before."""
    import llama_cpp

    return int(llama_cpp.llama_perf_context(llm.ctx).n_reused)


COMMANDS: dict[str, Callable[[Any, Any], dict[str, Any]]] = {
    "begin": begin,
    "read": read,
    "prune": prune,
    "prefill": prefill,
    "decode": decode,
    "turn": turn,
}


def report(llm: Any, answer: dict[str, Any]) -> None:
    stats = llm.kv_stats.as_dict() if hasattr(llm, "kv_stats") else None
    resident = {"rss": process.rss(), "rss_anon": process.rss_anonymous(), "rss_peak": process.rss_peak() or 0}
    print(json.dumps({**answer, **resident, "kv": stats}), flush=True)


def main() -> None:
    spec = json.loads(sys.argv[1])
    start = time.perf_counter()
    try:
        llm = load(spec)
    except Exception as error:
        print(json.dumps({"error": str(error) or type(error).__name__}), flush=True)
        return
    report(llm, {"load_s": time.perf_counter() - start})
    for line in sys.stdin:
        command = json.loads(line)
        (name, argument), *_ = command.items()
        report(llm, COMMANDS[name](llm, argument))


if __name__ == "__main__":
    main()
