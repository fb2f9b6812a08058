"""What the tests of behaviour do all the time."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from refreekv_cpp import Llama, Policy, ReFreeKV, native
from refreekv_cpp.policies import as_policy

HELPERS = Path(__file__).parent

# ggml's numbers of the types a cache can have
CACHE_TYPES = {"f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q5_1": 7, "q4_0": 2, "iq4_nl": 20}
F32, F16, Q8_0 = CACHE_TYPES["f32"], CACHE_TYPES["f16"], CACHE_TYPES["q8_0"]


def load(path: Path, policy: str | Policy, *, kind: type[Llama] = Llama, codes: bool = False, **options: Any) -> Llama:
    """A Llama on one thread: with models this small more of them only wait for each other.

    codes: ReFreeKV goes on attending to what it evicts.
    """
    defaults = {"n_ctx": 2048, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    policy = as_policy(policy) if codes else without_codes(policy)
    return kind(str(path), kv_policy=policy, **{**defaults, **options})


def without_codes(policy: str | Policy) -> Policy:
    """The policy; if it is ReFreeKV, what it evicts is gone."""
    policy = as_policy(policy)
    return replace(policy, theta=0.0) if isinstance(policy, ReFreeKV) else policy


def ctx_of(llm: llama_cpp.Llama) -> Any:
    return llm._ctx.ctx


def logits(llm: llama_cpp.Llama) -> npt.NDArray[np.float32]:
    """After the last token: [n_vocab]."""
    pointer = llama_cpp.llama_get_logits_ith(ctx_of(llm), -1)
    return np.ctypeslib.as_array(pointer, shape=(llm.n_vocab(),)).copy()


def feed(llm: llama_cpp.Llama, tokens: Iterable[int]) -> npt.NDArray[np.float32]:
    """The logits after each of these tokens, read one by one: [n_tokens, n_vocab]."""
    res = []
    for token in tokens:
        llm.eval([token])
        res.append(logits(llm))
    return np.array(res)


def generate(llm: Llama, tokens: list[int], n: int = 6, **options: Any) -> list[int]:
    """The first tokens of a greedy generation."""
    generator = llm.generate(tokens, temp=0.0, **options)
    res = list(itertools.islice(generator, n))
    generator.close()
    return res


def kept(llm: Llama, seq_id: int = 0) -> list[list[int]]:
    """The positions that each layer holds."""
    n_layer = native.stats(ctx_of(llm)).n_layer
    return [native.kept(ctx_of(llm), seq_id, layer).tolist() for layer in range(n_layer)]


class Sequences:
    """A context with several sequences, which llama-cpp-python's Llama does not have.

    Args:
        codes: ReFreeKV goes on attending to what it evicts.
        cold: fields of refreekv_params that say where evicted rows go, and theta.
        fields: of llama_context_params.
    """

    def __init__(
        self, path: Path, policy: Policy, *, codes: bool = False, cold: dict[str, Any] | None = None, **fields: Any
    ) -> None:
        params = llama_cpp.llama_context_default_params()
        defaults = {
            "n_ctx": 4096,
            "n_batch": 512,
            "n_seq_max": 2,
            "kv_unified": True,
            "n_threads": 1,
            "n_threads_batch": 1,
        }
        defaults |= {"type_k": F32, "type_v": F32, "flash_attn_type": llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED}
        for field, value in {**defaults, **fields}.items():
            setattr(params, field, value)
        llama_cpp._logger.set_verbose(False)
        self.model = llama_cpp._internals.LlamaModel(
            path_model=str(path), params=llama_cpp.llama_model_default_params(), verbose=False
        )
        options = (policy if codes else without_codes(policy)).native_options()
        with native.next_context(options and native.make_params(**{**options, **(cold or {})})):
            self.context = llama_cpp._internals.LlamaContext(model=self.model, params=params, verbose=False)
        self.ctx = self.context.ctx
        self.memory = llama_cpp.llama_get_memory(self.ctx)
        self.n_batch = params.n_batch

    def close(self) -> None:
        """Free the context, and then the model, which the context needs until then."""
        self.context.close()
        self.model.close()

    def n_tokens(self, seq_id: int) -> int:
        """Positions so far."""
        return llama_cpp.llama_memory_seq_pos_max(self.memory, seq_id) + 1

    def read(self, seq_id: int, tokens: list[int]) -> npt.NDArray[np.float32]:
        """Logits after the last token."""
        for i in range(0, len(tokens), self.n_batch):
            res = self.read_together({seq_id: tokens[i : i + self.n_batch]})
        return res[seq_id]

    def read_together(self, tokens: dict[int, list[int]]) -> dict[int, npt.NDArray[np.float32]]:
        """One batch with the tokens of several sequences, taken from each in turn; logits after the last of each."""
        n_max = max(map(len, tokens.values()))
        entries = [(seq_id, i) for i in range(n_max) for seq_id in tokens if i < len(tokens[seq_id])]
        start = {seq_id: self.n_tokens(seq_id) for seq_id in tokens}

        batch = llama_cpp.llama_batch_init(len(entries), 0, 1)
        batch.n_tokens = len(entries)
        for at, (seq_id, i) in enumerate(entries):
            batch.token[at] = tokens[seq_id][i]
            batch.pos[at] = start[seq_id] + i
            batch.n_seq_id[at] = 1
            batch.seq_id[at][0] = seq_id
            batch.logits[at] = i == len(tokens[seq_id]) - 1
        status = llama_cpp.llama_decode(self.ctx, batch)
        llama_cpp.llama_batch_free(batch)
        assert status == 0

        n_vocab = self.model.n_vocab()
        return {
            seq_id: np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.ctx, at), shape=(n_vocab,)).copy()
            for at, (seq_id, i) in enumerate(entries)
            if i == len(tokens[seq_id]) - 1
        }

    def kept(self, seq_id: int) -> list[list[int]]:
        return [native.kept(self.ctx, seq_id, layer).tolist() for layer in range(native.stats(self.ctx).n_layer)]

    def remove(self, seq_id: int, start: int = -1, end: int = -1) -> bool:
        return llama_cpp.llama_memory_seq_rm(self.memory, seq_id, start, end)

    def copy(self, source: int, target: int, start: int = -1, end: int = -1) -> None:
        llama_cpp.llama_memory_seq_cp(self.memory, source, target, start, end)

    def save(self, seq_id: int, flags: int = 0) -> bytes:
        """The state of one sequence; flags: LLAMA_STATE_SEQ_FLAGS_*."""
        size = llama_cpp.llama_state_seq_get_size_ext(self.ctx, seq_id, flags)
        buffer = (ctypes.c_uint8 * size)()
        return bytes(buffer[: llama_cpp.llama_state_seq_get_data_ext(self.ctx, buffer, size, seq_id, flags)])

    def restore(self, state: bytes, seq_id: int, flags: int = 0) -> int:
        """Bytes read; 0: the state was refused."""
        buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        return llama_cpp.llama_state_seq_set_data_ext(self.ctx, buffer, len(state), seq_id, flags)
