"""Brings the line numbers in patches/ up to date with another llama.cpp: a step of docs/development/moving-the-pin.md.

    rebase_patches.py SDIST

SDIST is an unpacked llama-cpp-python sdist. The build applies a hunk only at the very line that it names. This finds
where the lines of a hunk are now, which has to be one place and no other, and writes that line into the patch. What
cannot be found is printed, and has to be mended by hand in the patch; then this is run again.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

PATCHES = sorted((Path(__file__).parent.parent / "patches").glob("*.patch"))

_HUNK = re.compile(r"@@ -(\d+)\S* \S+ @@(.*)")


def rebase(patch: str, files: dict[str, list[str]], tree: Path) -> tuple[str, list[str]]:
    """A patch with the line numbers of this tree, and a message for each hunk that moved or has no single place.

    Args:
        files: lines of the files that patches before this one have changed, by their paths in the tree; it is updated.
    """
    res: list[str] = []
    messages: list[str] = []
    parts = re.split(r"^(?=--- a/|@@ )", patch, flags=re.MULTILINE)
    name, done, delta = "", 0, 0
    for part in parts:
        head, *body = part.splitlines()
        hunk = _HUNK.fullmatch(head)
        if not hunk:
            if head.startswith("--- a/"):
                name, done, delta = head.removeprefix("--- a/"), 0, 0
            res.append(part)
            continue

        if name not in files:
            path = tree / name
            files[name] = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        lines = files[name]
        old = [line[1:] for line in body if not line.startswith("+")]
        new = [line[1:] for line in body if not line.startswith("-")]
        places = [i for i in range(done, len(lines) - len(old) + 1) if lines[i : i + len(old)] == old]
        if len(places) != 1:
            where = f"{len(places)} places have" if places else "no place has"
            messages.append(f"{name}, line {hunk[1]} before: {where} the lines of this hunk\n{part}")
            res.append(part)
            continue

        start = places[0]
        lines[start : start + len(old)] = new
        first = start + 1 - delta
        done, delta = start + len(new), delta + len(new) - len(old)
        if first != int(hunk[1]):
            messages.append(f"{name}: line {hunk[1]} is line {first} now")
        res.append(f"@@ -{first},{len(old)} +{start + 1},{len(new)} @@{hunk[2]}\n" + part.partition("\n")[2])
    return "".join(res), messages


def main() -> None:
    tree = Path(sys.argv[1]) / "vendor" / "llama.cpp"
    files: dict[str, list[str]] = {}
    failed = False
    for path in PATCHES:
        text, messages = rebase(path.read_text(encoding="utf-8"), files, tree)
        path.write_text(text, encoding="utf-8")
        for message in messages:
            print(f"{path.name}: {message}")
            failed |= "\n" in message
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
