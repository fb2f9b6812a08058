"""Our kernels for devices (REFREEKV_DEVICE_KERNELS=1), on the device of tests, which computes their nodes on the host:
what they answer beside the CPU's kernel, with the same codes and the same exact rows. No GPU has run them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from far_device import FarDevice, compile_device, plugged_in
from support import CACHE_TYPES, Sequences, ctx_of, feed, kept, load
from tiny import random_tokens
from tiny_architectures import ARCHITECTURES

from refreekv_cpp import Llama, ReFreeKV, native

pytestmark = pytest.mark.device

Tiny = Callable[[str], Path]
Floats = npt.NDArray[np.float32]

PROMPT = random_tokens(1060)
MORE = random_tokens(9, seed=1)[1:]
SHARE = 0.003  # theta

# by the CPU's kernel, whose queries and weights have 8 bits there, logits differ by up to this part of the largest one
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_device(tmp_path_factory.mktemp("device"))


@pytest.fixture
def device(library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FarDevice]:
    monkeypatch.setenv("REFREEKV_DEVICE_KERNELS", "1")
    with plugged_in(library) as device:
        yield device
        gc.collect()


def pruned(path: Path, *, on_device: bool = True, theta: float = SHARE, **options: Any) -> Llama:
    """With the prompt read, and most of it evicted. On the CPU, only the cache is there: the weights have the device's
    kernels in both cases."""
    llm = load(path, ReFreeKV(theta=theta), codes=True, n_gpu_layers=-1, offload_kqv=on_device, **options)
    llm.eval(PROMPT)
    assert llm.prune_kv() > 0
    return llm


def assert_alike(found: Floats, expected: Floats) -> None:
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "f16, V transposed": ("gqa64", {}),
    "flash attention": ("gqa64", {"flash_attn": True}),
    "f32": ("gqa64", {"type_k": CACHE_TYPES["f32"], "type_v": CACHE_TYPES["f32"]}),
    "bf16": ("gqa64", {"type_k": CACHE_TYPES["bf16"], "type_v": CACHE_TYPES["bf16"]}),
    "q8_0": ("gqa64", {"flash_attn": True, "type_k": CACHE_TYPES["q8_0"], "type_v": CACHE_TYPES["q8_0"]}),
    "soft-cap": ("gemma2", {}),
    "soft-cap, flash attention": ("gemma2", {"flash_attn": True}),
    "sinks": ("gpt-oss", {}),
}


@pytest.mark.parametrize(("model", "options"), CASES.values(), ids=CASES)
def test_it_answers_as_the_kernel_of_the_cpu(
    tiny: Tiny, device: FarDevice, model: str, options: dict[str, Any]
) -> None:
    path = tiny(next((title for title in ARCHITECTURES if title.startswith(model)), model))

    def run(*, on_device: bool, theta: float = SHARE) -> tuple[Floats, int, list[list[int]]]:
        llm = pruned(path, on_device=on_device, theta=theta, **options)
        cells = kept(llm)
        rows = feed(llm, MORE)
        assert llm.kv_stats.theta == pytest.approx(theta)
        assert llm.kv_stats.bytes_bounced == 0
        llm.eval(random_tokens(200, seed=2)[1:])
        llm.prune_kv()
        rows = np.concatenate([rows, feed(llm, MORE[:1])])
        return rows, llm.kv_stats.n_rows_read, cells

    expected, n_expected, cells = run(on_device=False)
    found, n_found, cells_found = run(on_device=True)
    assert cells_found == cells
    assert_alike(found[:-1], expected[:-1])
    # a row more or less that draws theta, by the rounding of either
    assert n_expected > 0
    assert abs(n_found - n_expected) <= 0.02 * n_expected
    codes_alone, _, _ = run(on_device=True, theta=0.9)
    assert np.abs(codes_alone - expected).max() > 3 * np.abs(found - expected).max()


def test_they_have_to_be_asked_for(tiny: Tiny, device: FarDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pruned(tiny("gqa64")).kv_stats.codes_share < 0.25
    for value in ("0", None):
        monkeypatch.setenv("REFREEKV_DEVICE_KERNELS", value or "")
        llm = pruned(tiny("gqa64"))
        assert llm.kv_stats.theta == 0  # ggml's operations read no exact rows
        assert llm.kv_stats.codes_share > 0.4


@pytest.mark.parametrize("options", [{"kv_evicted": "drop"}, {"n_gpu_layers": 0}], ids=["no cold store", "on the CPU"])
def test_where_they_do_not_fit_it_is_as_without_them(
    tiny: Tiny, device: FarDevice, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    def run() -> Floats:
        llm = load(tiny("gqa64"), ReFreeKV(), codes=True, **{"n_gpu_layers": -1, **options})
        llm.eval(PROMPT)
        llm.prune_kv()
        return feed(llm, MORE)

    found = run()
    monkeypatch.delenv("REFREEKV_DEVICE_KERNELS")
    np.testing.assert_array_equal(found, run())


def test_tokens_together_and_one_by_one(tiny: Tiny, device: FarDevice) -> None:
    tokens = random_tokens(41, seed=3)[1:]
    one_by_one, together = pruned(tiny("gqa64")), pruned(tiny("gqa64"))
    feed(one_by_one, tokens)
    together.eval(tokens)
    assert_alike(feed(together, MORE), feed(one_by_one, MORE))


def test_decoding_brings_nothing_but_logits_to_the_host(tiny: Tiny, device: FarDevice) -> None:
    llm = pruned(tiny("gqa64"))
    feed(llm, MORE[:1])  # the addresses of exact rows go to the device with the first token
    device.forget()
    feed(llm, MORE[1:])
    assert {crossing.name for crossing in device.to_host()} == {"result_output"}
    sent = [crossing for crossing in device.crossings() if not crossing.to_host]
    assert not [crossing for crossing in sent if "codes" in crossing.name or "exact" in crossing.name]


def test_without_memory_that_the_device_can_read_its_codes_stand_for_all(tiny: Tiny, device: FarDevice) -> None:
    with device.without_shared_memory():
        llm = pruned(tiny("gqa64"))
        found = feed(llm, MORE)
        llm.eval(random_tokens(200, seed=2)[1:])
        llm.prune_kv()
        feed(llm, MORE[:1])
        assert llm.kv_stats.n_rows_read == 0
    # which rows there are decides which are read: no part of it is by chance
    np.testing.assert_array_equal(found, feed(pruned(tiny("gqa64"), theta=0.999), MORE))


def test_a_second_turn(tiny: Tiny, device: FarDevice) -> None:
    """Restored, read and pruned again: codes and addresses of exact rows come and go."""

    def run(*, on_device: bool) -> Floats:
        llm = pruned(tiny("gqa64"), on_device=on_device)
        rows = [feed(llm, MORE)]
        native.restore(ctx_of(llm), 0)
        llm.eval(random_tokens(300, seed=2)[1:])
        llm.prune_kv()
        rows.append(feed(llm, MORE))
        llm.n_tokens = 700  # what comes behind is removed with the next token
        rows.append(feed(llm, MORE))
        return np.concatenate(rows)

    assert_alike(run(on_device=True), run(on_device=False))


@pytest.mark.parametrize("to_device", [True, False], ids=["to the device", "to the CPU"])
def test_states_of_the_cpu_and_of_the_device_have_the_same_codes(
    tiny: Tiny, device: FarDevice, to_device: bool
) -> None:
    llm = pruned(tiny("gqa64"), on_device=not to_device)
    state = llm.save_state()
    expected = feed(llm, MORE)
    other = pruned(tiny("gqa64"), on_device=to_device)
    other.load_state(state)
    assert other.kv_stats.bytes_codes > 0
    assert_alike(feed(other, MORE), expected)


def test_sequences_side_by_side(tiny: Tiny, device: FarDevice) -> None:
    """A copied prefix, tokens of both sequences in one batch, and what is cut from one of them."""

    def run(*, on_device: bool) -> Floats:
        device.forget()
        cold = {"cold": native.enum_value("COLD_MEMORY")}
        sequences = Sequences(tiny("gqa64"), ReFreeKV(), codes=True, cold=cold, offload_kqv=on_device)
        sequences.read(0, PROMPT)
        assert native.prune(sequences.ctx, 0) > 0
        sequences.copy(0, 1)
        rows = list(sequences.read_together({0: MORE[:3], 1: MORE[3:]}).values())
        assert sequences.remove(0, 500)
        rows += sequences.read_together({0: MORE[:2], 1: MORE[2:4]}).values()
        assert sequences.remove(1)
        rows.append(sequences.read(0, MORE))
        sequences.close()
        assert any("codes" in crossing.name for crossing in device.crossings()) == on_device
        return np.array(rows)

    assert_alike(run(on_device=True), run(on_device=False))
