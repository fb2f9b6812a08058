"""The library: prefixes of texts that were read before, as blocks of 256 tokens in the files of one folder.

A block's key is a hash of all that its contents depend on: the model and the options it was read with (together: the
`start`), the tokens before it, and its own. So a prefix that several texts share is stored once, and a block never
changes.

Blocks are of two kinds. An *exact* one was read while nothing before it was evicted: it depends on nothing else. The
others, of answers and of what follows them, were computed with codes in the place of what was evicted; their keys have
the options of the policy in them, too, and no block behind one of these is exact.

Beside them are *states*: what recurrent layers and layers with a window hold behind some tokens of a text. A text of a
model that has such layers can be opened where there is one. Its name is that of a block that would end there.

Any number of processes may use a folder at once. A block is written to a temporary file, which is then renamed; whoever
reads one checks it first, and holds the file open. Nothing waits for the disk (fsync): after a power cut a block may be
damaged, which its checksums tell.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from refreekv_cpp import native
from refreekv_cpp._log import logger
from refreekv_cpp.errors import CacheMemoryError, CacheStateError

VERSION = 1  # of the keys; that of the files is in native/library/block.cpp
N_BLOCK = 256  # tokens, without the sinks
_KEY_BYTES = 20
_SUFFIX = ".block"
_TEMPORARY = ".tmp"
# a folder may have files of others in it: copies that a program has made of a block, or anything
_STATE_SUFFIX = ".state"
_STATE_NAME = re.compile(r"(?P<parent>[0-9a-f]{40})-(?P<key>[0-9a-f]{40})-(?P<n_tokens>[0-9]+)\.state")
_BLOCK_NAME = re.compile(r"[0-9a-f]{40}-[0-9a-f]{40}\.block")
_TEMPORARY_NAME = re.compile(r"\.(?P<host>[0-9a-f]{8})-(?P<pid>[0-9]+)-[0-9a-f]{8}\.tmp")
_LEFT_BEHIND = 3600.0  # seconds after which a temporary file of another machine is
_N_SAMPLES, _SAMPLE, _HEAD = 256, 16 << 10, 8 << 20  # of a file, in bytes


def hashed(*parts: bytes | memoryview) -> bytes:
    found = hashlib.blake2b(digest_size=_KEY_BYTES)
    for part in parts:
        found.update(part)
    return found.digest()


def hashed_json(value: Any) -> bytes:
    """Of what is not JSON, its repr."""
    return hashed(json.dumps(value, sort_keys=True, default=repr).encode())


def file_identity(path: Path) -> str:
    """Tells one model's file from another: a hash of its size, its beginning, and samples of the rest."""
    size = path.stat().st_size
    found = hashlib.blake2b(str(size).encode(), digest_size=_KEY_BYTES)
    with path.open("rb") as file:
        found.update(file.read(_HEAD))
        for i in range(_N_SAMPLES):
            file.seek(size * i // _N_SAMPLES)
            found.update(file.read(_SAMPLE))
    return found.hexdigest()


@dataclass(frozen=True)
class Block:
    """Some tokens of a text.

    Attributes:
        key: of this block.
        parent: the key of the block before it, or the start of all texts. Both are the name of its file.
        first: the position of its first token.
        exact: see the module.
    """

    key: bytes
    parent: bytes
    first: int
    tokens: tuple[int, ...]
    exact: bool

    @property
    def label(self) -> bytes:
        """What its file says of it."""
        return self.key + self.parent + np.array(self.tokens, dtype="<i4").tobytes()


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
    """Those of one folder.

    Args:
        folder: made where it is not there, for its owner alone.
        limit: bytes of all files; blocks that were not used for longest are removed to keep to it.

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        self.names = folder / "names"
        folder.parent.mkdir(parents=True, exist_ok=True)
        for each in (folder, self.names):
            each.mkdir(mode=0o700, exist_ok=True)
        self._remove_left_behind()

    # -- blocks

    def path(self, block: Block) -> Path:
        return self.folder / f"{block.parent.hex()}-{block.key.hex()}{_SUFFIX}"

    def has(self, block: Block) -> bool:
        return self.path(block).exists()

    def find(self, start: bytes, salt: bytes, tokens: Sequence[int], n_before: int) -> tuple[list[Block], int]:
        """The blocks that have the longest prefix of these tokens, and its length. They are not checked yet.

        Of the last one, the first tokens may be all that is of use.

        Args:
            start: a hash of the model and of the options that it reads with.
            salt: what blocks that are not exact depend on besides.
            n_before: the tokens that the first block has more than the others: the sinks.
        """
        children: dict[str, list[str]] = {}
        for path in self._paths():
            parent, _, key = path.stem.partition("-")
            children.setdefault(parent, []).append(key)

        def follow(blocks: Sequence[Block], salt: bytes) -> list[Block]:
            res = list(blocks)
            while (block := _next(res, start, salt, tokens, n_before)) is not None and (
                block.key.hex() in children.get(block.parent.hex(), ())
            ):
                res.append(block)
            return res

        def with_part(blocks: list[Block]) -> tuple[list[Block], int]:
            """... and of the blocks that follow the one that has most of the tokens that come next."""
            parent, n = (blocks[-1].key, _n_tokens(blocks)) if blocks else (start, 0)
            best: tuple[list[Block], int] = blocks, n
            for key in children.get(parent.hex(), ()):
                block = self._block(parent, bytes.fromhex(key), n, salt)
                n_common = 0 if block is None else _n_common(block.tokens, tokens[n:])
                if block is not None and n + n_common > best[1]:
                    best = [*blocks, block], n + n_common
            return best

        exact = follow([], b"")
        found = [with_part(exact)]
        for n in range(len(exact), -1, -1):
            others = follow(exact[:n], salt)
            if len(others) > n:
                found.append(with_part(others))
        return max(found, key=lambda blocks_and_length: blocks_and_length[1])

    def check(self, block: Block) -> bool:
        """Whether the block can be read, and is what was written. One that is damaged is removed."""
        return self._is_whole(self.path(block), block.label)

    def checked(self, blocks: Sequence[Block]) -> list[Block]:
        """Those before the first that is damaged or gone."""
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
            good = list(threads.map(self.check, blocks))
        return list(blocks[: good.index(False)] if False in good else blocks)

    def touch(self, blocks: Sequence[Block]) -> None:
        """They were used now. What comes later in a text is removed before what it needs."""
        now = time.time_ns()
        for i, block in enumerate(blocks):
            with contextlib.suppress(OSError):
                os.utime(self.path(block), ns=(now, now - i * 1000))

    def write(self, ctx: Any, seq_id: int, block: Block, n_before: int) -> None:
        """Write a block of what is in a cache.

        Raises:
            CacheStateError: the cache does not have its rows (any more), or the file cannot be made.
            CacheMemoryError: the disk is full.
            OSError: the file cannot be renamed.
        """
        temporary = self.folder / f".{_this_host()}-{os.getpid()}-{secrets.token_hex(4)}{_TEMPORARY}"
        n_before = min(n_before, len(block.tokens)) if block.first == 0 else 0
        try:
            native.library_write(ctx, seq_id, block.first, len(block.tokens), n_before, block.label, temporary)
            temporary.replace(self.path(block))
        finally:
            _remove(temporary)

    # -- states

    def state_path(self, block: Block) -> Path:
        """Of the state behind the last token of a block."""
        n_tokens = block.first + len(block.tokens)
        return self.folder / f"{block.parent.hex()}-{block.key.hex()}-{n_tokens}{_STATE_SUFFIX}"

    def find_state(self, blocks: Sequence[Block], salt: bytes, n_tokens: int) -> Block | None:
        """The block that would end where the last state of a text is.

        Args:
            blocks: of the text.
            salt: as in `find`.
            n_tokens: where it has to be at most.
        """
        there = {path.name for path in self._states()}
        lengths: dict[str, set[int]] = {}
        for name in there:
            match = _STATE_NAME.fullmatch(name)
            assert match is not None
            lengths.setdefault(match["parent"], set()).add(int(match["n_tokens"]))
        for block in reversed(blocks):
            end = min(n_tokens, block.first + len(block.tokens))
            for n in sorted(lengths.get(block.parent.hex(), ()), reverse=True):
                for kind in (b"", salt) if block.first < n <= end else ():
                    part = _block(block.parent, kind, block.first, block.tokens[: n - block.first])
                    if self.state_path(part).name in there:
                        return part
        return None

    def touch_state(self, block: Block) -> None:
        """It was used now."""
        with contextlib.suppress(OSError):
            os.utime(self.state_path(block))

    def write_state(self, block: Block, state: memoryview) -> None:
        """
        Raises:
            OSError: the file cannot be written.
        """
        temporary = self.folder / f".{_this_host()}-{os.getpid()}-{secrets.token_hex(4)}{_TEMPORARY}"
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(_state_head(block.key, state))
                file.write(state)
            temporary.replace(self.state_path(block))
        finally:
            _remove(temporary)

    def read_state(self, block: Block) -> memoryview | None:
        """None: it is gone, or damaged, which the log says, and removed."""
        path = self.state_path(block)
        try:
            data = memoryview(path.read_bytes())
        except OSError:
            return None
        if not _is_state(block.key, data):
            logger.warning("the library has a damaged state, which is removed: %s", path)
            _remove(path)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return data[_STATE_HEAD:]

    def _states(self) -> Iterator[Path]:
        return (path for path in self.folder.glob(f"*{_STATE_SUFFIX}") if _STATE_NAME.fullmatch(path.name))

    # -- files

    def size(self, block: Block) -> int:
        """Bytes of its file; 0: it is gone."""
        try:
            return self.path(block).stat().st_size
        except OSError:
            return 0

    def remove(self, block: Block) -> None:
        _remove(self.path(block))

    def replace(self, block: Block, later: Block) -> None:
        """Remove the end of a text, which ends later now; if it has a name, it keeps that."""
        for _, name in self._named():
            if name["key"] == block.key.hex():
                self.name(name["name"], later)
        self.remove(block)

    def trim(self) -> None:
        """Remove what was not used for longest, until the rest is within the limit; and names of what is gone."""
        files = sorted([*self._files(), *self._state_files()], key=lambda file: file[1].st_mtime)
        n_bytes = sum(info.st_size for _, info in files)
        kept = {path.stem.partition("-")[2] for path, _ in files}
        for path, info in files:
            if n_bytes <= self.limit:
                break
            _remove(path)
            kept.discard(path.stem.partition("-")[2])
            n_bytes -= info.st_size
        for path, name in self._named():
            if name["key"] not in kept:
                _remove(path)
        self._remove_states_without_text()

    def n_bytes(self) -> int:
        """Of all files."""
        return sum(info.st_size for _, info in [*self._files(), *self._state_files()])

    def clear(self) -> int:
        """Remove all blocks and states. Returns their bytes."""
        n_bytes = self.n_bytes()
        for path in [*self._paths(), *self._states()]:
            _remove(path)
        return n_bytes

    # -- texts

    def name(self, name: str, block: Block) -> None:
        """Give a name to the text that ends with a block, in place of another text that had it."""
        temporary = self.names / f".{_this_host()}-{os.getpid()}-{secrets.token_hex(4)}{_TEMPORARY}"
        # the name of a file may be no text, which Python reads as lone surrogates
        path = self.names / f"{hashed(name.encode('utf-8', 'surrogatepass')).hex()}.json"
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
                json.dump({"name": name, "key": block.key.hex()}, file)
            temporary.replace(path)
        finally:
            _remove(temporary)

    def texts(self) -> list[Text]:
        """All, the one that was used last first. A text that another one begins with is listed if it has a name."""
        files = {path.stem.partition("-")[2]: (path, info) for path, info in self._files()}
        parent_of = {key: path.stem.partition("-")[0] for key, (path, _) in files.items()}
        parents = set(parent_of.values())
        names = {name["key"]: name["name"] for _, name in self._named()}
        res = []
        for key, (path, info) in files.items():
            head = _read_head(path)
            if head is None or (key in parents and key not in names):
                continue
            chain = [key]
            while parent_of[chain[0]] in files:
                chain.insert(0, parent_of[chain[0]])
            beginning = _read_head(files[chain[0]][0])
            if beginning is not None and beginning.first == 0:  # else that has been removed
                n_tokens = head.first + len(head.tokens)
                n_bytes = sum(files[each][1].st_size for each in chain)
                paths = tuple(files[each][0] for each in chain)
                res.append(Text(key, names.get(key, ""), n_tokens, n_bytes, info.st_mtime, paths))
        return sorted(res, key=lambda text: -text.used)

    def remove_text(self, text: Text) -> int:
        """Remove its blocks, but for those that other texts begin with. Returns the bytes that were freed."""
        needed = {path for other in self.texts() if other.key != text.key for path in other.blocks}
        freed = 0
        for path in text.blocks:
            if path not in needed:
                with contextlib.suppress(OSError):
                    freed += path.stat().st_size
                _remove(path)
        for path, name in self._named():
            if name["key"] == text.key:
                _remove(path)
        before = self.n_bytes()
        self._remove_states_without_text()
        return freed + before - self.n_bytes()

    def check_all(self) -> tuple[int, list[str]]:
        """Read all files. Returns how many are whole, and what is wrong with the others. Those that are damaged are
        removed, those that cannot be opened are not."""
        n_good, errors = 0, []
        for path, _ in self._files():
            try:
                native.library_check(path, None)
                head = _read_head(path)
                if head is None or f"{head.parent}-{head.key}" != path.stem:
                    raise CacheStateError(f"{path}: it is another block than its name says")
                n_good += 1
            except CacheStateError as error:
                errors.append(str(error))
                if _can_be_opened(path):
                    _remove(path)
        for path in self._states():
            with contextlib.suppress(OSError):
                if _is_state(bytes.fromhex(path.name.split("-")[1]), memoryview(path.read_bytes())):
                    n_good += 1
                else:
                    errors.append(f"{path}: it is damaged")
                    _remove(path)
        return n_good, errors

    # -- details

    def _is_whole(self, path: Path, label: bytes | None) -> bool:
        try:
            native.library_check(path, label)
        except CacheStateError as error:
            if _can_be_opened(path):
                logger.warning("the library has a damaged block, which is removed: %s", error)
                _remove(path)
            return False
        except CacheMemoryError:
            return False
        return True

    def _block(self, parent: bytes, key: bytes, first: int, salt: bytes) -> Block | None:
        """The block of a file, by what that says; None: it depends on something else, or is damaged."""
        path = self.folder / f"{parent.hex()}-{key.hex()}{_SUFFIX}"
        head = _read_head(path)
        for kind in (b"", salt):
            if head is not None and _key(parent, kind, np.array(head.tokens, dtype="<i4")) == key:
                return Block(key, parent, first, head.tokens, exact=not kind)
        if head is None or (head.parent, head.key) != (parent.hex(), key.hex()):
            self._is_whole(path, None)
        return None

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self._paths():
            with contextlib.suppress(OSError):
                yield path, path.stat()

    def _state_files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self._states():
            with contextlib.suppress(OSError):
                yield path, path.stat()

    def _remove_states_without_text(self) -> None:
        parents = {path.stem.partition("-")[0] for path in self._paths()}
        for path in self._states():
            if path.name.partition("-")[0] not in parents:
                _remove(path)

    def _paths(self) -> Iterator[Path]:
        return (path for path in self.folder.glob(f"*{_SUFFIX}") if _BLOCK_NAME.fullmatch(path.name))

    def _named(self) -> Iterator[tuple[Path, dict[str, str]]]:
        for path in self.names.glob("*.json"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                name = json.loads(path.read_text(encoding="utf-8"))
                yield path, {"name": str(name["name"]), "key": str(name["key"])}

    def _remove_left_behind(self) -> None:
        """Temporary files of processes that have died."""
        for path in [*self.folder.glob(f".*{_TEMPORARY}"), *self.names.glob(f".*{_TEMPORARY}")]:
            if (name := _TEMPORARY_NAME.fullmatch(path.name)) is None:
                continue
            with contextlib.suppress(OSError, OverflowError):
                old = time.time() - path.stat().st_mtime > _LEFT_BEHIND
                if old or (name["host"] == _this_host() and not psutil.pid_exists(int(name["pid"]))):
                    _remove(path)


def blocks_of(start: bytes, salt: bytes, tokens: Sequence[int], n_exact: int, n_before: int) -> list[Block]:
    """The blocks of a text, of which the first n_exact tokens were read while nothing was evicted.

    The last one may have fewer tokens than the others.
    """
    res: list[Block] = []
    n = 0
    while n < len(tokens):
        end = min(n + _whole(n, n_before), len(tokens))
        parent = res[-1].key if res else start
        res.append(_block(parent, b"" if end <= n_exact else salt, n, tokens[n:end]))
        n = end
    return res


def is_whole(block: Block, n_before: int) -> bool:
    return len(block.tokens) == _whole(block.first, n_before)


def _whole(first: int, n_before: int) -> int:
    return N_BLOCK + (n_before if first == 0 else 0)


def _next(blocks: Sequence[Block], start: bytes, salt: bytes, tokens: Sequence[int], n_before: int) -> Block | None:
    """The whole block that follows; None: there are not so many tokens."""
    first = _n_tokens(blocks)
    end = first + _whole(first, n_before)
    return _block(blocks[-1].key if blocks else start, salt, first, tokens[first:end]) if end <= len(tokens) else None


def _block(parent: bytes, salt: bytes, first: int, tokens: Sequence[int]) -> Block:
    key = _key(parent, salt, np.array(tokens, dtype="<i4"))
    return Block(key, parent, first, tuple(tokens), exact=not salt)


def _key(parent: bytes, salt: bytes, tokens: Any) -> bytes:
    return hashed(parent, salt, tokens.tobytes())


def _n_common(a: Sequence[int], b: Sequence[int]) -> int:
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)


def _n_tokens(blocks: Sequence[Block]) -> int:
    return blocks[-1].first + len(blocks[-1].tokens) if blocks else 0


def _can_be_opened(path: Path) -> bool:
    """False: it is gone, or what is wrong is not the file, such as too many open ones."""
    try:
        path.open("rb").close()
    except OSError:
        return False
    return True


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # it is gone already, or in use where the system does not allow that
        path.unlink()


def _this_host() -> str:
    return hashed(socket.gethostname().encode()).hex()[:8]


@dataclass(frozen=True)
class _Head:
    key: str
    parent: str
    first: int
    tokens: tuple[int, ...]


_STATE_HEAD = 8 + _KEY_BYTES


def _state_head(key: bytes, state: memoryview) -> bytes:
    return b"RFKS" + struct.pack("<I", VERSION) + hashed(key, state)


def _is_state(key: bytes, data: memoryview) -> bool:
    """Whether a file of that key has its head before what was written."""
    return data[:_STATE_HEAD] == _state_head(key, data[_STATE_HEAD:])


_HEADER = struct.Struct("<10IQ")  # block_header of native/library/block.h
_MAX_LABEL = 1 << 16


def _read_head(path: Path) -> _Head | None:
    """What a file says of itself; None: it cannot be read, or is no block."""
    try:
        with path.open("rb") as file:
            magic, _, n_label, _, first, *_ = _HEADER.unpack(file.read(_HEADER.size))
            label = file.read(min(n_label, _MAX_LABEL))
    except (OSError, struct.error):
        return None
    if magic != int.from_bytes(b"RFKB", "little") or len(label) < 2 * _KEY_BYTES or len(label) % 4:
        return None
    tokens = np.frombuffer(label[2 * _KEY_BYTES :], dtype="<i4")
    return _Head(label[:_KEY_BYTES].hex(), label[_KEY_BYTES : 2 * _KEY_BYTES].hex(), first, tuple(tokens.tolist()))
