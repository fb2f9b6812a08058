from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from refreekv_cpp.cli import common
from refreekv_cpp.cli.common import MaxTokensOption, ModelArgument, RawOption, SystemOption, TemperatureOption
from refreekv_cpp.cli.documents import ask_about, check_room, read_document
from refreekv_cpp.cli.options import ChatOptions, takes_options
from refreekv_cpp.llama import Llama
from refreekv_cpp.models import resolve


@common.user_errors()
@takes_options
def run(
    model: ModelArgument,
    options: ChatOptions,
    context: typer.Context,
    prompt: Annotated[str | None, typer.Option(help="The prompt. Without it and --file: stdin.")] = None,
    file: Annotated[
        list[Path] | None,
        typer.Option(
            help="A document (text, Markdown or PDF) that the prompt is about; without --prompt, the prompt. "
            "Can be repeated."
        ),
    ] = None,
    system: SystemOption = None,
    max_tokens: MaxTokensOption = 512,
    temperature: TemperatureOption = 0.2,
    raw: RawOption = False,
) -> None:
    """Answer one prompt. The text goes to stdout, all else to stderr."""
    if context.args:
        raise ValueError(f"{' '.join(context.args)!r}: a prompt must be written as --prompt TEXT")
    if raw and system is not None:
        raise ValueError("--system needs the chat template, which --raw leaves out")
    options = options.with_library(bool(file))
    text = _read_prompt(prompt, file or [])
    with closing(options.load(resolve(model))) as llm:
        if file:
            check_room(llm, [(", ".join(path.name for path in file), text)])
        if raw:
            pieces = _stream_raw(llm, text, max_tokens=max_tokens, temperature=temperature)
        else:
            messages = common.messages(system, text)
            pieces = common.stream_chat(llm, messages, max_tokens=max_tokens, temperature=temperature)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
        if file:
            llm.keep_kv(f"question about {', '.join(path.name for path in file)}")
        common.print_receipt(llm)


def _read_prompt(prompt: str | None, files: list[Path]) -> str:
    documents = [read_document(file) for file in files]
    if prompt is not None:
        text = prompt
    elif documents:
        *documents, text = documents
    elif sys.stdin is None or sys.stdin.isatty():  # None: the program was started with stdin closed
        raise ValueError("no prompt: use --prompt or --file, or pipe it in")
    else:
        text = sys.stdin.read()
    if not text.strip():
        raise ValueError("the prompt is empty")
    return common.whole_text(ask_about(documents, text))


def _stream_raw(llm: Llama, text: str, *, max_tokens: int, temperature: float) -> Iterator[str]:
    chunks: Any = llm.create_completion(text, stream=True, max_tokens=max_tokens, temperature=temperature)
    for chunk in chunks:
        yield chunk["choices"][0]["text"]
