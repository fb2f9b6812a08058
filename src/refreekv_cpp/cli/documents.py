"""Documents that a user names, which are read before a question about them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import llama_cpp

from refreekv_cpp import _upstream
from refreekv_cpp._extras import needs_extra
from refreekv_cpp._files import check_file
from refreekv_cpp.cli import common


def read_document(path: Path) -> str:
    """The text of a file: of a PDF, that of its pages; of any other file, what is in it.

    Raises:
        OSError: it is not there, or cannot be read.
        ValueError: it is no text in UTF-8, a PDF that cannot be read, or there is no text in it.
        MissingExtraError: it is a PDF, and pypdf is not installed.
    """
    check_file(path)
    text = _read_pdf(path) if path.suffix.lower() == ".pdf" else _read_text(path)
    if not text.strip():
        raise ValueError(f"{path}: there is no text in it")
    return common.whole_text(text)


def check_room(llm: llama_cpp.Llama, documents: Sequence[tuple[str, str]]) -> None:
    """
    Args:
        documents: the name and the text of each.

    Raises:
        ValueError: the context cannot hold these documents and one token more.
    """
    n_tokens = sum(len(llm.tokenize(text.encode(), add_bos=False)) for _, text in documents)
    if n_tokens >= llm.n_ctx():
        names = ", ".join(name for name, _ in documents)
        raise ValueError(
            f"{names}: {n_tokens} tokens, more than the context of {llm.n_ctx()} has room for; --n-ctx makes a "
            f"longer one (the model was made for {_upstream.n_ctx_train(llm)})"
        )


def ask_about(documents: Sequence[str], question: str) -> str:
    """A message with documents and a question. The documents come first, so that other questions begin alike."""
    return "\n\n".join([*(document.strip() for document in documents), question])


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8 ({error.reason} at byte {error.start})") from error


def _read_pdf(path: Path) -> str:
    with needs_extra("pdf", "a PDF"):
        from pypdf import PdfReader
    with path.open("rb") as file:
        if b"%PDF" not in file.read(1024):
            raise ValueError(f"{path}: not a PDF, although its name says so")
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # the errors that matter are raised
    try:
        return "\n\n".join(page.extract_text() for page in PdfReader(path).pages)
    except MemoryError:
        raise
    except Exception as error:  # of a damaged file it can be any: KeyError, RecursionError, DependencyError, ...
        raise ValueError(f"{path}: cannot be read as a PDF: {error}") from error
