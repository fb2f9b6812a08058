"""Damaged and made-up inputs: states, blocks of a library, calls of the C API. docs/development/reliability.md.

    python tests/fuzz/fuzz.py [--target state --target block ...] [--inputs 1000000] [--first 0]

Inputs are numbered: the n-th is the same in every run. Each is made of a valid one (a state that a tiny model has
saved, a block that it has written, a list of calls) by a few changes, most of them near the heads of sections. They run
in a process that is forked off. One that ends this process, or takes more than 10 s, is kept in a file and reported.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import llama_cpp
import numpy as np
import typer
from books import files
from support import Sequences
from tiny import TinyModel, random_tokens

from refreekv_cpp import ReFreeKV, RefreeKVError, native

_N_SECONDS = 10.0
_N_MOST = 1 << 24  # bytes of an input
_MAGICS = (b"RFKV", b"RFVV", b"RFKC", b"RFKW", b"RFKB")
_NUMBERS = [0, 1, 2, 63, 64, 65, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**64 - 1]
_COLD = {"theta": 0.003, "cold": 2}

Run = Callable[[bytes], None]


def changed(rng: random.Random, seeds: list[bytes]) -> bytes:
    data = bytearray(rng.choice(seeds))
    heads = [at for magic in _MAGICS for at in _places(bytes(data), magic)] or [0]
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        if not data:
            break
        near = rng.random() < 0.8
        at = min(rng.choice(heads) + rng.randrange(200), len(data) - 1) if near else rng.randrange(len(data))
        kind = rng.randrange(8)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.randrange(256)
        elif kind in (2, 3):
            data[at : at + 4] = struct.pack("<I", rng.choice(_NUMBERS) % 2**32)
        elif kind == 4:
            data[at : at + 8] = struct.pack("<Q", rng.choice(_NUMBERS))
        elif kind == 5:
            del data[at : at + rng.choice((1, 4, 8, 100))]
        elif kind == 6:
            data[at:at] = rng.randbytes(rng.choice((1, 4, 8, 100)))
        elif rng.random() < 0.3:
            del data[at:]
        else:  # the end of another one
            other = rng.choice(seeds)
            data[at:] = other[rng.randrange(len(other)) :]
    return bytes(data[:_N_MOST])


def _places(data: bytes, magic: bytes) -> list[int]:
    res, at = [], data.find(magic)
    while at >= 0 and len(res) < 64:
        res.append(at)
        at = data.find(magic, at + 1)
    return res


# -- targets: each makes its valid inputs, and what runs one


def _context(model: Path, **fields: object) -> Sequences:
    policy = ReFreeKV(n_min=0, n_hot=64)
    return Sequences(model, policy, codes=True, cold=_COLD, n_ctx=1024, n_batch=256, n_ubatch=256, **fields)


def state(model: Path, folder: Path) -> tuple[list[bytes], Run]:
    """llama_state_seq_set_data."""
    ctx = _context(model)
    ctx.read(0, random_tokens(400))
    seeds = [ctx.save(0)]
    native.prune(ctx.ctx, 0)
    seeds.append(ctx.save(0))
    ctx.read(1, random_tokens(100, seed=1))
    seeds.append(ctx.save(1))

    def run(data: bytes) -> None:
        if ctx.restore(data, 0) and 0 < ctx.n_tokens(0) < 1000:
            _decode(ctx, 0)
        if ctx.n_tokens(1) > 800:
            ctx.remove(1)
        _decode(ctx, 1)

    return seeds, run


def whole_state(model: Path, folder: Path) -> tuple[list[bytes], Run]:
    """llama_state_set_data."""
    ctx = _context(model)
    seeds = []
    for seq_id, n in ((0, 400), (1, 200)):
        ctx.read(seq_id, random_tokens(n))
        native.prune(ctx.ctx, seq_id)
        buffer = (ctypes.c_uint8 * llama_cpp.llama_state_get_size(ctx.ctx))()
        seeds.append(bytes(buffer[: llama_cpp.llama_state_get_data(ctx.ctx, buffer, len(buffer))]))

    def run(data: bytes) -> None:
        buffer = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
        llama_cpp.llama_state_set_data(ctx.ctx, buffer, len(data))
        for seq_id in (0, 1):
            if ctx.n_tokens(seq_id) < 1000:
                _decode(ctx, seq_id)

    return seeds, run


def block(model: Path, folder: Path) -> tuple[list[bytes], Run]:
    """A text that is opened from a library with one such block. The checksums are mended after a change, where there is
    a compiler for them."""
    checksum = _xxh3(folder)
    ctx = _context(model)
    tokens = random_tokens(700)
    native.library_use(ctx.ctx, folder / "library", 2**40, [model], "", "")
    ctx.read(0, tokens)
    native.prune(ctx.ctx, 0)
    native.library_keep(ctx.ctx, 0, tokens, [], stay=False)
    whole = {path: path.read_bytes() for path in files(folder / "library")}
    names = {data[_HEADER.size : _HEADER.size + 40]: path for path, data in whole.items()}  # by their keys

    def run(data: bytes) -> None:
        data = data if checksum is None else _mended(data, checksum)
        changed = names.get(data[_HEADER.size : _HEADER.size + 40], next(iter(whole)))
        changed.write_bytes(data)
        with suppress(RefreeKVError):
            native.library_check(changed)
        with suppress(RefreeKVError):
            ctx.remove(0)
            if native.library_find(ctx.ctx, 0, tokens, 0, with_state=False):
                native.library_open(ctx.ctx, 0)
            _decode(ctx, 0)
        if ctx.n_tokens(1) > 300:
            ctx.remove(1)
        _decode(ctx, 1)
        changed.write_bytes(whole[changed])

    return list(whole.values()), run


def calls(model: Path, folder: Path) -> tuple[list[bytes], Run]:
    """Lists of calls, four bytes each: which one, and its arguments."""
    ctx = _context(model, n_seq_max=4)
    other = _context(model, n_seq_max=4, kv_unified=False)
    n_vocab = ctx.model.n_vocab()
    saved: dict[int, bytes] = {}
    rng = np.random.default_rng(0)
    for its in (ctx, other):
        native.library_use(its.ctx, folder / "library", 1 << 20, [model], "", "")
    texts = [random_tokens(700, seed=i) for i in range(3)]
    seeds = [rng.integers(0, 256, 4 * n, dtype=np.uint8).tobytes() for n in (4, 16, 64)]

    def one(its: Sequences, what: int, a: int, b: int, c: int) -> None:
        memory, seq = its.memory, a % 4
        any_seq, p0, p1 = a - 8, b * 4 - 8, c * 4 - 8
        if what in (0, 1, 2):
            n = min(b + 1, 1000 - max(its.n_tokens(s) for s in range(4)))
            if n > 0:
                with suppress(AssertionError):
                    its.read(seq, [3 + (c + i) % (n_vocab - 3) for i in range(n)])
        elif what == 3:
            native.prune(its.ctx, any_seq)
        elif what == 4:
            native.restore(its.ctx, any_seq)
        elif what == 5:
            native.keep(its.ctx, any_seq, c % 6, np.arange(b, dtype=np.int32))
        elif what == 6:
            its.remove(seq if c % 3 else -1, p0, p1)
        elif what == 7:
            its.copy(seq, b % 4, *((-1, -1) if c % 2 else (p0, p1)))
        elif what == 8:
            llama_cpp.llama_memory_seq_keep(memory, seq)
        elif what == 9 and llama_cpp.llama_memory_can_shift(memory):
            llama_cpp.llama_memory_seq_add(memory, seq, b, -1, -(c % 8))
        elif what == 10:
            saved[seq] = its.save(seq)
        elif what == 11:
            if b % 4 in saved:
                its.restore(saved[b % 4], seq)
        elif what == 12:
            native.protect(its.ctx, any_seq, p0, p1)
        elif what == 13:
            native.expect(its.ctx, p0)
        elif what == 14:
            native.prompt(its.ctx, any_seq, p0)
        elif what == 15:
            native.usable_prefix(its.ctx, any_seq, b, c)
        elif what == 16:
            native.library_keep(its.ctx, any_seq, texts[b % 3][: c * 4], [(c, memoryview(b"state"))], stay=bool(b % 2))
        elif what == 17:
            native.library_find(its.ctx, any_seq, texts[b % 3], c, with_state=b > 200)
            native.library_open(its.ctx, seq)
        elif what == 18:
            native.kept(its.ctx, any_seq, c % 6)
            native.read_queries(its.ctx, any_seq, c % 6)
        elif what == 19:
            native.read_keys(its.ctx, any_seq, c % 6)
        elif what == 20:
            native.fail_allocation(c % 5)
        elif what == 21:
            native.fail_cold(c % 5)
        elif what == 22:
            llama_cpp.llama_memory_clear(memory, bool(c % 2))
        elif what == 23:
            native.stats(its.ctx)
            native.pruned_pos(its.ctx, any_seq)

    def run(data: bytes) -> None:
        for i in range(0, len(data) - 3, 4):
            what, a, b, c = data[i : i + 4]
            with suppress(RefreeKVError):
                one(other if what & 128 else ctx, what % 24, a, b, c)
        native.fail_allocation(0)
        native.fail_cold(0)

    return seeds, run


def _decode(ctx: Sequences, seq_id: int) -> None:
    with suppress(AssertionError):  # no room
        ctx.read(seq_id, [5])


_XXH3 = """
#define XXH_INLINE_ALL
#include "xxhash/xxhash.h"
extern "C" unsigned long long xxh3(const void * data, size_t size) { return XXH3_64bits(data, size); }
"""


def _xxh3(folder: Path) -> Callable[[bytes], int] | None:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    sources = os.environ.get("REFREEKV_UPSTREAM_DIR")
    if compiler is None or sources is None:
        return None
    (folder / "xxh3.cpp").write_text(_XXH3)
    command = [compiler, "-O2", "-fPIC", "-shared", "-I", f"{sources}/vendor/llama.cpp/vendor/hash"]
    subprocess.run([*command, str(folder / "xxh3.cpp"), "-o", str(folder / "xxh3.so")], check=True)
    found = ctypes.CDLL(str(folder / "xxh3.so")).xxh3
    found.restype, found.argtypes = ctypes.c_uint64, [ctypes.c_char_p, ctypes.c_size_t]
    return lambda data: int(found(data, len(data)))


_HEADER, _LAYER = struct.Struct("<10IQ"), struct.Struct("<3iI10Q")  # native/library/block.h


def _mended(data: bytes, checksum: Callable[[bytes], int]) -> bytes:
    """With the checksums that it has to have, as far as the places that it names are in it."""
    if len(data) < _HEADER.size:
        return data
    header = list(_HEADER.unpack_from(data))
    header[-1] = len(data)
    n_label, n_layers, n_cells, n_groups = header[2], header[3], header[5], header[7]
    end = _HEADER.size + n_label + n_layers * _LAYER.size
    if n_layers > 64 or end + 8 > len(data):
        return data
    res = bytearray(data)
    res[: _HEADER.size] = _HEADER.pack(*header)
    for i in range(n_layers):
        at = _HEADER.size + n_label + i * _LAYER.size
        layer = list(_LAYER.unpack_from(res, at))
        n_heads, row_k, row_v, codes_k, codes_v, codes_at, records_at = layer[3], *layer[4:6], *layer[8:12]
        n_codes, n_records = n_groups * n_heads * (codes_k + codes_v), n_cells * (row_k + row_v)
        for part, (begin, size) in enumerate(((codes_at, n_codes), (records_at, n_records))):
            if begin + size <= len(res):
                layer[12 + part] = checksum(bytes(res[begin : begin + size]))
        res[at : at + _LAYER.size] = _LAYER.pack(*layer)
    res[end : end + 8] = struct.pack("<Q", checksum(bytes(res[:end])))
    return bytes(res)


TARGETS = {"state": state, "whole_state": whole_state, "block": block, "calls": calls}


# -- running them


def fuzz(name: str, first: int, n_inputs: int, found: Path) -> int:
    """The number of inputs that ended the process, or took too long."""
    shared = mmap.mmap(-1, _N_MOST + 16)  # the number of the input, its size, and the input
    n_bad, at = 0, first
    while at < first + n_inputs:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                sys.stderr = open(os.devnull, "w")  # noqa: SIM115
                with tempfile.TemporaryDirectory() as folder:
                    _work(name, Path(folder), at, first + n_inputs, shared)
                code = 0
            except BaseException as error:
                print(f"{name}: {type(error).__name__}: {error}", flush=True)
            finally:
                os._exit(code)
        status = _wait(pid, shared)
        if status == 0:
            break
        n, size = struct.unpack_from("<QQ", shared)
        found.mkdir(exist_ok=True)
        path = found / f"{name}-{n}"
        path.write_bytes(shared[16 : 16 + size])
        how = "takes too long" if status is None else signal.strsignal(os.WTERMSIG(status)) or f"exit {status}"
        print(f"BAD {name} {n}: {how}: {path}", flush=True)
        n_bad += 1
        at = n + 1
    return n_bad


def _wait(pid: int, shared: mmap.mmap) -> int | None:
    """The status of a process; None: it took too long for an input."""
    last, since = -1, time.monotonic()
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        (n,) = struct.unpack_from("<Q", shared)
        if n != last:
            last, since = n, time.monotonic()
        if time.monotonic() - since > _N_SECONDS:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        time.sleep(0.005)


def _work(name: str, folder: Path, first: int, end: int, shared: mmap.mmap) -> None:
    TinyModel(n_layer=2).write(folder / "tiny.gguf")
    seeds, run = TARGETS[name](folder / "tiny.gguf", folder)
    for seed in seeds:
        run(seed)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for n in range(first, end):
        data = changed(random.Random(f"{name} {n}"), seeds)
        struct.pack_into("<QQ", shared, 0, n, len(data))
        shared[16 : 16 + len(data)] = data
        run(data)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{name}: {end - first} inputs; the process grew by {grown >> 10} MiB at most", flush=True)
    assert grown < 256 << 10


def main(
    target: Annotated[list[str] | None, typer.Option(help=f"Some of: {', '.join(TARGETS)}.")] = None,
    inputs: Annotated[int, typer.Option(help="Of each target.")] = 1_000_000,
    first: Annotated[int, typer.Option(help="The number of the first.")] = 0,
    found: Annotated[Path, typer.Option(help="The folder of what is found.")] = Path("found"),
) -> None:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    n_bad = sum(fuzz(name, first, inputs, found.resolve()) for name in target or TARGETS)
    print(f"{n_bad} inputs ended the process or took too long")
    raise SystemExit(n_bad > 0)


if __name__ == "__main__":
    typer.run(main)
