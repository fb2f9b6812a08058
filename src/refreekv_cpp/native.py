"""The C API (native/refreekv.h) as Python: one function per call, return codes turned into exceptions."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from refreekv_cpp._binding import ffi  # written by the build from native/refreekv.h
from refreekv_cpp._llama_cpp import library
from refreekv_cpp.errors import CacheMemoryError, CacheStateError, ComputeError, PolicyError, RefreeKVError

_ABI_VERSION = 15

_lib: Any = ffi.dlopen(library._name)

if _lib.refreekv_abi_version() != _ABI_VERSION:
    raise ImportError(
        f"the native library has ABI version {_lib.refreekv_abi_version()}, this package needs {_ABI_VERSION}: "
        "reinstall it"
    )

# refreekv_params.policy of a cache that grows and shrinks and evicts nothing
ELASTIC: int = _lib.REFREEKV_POLICY_ELASTIC


def enum_value(name: str) -> int:
    """The number of a constant of native/refreekv.h, without its prefix: enum_value("RANKING_SCORE")."""
    value: int = getattr(_lib, f"REFREEKV_{name}")
    return value


# what params point to
_texts: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()

Floats = npt.NDArray[np.float32]
Positions = npt.NDArray[np.int32]


def last_error() -> str:
    """What the last failing call of this thread said, "" when none failed."""
    text: bytes = ffi.string(_lib.refreekv_last_error())
    return text.decode(errors="replace")  # paths may be no text


def clear_error() -> None:
    """Before a call of llama.cpp's that may leave a new one."""
    _lib.refreekv_forget_last_error()


def _check(code: int) -> int:
    """The one place where return codes become exceptions."""
    if code >= 0:
        return code
    kind = {
        _lib.REFREEKV_ERR_ARGUMENT: PolicyError,
        _lib.REFREEKV_ERR_NO_POLICY: CacheStateError,
        _lib.REFREEKV_ERR_STATE: CacheStateError,
        _lib.REFREEKV_ERR_MEMORY: CacheMemoryError,
        _lib.REFREEKV_ERR_COMPUTE: ComputeError,
    }.get(code, RefreeKVError)
    raise kind(last_error() or f"native call failed with {code}")


def _context(ctx: Any) -> Any:
    """A llama_context pointer of llama_cpp (ctypes) as one of ours (cffi)."""
    return ffi.cast("struct llama_context *", ctypes.cast(ctx, ctypes.c_void_p).value or 0)


def model_refusal(model: Any) -> str | None:
    """Why a llama_model of llama_cpp cannot have a policy; None: it can."""
    why = _lib.refreekv_model_refusal(ffi.cast("struct llama_model *", ctypes.cast(model, ctypes.c_void_p).value or 0))
    return None if why == ffi.NULL else ffi.string(why).decode()


def hooks_ran() -> int:
    """A bit mask of the upstream hooks that have run in this process (native/api/process.h)."""
    return int(_lib.refreekv_hooks_ran())


def make_params(**options: Any) -> Any:
    """A `refreekv_params`: the native defaults with these fields set. Enum fields take their number."""
    params = ffi.new("struct refreekv_params *", _lib.refreekv_params_default())
    for name, value in options.items():
        if isinstance(value, str):
            value = ffi.new("char[]", os.fsencode(value))
            _texts[params] = value
        setattr(params, name, value)
    return params


def params_fields(params: Any) -> dict[str, Any]:
    """The fields of a `refreekv_params`."""
    return {name: getattr(params, name) for name, _ in ffi.typeof(params).item.fields}


@contextmanager
def next_context(params: Any | None) -> Iterator[None]:
    """Contexts that this thread creates inside get the policy; None: upstream's own cache in any environment."""
    _check(_lib.refreekv_next_context(ffi.NULL if params is None else params))
    try:
        yield
    finally:
        _lib.refreekv_forget_next_context()


def prune(ctx: Any, seq_id: int) -> int:
    """Apply the context's policy to a sequence. Returns the cells evicted, over all layers.

    Raises:
        CacheStateError: the last query of the sequence is not there any more.
    """
    return _check(_lib.refreekv_prune(_context(ctx), seq_id))


def expect(ctx: Any, n_tokens: int) -> None:
    """So many tokens are about to be decoded, in several batches: room for all of them is made at once."""
    _check(_lib.refreekv_expect(_context(ctx), n_tokens))


def prompt(ctx: Any, seq_id: int, n_tokens: int) -> None:
    """The next n_tokens tokens of a sequence are the rest of a prompt; -1: there is none, and no pruning is due."""
    _check(_lib.refreekv_prompt(_context(ctx), seq_id, n_tokens))


def is_due(ctx: Any, seq_id: int) -> bool:
    """Whether a prompt of the sequence was read, and nothing of it has been pruned since."""
    return bool(_check(_lib.refreekv_is_due(_context(ctx), seq_id)))


def usable_prefix(ctx: Any, seq_id: int, n_prefix: int, n_prompt: int) -> int:
    """How many of the first n_prefix tokens a prompt of n_prompt tokens, which begins with them, can go on from: the
    policy judges by the last queries of a prompt, and what is not there any more of them has to be read again."""
    return _check(_lib.refreekv_usable_prefix(_context(ctx), seq_id, n_prefix, n_prompt))


def protect(ctx: Any, seq_id: int, start: int, end: int) -> None:
    """Positions start to end - 1 of a sequence stay, whatever the policy, until the whole sequence is removed."""
    _check(_lib.refreekv_protect(_context(ctx), seq_id, start, end))


def restore(ctx: Any, seq_id: int) -> int:
    """Bring back what was evicted of a sequence, bit for bit. Returns the cells brought back, over all layers.

    Raises:
        CacheStateError: it is not there (any more): no cold store, or it was full.
        CacheMemoryError: no memory for it, or not within the limit.
    """
    return _check(_lib.refreekv_restore(_context(ctx), seq_id))


def library_refusal(ctx: Any) -> str | None:
    """Why sequences of this context cannot be written to a library or opened from it; None: they can."""
    why = _lib.refreekv_library_refusal(_context(ctx))
    return None if why == ffi.NULL else ffi.string(why).decode()


def library_use(ctx: Any, folder: Path, limit: int, files: Sequence[Path], reads_with: str, evicts_with: str) -> None:
    """Have a context keep what it reads in a folder, which is made where it is not there.

    Args:
        limit: bytes of all files of the folder.
        files: of the model, and of its adapters.
        reads_with: what the numbers in the cache depend on besides, but for the options of the context.
        evicts_with: what those of answers depend on besides, but for the parameters of the policy.

    Raises:
        CacheStateError: a file cannot be read, or the folder not be made.
    """
    paths = [ffi.new("char[]", os.fsencode(path)) for path in files]
    _check(
        _lib.refreekv_library_use(
            _context(ctx),
            os.fsencode(folder),
            limit,
            ffi.new("char *[]", paths),
            len(paths),
            reads_with.encode(),
            evicts_with.encode(),
        )
    )


def library_find(ctx: Any, seq_id: int, tokens: Sequence[int], n_have: int, *, with_state: bool) -> int:
    """How many of these tokens, from the first on, `library_open` would have a sequence hold.

    Args:
        n_have: of them, in the cache already. If the library has hardly more, this is 0.
        with_state: only as far as there is a state behind them.
    """
    return _check(_lib.refreekv_library_find(_context(ctx), seq_id, list(tokens), len(tokens), n_have, with_state))


def library_open(ctx: Any, seq_id: int) -> None:
    """Have a sequence be what `library_find` has found for it, as if it had been read and pruned.

    Rows that were evicted are read from the files when they are wanted.

    Raises:
        CacheStateError: the blocks do not fit this context, or cannot be read. The sequence is empty then.
        CacheMemoryError: no memory for it, or not within the limit. The sequence is empty then.
    """
    _check(_lib.refreekv_library_open(_context(ctx), seq_id))


def library_state(ctx: Any) -> memoryview:
    """The state behind what `library_find` has found, before it is opened."""
    n = _check(_lib.refreekv_library_state(_context(ctx), ffi.NULL, 0))
    data = bytearray(n)
    _check(_lib.refreekv_library_state(_context(ctx), ffi.from_buffer(data), n))
    return memoryview(data)


def library_keep(
    ctx: Any, seq_id: int, tokens: Sequence[int], states: Sequence[tuple[int, memoryview]], *, stay: bool
) -> int:
    """Write a sequence to the library. Returns how many tokens the library has of it now.

    Args:
        tokens: that it holds.
        states: behind the first so many of them.
        stay: the states stay when the text gets longer, which else have others in their place.

    Raises:
        CacheStateError: it could not be written. The library is what it was before.
    """
    buffers = [ffi.from_buffer(state) for _, state in states]
    return _check(
        _lib.refreekv_library_keep(
            _context(ctx),
            seq_id,
            list(tokens),
            len(tokens),
            [n for n, _ in states],
            ffi.new("void *[]", buffers),
            [len(state) for _, state in states],
            len(states),
            stay,
        )
    )


def library_key(ctx: Any, seq_id: int, *, replaced: bool = False) -> str:
    """Of the last block that was kept of a sequence, in hexadecimal digits; "": none was.

    Args:
        replaced: of the block that was removed then, because this one has its tokens and more.
    """
    return str(ffi.string(_lib.refreekv_library_key(_context(ctx), seq_id, replaced)).decode())


def library_check(path: Path, *, may_remove: bool = False) -> None:
    """Read a file of the library, and compare its checksums.

    Args:
        may_remove: it is removed if it is damaged, unless it cannot be opened, or is not this user's.

    Raises:
        CacheStateError: it is damaged, none of a library's, or cannot be read.
    """
    _check(_lib.refreekv_library_check(os.fsencode(path), may_remove))


def library_tidy(folder: Path, limit: int) -> None:
    """Make the folder of a library where it is not there, and remove what nobody needs and what is beyond the limit.

    Raises:
        CacheStateError: it cannot be made.
    """
    _check(_lib.refreekv_library_tidy(os.fsencode(folder), limit))


def fail_cold(n: int) -> None:
    """Test hook: let the n-th write to a cold store or a library from now on fail, and all after it, in this process.

    0: none.
    """
    _lib.refreekv_fail_cold(n)


def keep(ctx: Any, seq_id: int, layer: int, positions: Positions) -> int:
    """Keep just these positions in one layer of the model. Returns the cells evicted."""
    positions = np.ascontiguousarray(positions, dtype=np.int32)
    return _check(
        _lib.refreekv_keep(_context(ctx), seq_id, layer, ffi.from_buffer("llama_pos[]", positions), len(positions))
    )


def fail_allocation(n: int) -> None:
    """Test hook: let the n-th allocation of rows from now on fail, and all after it, in this process; 0: none."""
    _lib.refreekv_fail_allocation(n)


def pruned_pos(ctx: Any, seq_id: int) -> int:
    """The last position that a pruning of this sequence looked at; -1: it is whole."""
    return int(_lib.refreekv_pruned_pos(_context(ctx), seq_id))


def figures(ctx: Any) -> tuple[Any, list[Any]]:
    """The `refreekv_stats` of a cache and the `refreekv_layer_info` of each layer that has one, all of one moment.

    Any thread may ask, while the context exists: the figures are those of the end of the last operation or batch.
    """
    out = ffi.new("struct refreekv_stats *")
    n_max = _check(_lib.refreekv_get_stats(_context(ctx), out, ffi.NULL, 0))
    layers = ffi.new("struct refreekv_layer_info[]", n_max)
    n = _check(_lib.refreekv_get_stats(_context(ctx), out, layers, n_max))
    return out, _copies("struct refreekv_layer_info *", layers, n)


def stats(ctx: Any) -> Any:
    """The `refreekv_stats` of a cache. Any thread, see `figures`."""
    return figures(ctx)[0]


def layer(ctx: Any, index: int) -> Any:
    """The `refreekv_layer_info` of one of the layers that have a cache. Any thread, see `figures`.

    Raises:
        PolicyError: there is no such layer.
    """
    layers = figures(ctx)[1]
    if not 0 <= index < len(layers):
        raise PolicyError(f"index={index}: must be 0 to {len(layers) - 1}")
    return layers[index]


def buffers(ctx: Any) -> list[tuple[str, Any]]:
    """The memory of a model and its context: name and `refreekv_buffer_info` of each kind. Any thread, as `figures`."""
    n_max = 64  # buffer types; a machine has a few
    out = ffi.new("struct refreekv_buffer_info[]", n_max)
    n = _check(_lib.refreekv_get_buffers(_context(ctx), out, n_max))
    return [(ffi.string(info.name).decode(), info) for info in _copies("struct refreekv_buffer_info *", out, n)]


def _copies(pointer: str, array: Any, n: int) -> list[Any]:
    """The first elements of an array, which do not keep it alive by themselves."""
    return [ffi.new(pointer, array[i]) for i in range(min(n, len(array)))]


def devices(ctx: Any) -> list[Any]:
    """What a model and its context take of each device: a `refreekv_device_info` each, the host's last."""
    n_max = 64
    out = ffi.new("struct refreekv_device_info[]", n_max)
    n = _check(_lib.refreekv_get_devices(_context(ctx), out, n_max))
    return [ffi.new("struct refreekv_device_info *", out[i]) for i in range(min(n, n_max))]


def kept(ctx: Any, seq_id: int, index: int) -> Positions:
    """The positions of a sequence that a layer holds, ascending."""
    out = np.empty(layer(ctx, index).n_kept, dtype=np.int32)
    n = _check(_lib.refreekv_get_kept(_context(ctx), seq_id, index, ffi.from_buffer("llama_pos[]", out), len(out)))
    return out[:n]


def _read_rows(function: Any, ctx: Any, seq_id: int, index: int, n_max: int, n_head: int) -> tuple[Floats, Positions]:
    out = np.empty((n_max, n_head, layer(ctx, index).n_embd_head), dtype=np.float32)
    pos = np.empty(n_max, dtype=np.int32)
    n = _check(
        function(
            _context(ctx), seq_id, index, ffi.from_buffer("float[]", out), ffi.from_buffer("llama_pos[]", pos), n_max
        )
    )
    return out[:n], pos[:n]


def read_queries(ctx: Any, seq_id: int, index: int) -> tuple[Floats, Positions]:
    """The queries in the ring, oldest first: [n, n_head, n_embd_head] and their positions."""
    return _read_rows(_lib.refreekv_read_queries, ctx, seq_id, index, 256, layer(ctx, index).n_head)


def read_keys(ctx: Any, seq_id: int, index: int) -> tuple[Floats, Positions]:
    """The keys a layer holds, dequantised, in position order: [n, n_head_kv, n_embd_head] and their positions."""
    info = layer(ctx, index)
    return _read_rows(_lib.refreekv_read_keys, ctx, seq_id, index, info.n_kept, info.n_head_kv)


def read_attention(ctx: Any, seq_id: int, index: int) -> Floats:
    """What a policy sees of a layer, [n_head, n_rows, n_cells]: softmax rows of the ring's queries, oldest first."""
    shape = ffi.new("int32_t[3]")

    def call(out: Any, n_max: int) -> None:
        _check(_lib.refreekv_read_attention(_context(ctx), seq_id, index, out, n_max, shape))

    call(ffi.NULL, 0)
    out = np.empty(tuple(shape), dtype=np.float32)
    call(ffi.from_buffer("float[]", out), out.size)
    return out


def select(params: Any, attention: Floats, *, layer: int = 0, n_layer: int = 1) -> npt.NDArray[np.bool_]:
    """The policy alone, on attention [n_head, n_rows, n_cells] (rows oldest first) of a layer: which cells it keeps."""
    attention = np.ascontiguousarray(attention, dtype=np.float32)
    n_head, n_rows, n_cells = attention.shape
    out = np.empty(n_cells, dtype=np.uint8)
    _check(
        _lib.refreekv_select(
            params,
            ffi.from_buffer("float[]", attention),
            n_head,
            n_rows,
            n_cells,
            layer,
            n_layer,
            ffi.from_buffer("uint8_t[]", out),
        )
    )
    return out.astype(bool)
