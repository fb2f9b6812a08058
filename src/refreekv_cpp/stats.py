"""What the KV cache holds, in numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from refreekv_cpp import _process, native

_COLD_MEMORY, _COLD_FILE = native.enum_value("COLD_MEMORY"), native.enum_value("COLD_FILE")


@dataclass(frozen=True)
class Buffer:
    """The bytes that a model and its context have allocated in one kind of memory, by llama.cpp's own count.

    Attributes:
        name: ggml's name of the buffer type: "CPU", "CUDA0", ...
        model: the weights.
        context: the cache and what belongs to it: K, V and the query rings.
        compute: room for graphs, reserved at load.
    """

    name: str
    model: int
    context: int
    compute: int


@dataclass(frozen=True)
class ProcessMemory:
    """The memory of the whole process, and what this model and its context have allocated of it, in bytes.

    What is allocated on a GPU is not resident in the process. `KVStats.buffers` says where each part is.

    Attributes:
        rss: resident in the process now, including weights that are mapped from the file.
        rss_peak: the peak of `rss`; None if the operating system does not say.
        weights: the model's weights.
        compute: buffers for graphs.
        kv: K and V that are exact.
        codes: codes of evicted rows.
        rings: the last queries, for a policy that looks at attention.
        other: the rest of the context: layers with a sliding window, recurrent states.
        checkpoints: copies of `other` at earlier positions, if they are in memory and not in files.
    """

    rss: int
    rss_peak: int | None
    weights: int
    compute: int
    kv: int
    codes: int
    rings: int
    other: int
    checkpoints: int


@dataclass(frozen=True)
class KVStats:
    """The memory of the process and the figures of the KV cache (`Llama.kv_stats`): a snapshot of one moment.

    docs/explanation/three-tiers.md explains cells, rows, codes and the cold store. Sizes are in bytes.

    Attributes:
        memory: the memory of the whole process.
        policy: the policy's name.
        n_tokens: tokens of the conversation, exact or evicted.
        layers: the numbers of the layers whose cache a policy can work on.
        cells_kept: cells that each of these layers holds exactly.
        cells_capacity: cells that each of these layers has room for.
        budget: bytes_kept / bytes_full; 1.0 for an empty cache.
        bytes: allocated for exact K and V now.
        bytes_kept: what the exact cells need of it.
        bytes_ring: the last queries, for a policy that looks at attention; fixed when the model is loaded.
        bytes_other: the rest of the context's memory, which no policy touches: layers with a sliding window, recurrent
            states.
        bytes_checkpoints: copies of these at earlier positions, so that the sequence can go back
            (docs/explanation/conversations.md). They are in files if the cold store is a file, else in memory.
        bytes_full: what the full cache of n_tokens would need.
        bytes_freed: what all prunings so far have given back.
        bytes_read: what all prunings so far have read back from the layers' backends: scores and sums, not keys or
            values.
        bytes_bounced: keys, values and queries that came to the host because their backend lacks a kernel; 0 with the
            backends in docs/lab/backends.md.
        bytes_per_token: what one token takes in the full cache, over all layers.
        n_prunes: prunings that evicted something.
        n_limit_prunes: prunings that `kv_memory_limit` forced while a prompt was read; counted in n_prunes too.
        prune_ms: the time of all prunings together, in milliseconds.
        bytes_cold: evicted rows in the cold store.
        cold: where the cold store is: "memory", "file", or "" if there is none.
        cold_full: rows were lost because the cold store had no room.
        n_restores: how often evicted rows were brought back.
        restore_ms: the time of all restores together, in milliseconds.
        codes_share: bytes of an evicted row's codes over its bytes in f16; 0: there are no codes, and evicted cells get
            no attention.
        theta: the share of a head's attention from which on the exact row of an evicted cell is read; 0: none is read,
            as on a device.
        n_rows_read: exact rows (of one KV head each) that were read from the cold store.
        n_rows_left: rows whose codes were used because they were not in memory in time, or were too many for one token.
        bytes_codes: codes of evicted rows.
        by_codes: the share of a head's attention that relied on codes: the mean over heads, layers and tokens so far.
        error_bound: with `ReFreeKV.max_error`, the largest share of a head's attention that codes can have misplaced,
            over heads, layers and tokens so far. It is not computed without `max_error`.
        n_opened: tokens that were opened from the library (`kv_library`) instead of read.
        n_layouts: how many different masks a graph needs for these layers.
        buffers: where the memory of the model and the context is.
    """

    memory: ProcessMemory
    policy: str
    n_tokens: int
    layers: tuple[int, ...]
    cells_kept: tuple[int, ...]
    cells_capacity: tuple[int, ...]
    budget: float
    bytes: int
    bytes_kept: int
    bytes_ring: int
    bytes_other: int
    bytes_checkpoints: int
    bytes_full: int
    bytes_freed: int
    bytes_read: int
    bytes_bounced: int
    bytes_per_token: int
    n_prunes: int
    n_limit_prunes: int
    prune_ms: float
    bytes_cold: int
    cold: str
    cold_full: bool
    n_restores: int
    restore_ms: float
    codes_share: float
    theta: float
    n_rows_read: int
    n_rows_left: int
    bytes_codes: int
    by_codes: float
    error_bound: float
    n_opened: int
    n_layouts: int
    buffers: tuple[Buffer, ...]

    @classmethod
    def read(
        cls,
        policy: str,
        ctx: Any,
        *,
        n_limit_prunes: int = 0,
        n_opened: int = 0,
        bytes_checkpoints: int = 0,
        bytes_checkpoints_in_memory: int = 0,
    ) -> KVStats:
        """The figures of a llama_context, from any thread. The other arguments are what only its `Llama` knows."""
        stats, layers = native.figures(ctx)
        buffers = tuple(
            Buffer(name, info.bytes_model, info.bytes_context, info.bytes_compute) for name, info in native.buffers(ctx)
        )
        bytes_kept = sum(layer.n_kept * layer.row_bytes for layer in layers)
        return cls(
            memory=ProcessMemory(
                rss=_process.rss(),
                rss_peak=_process.rss_peak(),
                weights=sum(buffer.model for buffer in buffers),
                compute=sum(buffer.compute for buffer in buffers),
                kv=stats.bytes,
                codes=stats.bytes_codes,
                rings=stats.bytes_ring,
                other=stats.bytes_other,
                checkpoints=bytes_checkpoints_in_memory,
            ),
            policy=policy,
            n_tokens=stats.n_tokens,
            layers=tuple(layer.il for layer in layers),
            cells_kept=tuple(layer.n_kept for layer in layers),
            cells_capacity=tuple(layer.n_capacity for layer in layers),
            budget=bytes_kept / stats.bytes_full if stats.bytes_full else 1.0,
            bytes=stats.bytes,
            bytes_kept=bytes_kept,
            bytes_ring=stats.bytes_ring,
            bytes_other=stats.bytes_other,
            bytes_checkpoints=bytes_checkpoints,
            bytes_full=stats.bytes_full,
            bytes_freed=stats.bytes_freed,
            bytes_read=stats.bytes_read,
            bytes_bounced=stats.bytes_bounced,
            bytes_per_token=sum(layer.row_bytes for layer in layers),
            n_prunes=stats.n_prunes,
            n_limit_prunes=n_limit_prunes,
            prune_ms=stats.prune_us / 1000,
            bytes_cold=stats.bytes_cold,
            cold={_COLD_MEMORY: "memory", _COLD_FILE: "file"}.get(stats.cold, ""),
            cold_full=stats.cold_full,
            n_restores=stats.n_restores,
            restore_ms=stats.restore_us / 1000,
            codes_share=stats.codes_share,
            theta=stats.theta,
            n_rows_read=stats.n_rows_read,
            n_rows_left=stats.n_rows_left,
            bytes_codes=stats.bytes_codes,
            by_codes=stats.by_codes,
            error_bound=stats.error_bound,
            n_opened=n_opened,
            n_layouts=stats.n_layout,
            buffers=buffers,
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def receipt(self) -> str:
        """One line for a person, in MiB: the process, and what of it the model and the cache have."""
        memory = self.memory
        peak = "" if memory.rss_peak is None else f" (peak {_mib(memory.rss_peak)})"
        small = {name: _mib(getattr(memory, name)) for name in ("rings", "other", "checkpoints")}
        tiers = f"{_mib(memory.kv)} exact, {_mib(memory.codes)} compressed; " if memory.codes else ""
        cache = f"KV {_mib(memory.kv + memory.codes)} for {self.n_tokens} tokens"
        parts = [
            f"weights {_mib(memory.weights)}",
            f"{cache} ({self.policy}: {tiers}full size {_mib(self.bytes_full)})",
            *(f"{name} {size}" for name, size in small.items() if size != "0.0"),
            f"compute up to {_mib(memory.compute)}",
        ]
        pruned = f"; pruned {_times(self.n_prunes)} in {self.prune_ms:.0f} ms" if self.n_prunes else ""
        opened = f"; {self.n_opened} tokens from the library" if self.n_opened else ""
        return f"process {_mib(memory.rss)} MiB{peak}: {', '.join(parts)}{pruned}{opened}"

    def __repr__(self) -> str:
        kept = f"{min(self.cells_kept)}..{max(self.cells_kept)}" if self.cells_kept else "-"
        return f"<KVStats {self.receipt()}, {kept} cells in each of {len(self.layers)} layers>"


def _mib(n_bytes: int) -> str:
    mib = n_bytes / 2**20
    return f"{mib:.0f}" if mib >= 10 else f"{mib:.1f}"


def _times(n: int) -> str:
    return "once" if n == 1 else f"{n} times"
