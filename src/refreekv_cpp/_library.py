"""The texts of a library, for those who look after it: their names, what they take, and removing them.

native/library writes and opens them (library.h, and folder.h for the names of the files).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from refreekv_cpp import native
from refreekv_cpp._files import remove_left_behind, why_not_private, write_file
from refreekv_cpp.errors import CacheStateError

# a folder may have files of others in it: copies that a program has made of a block, or anything
_BLOCK_NAME = re.compile(r"(?P<parent>[0-9a-f]{40})-(?P<key>[0-9a-f]{40})\.block")
_STATE_NAME = re.compile(r"[0-9a-f]{40}-[0-9a-f]{40}-[0-9]+\.state")
_NO_LIMIT = 2**63 - 1


@dataclass(frozen=True)
class Text:
    """What a library has of a text, for `refreekv library`.

    Attributes:
        key: of its last block, in hexadecimal digits.
        name: that was given to it; "" for none.
        n_tokens: its length.
        n_bytes: of its blocks. Those that it shares with another text count for both.
        used: when it was written or opened last, in seconds since the epoch.
        blocks: their files, the first one first.
    """

    key: str
    name: str
    n_tokens: int
    n_bytes: int
    used: float
    blocks: tuple[Path, ...]


class Library:
    """The texts of one folder, which is made where it is not there.

    Raises:
        CacheStateError: it cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = folder / "names"
        native.library_tidy(folder, _NO_LIMIT)
        if reason := why_not_private(folder):  # somebody else may have been faster
            raise CacheStateError(f"{folder}: {reason}")
        remove_left_behind(self.names)
        self._remove_names()

    def texts(self) -> list[Text]:
        """All, the one that was used last first. A text that another one begins with is listed if it has a name."""
        files = {}
        for path, match in self._blocks():
            with contextlib.suppress(OSError):  # another process may have removed it just now
                files[match["key"]] = path, match["parent"], path.stat()
        parents = {parent for _, parent, _ in files.values()}
        names = {name["key"]: name["name"] for _, name in self._named()}
        res = []
        for key, (path, _, info) in files.items():
            head = _read_head(path)
            if head is None or (key in parents and key not in names):
                continue
            chain = [key]
            while (parent := files[chain[0]][1]) in files and parent not in chain:  # a renamed file may be its own
                chain.insert(0, parent)
            beginning = _read_head(files[chain[0]][0])
            if beginning is not None and beginning[0] == 0:  # else that has been removed
                n_bytes = sum(files[each][2].st_size for each in chain)
                paths = tuple(files[each][0] for each in chain)
                res.append(Text(key, names.get(key, ""), sum(head), n_bytes, info.st_mtime, paths))
        return sorted(res, key=lambda text: -text.used)

    def n_bytes(self) -> int:
        """Of all files."""
        res = 0
        for path in self._files():
            with contextlib.suppress(OSError):
                res += path.stat().st_size
        return res

    def remove_text(self, text: Text) -> int:
        """Remove its blocks, but for those that other texts begin with. Returns the bytes that were freed."""
        before = self.n_bytes()
        needed = {path for other in self.texts() if other.key != text.key for path in other.blocks}
        for path in text.blocks:
            if path not in needed:
                _remove(path)
        for path, name in self._named():
            if name["key"] == text.key:
                _remove(path)
        native.library_tidy(self.folder, _NO_LIMIT)  # which removes its states
        self._remove_names()
        return before - self.n_bytes()

    def clear(self) -> int:
        """Remove all of it. Returns the bytes that were freed."""
        before = self.n_bytes()
        for path in self._files():
            _remove(path)
        self._remove_names()
        return before

    def check_all(self) -> tuple[int, list[str]]:
        """Read all files. Returns how many are whole, and what is wrong with the others. Those that are damaged are
        removed; those that cannot be opened, or are not this user's, are not."""
        n_good, errors = 0, []
        for path in list(self._files()):
            try:
                native.library_check(path, may_remove=True)
                n_good += 1
            except CacheStateError as error:
                errors.append(str(error))
        return n_good, errors

    # -- names

    def name(self, name: str, key: str) -> None:
        """Give a name to the text that ends with a block, in place of another text that had it.

        Raises:
            OSError: it cannot be written.
        """
        # the name of a file may be no text, which Python reads as lone surrogates
        digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=20).hexdigest()
        write_file(self.names / f"{digest}.json", json.dumps({"name": name, "key": key}))

    def follow(self, key: str, later: str) -> None:
        """The text that ended with a block ends with a later one now: so does its name."""
        for _, name in self._named():
            if name["key"] == key:
                self.name(name["name"], later)

    def _named(self) -> Iterator[tuple[Path, dict[str, str]]]:
        for path in filter(Path.is_file, self.names.glob("*.json")):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                name = json.loads(path.read_text(encoding="utf-8"))
                yield path, {"name": str(name["name"]), "key": str(name["key"])}

    def _remove_names(self) -> None:
        """Of texts that are gone."""
        named = list(self._named())  # before the blocks: another process may be writing one, and then its name
        keys = {match["key"] for _, match in self._blocks()}
        for path, name in named:
            if name["key"] not in keys:
                _remove(path)

    # -- files

    def _blocks(self) -> Iterator[tuple[Path, re.Match[str]]]:
        for path in self.folder.glob("*.block"):
            if (match := _BLOCK_NAME.fullmatch(path.name)) and path.is_file():  # a pipe would wait for its writer
                yield path, match

    def _files(self) -> Iterator[Path]:
        yield from (path for path, _ in self._blocks())
        yield from (path for path in self.folder.glob("*.state") if _STATE_NAME.fullmatch(path.name))


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # it is gone already, or in use where the system does not allow that
        path.unlink()


_HEADER = struct.Struct("<10IQ")  # block_header of native/library/block.h


def _read_head(path: Path) -> tuple[int, int] | None:
    """The position of the first token of a block, and how many it has; None: it cannot be read, or is no block."""
    try:
        with path.open("rb") as file:
            magic, version, _, _, first, n_tokens, *_ = _HEADER.unpack(file.read(_HEADER.size))
    except (OSError, struct.error):
        return None
    return (first, n_tokens) if (magic, version) == (int.from_bytes(b"RFKB", "little"), 2) else None
