"""The folder of a run: settings.json, and records.jsonl with a line for each (item, cache, mode).

A run that is kept has records.jsonl.xz in its place. It can be reported on and resumed like any other.
"""

from __future__ import annotations

import json
import lzma
import os
from pathlib import Path
from typing import IO, Any

Record = dict[str, Any]

RECORDS = "records.jsonl"
PACKED = "records.jsonl.xz"
SETTINGS = "settings.json"


def read_records(folder: Path) -> list[Record]:
    """The whole lines; the last one is left out when the run was stopped in the middle of it.

    Raises:
        ValueError: another line is no record, or the packed file is damaged.
    """
    lines = _content(folder).split(b"\n")[:-1]
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{folder}: line {number} of the records is no record ({error})") from error
    return records


def open_for_more(folder: Path) -> IO[str]:
    """The file that further lines are written to. A last line that is not whole is taken away first."""
    path = folder / RECORDS
    text = _content(folder)
    whole = text.rfind(b"\n") + 1
    if not path.exists():
        path.write_bytes(text[:whole])
    elif whole < len(text):
        os.truncate(path, whole)
    return path.open("a", encoding="utf-8")


def _content(folder: Path) -> bytes:
    for name, read in ((RECORDS, Path.read_bytes), (PACKED, _unpacked)):
        if (folder / name).exists():
            return read(folder / name)
    return b""


def _unpacked(path: Path) -> bytes:
    try:
        return lzma.decompress(path.read_bytes())
    except (lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path}: damaged ({error})") from error


def keep_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Writes them, or checks that they are those of the run that is there.

    Raises:
        ValueError: the folder holds another run.
    """
    path = folder / SETTINGS
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        return
    before = read_settings(folder)
    for name, value in settings.items():
        if before.get(name) != value:
            raise ValueError(
                f"{folder} holds a run with {name} {before.get(name)}, not {value}; go on with the same settings, or "
                "take another --out"
            )


def read_settings(folder: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: there is no run.
    """
    path = folder / SETTINGS
    if not path.exists():
        raise ValueError(f"{folder}: there is no {SETTINGS} in it, so no run of refreekv eval")
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return settings
