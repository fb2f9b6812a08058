"""What native/ does in a way of its own after llama.cpp's: a change there compiles here, and is wrong without a word.

    mirrored.py OLD NEW

Prints how the pieces of llama.cpp in mirrored.json differ between two unpacked llama-cpp-python sdists, and notes that
those of NEW have been read: a step of docs/development/moving-the-pin.md. The build ends when they are others.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import TypedDict

TABLE = Path(__file__).with_suffix(".json")


class Piece(TypedDict):
    """
    Attributes:
        file: of llama.cpp.
        begins: the beginning of the piece, at the beginning of a line; it ends with the next line that is a brace. All
            pieces that begin so count.
        ours: where the same is done in another way, or what depends on it.
        sha256: of the piece that ours was written after; its first 16 digits.
    """

    file: str
    begins: str
    ours: str
    sha256: str


def read_table() -> list[Piece]:
    res: list[Piece] = json.loads(TABLE.read_text(encoding="utf-8"))
    return res


def text_of(piece: Piece, sdist: Path) -> str:
    """The piece in an unpacked sdist; empty when it is not there."""
    path = sdist / "vendor" / "llama.cpp" / piece["file"]
    source = path.read_text(encoding="utf-8") if path.exists() else ""
    found = re.findall(rf"^{re.escape(piece['begins'])}.*?^\}};?$", source, re.MULTILINE | re.DOTALL)
    return "\n\n".join(found) + "\n" if found else ""


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_mirrored(sdist: Path) -> None:
    """
    Raises:
        SystemExit: a piece is another one than ours was written after.
    """
    changed = [piece for piece in read_table() if digest(text_of(piece, sdist)) != piece["sha256"]]
    if changed:
        names = "\n".join(map(_line, changed))
        raise SystemExit(
            "llama.cpp has changed what native/ does in a way of its own, see "
            f"docs/development/moving-the-pin.md:\n{names}"
        )


def _line(piece: Piece) -> str:
    return f"  {piece['file']}: {' '.join(piece['begins'].split())} (ours: {piece['ours']})"


def main() -> None:
    old, new = map(Path, sys.argv[1:3])
    table = read_table()
    for piece in table:
        before, after = text_of(piece, old), text_of(piece, new)
        if not after:
            raise SystemExit(f"{piece['file']} has no {piece['begins']!r} any more; mend {TABLE.name}")
        if before != after:
            print("====" + _line(piece))
            print("".join(difflib.unified_diff(before.splitlines(True), after.splitlines(True), n=5)))
        piece["sha256"] = digest(after)
    TABLE.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
