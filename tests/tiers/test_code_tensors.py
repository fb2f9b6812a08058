"""Where our kernel cannot be, decoding attends to what is evicted by codes in ggml's types, with ggml's operations."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
import reference
from far_device import FarDevice, compile_device, plugged_in
from policies import Debug
from support import CACHE_TYPES, Sequences, ctx_of, feed, kept, load, logits
from tiny import TinyModel, random_tokens
from tiny_architectures import ARCHITECTURES, Architecture

from refreekv_cpp import CacheStateError, Llama, Policy, ReFreeKV, SnapKV, UnsupportedModelError, native

Tiny = Callable[[str], Path]

PROMPT = random_tokens(1024)
ANSWER = random_tokens(8, seed=1)
SNAPKV = SnapKV(budget=512, n_min=0)
F32 = {"type_k": CACHE_TYPES["f32"], "type_v": CACHE_TYPES["f32"]}
CACHES: dict[str, dict[str, Any]] = {
    "f32": F32,
    "f16": {},
    "f16, flash attention": {"flash_attn": True},
    "q8_0": {"flash_attn": True, "type_k": CACHE_TYPES["q8_0"], "type_v": CACHE_TYPES["q8_0"]},
}


@dataclass(frozen=True, kw_only=True)
class AsOnADevice(Debug):
    """A policy with codes in tensors, though the cache is in host memory and the kernel fits."""

    policy: Policy = SNAPKV
    by_graph: bool = True
    theta: float = 0.003


PRESET = AsOnADevice(policy=ReFreeKV())
GONE = AsOnADevice(theta=0)


def read(path: Path, policy: Policy = AsOnADevice(), *, prune: bool = True, **options: Any) -> Llama:
    llm = load(path, policy, codes=True, **options)
    llm.eval(PROMPT)
    if prune:
        assert llm.prune_kv() > 0
    return llm


def far(ours: npt.NDArray[np.float32], full: npt.NDArray[np.float32]) -> float:
    return float(np.abs(ours - full).max() / np.abs(full).max())


class ByTypes(reference.LlamaReference):
    """Codes of K are q8_0, line by line; those of V are q5_1 or, in the last of 4 layers, q4_1, along a channel."""

    def attention_to_warm(self, layer: int, head: int, queries: npt.NDArray[Any], scale: float) -> npt.NDArray[Any]:
        gone = self.warm[layer][0]
        keys, values = self.keys[layer][:, head].copy(), self.values[layer][:, head].copy()
        keys[gone] = q8_0(keys[gone])
        padded = np.pad(values[gone], [(0, -len(gone) % 64), (0, 0)])
        values[gone] = with_least(padded.T, 5 if layer < 3 else 4).T[: len(gone)]
        res: npt.NDArray[Any] = reference.softmax(queries @ keys.T * scale) @ values
        return res


def q8_0(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    lines = np.pad(x, [(0, 0), (0, -x.shape[1] % 32)])
    blocks = lines.reshape(len(x), -1, 32)
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / 127
    codes = np.rint(blocks / np.where(scale, scale, 1))
    return (codes * scale.astype(np.float16)).reshape(lines.shape)[:, : x.shape[1]]


def with_least(x: npt.NDArray[Any], bits: int) -> npt.NDArray[Any]:
    """q4_1, q5_1: blocks of 32 numbers with their least one and a step."""
    top = 2**bits - 1
    blocks = x.reshape(len(x), -1, 32)
    least = blocks.min(axis=-1, keepdims=True)
    step = (blocks.max(axis=-1, keepdims=True) - least) / top
    codes = np.minimum(top, np.floor((blocks - least) / np.where(step, step, 1) + 0.5))
    return (codes * step.astype(np.float16) + least.astype(np.float16)).reshape(x.shape)


@pytest.mark.parametrize("flash_attn", [False, True])
@pytest.mark.parametrize("model", ["gqa", "mha", "gqa64"])
def test_attention_is_one_soft_max_over_rows_and_codes(tiny: Tiny, model: str, flash_attn: bool) -> None:
    llm = read(tiny(model), **F32, flash_attn=flash_attn)
    numpy = ByTypes(tiny(model))
    numpy.read(PROMPT)
    rough = numpy.copy()
    for layer, positions in enumerate(kept(llm)):
        numpy.put_away(layer, positions, (8, 4), 1)
        rough.hidden[layer] = ~np.isin(np.arange(len(PROMPT)), positions)
    expected = np.concatenate([numpy.read([token]) for token in ANSWER])
    without = np.concatenate([rough.read([token]) for token in ANSWER])
    # ggml rounds queries and weights to 8 bits
    error = far(feed(llm, ANSWER), expected)
    assert error < 0.01
    assert far(without, expected) > 5 * error


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(
    "shape",
    [TinyModel(), TinyModel(n_embd=128, n_embd_head=64), TinyModel(n_embd=128, n_embd_head=80)],
    ids=["heads of 16", "heads of 64", "heads of 80"],
)
def test_the_answer_is_near_the_full_caches(tmp_path: Path, shape: TinyModel, cache: str) -> None:
    if cache == "q8_0" and shape.n_embd_head % 32:
        pytest.skip("llama.cpp has no such cache")
    shape.write(tmp_path / "model.gguf")
    full, without = (
        feed(read(tmp_path / "model.gguf", GONE, prune=prune, **CACHES[cache]), ANSWER) for prune in (False, True)
    )
    llm = read(tmp_path / "model.gguf", **CACHES[cache])
    ours = feed(llm, ANSWER)
    assert far(ours, full) < 0.03
    assert far(ours, full) < 0.5 * far(without, full)

    stats = llm.kv_stats
    assert stats.bytes_codes > 0
    assert stats.theta == stats.n_rows_read == 0
    padded = -(-shape.n_embd_head // 32) * 32
    n_bytes = (padded * 34 + shape.n_embd_head * (3 * 24 + 20) / 4) / 32  # of four layers
    assert stats.codes_share == pytest.approx(n_bytes / (4 * shape.n_embd_head))
    assert stats.bytes_bounced == 0


@pytest.mark.parametrize("title", ARCHITECTURES)
def test_other_kinds_of_attention(tiny: Tiny, title: str) -> None:
    if "ALiBi" in title:
        pytest.skip("has no codes")
    options = {**F32, "flash_attn": True}
    try:
        full = feed(read(tiny(title), GONE, prune=False, **options), ANSWER)
    except UnsupportedModelError:
        pytest.skip("has no policy")
    without, ours = (feed(read(tiny(title), policy, **options), ANSWER) for policy in (GONE, AsOnADevice()))
    # of the tokens the median: where two experts are nearly tied, any difference takes another one
    ours_far, without_far = (np.median([far(*rows) for rows in zip(its, full, strict=True)]) for its in (ours, without))
    assert ours_far < 0.1 * without_far


def test_layers_with_other_numbers_of_heads(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    Architecture("openelm", keys={"attention.head_count_kv": [1, 2, 4, 1]}).write(path)
    full, without, ours = (
        feed(read(path, policy, prune=prune, **F32), ANSWER)
        for policy, prune in ((GONE, False), (GONE, True), (AsOnADevice(), True))
    )
    assert far(ours, full) < 0.5 * far(without, full)


def test_heads_that_do_not_fit_the_kernel_have_them_by_themselves(tmp_path: Path) -> None:
    TinyModel(n_embd=96, n_embd_head=24).write(tmp_path / "model.gguf")
    full, ours = (
        feed(
            read(tmp_path / "model.gguf", Debug(policy=SNAPKV, theta=theta), prune=theta > 0),
            ANSWER,
        )
        for theta in (0, 0.003)
    )
    assert 0 < far(ours, full) < 0.03


@pytest.mark.parametrize("policy", [AsOnADevice(), PRESET], ids=["as the policy says", "preset"])
def test_many_tokens_at_once_are_as_each_by_itself(tiny: Tiny, policy: Policy) -> None:
    tokens = random_tokens(70, seed=3)
    one_by_one, at_once, by_four = (read(tiny("gqa64"), policy, **F32) for _ in range(3))
    expected = feed(one_by_one, tokens)[-1]
    at_once.eval(tokens)
    for i in range(0, len(tokens), 4):
        by_four.eval(tokens[i : i + 4])
    for llm in (at_once, by_four):
        assert far(logits(llm), expected) < 0.01


def test_a_batch_is_computed_in_parts_where_its_scores_take_much_memory(tmp_path: Path) -> None:
    TinyModel(n_embd=64, n_head=16, n_head_kv=4).write(tmp_path / "model.gguf")
    answers = []
    for n_ubatch in (512, 64):
        llm = load(tmp_path / "model.gguf", PRESET, codes=True, n_ctx=8192, n_batch=512, n_ubatch=n_ubatch)
        llm.eval(random_tokens(7000))
        llm.prune_kv()
        llm.eval(random_tokens(512, seed=2))
        answers.append(logits(llm))
    assert far(*answers) < 0.01


@pytest.mark.parametrize("kv_unified", [True, False])
def test_two_sequences_see_their_own(tiny: Tiny, kv_unified: bool) -> None:
    answers = []
    for policy, prune in ((GONE, False), (GONE, True), (AsOnADevice(), True)):
        sequences = Sequences(
            tiny("gqa64"), policy, codes=True, cold={"cold": native.enum_value("COLD_MEMORY")}, kv_unified=kv_unified
        )
        for i in range(4):
            sequences.read_together({s: random_tokens(230, seed=10 * i + s) for s in range(2)})
        for s in range(2):
            if prune:
                assert native.prune(sequences.ctx, s) > 0
        res = [sequences.read_together({s: [ANSWER[i]] for s in range(2)}) for i in range(4)]
        answers.append(np.array([row[s] for row in res for s in range(2)]))
        sequences.close()
    full, without, ours = answers
    assert far(ours, full) < 0.03
    assert far(ours, full) < 0.5 * far(without, full)


@pytest.mark.parametrize("kv_unified", [True, False])
def test_a_copied_sequence_has_them_too(tiny: Tiny, kv_unified: bool) -> None:
    sequences = Sequences(tiny("gqa64"), PRESET, codes=True, kv_unified=kv_unified)
    sequences.read(0, PROMPT)
    assert native.prune(sequences.ctx, 0) > 0
    sequences.copy(0, 1)
    original = sequences.read(0, ANSWER[:1])
    sequences.remove(0)
    assert far(sequences.read(1, ANSWER[:1]), original) < 1e-3


def test_a_shared_prefix_that_one_sequence_cuts_is_seen_by_the_other_alone(tiny: Tiny) -> None:
    answers = []
    for policy in (PRESET, AsOnADevice(policy=ReFreeKV(), theta=0)):
        sequences = Sequences(tiny("gqa64"), policy, codes=True, cold={"cold": native.enum_value("COLD_MEMORY")})
        sequences.read(0, PROMPT[:900])
        if policy is PRESET:
            assert native.prune(sequences.ctx, 0) > 0
        sequences.copy(0, 1)
        assert llama_cpp.llama_memory_seq_rm(sequences.memory, 1, 100, -1)
        question = random_tokens(40, seed=9)
        answers.append(np.array([sequences.read(1, question), sequences.read(0, question)]))
        sequences.close()
    assert far(answers[0], answers[1]) < 0.03


def test_what_came_back_is_not_there_twice(tiny: Tiny) -> None:
    llm, full = read(tiny("gqa64")), read(tiny("gqa64"), prune=False)
    native.restore(ctx_of(llm), 0)
    assert llm.kv_stats.bytes_codes == 0
    np.testing.assert_array_equal(feed(llm, ANSWER), feed(full, ANSWER))


def test_what_is_generated_is_coded_too(tiny: Tiny) -> None:
    llm = load(tiny("gqa64"), PRESET, codes=True, **F32)
    full = load(tiny("gqa64"), "full", kv_elastic=True, **F32)
    answer = random_tokens(1200, seed=3)
    for each in (llm, full):
        each.eval(PROMPT[:600])
    llm.prune_kv()
    ours, theirs = (feed(each, answer) for each in (llm, full))
    assert far(ours, theirs) < 0.03
    for positions in kept(llm):
        assert len(positions) <= 512
        assert positions[4:] == [*range(1800 - len(positions) + 4, 1800)]


def test_a_graph_is_built_when_codes_come_and_not_with_every_token(tiny: Tiny) -> None:
    llm = read(tiny("gqa64"), PRESET)
    llm.eval([1])
    reused = llama_cpp.llama_perf_context(ctx_of(llm)).n_reused
    feed(llm, random_tokens(40, seed=3))
    assert llama_cpp.llama_perf_context(ctx_of(llm)).n_reused >= reused + 38


def test_going_back_and_pruning_again(tiny: Tiny) -> None:
    llm, full = read(tiny("gqa64"), **F32), read(tiny("gqa64"), prune=False, **F32)
    for each in (llm, full):
        each.n_tokens = 500
        each.eval(random_tokens(900, seed=7))
    assert llm.prune_kv() > 0
    assert far(feed(llm, ANSWER), feed(full, ANSWER)) < 0.03


@pytest.mark.parametrize("options", [{}, {"kv_evicted": "drop"}, {"kv_cold_state": False}], ids=str)
def test_they_survive_saving_and_loading(tiny: Tiny, options: dict[str, Any]) -> None:
    llm = read(tiny("gqa64"), **options)
    other = load(tiny("gqa64"), AsOnADevice(), codes=True, **options)
    other.load_state(llm.save_state())
    assert other.kv_stats.bytes_codes > 0
    assert far(feed(other, ANSWER), feed(llm, ANSWER)) < 1e-6


def test_states_of_the_kernels_codes_are_coded_anew(tiny: Tiny) -> None:
    by_kernel = Debug(policy=SNAPKV, theta=0.003)
    full = feed(read(tiny("gqa64"), prune=False), ANSWER)
    for source, target in ((AsOnADevice(), by_kernel), (by_kernel, AsOnADevice())):
        other = load(tiny("gqa64"), target, codes=True)
        other.load_state(read(tiny("gqa64"), source).save_state())
        assert other.kv_stats.bytes_codes > 0
        assert far(feed(other, ANSWER), full) < 0.05


def test_a_limit_counts_them(tiny: Tiny) -> None:
    saved = read(tiny("gqa64"))
    state, stats = saved.save_state(), saved.kv_stats
    llm = load(tiny("gqa64"), AsOnADevice(), codes=True, kv_memory_limit=stats.bytes + stats.bytes_codes // 2)
    with pytest.raises(CacheStateError, match="the limit is"):
        llm.load_state(state)
    assert llm.kv_stats.bytes_codes == 0


def test_they_take_less_than_half_of_f16(tmp_path: Path) -> None:
    TinyModel(n_embd=256, n_embd_head=64).write(tmp_path / "model.gguf")
    llm = load(tmp_path / "model.gguf", PRESET, codes=True, n_ctx=4352)
    llm.eval(random_tokens(4192))
    llm.prune_kv()
    evicted = 1 - np.mean(llm.kv_stats.cells_kept) / 4192
    assert llm.kv_stats.bytes_codes < 0.45 * evicted * llm.kv_stats.bytes_full


def test_no_memory_for_them_evicts_nothing(tiny: Tiny) -> None:
    llm = read(tiny("gqa64"), prune=False)
    native.fail_allocation(1)
    try:
        with pytest.raises(MemoryError):
            llm.prune_kv()
    finally:
        native.fail_allocation(0)
    assert llm.kv_stats.bytes_codes == 0
    np.testing.assert_array_equal(feed(llm, ANSWER), feed(read(tiny("gqa64"), prune=False), ANSWER))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_device(tmp_path_factory.mktemp("device"))


@pytest.fixture
def device(library: Path) -> Iterator[FarDevice]:
    with plugged_in(library) as device:
        yield device
        gc.collect()


@pytest.mark.device
@pytest.mark.parametrize("cache", CACHES)
def test_on_a_device(tiny: Tiny, device: FarDevice, cache: str) -> None:
    on_device = {"n_gpu_layers": -1, **CACHES[cache]}
    full = feed(load_and_read(tiny("gqa64"), ReFreeKV(theta=0, n_hot=0), False, on_device), ANSWER)
    llm = load_and_read(tiny("gqa64"), ReFreeKV(), True, on_device)
    stats = llm.kv_stats
    assert stats.theta == 0
    assert stats.bytes_codes > 0
    assert max(stats.cells_kept) <= 512
    device.forget()
    ours = feed(llm, ANSWER)
    assert {crossing.name for crossing in device.to_host()} == {"result_output"}
    assert far(ours, full) < 0.05


@pytest.mark.device
def test_codes_stay_on_the_device(tiny: Tiny, device: FarDevice) -> None:
    llm = load_and_read(tiny("gqa64"), ReFreeKV(), True, {"n_gpu_layers": -1, "n_ctx": 4096})
    before = llm.kv_stats.bytes_codes
    device.forget()
    feed(llm, random_tokens(1500, seed=3))
    assert llm.kv_stats.bytes_codes > 1.5 * before, "they did not grow"
    assert not [crossing for crossing in device.to_host() if "codes" in crossing.name]
    assert llm.kv_stats.bytes_bounced == 0


@pytest.mark.device
def test_a_device_without_the_operations_has_none(tiny: Tiny, device: FarDevice) -> None:
    with device.without("CONCAT"):
        llm = load_and_read(tiny("gqa64"), ReFreeKV(), True, {"n_gpu_layers": -1, "n_ctx": 4096})
        assert llm.kv_stats.bytes_codes == 0
        feed(llm, ANSWER)


def load_and_read(path: Path, policy: Policy, prune: bool, options: dict[str, Any]) -> Llama:
    llm = load(path, policy, codes=True, **options)
    llm.eval(PROMPT)
    if prune:
        assert llm.prune_kv() > 0
    return llm
