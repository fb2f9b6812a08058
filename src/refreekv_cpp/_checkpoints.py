"""What recurrent layers and layers with a sliding window held at earlier positions of a sequence.

The cache of a layer that sees everything can be cut at any position. A recurrent state cannot: it is that of the last
token alone. Nor can a window whose rows before that position have been overwritten. So a copy of these layers is kept
at positions where a later prompt is likely to differ, and going back means to load one, to cut the rest of the cache,
and to read the tokens between.
"""

from __future__ import annotations

import contextlib
import ctypes
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import llama_cpp
import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.intc]

N_MOST = 32  # as llama.cpp's server
BYTES_MOST = 512 * 2**20
N_ALWAYS = 2  # the newest: where the last turn ended, and where the prompt did. They stay, however large they are
STEP = 2048  # tokens between those inside of a long prompt
# Tokens at the end of a prompt that end the message and ask for an answer, 3 to 10 in the templates of today. They are
# others once there is an answer ("<think>"), or where another question follows a document
N_REQUEST = 16

_PARTIAL = llama_cpp.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY


class _Checkpoint:
    """The state behind some tokens, which are all that had been read: in a file without a name, else in memory."""

    def __init__(self, tokens: Tokens, state: memoryview, folder: Path | None) -> None:
        self.tokens = tokens
        self.n_bytes = len(state)
        self.file: IO[bytes] | None = None
        self.state = b""
        try:
            if folder is not None:
                self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
                self.file.write(state)
                self.file.flush()
                return
        except OSError:  # the disk is full
            self._close()
        self.state = bytes(state)

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    def begins(self, read: Tokens) -> bool:
        return np.array_equal(self.tokens, read[: self.n_tokens])

    def read(self) -> ctypes.Array[ctypes.c_uint8]:
        """
        Raises:
            OSError: the file cannot be read any more.
        """
        data = (ctypes.c_uint8 * self.n_bytes)()
        if self.file is None:
            memoryview(data).cast("B")[:] = self.state
        else:
            self.file.seek(0)
            if self.file.readinto(data) != self.n_bytes:  # type: ignore[attr-defined]
                raise OSError("the file is shorter than it was")
        return data

    def _close(self) -> None:
        if self.file is not None:
            with contextlib.suppress(OSError):  # it may try to write once more
                self.file.close()
            self.file = None

    __del__ = _close


class Checkpoints:
    """Those of one sequence of a llama_context, and of other texts that it held before.

    Args:
        ctx: a llama_context of llama_cpp.
        seq_id: the sequence.
        swa_full: layers with a window have room for the whole context, as the context was made.

    Attributes:
        is_hybrid: there are recurrent layers.
        folder: of files for them; None: they are in memory.
    """

    def __init__(self, ctx: Any, seq_id: int, *, swa_full: bool) -> None:
        model = llama_cpp.llama_get_model(ctx)
        self._ctx = ctx
        self._seq_id = seq_id
        self.folder: Path | None = None
        self.is_hybrid = bool(llama_cpp.llama_model_is_hybrid(model))
        self._n_swa = 0 if swa_full else int(llama_cpp.llama_model_n_swa(model))
        self._all: list[_Checkpoint] = []  # the one that was made or used last is the last one

    @property
    def are_needed(self) -> bool:
        """Whether there are layers whose cache cannot be cut at any position. A vocabulary alone has no layers."""
        return bool(llama_cpp.llama_get_memory(self._ctx)) and (self.is_hybrid or self._n_swa > 0)

    @property
    def n_bytes(self) -> int:
        return sum(checkpoint.n_bytes for checkpoint in self._all)

    @property
    def n_bytes_in_memory(self) -> int:
        return sum(len(checkpoint.state) for checkpoint in self._all)

    def can_cut(self, n_tokens: int) -> bool:
        """Whether the cache of all layers can be cut behind the first n_tokens as it is."""
        if n_tokens == 0:
            return True
        memory = llama_cpp.llama_get_memory(self._ctx)
        if self.is_hybrid:
            return bool(llama_cpp.llama_memory_seq_pos_max(memory, self._seq_id) + 1 == n_tokens)
        first = llama_cpp.llama_memory_seq_pos_min(memory, self._seq_id)  # of the layers with a window
        return bool(0 <= first <= max(0, n_tokens - self._n_swa))

    def nearest(self, read: Tokens, n_tokens: int) -> int:
        """The last position, n_tokens or before, where the sequence can be cut, if need be with a checkpoint.

        Args:
            read: the tokens of the sequence.
        """
        if self.can_cut(n_tokens):
            return n_tokens
        found = self._of(read[:n_tokens])
        return found[-1].n_tokens if found else 0

    def load(self, read: Tokens) -> bool:
        """Have these layers hold what they did behind these tokens. False: there is no such checkpoint (any more)."""
        for checkpoint in self._of(read)[-1:]:
            if checkpoint.n_tokens == len(read):
                self._use(checkpoint)
                try:
                    data = checkpoint.read()
                except OSError:
                    return False
                n_read = llama_cpp.llama_state_seq_set_data_ext(self._ctx, data, len(data), self._seq_id, _PARTIAL)
                return int(n_read) == len(data)
        return False

    def put(self, read: Tokens, state: memoryview) -> None:
        """... of another process."""
        self._all = [*self._all, _Checkpoint(read.copy(), state, self.folder)]
        self._trim(read)

    def newest(self, read: Tokens) -> Iterator[tuple[int, memoryview]]:
        """The last ones of this text: the number of tokens before, and the state."""
        for checkpoint in self._of(read)[-N_ALWAYS:]:
            with contextlib.suppress(OSError):
                yield checkpoint.n_tokens, memoryview(checkpoint.read()).cast("B")

    def take(self, read: Tokens) -> None:
        """Keep what these layers hold now, behind these tokens, which are all of the sequence."""
        memory = llama_cpp.llama_get_memory(self._ctx)
        if not len(read) or llama_cpp.llama_memory_seq_pos_max(memory, self._seq_id) + 1 != len(read):
            return  # it holds more than these, or nothing
        own = self._of(read)
        if own and own[-1].n_tokens == len(read):  # loaded a moment ago
            self._use(own[-1])
            return
        size = llama_cpp.llama_state_seq_get_size_ext(self._ctx, self._seq_id, _PARTIAL)
        data = (ctypes.c_uint8 * size)()
        n_written = llama_cpp.llama_state_seq_get_data_ext(self._ctx, data, size, self._seq_id, _PARTIAL)
        if n_written:
            self.put(read, memoryview(data).cast("B")[:n_written])

    def forget_read_again(self, read: Tokens, n_before: int) -> None:
        """The tokens behind the first n_before were read now: a checkpoint there is of another time that they were."""
        if any(n_before < checkpoint.n_tokens <= len(read) for checkpoint in self._all):
            old = [checkpoint for checkpoint in self._of(read) if checkpoint.n_tokens > n_before]
            self._all = [checkpoint for checkpoint in self._all if checkpoint not in old]

    def _of(self, read: Tokens) -> list[_Checkpoint]:
        """Those of a text that begins so, in the order of their positions."""
        found = [each for each in self._all if each.n_tokens <= len(read) and each.begins(read)]
        return sorted(found, key=lambda checkpoint: checkpoint.n_tokens)

    def _use(self, checkpoint: _Checkpoint) -> None:
        self._all = [*(each for each in self._all if each is not checkpoint), checkpoint]

    def _trim(self, read: Tokens) -> None:
        """Those of other texts go first, the oldest one before the others. Of this one go those whose neighbours are
        nearest to each other for their distance from the end: the last turns stay close to each other."""
        while len(self._all) > N_MOST or (len(self._all) > N_ALWAYS and self.n_bytes > BYTES_MOST):
            own = self._of(read)
            others = [checkpoint for checkpoint in self._all if checkpoint not in own]
            at = [0, *(checkpoint.n_tokens for checkpoint in own)]
            gaps = [(at[i + 2] - at[i]) / (len(read) - at[i]) for i in range(len(own) - N_ALWAYS)]
            gone = others[0] if others else own[gaps.index(min(gaps))]
            self._all = [checkpoint for checkpoint in self._all if checkpoint is not gone]
