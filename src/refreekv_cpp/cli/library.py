from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from refreekv_cpp._library import Library, Text
from refreekv_cpp._units import mebibytes
from refreekv_cpp.cli import common
from refreekv_cpp.options import read_option

app = typer.Typer(help="Show what has been read and is kept, remove it, or check it.", invoke_without_command=True)

_FolderOption = Annotated[
    Path | None, typer.Option("--folder", help="Its folder, if it is not the one in the cache folder.")
]
_N_KEY = 12  # digits of a key that are shown


def _library(context: typer.Context, folder: Path | None) -> Library:
    """... whether --folder came after the command or before it."""
    folder = folder or context.obj
    if folder is not None and not folder.is_dir():
        raise ValueError(f"--folder {folder}: there is no such folder")
    return Library(read_option("kv_library", True if folder is None else folder))


@app.callback()
@common.user_errors()
def show(context: typer.Context, folder: _FolderOption = None) -> None:
    """Show the texts: name, tokens, bytes, last use. Texts that begin alike share what they have in common."""
    context.obj = folder
    if context.invoked_subcommand is not None:
        return
    library = _library(context, folder)
    table = Table("name", "tokens", "size", "last used", "key")
    texts = library.texts()
    for text in texts:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(text.used))
        table.add_row(text.name, str(text.n_tokens), mebibytes(text.n_bytes), used, text.key[:_N_KEY])
    common.print_tables(table)
    n_bytes = library.n_bytes()
    shared = ", parts that texts share counted once" if n_bytes < sum(text.n_bytes for text in texts) else ""
    common.print_note(f"{library.folder}: {len(texts)} texts, {mebibytes(n_bytes)} on disk{shared}")


@app.command()
@common.user_errors()
def remove(
    context: typer.Context,
    texts: Annotated[list[str], typer.Argument(metavar="NAME...", help="Names or keys, or: all.", show_default=False)],
    folder: _FolderOption = None,
) -> None:
    """Remove texts, but for what others begin with."""
    library = _library(context, folder)
    known = library.texts()
    chosen: list[Text] = []
    for wanted in texts:
        named = [text for text in known if wanted and wanted in ("all", text.name)]
        found = named or [text for text in known if len(wanted) >= _N_KEY and text.key.startswith(wanted)]
        if not found and wanted != "all":
            raise ValueError(f"{wanted}: must be a name or a key that `refreekv library` lists, or all")
        chosen += found
    freed = sum(library.remove_text(text) for text in chosen)
    if "all" in texts:
        freed += library.clear()
    common.print_note(f"{mebibytes(freed)} are free")


@app.command()
@common.user_errors()
def check(context: typer.Context, folder: _FolderOption = None) -> None:
    """Read all of it, and remove what is damaged."""
    n_good, errors = _library(context, folder).check_all()
    for error in errors:
        common.print_error(error)
    common.print_note(f"{n_good} files are whole, {len(errors)} are not; those that were damaged are removed")
    if errors:
        raise typer.Exit(1)
