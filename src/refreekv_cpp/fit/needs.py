"""What a model and its context need, by llama.cpp's own accounting."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import llama_cpp

from refreekv_cpp import _upstream, native
from refreekv_cpp._binding import ffi  # written by the build from native/refreekv.h
from refreekv_cpp._cache_types import CACHE_TYPES
from refreekv_cpp._machine import host_free, host_total
from refreekv_cpp.errors import CacheMemoryError, ContextError
from refreekv_cpp.fit.unallocated import Unallocated, context
from refreekv_cpp.policies import Policy, ReFreeKV

CONTEXT_STEP = 256
"""llama.cpp rounds contexts up to this, in tokens."""

# the shares of the rows of K and V that the default policy kept of long prompts without codes (docs/results/memory.md)
_KEPT_BY_DEFAULT = (0.39, 0.66)
# ... and with codes the cells that stay: 4 sinks, the last 64, and up to 63 more, since a block of codes has 64 cells
_HOT_CELLS = (68, 131)

# what a first prompt takes beside all that is counted: code of kernels that is read now, graphs, stacks, logits
_FIRST_PROMPT_BYTES = 4 * 2**20
_FIRST_PROMPT_BYTES_PER_WORD = 24  # of the vocabulary


@dataclass(frozen=True)
class Device:
    """What a model and its context take of the memory of one device, in bytes.

    Attributes:
        name: ggml's: "CUDA0", "CPU".
        description: what the machine calls it.
        is_host: it is the host's memory.
        free, total: as the device has it now; 0 and 0 where it does not say.
        weights: on a device. Of the host's, those that are used from the file's pages (or were read from there).
        repacked: weights that the CPU's kernels want in another order than the file has, as copies.
        context: the full cache of n_ctx, and what else belongs to it: windows, recurrent states, query rings.
        compute: compute buffers, as reserved.
        compute_used: what of them is ever written to, when logits are wanted of single tokens.
        work: scratch memory of the CPU's threads beside them.
    """

    name: str
    description: str
    is_host: bool
    free: int
    total: int
    weights: int
    repacked: int
    context: int
    compute: int
    compute_used: int
    work: int

    @property
    def bytes(self) -> int:
        """All of it. On the host, memory that is reserved and never written to takes none."""
        compute = self.compute_used + self.work if self.is_host else self.compute
        return self.weights + self.repacked + self.context + compute


@dataclass(frozen=True)
class Needs:
    """What a `Llama` with some options needs, with its cache full.

    Attributes:
        devices: those of the model, then the host.
        n_ctx: tokens of context that this is for.
        n_tokens: of the longest prompt that is read into it.
        n_ctx_train: tokens of context that the model was made for.
        n_layers: of the model, with the output layer, as n_gpu_layers counts them.
        n_vocab: words of the model's vocabulary.
        policy: of the cache.
        evicts: the policy evicts.
        prunable: bytes of K and V that grow with the prompt and that a policy works on, within `devices[...].context`.
        whole: what those would be if nothing were evicted.
        whole_f16: what that would be in f16.
        evicted: bytes of the rows of K and V that are evicted, in the cache's type.
        codes_share: bytes of the codes by which decoding goes on attending to evicted rows, over those that the rows
            have in f16; 0: it attends to none of them.
        cold: where evicted rows go, "memory", "file" or "" (nowhere).
        cold_dir: the folder of the file.
        cold_share: bytes of an evicted row in the cold store, over those that it has in the cache.
        cold_limit: of the bytes there; None: none.
    """

    devices: tuple[Device, ...]
    n_ctx: int
    n_tokens: int
    n_ctx_train: int
    n_layers: int
    n_vocab: int
    policy: Policy
    evicts: bool
    prunable: int
    whole: int
    whole_f16: int
    evicted: int
    codes_share: float
    cold: str
    cold_dir: Path | None
    cold_share: float
    cold_limit: int | None

    @property
    def host(self) -> Device:
        return self.devices[-1]

    @property
    def context(self) -> int:
        """Bytes, on all devices."""
        return sum(device.context for device in self.devices)

    @property
    def compute(self) -> int:
        """Bytes of compute buffers as reserved, on all devices."""
        return sum(device.compute for device in self.devices)

    def with_cache(self, prunable: int) -> Needs:
        """The same with so many bytes of K and V in the part of the cache that a policy works on."""
        less, context = self.prunable - prunable, max(self.context, 1)
        devices = (replace(d, context=d.context - round(less * d.context / context)) for d in self.devices)
        return replace(self, devices=tuple(devices), prunable=prunable)

    def kept(self) -> tuple[float, float] | None:
        """The share of the rows of K and V that stays after the longest prompt, from ... to; None: it is not known.

        A policy with a fixed budget says what it keeps, and so does the default where it has codes. Without codes the
        default keeps what the text needs: these are the shares that were measured.
        """
        if not self.evicts or self.n_tokens < getattr(self.policy, "n_min", 0):
            return 1.0, 1.0
        budget = getattr(self.policy, "budget", None)
        if budget is not None:
            share = min(budget if budget <= 1 else budget / self.n_tokens, 1.0)
            return share, share
        if not isinstance(self.policy, ReFreeKV) or self.policy != ReFreeKV(theta=self.policy.theta):
            return None
        if self.codes_share:
            least, most = (min(n / self.n_tokens, 1.0) for n in _HOT_CELLS)
            return least, most
        return _KEPT_BY_DEFAULT

    def settled(self, share: float) -> Needs:
        """After a pruning of the longest prompt that left this share of the rows of K and V."""
        kept = min(round(share * self.whole), self.prunable)
        n_bytes = self.codes_share * (1 - share) * self.whole_f16
        return replace(self.with_cache(round(kept + n_bytes)), evicted=self.whole - kept)

    @property
    def cold_bytes(self) -> int:
        """Bytes in the cold store."""
        if not self.cold:
            return 0
        n_bytes = round(self.evicted * self.cold_share)
        return n_bytes if self.cold_limit is None else min(n_bytes, self.cold_limit)


def measure(llm: Unallocated, n_ctx: int, n_tokens: int | None = None) -> Needs:
    """What a context of n_ctx tokens needs.

    Args:
        n_ctx: 0: as many as the model was made for.
        n_tokens: of the longest prompt that is read into it. Default: n_ctx.

    Raises:
        ContextError: the model has no such context, or the machine has no room to look at one.
    """
    n_ctx_train = _upstream.n_ctx_train(llm)
    n_ctx = n_ctx or n_ctx_train
    with context(llm, n_ctx) as ctx:
        try:
            devices = [_device(info) for info in native.devices(ctx)]
        except CacheMemoryError as error:  # ggml allocates this scratch memory to say how large it is
            why = "it needs more scratch memory than the machine has"
            raise ContextError(f"{llm.model_path}: there is no context of {n_ctx} tokens: {why}") from error
        stats, layers = native.figures(ctx)
        n_cells = int(llama_cpp.llama_n_ctx(ctx))
        row_bytes = sum(layer.row_bytes for layer in layers)
        row_numbers = sum(layer.row_numbers for layer in layers)
    needs = Needs(
        devices=_with_weights(llm, devices),
        n_ctx=n_cells,
        n_tokens=n_cells if n_tokens is None else min(n_tokens, n_cells),
        n_ctx_train=n_ctx_train,
        n_layers=llama_cpp.llama_model_n_layer(llm.model) + 1,
        n_vocab=llm.n_vocab(),
        policy=llm.kv_policy,
        evicts=llm._kv.evicts,
        prunable=row_bytes * n_cells,
        whole=row_bytes * n_cells,
        whole_f16=row_numbers * 2 * n_cells,
        evicted=0,
        codes_share=stats.codes_share,
        cold={native.enum_value("COLD_MEMORY"): "memory", native.enum_value("COLD_FILE"): "file"}.get(stats.cold, ""),
        cold_dir=llm._kv.cold_folder(),
        cold_share=_cold_share(llm),
        cold_limit=llm.kv_cold_limit,
    )
    if needs.n_tokens < needs.n_ctx:
        needs = _with_prompt(llm, needs)
    if llm.kv_memory_limit is not None:
        needs = needs.with_cache(min(needs.prunable, llm.kv_memory_limit))
    return replace(needs, evicted=needs.whole - min(needs.prunable, needs.whole))


def _device(info: Any) -> Device:
    return Device(
        name=ffi.string(info.name).decode(),
        description=ffi.string(info.description).decode(errors="replace"),
        is_host=info.is_host,
        free=host_free() if info.is_host else info.bytes_free,
        total=host_total() if info.is_host else info.bytes_total,
        weights=info.bytes_model - info.bytes_repacked,
        repacked=info.bytes_repacked,
        context=info.bytes_context,
        compute=info.bytes_compute,
        compute_used=info.bytes_compute_used,
        work=info.bytes_work,
    )


def _with_weights(llm: Unallocated, devices: list[Device]) -> tuple[Device, ...]:
    """A file that is mapped is in memory as it is, with those weights, too, that are there as a repacked copy."""
    *others, host = devices
    if (adapter := llm.asked.get("lora_path")) is not None:
        host = replace(host, weights=host.weights + os.path.getsize(adapter))
    elif llm.asked.get("use_mmap", True):
        in_file = llama_cpp.llama_model_size(llm.model) - sum(device.weights for device in others)
        host = replace(host, weights=max(host.weights, min(in_file, host.weights + host.repacked)))
    if _upstream.keeps_all_logits(llm):
        host = replace(host, compute_used=host.compute)
    return (*others, host)


def _with_prompt(llm: Unallocated, needs: Needs) -> Needs:
    """Graphs are no larger than the prompt needs them, and neither is a cache that grows with it."""
    n_tokens = needs.n_tokens
    n_ubatch = llm.context_params.n_ubatch
    with context(llm, max(n_tokens // n_ubatch, 1) * n_ubatch) as ctx:  # the last whole batch has the largest graph
        graphs = [_device(info) for info in native.devices(ctx)]
    if _upstream.keeps_all_logits(llm):
        graphs = [replace(device, compute_used=device.compute) for device in graphs]
    pairs = zip(needs.devices, graphs, strict=True)
    devices = (replace(device, compute_used=graph.compute_used, work=graph.work) for device, graph in pairs)
    n_cells = -(-n_tokens // CONTEXT_STEP) * CONTEXT_STEP
    whole, whole_f16 = (n_bytes * n_cells // needs.n_ctx for n_bytes in (needs.whole, needs.whole_f16))
    needs = replace(needs, devices=tuple(devices), whole=whole, whole_f16=whole_f16)
    return needs.with_cache(whole) if llm.kv_elastic else needs


def _cold_share(llm: Unallocated) -> float:
    """Of cold rows that are rounded to q8_0: 34 bytes for 32 numbers. Those of a quantised cache stay as they are."""
    if llm.kv_cold_type is None:
        return 1.0
    sizes = {CACHE_TYPES["f32"]: 4.0, CACHE_TYPES["f16"]: 2.0, CACHE_TYPES["bf16"]: 2.0}
    types = llm.context_params.type_k, llm.context_params.type_v
    here = [sizes.get(kind) for kind in types]
    return sum(1.0 if size is None else 34 / 32 / size for size in here) / len(here)


def process_bytes(needs: Needs, base: int) -> int:
    """What the process has in memory (RSS) once its longest prompt has been read. `base`: what `base_bytes` says."""
    cold = needs.cold_bytes if needs.cold == "memory" else 0
    return base + needs.host.bytes + cold + _FIRST_PROMPT_BYTES + _FIRST_PROMPT_BYTES_PER_WORD * needs.n_vocab
