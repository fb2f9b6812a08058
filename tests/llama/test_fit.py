"""What a model will need of memory, asked before it is loaded, is what it then takes; and what fits is chosen by it."""

from __future__ import annotations

import ctypes
import gc
import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from far_device import compile_device, plugged_in
from support import CACHE_TYPES, ctx_of, load
from tiny import N_VOCAB, random_tokens

from refreekv_cpp import PolicyError, UnsupportedModelError, _machine, _process, fit, native
from refreekv_cpp.errors import CacheMemoryError
from refreekv_cpp.fit import Device, Needs, search, unallocated
from refreekv_cpp.fit import needs as accounting
from refreekv_cpp.policies import Full, ReFreeKV, Streaming

Tiny = Callable[[str], Path]
Measured = tuple[int, int, int]

QUANTISED = {"type_k": CACHE_TYPES["q8_0"], "type_v": CACHE_TYPES["q4_0"], "flash_attn": True}
WINDOWED = "gemma2 (soft-cap, sliding window)"
HYBRIDS = ["jamba (hybrid)", "lfm2 (hybrid)"]
SHARED = "gemma4 (E2B: layers that share K and V)"
MLA = "deepseek2 (MLA, experts)"
SINKS = "gpt-oss (attention sinks, sliding window, experts)"
HEADS = "qwen35 (hybrid, with a draft head)"
MODELS = ["gqa", "mha", WINDOWED, *HYBRIDS, SHARED, MLA]

MIB = 2**20


def foreseen(path: Path, n_ctx: int, n_tokens: int | None = None, **options: Any) -> Needs:
    with fit.opened(path, n_threads=1, n_threads_batch=1, **options) as llm:
        return fit.measure(llm, n_ctx, n_tokens)


def in_sum(needs: Needs) -> Measured:
    """Weights, context and compute buffers. (Weights in a mapped file that are repacked, too, are there twice.)"""
    return needs.host.weights + needs.host.repacked, needs.context, needs.compute


def allocated(llm: llama_cpp.Llama) -> Measured:
    infos = [info for _, info in native.buffers(ctx_of(llm))]
    fields = ("bytes_model", "bytes_context", "bytes_compute")
    return tuple(sum(getattr(info, field) for info in infos) for field in fields)  # type: ignore[return-value]


@pytest.mark.parametrize("n_ctx", [512, 2048])
@pytest.mark.parametrize("name", MODELS)
def test_full_is_what_is_allocated(tiny: Tiny, name: str, n_ctx: int) -> None:
    needs = foreseen(tiny(name), n_ctx, kv_policy="full")
    assert in_sum(needs) == allocated(load(tiny(name), "full", n_ctx=n_ctx))
    assert (needs.n_ctx, needs.n_tokens) == (n_ctx, n_ctx)


@pytest.mark.parametrize(
    "options",
    [
        QUANTISED,
        {"flash_attn": True},
        {"n_ubatch": 64},
        {"n_batch": 1024, "n_ubatch": 1024},
        {"swa_full": False},
        {"offload_kqv": False},
        {"logits_all": True},
        {"use_mmap": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["gqa64", WINDOWED])
def test_options_count(tiny: Tiny, name: str, options: dict[str, Any]) -> None:
    if "type_k" in options and name != "gqa64":
        pytest.skip("heads of 16 numbers are no whole blocks")
    needs = foreseen(tiny(name), 2048, kv_policy="full", **options)
    assert in_sum(needs) == allocated(load(tiny(name), "full", **options))


@pytest.mark.parametrize("options", [{}, QUANTISED], ids=str)
@pytest.mark.parametrize("name", ["gqa64", WINDOWED, *HYBRIDS, SHARED, MLA])
def test_a_policy_holds_the_whole_prompt_while_it_is_read(tiny: Tiny, name: str, options: dict[str, Any]) -> None:
    if options and name != "gqa64":
        pytest.skip("heads of 16 numbers are no whole blocks")
    policy = ReFreeKV(n_min=0, theta=0)
    needs = foreseen(tiny(name), 2048, kv_policy=policy, **options)
    llm = load(tiny(name), policy, **options)
    llm.eval(random_tokens(2048))
    assert in_sum(needs) == allocated(llm)
    stats = native.stats(ctx_of(llm))  # as it is, where kv_stats may prune
    assert needs.prunable == stats.bytes == stats.bytes_full
    assert needs.context - needs.prunable == stats.bytes_ring + stats.bytes_other


@pytest.mark.parametrize(
    ("name", "per_token"),
    [(SHARED, 2 * 2 * 2 * 16 * 2), (MLA, 4 * 48 * 2), (SINKS, 2 * 2 * 2 * 16 * 2), (HEADS, 2 * 2 * 2 * 16 * 2)],
)
def test_cells_that_layers_share_and_values_within_keys_count_once(tiny: Tiny, name: str, per_token: int) -> None:
    """Of MLA four layers with one latent row, which is K and V; of the others two layers with K and V of two heads."""
    needs = foreseen(tiny(name), 4096, kv_policy="refreekv")
    assert needs.whole == needs.whole_f16 == 4096 * per_token
    llm = load(tiny(name), "refreekv", codes=True, n_ctx=4096)
    llm.eval(random_tokens(4000))
    assert llm.prune_kv() > 0
    _, most = needs.kept() or (0, 0)
    assert llm.kv_stats.bytes + llm.kv_stats.bytes_codes <= 1.1 * needs.settled(most).prunable


def test_a_shorter_prompt_needs_less_of_a_cache_that_grows(tiny: Tiny) -> None:
    whole, part = (foreseen(tiny("gqa"), 4096, n, kv_policy="refreekv", flash_attn=False) for n in (None, 1000))
    assert part.prunable == whole.prunable // 4
    assert whole.context - part.context == whole.prunable - part.prunable
    assert part.compute == whole.compute  # they are reserved for all of it
    assert part.host.compute_used < whole.host.compute_used
    full = foreseen(tiny("gqa"), 4096, 1000, kv_policy="full")
    assert full.prunable == whole.prunable


def test_a_memory_limit_counts(tiny: Tiny) -> None:
    whole = foreseen(tiny("gqa"), 4096, kv_policy="streaming")
    limited = foreseen(tiny("gqa"), 4096, kv_policy="streaming", kv_memory_limit=MIB)
    assert limited.prunable == MIB
    assert whole.context - limited.context == whole.prunable - MIB
    # a prompt that is pruned while it is read has evicted the rest by then
    assert (whole.cold_bytes, limited.cold_bytes) == (0, whole.prunable - MIB)
    assert whole.settled(0.4).cold_bytes == limited.settled(0.4).cold_bytes


def test_what_is_reserved_for_the_logits_of_a_batch_is_not_used(tiny: Tiny) -> None:
    needs = foreseen(tiny("gqa"), 512, kv_policy="full")
    assert needs.host.compute_used < needs.host.compute
    every = foreseen(tiny("gqa"), 512, kv_policy="full", logits_all=True)
    assert every.host.compute_used == every.host.compute == needs.host.compute


def test_what_stays_is_known_of_a_fixed_budget_and_measured_of_the_default(tiny: Tiny) -> None:
    needs = foreseen(tiny("gqa"), 4096, kv_policy=Streaming(budget=1024))
    assert needs.kept() == (0.25, 0.25)
    settled = needs.settled(0.25)
    assert settled.prunable == needs.prunable // 4
    assert settled.cold_bytes == settled.evicted == needs.prunable * 3 // 4
    assert replace(settled, cold_limit=1000).cold_bytes == 1000
    assert replace(needs, policy=Full(), evicts=False).kept() == (1.0, 1.0)
    assert replace(needs, policy=ReFreeKV.paper()).kept() is None
    assert replace(needs, policy=ReFreeKV(n_sink=8)).kept() is None
    low, high = replace(needs, policy=ReFreeKV()).kept() or (0, 0)
    assert 0 < low < high < 1
    drop = foreseen(tiny("gqa"), 4096, kv_policy="streaming", kv_evicted="drop")
    assert drop.settled(0.25).cold_bytes == 0


@pytest.mark.parametrize("options", [{}, {"kv_evicted": "drop"}, QUANTISED], ids=["f16", "drop", "q8_0"])
def test_codes_of_what_is_evicted_stay(tiny: Tiny, options: dict[str, Any]) -> None:
    needs = foreseen(tiny("gqa64"), 4096, 4000, kv_policy="refreekv", **options)
    assert needs.codes_share
    llm = load(tiny("gqa64"), "refreekv", codes=True, n_ctx=4096, **options)
    llm.eval(random_tokens(4000))
    llm.prune_kv()
    stats = llm.kv_stats
    assert stats.bytes_codes > 0
    low, high = needs.kept() or (0, 0)
    assert low <= stats.budget <= high
    assert needs.settled(stats.budget).prunable == pytest.approx(stats.bytes_kept + stats.bytes_codes, rel=0.05)


def test_cold_rows_that_are_rounded_need_less(tiny: Tiny) -> None:
    plain, rounded = (foreseen(tiny("gqa64"), 1024, kv_policy="streaming", **o) for o in ({}, {"kv_cold_type": "q8_0"}))
    assert rounded.settled(0.5).cold_bytes / plain.settled(0.5).cold_bytes == pytest.approx(34 / 64)
    quantised = foreseen(tiny("gqa64"), 1024, kv_policy="streaming", kv_cold_type="q8_0", **QUANTISED)
    assert quantised.settled(0.5).cold_bytes == quantised.prunable // 2


def test_nothing_is_allocated(tiny: Tiny) -> None:
    with fit.opened(tiny("gqa"), kv_policy="full") as llm:
        before = _process.rss()
        needs = fit.measure(llm, 2**20)
        assert needs.prunable > 500 * MIB
        assert _process.rss() - before < needs.prunable / 4  # of llama.cpp's table of cells


def test_what_llama_cpp_logs_goes_where_it_went(tiny: Tiny, capfd: pytest.CaptureFixture[str]) -> None:
    foreseen(tiny("gqa"), 512, kv_policy="full")
    assert capfd.readouterr() == ("", "")
    load(tiny("gqa"), "full", verbose=True)
    assert "llama_context" in capfd.readouterr().err


def test_two_threads_that_ask_at_once_leave_llama_cpps_log_as_it_was() -> None:
    # once a callback was left that had been freed, and the next message ended the process
    def callback() -> int | None:
        now, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
        llama_cpp.llama_log_get(ctypes.byref(now), ctypes.byref(data))
        return ctypes.cast(now, ctypes.c_void_p).value

    def ask() -> None:
        with unallocated.quiet():
            begun.set()
            end.wait(60)

    begun, end, before = threading.Event(), threading.Event(), callback()
    other = threading.Thread(target=ask)
    with unallocated.quiet():
        other.start()
        assert not begun.wait(0.2)
    end.set()
    other.join(60)
    assert begun.is_set()
    assert callback() == before


@pytest.mark.device
@pytest.mark.parametrize("policy", ["full", "streaming"])
def test_a_device_gets_its_part(tiny: Tiny, tmp_path: Path, policy: str) -> None:
    """A device whose 4 GiB of memory the host cannot see (far_device.cpp)."""
    with plugged_in(compile_device(tmp_path)):
        needs = foreseen(tiny("gqa"), 2048, kv_policy=policy, n_gpu_layers=3)
        device, host = needs.devices
        assert (device.free, device.is_host, host.is_host) == (4 * 2**30, False, True)
        llm = load(tiny("gqa"), policy, n_gpu_layers=3)
        llm.eval(random_tokens(2048))
        taken, of_host = native.devices(ctx_of(llm))
        assert device.weights == taken.bytes_model > 0
        assert (device.context, device.compute) == (taken.bytes_context, taken.bytes_compute)
        assert (host.context, host.compute) == (of_host.bytes_context, of_host.bytes_compute)
        llm.close()
        assert fit.gpu_layers(tiny("gqa")) == -1
        assert fit.n_ctx(tiny("gqa")) == 4096
        gc.collect()


# errors


def test_no_such_file(tmp_path: Path) -> None:
    for function in (fit.n_ctx, fit.gpu_layers):
        with pytest.raises(FileNotFoundError, match=r"none\.gguf: no such file"):
            function(tmp_path / "none.gguf")


def test_no_gguf(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_text("not a model")
    for function in (fit.n_ctx, fit.gpu_layers):
        with pytest.raises(ValueError, match=r"model\.gguf: not a GGUF file"):
            function(path)


@pytest.fixture
def damaged(tiny_model: Path, tmp_path: Path) -> Path:
    """A GGUF whose architecture nobody knows."""
    path = tmp_path / "damaged.gguf"
    path.write_bytes(tiny_model.read_bytes().replace(b"llama", b"lumma"))
    return path


def test_a_model_that_llama_cpp_cannot_load(damaged: Path) -> None:
    with pytest.raises(ValueError, match=r"damaged\.gguf: llama\.cpp cannot load it: .*lumma"), fit.opened(damaged):
        pass


def test_a_model_that_cannot_be_loaded_has_no_context_that_fits(damaged: Path) -> None:
    with pytest.raises(ValueError, match=r"damaged\.gguf: llama\.cpp cannot load it: .*lumma"):
        fit.n_ctx(damaged)


def test_a_vocabulary_has_no_context(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="a vocabulary alone has no context"):
        fit.n_ctx(tiny("gqa"), vocab_only=True)


def test_a_wrong_option_is_an_error(tiny: Tiny) -> None:
    with pytest.raises(TypeError, match="n_btach"):
        fit.n_ctx(tiny("gqa"), n_btach=1)
    with pytest.raises(PolicyError, match="refrekv"):
        fit.n_ctx(tiny("gqa"), kv_policy="refrekv")
    with pytest.raises(UnsupportedModelError):
        fit.n_ctx(tiny("mamba (recurrent)"), kv_policy="refreekv")


# what fits


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the bytes of memory that the host has free."""

    def set_free(n_bytes: int) -> None:
        monkeypatch.setattr(accounting, "host_free", lambda: n_bytes)

    return set_free


def test_the_whole_context_where_there_is_room(tiny: Tiny, free: Callable[[int], None]) -> None:
    free(10 * 2**30)
    assert fit.n_ctx(tiny("gqa")) == 4096  # what the model was made for
    assert fit.n_ctx(tiny(WINDOWED), n_ctx=7) == 2048


@pytest.mark.parametrize("policy", ["full", "refreekv"])
def test_the_longest_context_that_fits(tiny: Tiny, free: Callable[[int], None], policy: str) -> None:
    needs = foreseen(tiny("gqa"), 2304, kv_policy=policy)
    wanted = fit.needed_bytes(needs, needs.host)
    free(wanted * 8 // 7 + 8)  # an eighth of what is free stays free
    assert fit.n_ctx(tiny("gqa"), kv_policy=policy, n_threads=1, n_threads_batch=1) == 2304
    free(wanted * 8 // 7 - 8)
    assert fit.n_ctx(tiny("gqa"), kv_policy=policy, n_threads=1, n_threads_batch=1) == 2048


@pytest.mark.parametrize("limit", [None, MIB])
def test_what_is_evicted_to_memory_needs_memory(tiny: Tiny, limit: int | None) -> None:
    options = {"kv_policy": Streaming(budget=0.25), "kv_memory_limit": limit, "flash_attn": True}
    on_disk = foreseen(tiny("gqa"), 4096, kv_cold="file", **options)
    in_memory = foreseen(tiny("gqa"), 4096, kv_cold="memory", **options)
    more = fit.needed_bytes(in_memory, in_memory.host) - fit.needed_bytes(on_disk, on_disk.host)
    assert more == in_memory.settled(0.0).cold_bytes == in_memory.whole


def test_what_is_said_to_be_needed_has_to_fit(tiny: Tiny) -> None:
    needs = foreseen(tiny("gqa"), 4096, kv_policy="full")
    base = 100 * MIB
    needed = fit.needed_bytes(needs, needs.host, base)
    assert needed == fit.process_bytes(needs, base) > base + needs.host.bytes

    def fits(free: int) -> bool:
        return fit.fits(replace(needs, devices=(replace(needs.host, free=free),)), base)

    assert fits(needed * 8 // 7 + 8)
    assert not fits(needed * 8 // 7 - 8)


def test_never_more_than_32768(tiny: Tiny, free: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    free(100 * 2**30)
    monkeypatch.setattr(llama_cpp._internals.LlamaModel, "n_ctx_train", lambda self: 131072)
    assert fit.n_ctx(tiny("gqa")) == 32768


def test_where_nothing_fits(tiny: Tiny, free: Callable[[int], None], caplog: pytest.LogCaptureFixture) -> None:
    free(1000)
    with caplog.at_level(logging.WARNING):
        assert fit.n_ctx(tiny("gqa")) == 512
    assert "not even a context of 512 tokens fits" in caplog.text


def test_a_container_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_machine, "_container", lambda: (3 * MIB, 2 * MIB))
    assert (fit.host_total(), fit.host_free()) == (3 * MIB, 2 * MIB)
    monkeypatch.setattr(_machine, "_container", lambda: (2**60, 2**59))
    assert fit.host_free() < fit.host_total() < 2**59


def test_accounting_that_fails(tiny: Tiny, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Needs:
        raise fit.ContextError("there is no context")

    monkeypatch.setattr(search, "measure", fail)
    monkeypatch.setattr(llama_cpp, "llama_supports_gpu_offload", lambda: True)
    with caplog.at_level(logging.WARNING):
        assert fit.gpu_layers(tiny("gqa")) == 0
        assert fit.n_ctx(tiny("gqa"), n_gpu_layers=0) == 4096
    assert [record.message.rpartition(": ")[2] for record in caplog.records] == ["there is no context"] * 2


def test_a_context_that_is_too_long_to_look_at(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> None:
        raise CacheMemoryError("out of memory")

    monkeypatch.setattr(native, "devices", fail)
    with fit.opened(tiny("gqa")) as llm, pytest.raises(fit.ContextError, match=r"no context of 1024 tokens: .*scratch"):
        fit.measure(llm, 1024)


# layers on GPUs: there is none here, so a made-up machine takes the place of the accounting

GIB = 2**30
N_LAYERS = 33


class Machine:
    """Devices with so much memory, and a model whose layers take 1 GiB each, and 64 KiB for each token of context."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *free: int, compute: int = GIB) -> None:
        self.free = free
        self.compute = compute
        self.looks: list[int] = []
        monkeypatch.setattr(llama_cpp, "llama_supports_gpu_offload", lambda: True)
        monkeypatch.setattr(search, "_measured", self.measured)

    def measured(self, _: Any, n_gpu_layers: int, options: dict[str, Any]) -> Needs:
        self.looks.append(n_gpu_layers)
        n = N_LAYERS if n_gpu_layers < 0 else min(n_gpu_layers, N_LAYERS)
        parts = [n // len(self.free) + (i < n % len(self.free)) for i in range(len(self.free))]
        devices = [
            device(free, weights=part * GIB, context=part * options.get("n_ctx", 8192) * 65536, compute=self.compute)
            for free, part in zip(self.free, parts, strict=True)
        ]
        return Needs(
            devices=(*devices, replace(device(64 * GIB), is_host=True, name="CPU")),
            n_ctx=8192,
            n_tokens=8192,
            n_ctx_train=8192,
            n_layers=N_LAYERS,
            n_vocab=N_VOCAB,
            policy=Full(),
            evicts=False,
            prunable=0,
            whole=0,
            whole_f16=0,
            evicted=0,
            codes_share=0.0,
            cold="",
            cold_dir=None,
            cold_share=1.0,
            cold_limit=None,
        )


def device(free: int, *, weights: int = 0, context: int = 0, compute: int = 0) -> Device:
    return Device("GPU0", "a GPU", False, free, free, weights, 0, context, compute, compute, 0)


def test_no_gpu_no_layers(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 80 * GIB)
    monkeypatch.setattr(llama_cpp, "llama_supports_gpu_offload", lambda: False)
    assert fit.gpu_layers(tiny("gqa")) == 0
    assert machine.looks == []


def test_all_layers(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 80 * GIB)
    assert fit.gpu_layers(tiny("gqa"), n_gpu_layers=3) == -1
    assert machine.looks == [-1]


@pytest.mark.parametrize("gibibytes", range(1, 52))
def test_as_many_layers_as_fit(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, gibibytes: int) -> None:
    machine = Machine(monkeypatch, gibibytes * GIB)
    n = fit.gpu_layers(tiny("gqa"))
    # a layer takes 1.5 GiB, the compute buffers 1, and up to 1 stays free
    margin = min(1.0, gibibytes / 8)
    assert n == (-1 if gibibytes - margin - 1 >= 1.5 * N_LAYERS else max(0, int((gibibytes - margin - 1) / 1.5)))
    assert len(machine.looks) <= 8


def test_a_shorter_context_leaves_room_for_more(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch, 24 * GIB)
    assert fit.gpu_layers(tiny("gqa"), n_ctx=4096) > fit.gpu_layers(tiny("gqa"), n_ctx=16384) > 0


def test_each_of_several_gpus_has_to_hold_its_part(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch, 14 * GIB, 8 * GIB)
    assert fit.gpu_layers(tiny("gqa")) == 9  # 5 of them on the first one, and 4 on the other, which are 6 GiB of 8


def test_a_gpu_that_does_not_say_what_it_has(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch, 0)
    assert fit.gpu_layers(tiny("gqa")) == 0
