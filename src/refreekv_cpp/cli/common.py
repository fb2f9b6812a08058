"""What the commands share: options, consoles, errors, and a `Llama` that shows how far the prompt has been read."""

from __future__ import annotations

import ctypes
import io
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated, Any

import llama_cpp
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from refreekv_cpp import _checks, _upstream, models, native
from refreekv_cpp.cli.log import Log
from refreekv_cpp.errors import RefreeKVError
from refreekv_cpp.fit import check_model
from refreekv_cpp.llama import Llama
from refreekv_cpp.options import HELP


def _console(**options: Any) -> Console:
    """One that shows text as it is."""
    return Console(markup=False, emoji=False, highlight=False, **options)


# stdout is the model's text alone
stderr = _console(stderr=True)
messages_log = Log(stderr)


def print_tables(*tables: Table) -> None:
    """To stdout; wide enough for their columns where no terminal says how wide it is."""
    console = _console()
    if not console.is_terminal:
        console = _console(width=160)
    console.print(*tables)


ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=f"The model: {models.VALID}.", show_default=False)]
_PANEL = "Model and cache"  # of --help
GpuLayersOption = Annotated[
    str,
    typer.Option(
        rich_help_panel=_PANEL,
        metavar="N",
        help="Layers on the GPU: a number, all, or auto (as many as fit; 0 in a build without a GPU).",
    ),
]
FlashAttnOption = Annotated[
    bool | None,
    typer.Option(
        "--flash-attn/--no-flash-attn",
        rich_help_panel=_PANEL,
        help="Use flash attention.",
        show_default="by policy and backend",
    ),
]
_MAX_THREADS = _checks._INTEGERS["n_threads"].high
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        min=1, max=_MAX_THREADS, rich_help_panel=_PANEL, help="CPU threads.", show_default="by the number of cores"
    ),
]
# where figures are compared, which should not depend on the machine
FixedThreadsOption = Annotated[int, typer.Option(min=1, max=_MAX_THREADS, help="CPU threads.")]
OtherOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        rich_help_panel=_PANEL,
        metavar="NAME=VALUE",
        help="Any other option of Llama, such as kv_cold=memory, type_k=q8_0 or n_ubatch=256. Can be repeated.",
    ),
]
NCtxOption = Annotated[
    str,
    typer.Option(
        rich_help_panel=_PANEL,
        metavar="TOKENS",
        help="Tokens of context: a number, or auto (what fits, 32768 at most). 0 is as many as the model was made for.",
    ),
]
PolicyOption = Annotated[
    str,
    typer.Option(
        rich_help_panel=_PANEL,
        help=HELP["kv_policy"],
    ),
]
EvictedOption = Annotated[
    str,
    typer.Option(
        rich_help_panel=_PANEL,
        help=HELP["kv_evicted"],
    ),
]
MemoryLimitOption = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_PANEL,
        help=HELP["kv_memory_limit"],
    ),
]

SystemOption = Annotated[str | None, typer.Option(help="The system message.")]
MaxTokensOption = Annotated[int, typer.Option(min=0, help="Tokens to answer with at most; 0: as many as fit.")]
TemperatureOption = Annotated[float, typer.Option(min=0, help="Sampling temperature; 0 takes the likeliest token.")]
RawOption = Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")]


class ReadingLlama(Llama):
    """Shows on stderr how far a long prompt has been read, and takes the time of prefill and decode."""

    prefill_tokens = 0
    prefill_seconds = 0.0
    decode_tokens = 0
    decode_seconds = 0.0

    def eval(self, tokens: Sequence[int]) -> None:
        prune_us = native.stats(self.ctx).prune_us
        start = time.perf_counter()
        if len(tokens) > self.n_batch:
            self._eval_with_progress(tokens)
        else:
            super().eval(tokens)
        seconds = time.perf_counter() - start - (native.stats(self.ctx).prune_us - prune_us) / 1e6
        if len(tokens) > 1:
            self.prefill_tokens += len(tokens)
            self.prefill_seconds += seconds
        else:
            self.decode_tokens += len(tokens)
            self.decode_seconds += seconds

    def _eval_with_progress(self, tokens: Sequence[int]) -> None:
        columns = (TextColumn("reading the prompt"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
            task = progress.add_task("", total=len(tokens))
            with _upstream.after_batches(self, lambda n_tokens: progress.advance(task, n_tokens)):
                super().eval(tokens)


def load(model: Path, options: dict[str, Any]) -> ReadingLlama:
    """The model, ready to read a prompt. options: those of `Llama` (cli.options has them of the command line).

    Raises:
        ValueError: no such policy, the model cannot have it, or an option has a wrong value.
        KeyboardInterrupt: once it is loaded, if Ctrl-C came meanwhile.
    """
    verbose = messages_log.is_verbose()
    # verbose=False silences the weights, not the context
    with interrupts_held(), messages_log.held(), _upstream.suppress_stdout_stderr(disable=verbose):
        try:
            llm = ReadingLlama(str(model), **{**options, "verbose": verbose})
        except (TypeError, AttributeError, ctypes.ArgumentError) as error:  # a value of --option that nothing checks
            raise ValueError(f"an option has a value of a wrong kind: {error}") from error
        except ValueError as error:
            if "Failed to create llama_context" not in str(error):
                raise
            raise ValueError(
                "the context could not be created: there is too little memory (`refreekv plan MODEL` shows what fits), "
                "or options do not go together (`refreekv --verbose` shows llama.cpp's reason)"
            ) from error
    name = options.get("chat_format")
    if name is not None and not _upstream.has_chat_format(llm, name):
        llm.close()
        raise ValueError(f"--option chat_format={name}: the model's file has no such template")
    return llm


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Ctrl-C inside raises KeyboardInterrupt at the end, and a second Ctrl-C ends the process. (llama.cpp calls Python
    for each line of its log, and ctypes swallows what is raised there.)"""
    usual = signal.default_int_handler
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not usual:
        yield
        return
    held: list[int] = []

    def hold(number: int, _: Any) -> None:
        held.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if held:
        raise KeyboardInterrupt


@contextmanager
def vocabulary(model: Path) -> Iterator[llama_cpp.Llama]:
    """The model without weights and context, which turns text into tokens.

    Raises:
        ValueError: it is no model.
    """
    check_model(model)
    with interrupts_held(), _upstream.suppress_stdout_stderr(disable=False):
        llm = llama_cpp.Llama(str(model), vocab_only=True, verbose=False)
    with closing(llm):
        yield llm


def check_length(option: str, n_tokens: int, vocabulary: llama_cpp.Llama) -> None:
    """
    Args:
        option: of the command line, which asks for a text of so many tokens.

    Raises:
        ValueError: they are more than the model was made for.
    """
    architecture = vocabulary.metadata.get("general.architecture", "")
    most = int(vocabulary.metadata.get(f"{architecture}.context_length", n_tokens))
    if n_tokens > most:
        raise ValueError(f"{option} {n_tokens}: must be at most {most}, which the model was made for")


def messages(system: str | None, user: str | None = None) -> list[Any]:
    turns = [("system", system), ("user", user)]
    return [{"role": role, "content": whole_text(text)} for role, text in turns if text is not None]


def whole_text(text: str) -> str:
    """Text without lone surrogates, which no model can read. Python puts them where bytes of a terminal, a pipe or an
    argument are no text in the locale's encoding; bytes that are UTF-8 become their characters again."""
    try:
        data = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        data = text.encode("utf-8", "replace")
    return data.decode("utf-8", "replace")


def accept_any_text() -> None:
    """From now on stdout and stderr replace what their encoding does not have, and stdin takes any bytes."""
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "replace"), (sys.stdin, "surrogateescape")):
        if isinstance(stream, io.TextIOWrapper):  # None without a console
            stream.reconfigure(errors=errors)


def stream_chat(llm: Llama, history: list[Any], *, max_tokens: int, temperature: float) -> Iterator[str]:
    """The answer, piece by piece."""
    chunks: Any = llm.create_chat_completion(history, stream=True, max_tokens=max_tokens, temperature=temperature)
    for chunk in chunks:
        yield chunk["choices"][0]["delta"].get("content") or ""


def print_receipt(llm: Llama) -> None:
    print_note(llm.kv_stats.receipt())


def print_note(text: str) -> None:
    """What a user may want to know and did not ask for."""
    stderr.print(text, style="dim", soft_wrap=True)


def print_warning(error: Exception) -> None:
    stderr.print(str(error), style="yellow", soft_wrap=True)


def print_error(error: Exception | str) -> None:
    stderr.print(str(error), style="red", soft_wrap=True)


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
