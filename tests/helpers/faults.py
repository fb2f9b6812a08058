"""Faults: the n-th allocation of native/ fails, or the n-th call on a file. faults.cpp does it, in front of Python."""

from __future__ import annotations

import bisect
import ctypes
import errno
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forked import forked

SOURCE = Path(__file__).parent / "faults.cpp"
_OURS, _PASSED = 1, 2
_STANDARD = ("_ZNSt", "_ZNKSt", "_ZSt", "_ZNSa", "_ZNKSa", "_ZN9__gnu_cxx", "_ZNK9__gnu_cxx")
_SYSTEM = ("libstdc++", "libgcc_s", "libc.so", "libgomp", "libm.so", "ld-linux", "libfaults")


def compiler() -> str | None:
    """One for C++, with `nm` beside it; None: there is none, or this is no Linux."""
    found = shutil.which(os.environ.get("CXX", "c++"))
    return found if sys.platform == "linux" and shutil.which("nm") else None


def compile_shim(folder: Path) -> Path:
    path = folder / "libfaults.so"
    command = [compiler() or "c++", "-std=c++14", "-O1", "-fPIC", "-shared", str(SOURCE), "-o", str(path), "-ldl"]
    subprocess.run(command, check=True)
    return path


class _Range(ctypes.Structure):
    _fields_ = [("begin", ctypes.c_uint64), ("end", ctypes.c_uint64), ("kind", ctypes.c_int64)]


class Shim:
    """The one that stands in front of this process.

    Args:
        libraries: with our own code in them, which are loaded.
        folder: of files that may fail.
    """

    def __init__(self, libraries: list[Path], folder: Path) -> None:
        self._shim = ctypes.CDLL(None)
        self._shim.faults_disarm.restype = ctypes.c_long
        self._shim.faults_types.restype = ctypes.c_void_p
        self._shim.faults_places.restype = ctypes.POINTER(ctypes.c_uint64)
        self._shim.faults_arm.argtypes = [ctypes.c_int, ctypes.c_long, ctypes.c_int, ctypes.c_bool, ctypes.c_int]
        self._names: list[tuple[int, str]] = []
        ranges: list[tuple[int, int, int]] = []
        bases: dict[str, int] = {}
        for line in Path("/proc/self/maps").read_text().splitlines():
            part = line.split(maxsplit=5)
            if len(part) < 6:
                continue
            begin, end = (int(each, 16) for each in part[0].split("-"))
            bases.setdefault(part[5], begin)
            if "x" in part[1] and Path(part[5]).name.startswith(_SYSTEM):
                ranges.append((begin, end, _PASSED))
                self._names.append((begin, Path(part[5]).name))
        for library in libraries:
            base = bases[str(library.resolve())]
            listed = subprocess.run(["nm", "--defined-only", "-n", "-S", str(library)], capture_output=True, text=True)
            for address, size, name in re.findall(r"^([0-9a-f]+) ([0-9a-f]+) [tTwW] (\S+)$", listed.stdout, re.M):
                begin = base + int(address, 16)
                kind = _OURS if "refreekv" in name else _PASSED if name.startswith(_STANDARD) else 0
                ranges.append((begin, begin + int(size, 16), kind))
                self._names.append((begin, name))
        ranges = sorted({begin: (begin, end, kind) for begin, end, kind in ranges}.values())
        self._names.sort()
        self._table = (_Range * len(ranges))(*(_Range(*each) for each in ranges))
        self._shim.faults_table(self._table, ctypes.c_size_t(len(ranges)))
        self._shim.faults_folder(os.fsencode(folder))

    def arm(self, fault: Fault, log: int = -1) -> None:
        self._shim.faults_arm(int(fault.of_files), fault.n, fault.how, fault.all_after, log)

    def disarm(self) -> list[str]:
        """For each call that could have failed: a letter that says what was called, and, where none was to fail, a
        number that is the same for all calls with the same callers."""
        n = min(int(self._shim.faults_disarm()), 1 << 20)
        letters = ctypes.string_at(self._shim.faults_types(), n).decode()
        return [f"{letter}{place:x}" for letter, place in zip(letters, self._shim.faults_places()[:n], strict=True)]

    def names(self, addresses: bytes) -> list[str]:
        """The functions that these addresses, of 8 bytes each, lie in."""
        res = []
        for i in range(0, len(addresses), 8):
            at = bisect.bisect_right(self._names, (int.from_bytes(addresses[i : i + 8], "little"), "\uffff"))
            res.append(self._names[at - 1][1] if at else "?")
        return res


@dataclass(frozen=True)
class Fault:
    """Attributes:
    n: which call fails; 0: none.
    of_files: a call on a file; else an allocation of native/, or a thread of its own.
    how: the errno of a call on a file; -1: it does a part of what it is asked for.
    all_after: all later ones fail, too, until the script has seen the first error.
    """

    n: int
    of_files: bool = False
    how: int = 0
    all_after: bool = False

    def __str__(self) -> str:
        kind = "memory" if not self.of_files else "short" if self.how == -1 else errno.errorcode[self.how]
        return f"{kind} {self.n}{'...' if self.all_after else ''}"


@dataclass
class Outcome:
    """What a script came to.

    Attributes:
        result: what it returned; None: it did not end.
        ended: how, if it did not return: a signal, an exit code, an error that is none of those documented.
        where: the functions that called what failed, the innermost first.
    """

    fault: Fault
    result: Any = None
    ended: str = ""
    where: list[str] = field(default_factory=list)


def run(shim: Shim, fault: Fault, script: Callable[[Callable[[], None]], Any], log: Path) -> Outcome:
    """Run a script in a process that is forked off, with one fault.

    Args:
        script: is given a function that ends the faults; what it returns is JSON.
        log: a file for this function's use.
    """
    log.write_bytes(b"")

    def do() -> Any:
        calls: list[list[str]] = []
        fd = os.open(log, os.O_WRONLY | os.O_APPEND)
        shim.arm(fault, fd)
        try:
            result = script(lambda: calls.append(shim.disarm()))
        finally:
            calls.append(shim.disarm())
            os.close(fd)
        return result, calls[0]

    result, ended = forked(do)
    return Outcome(fault, result, ended, shim.names(log.read_bytes()))
