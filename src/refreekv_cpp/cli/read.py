from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from refreekv_cpp._kept import N_MIN
from refreekv_cpp.cli import common
from refreekv_cpp.cli.common import ModelArgument, SystemOption
from refreekv_cpp.cli.documents import ask_about, read_document
from refreekv_cpp.cli.options import ChatOptions, takes_options
from refreekv_cpp.models import resolve


@common.user_errors()
@takes_options
def read(
    model: ModelArgument,
    options: ChatOptions,
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Text, Markdown or PDF.", show_default=False)],
    system: SystemOption = None,
) -> None:
    """Read documents, and keep them in the library: chat --file and run --file then open them at once.

    They are found again by the same model with the same options and the same system message.
    """
    if options.library is False:
        raise ValueError("--no-library: the library is where this command keeps documents")
    options = options.with_library(needed=True)
    documents = [(path, read_document(path)) for path in files]
    with closing(options.load(resolve(model))) as llm:
        if (reason := llm._library_refusal) is not None:
            raise ValueError(f"nothing can be kept in the library: {reason}")
        for path, document in documents:
            messages = common.messages(system, ask_about([document], ""))  # a chat about it begins like this
            try:
                llm.create_chat_completion(messages, max_tokens=1, temperature=0)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
            if llm.n_tokens < N_MIN:
                common.print_note(f"{path}: {llm.n_tokens} tokens are read as quickly as they are opened, and not kept")
                continue
            if not (n_tokens := llm.keep_kv(path.name)):
                raise ValueError(f"{path}: could not be kept in the library (refreekv --verbose says why)")
            common.print_note(f"{path}: {n_tokens} tokens are in the library")
