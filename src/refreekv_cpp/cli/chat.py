from __future__ import annotations

import contextlib
from typing import Any

from refreekv_cpp.cli import common
from refreekv_cpp.cli.common import (
    EvictedOption,
    FlashAttnOption,
    MaxTokensOption,
    MemoryLimitOption,
    ModelArgument,
    NCtxOption,
    PolicyOption,
    SystemOption,
    TemperatureOption,
    ThreadsOption,
)
from refreekv_cpp.llama import Llama

with contextlib.suppress(ImportError):  # Windows has none
    import readline  # noqa: F401  (makes input() editable)


@common.user_errors()
def chat(
    model: ModelArgument,
    system: SystemOption = None,
    max_tokens: MaxTokensOption = 512,
    n_ctx: NCtxOption = 0,
    kv_policy: PolicyOption = "refreekv",
    kv_evicted: EvictedOption = "restore",
    kv_memory_limit: MemoryLimitOption = None,
    flash_attn: FlashAttnOption = None,
    threads: ThreadsOption = None,
    temperature: TemperatureOption = 0.2,
) -> None:
    """Talk with the model. Ctrl-C stops an answer; /clear forgets the conversation; /exit or Ctrl-D ends it."""
    with contextlib.closing(
        common.load(
            model,
            n_ctx=n_ctx,
            kv_policy=kv_policy,
            kv_evicted=kv_evicted,
            kv_memory_limit=kv_memory_limit,
            flash_attn=flash_attn,
            threads=threads,
        )
    ) as llm:
        history = common.messages(system)
        while (line := _read_line()) not in (None, "/exit"):
            if line == "/clear":
                history = common.messages(system)
            elif line:
                _turn(llm, history, line, max_tokens=max_tokens, temperature=temperature)


def _read_line() -> str | None:
    """What the user typed; None: no more will come."""
    try:
        return input("> ").strip()
    except EOFError:
        print()
        return None
    except KeyboardInterrupt:
        print()
        return ""


def _turn(llm: Llama, history: list[Any], line: str, *, max_tokens: int, temperature: float) -> None:
    """One question and its answer, which are added to the history."""
    question = {"role": "user", "content": line}
    answer = ""
    try:
        for piece in common.stream_chat(llm, [*history, question], max_tokens=max_tokens, temperature=temperature):
            answer += piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pass
    except ValueError as error:
        if "exceed context window" not in str(error):
            raise
        common.print_error(f"{error}; /clear starts anew")
        return
    print()
    if answer:
        history += [question, {"role": "assistant", "content": answer}]
    common.print_receipt(llm)
