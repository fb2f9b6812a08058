"""What the commands share: options, consoles, errors, and a `Llama` that shows how far the prompt has been read."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from llama_cpp._utils import suppress_stdout_stderr
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from refreekv_cpp import native
from refreekv_cpp.errors import RefreeKVError
from refreekv_cpp.llama import Llama
from refreekv_cpp.policies import as_policy

# stdout is the model's text alone
stderr = Console(stderr=True)


def print_tables(*tables: Table) -> None:
    """To stdout; wide enough for their columns where no terminal says how wide it is."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(*tables)


ModelArgument = Annotated[Path, typer.Argument(metavar="MODEL", help="A GGUF file.", show_default=False)]
SystemOption = Annotated[str | None, typer.Option(help="The system message.")]
MaxTokensOption = Annotated[int, typer.Option(min=0, help="Tokens to answer with at most; 0: as many as fit.")]
NCtxOption = Annotated[int, typer.Option(min=0, help="Tokens of context; 0: the model's own.")]
PolicyOption = Annotated[
    str, typer.Option(help="Which cells of the KV cache stay after the prompt: full, refreekv, paper, streaming, ...")
]
EvictedOption = Annotated[
    str,
    typer.Option(
        help="When the next turn follows a pruned one: restore (what was evicted comes back first), recompute (read "
        "it all again) or drop (go on)."
    ),
]
MemoryLimitOption = Annotated[
    str | None, typer.Option(help="A cap on the KV cache, such as 512MiB; a longer prompt is pruned while it is read.")
]
FlashAttnOption = Annotated[
    bool | None,
    typer.Option("--flash-attn/--no-flash-attn", help="Use flash attention.", show_default="the faster setting"),
]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="by the number of cores")]
TemperatureOption = Annotated[float, typer.Option(min=0, help="Of sampling; 0 takes the likeliest token.")]
RawOption = Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")]


class ReadingLlama(Llama):
    """Shows on stderr how far a long prompt has been read, and takes the time of prefill and decode."""

    prefill_tokens = 0
    prefill_seconds = 0.0
    decode_tokens = 0
    decode_seconds = 0.0

    def eval(self, tokens: Sequence[int]) -> None:
        prune_us = native.stats(self._ctx.ctx).prune_us
        start = time.perf_counter()
        if len(tokens) > self.n_batch:
            self._eval_with_progress(tokens)
        else:
            super().eval(tokens)
        seconds = time.perf_counter() - start - (native.stats(self._ctx.ctx).prune_us - prune_us) / 1e6
        if len(tokens) > 1:
            self.prefill_tokens += len(tokens)
            self.prefill_seconds += seconds
        else:
            self.decode_tokens += len(tokens)
            self.decode_seconds += seconds

    def _eval_with_progress(self, tokens: Sequence[int]) -> None:
        decode = self._ctx.decode
        columns = (TextColumn("reading the prompt"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
            task = progress.add_task("", total=len(tokens))

            def decode_and_advance(batch: Any) -> None:
                decode(batch)
                progress.advance(task, batch.n_tokens())

            self._ctx.decode = decode_and_advance  # type: ignore[method-assign]
            try:
                super().eval(tokens)
            finally:
                del self._ctx.decode


def load(
    model: Path, *, n_ctx: int, kv_policy: str, flash_attn: bool | None, threads: int | None, **kv_options: Any
) -> ReadingLlama:
    """The model, ready to read a prompt. kv_options: further options of `Llama` that start with kv_.

    Raises:
        ValueError: no such file, no such policy, or the model cannot have it.
    """
    policy = as_policy(kv_policy)
    check_file(model)
    # verbose=False silences the weights, not the context
    with suppress_stdout_stderr(disable=False):
        return ReadingLlama(
            str(model),
            kv_policy=policy,
            n_ctx=n_ctx,
            flash_attn="auto" if flash_attn is None else flash_attn,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
            **kv_options,
        )


def check_file(model: Path) -> None:
    if not model.is_file():
        raise FileNotFoundError(f"{model}: no such file")


def messages(system: str | None, user: str | None = None) -> list[Any]:
    turns = [("system", system), ("user", user)]
    return [{"role": role, "content": text} for role, text in turns if text is not None]


def stream_chat(llm: Llama, history: list[Any], *, max_tokens: int, temperature: float) -> Iterator[str]:
    """The answer, piece by piece."""
    chunks: Any = llm.create_chat_completion(history, stream=True, max_tokens=max_tokens, temperature=temperature)
    for chunk in chunks:
        yield chunk["choices"][0]["delta"].get("content") or ""


def print_receipt(llm: Llama) -> None:
    stderr.print(llm.kv_stats.receipt(), style="dim", markup=False, highlight=False, soft_wrap=True)


def print_error(error: Exception | str) -> None:
    stderr.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def user_errors() -> Iterator[None]:
    """What a user can set right is one line, not a traceback. ValueError is what llama-cpp-python raises for those."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (RefreeKVError, ValueError, OSError) as error:
        print_error(error)
        raise typer.Exit(2) from None
