"""Layers that attend to the K and V of another layer, multi-head latent attention (MLA), and Grok's cap of its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import books
import gguf
import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
import reference
from policies import POLICIES, Debug
from support import CACHE_TYPES, F32, ctx_of, feed, kept, load
from tiny import random_tokens
from tiny_architectures import ARCHITECTURES

from refreekv_cpp import H2O, Llama, Policy, ReFreeKV, UnsupportedModelError, native

Tiny = Callable[[str], Path]
Logits = npt.NDArray[np.float32]

SHARED = "gemma4 (E2B: layers that share K and V)"
SHARED_3N = "gemma3n (layers that share K and V)"
MLA = "deepseek2 (MLA, experts)"
GROK = "grok (experts, attention logits with a cap)"
SINKS = "gpt-oss (attention sinks, sliding window, experts)"
HYBRID = "qwen35 (hybrid, with a draft head)"
MODELS = [SHARED, SHARED_3N, MLA, GROK]

PROMPT = random_tokens(700)
MORE = random_tokens(41, seed=1)[1:]

SINGLE: dict[str, Any] = {"type_k": F32, "type_v": F32, "flash_attn": False}

# every evicted row is read while decoding, so that the answer is the full cache's
EXACT = ReFreeKV(n_min=0, theta=1e-12)


def n_layers(llm: Llama) -> int:
    return native.stats(ctx_of(llm)).n_layer


def keep(llm: Llama, layer: int, positions: npt.NDArray[np.int64]) -> None:
    native.keep(ctx_of(llm), 0, native.layer(ctx_of(llm), layer).il, positions)


def error(actual: Logits, expected: Logits) -> float:
    """The largest difference, in standard deviations of the logits."""
    return float(np.abs(actual - expected).max() / expected.std())


def usual_error(actual: Logits, expected: Logits) -> float:
    """... of the median token."""
    return float(np.median(np.abs(actual - expected).max(axis=1)) / expected.std())


@pytest.mark.parametrize("flash_attn", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_cache_that_grows_is_upstreams_bit_for_bit(tiny: Tiny, name: str, flash_attn: bool) -> None:
    logits = []
    for elastic in (False, True):
        llm = load(tiny(name), "full", kv_elastic=elastic, flash_attn=flash_attn and name != GROK)
        llm.eval(PROMPT)
        logits.append(feed(llm, MORE))
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize("flash_attn", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_evicted_is_what_is_masked(tiny: Tiny, name: str, flash_attn: bool) -> None:
    """Kept sets that differ in each layer, in a cache that has lost the rest, and in one that has it all."""
    options = {**SINGLE, "flash_attn": flash_attn and name != GROK}
    logits = []
    for policy in (ReFreeKV(), Debug(policy=ReFreeKV(), mask_only=True)):
        rng = np.random.default_rng(0)
        llm = load(tiny(name), policy, **options)
        llm.eval(PROMPT)
        for layer in range(n_layers(llm)):
            keep(llm, layer, np.sort(rng.choice(700, 100 + 20 * layer, replace=False)))
        logits.append(feed(llm, MORE))
    moved, masked = logits
    # in f16, which is what flash attention adds up in, by cell
    # 30 layers with a GELU from a table in f16 make thousandths of the rounding of sums
    usual, most = (1e-2, 5e-2) if options["flash_attn"] else (2e-3, 1e-2) if name == SHARED_3N else (1e-5, 5e-4)
    assert usual_error(moved, masked) < usual
    assert error(moved, masked) < most
    whole = load(tiny(name), "full", **options)
    whole.eval(PROMPT)
    assert error(feed(whole, MORE), masked) > 0.05


@pytest.mark.parametrize("flash_attn", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_with_all_exact_rows_it_is_upstreams_cache(tiny: Tiny, name: str, flash_attn: bool) -> None:
    """Decoding attends to what a layer holds and to what was evicted from it, with the queries of all its readers."""
    options = {**SINGLE, "flash_attn": flash_attn and name != GROK}
    full = load(tiny(name), "full", **options)
    full.eval(PROMPT)
    llm = load(tiny(name), EXACT, codes=True, kv_cold="memory", **options)
    llm.eval(PROMPT)
    assert llm.prune_kv() > 0
    stats = llm.kv_stats
    assert stats.theta > 0, "the kernel has nothing to do with this model: nothing was tested"
    assert error(feed(llm, MORE), feed(full, MORE)) < (0.15 if options["flash_attn"] else 5e-3)
    assert native.stats(ctx_of(llm)).n_rows_read > 0


@pytest.mark.parametrize("name", MODELS)
def test_codes_as_tensors(tiny: Tiny, name: str) -> None:
    """As a device has them, and by ggml's operations: it reads no exact rows."""
    full = load(tiny(name), "full", **SINGLE)
    full.eval(PROMPT)
    expected = feed(full, MORE)
    errors = []
    for theta in (0.003, 0.0):
        llm = load(tiny(name), Debug(policy=ReFreeKV(n_min=0), by_graph=True, theta=theta), codes=True, **SINGLE)
        llm.eval(PROMPT)
        if theta:
            assert llm.prune_kv() > 0
        else:
            for layer in range(n_layers(llm)):
                keep(llm, layer, np.arange(700 - 124, 700))
        errors.append(float(np.median(np.abs(feed(llm, MORE) - expected))))
    with_codes, without = errors
    assert with_codes < without / 4


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("policy", ["h2o", "snapkv", "released-code", "top-p"])
def test_kept_sets_are_those_of_the_definition(tiny: Tiny, name: str, policy: str) -> None:
    llm = load(tiny(name), POLICIES[policy], **SINGLE)
    llm.eval(PROMPT)
    seen = [native.read_attention(ctx_of(llm), 0, layer) for layer in range(n_layers(llm))]
    llm.prune_kv()
    n_full = getattr(POLICIES[policy], "n_full_layers", 0)
    for layer, (attention, positions) in list(enumerate(zip(seen, kept(llm), strict=True)))[n_full:]:
        rows = attention[:, -getattr(POLICIES[policy], "n_window", 1) :].astype(np.float64)
        np.testing.assert_allclose(rows.sum(axis=2), 1, rtol=1e-4)
        expected = reference.select(POLICIES[policy], rows, 256, layer, len(seen))
        assert positions == expected.kept


@pytest.mark.parametrize("name", [MLA, GROK])
def test_attention_is_that_of_the_queries_and_keys(tiny: Tiny, name: str) -> None:
    llm = load(tiny(name), H2O(), **SINGLE)
    llm.eval(PROMPT)
    for layer in range(n_layers(llm)):
        queries, query_pos = native.read_queries(ctx_of(llm), 0, layer)
        keys, key_pos = native.read_keys(ctx_of(llm), 0, layer)
        groups = queries.shape[1] // keys.shape[1]
        logits = np.einsum("qhd,khd->hqk", queries.astype(float), np.repeat(keys, groups, axis=1).astype(float))
        if name == GROK:  # llama.cpp's defaults of the scale and the cap
            logits = 30 * np.tanh(logits * 0.08838834764831845 / 30)
        logits *= native.layer(ctx_of(llm), layer).kq_scale
        logits[:, key_pos[None, :] > query_pos[:, None]] = -np.inf
        expected = reference.softmax(logits)
        np.testing.assert_allclose(native.read_attention(ctx_of(llm), 0, layer), expected, atol=1e-4)


# -- sharing -----------------------------------------------------------------------------------------------------------


def test_codes_and_rows_exist_once(tiny: Tiny) -> None:
    llm = load(tiny(SHARED), ReFreeKV(n_min=0), codes=True)
    infos = [native.layer(ctx_of(llm), layer) for layer in range(n_layers(llm))]
    assert [info.il for info in infos] == [1, 3]
    assert [info.n_readers for info in infos] == [1, 3]  # 5 and 7 read what 3 has stored
    llm.eval(PROMPT)
    llm.prune_kv()
    assert llm.kv_stats.cells_kept == (124, 124)
    n_head_kv, n_embd, n_cells = 2, 16, 700 - 124
    bits, meta = 4 + 2, 2 * 32 / 64  # of the codes of K and V, and what each channel of 64 cells has beside them
    assert llm.kv_stats.bytes_codes == pytest.approx(2 * n_cells * n_head_kv * n_embd * (bits + meta) / 8, rel=0.1)


def test_every_layer_that_reads_the_cells_has_a_say(tiny: Tiny, tmp_path: Path) -> None:
    """Other queries in a layer without K and V change what is kept of the layer whose cells it reads, and no other."""
    other = tmp_path / "other.gguf"
    shutil.copy(tiny(SHARED), other)
    tensor = next(t for t in gguf.GGUFReader(other, "r+").tensors if t.name == "blk.7.attn_q.weight")
    tensor.data[:] = np.roll(tensor.data, 7, axis=0)
    sets, attention = [], []
    for path in (tiny(SHARED), other):
        llm = load(path, H2O(budget=0.3), **SINGLE)
        llm.eval(PROMPT)
        attention.append([native.read_attention(ctx_of(llm), 0, layer) for layer in range(2)])
        assert llm.prune_kv() > 0
        sets.append(kept(llm))
    (first, second), (other_first, other_second) = attention
    assert (len(first), len(second)) == (4, 12)  # query heads: its own, and those of two more layers
    np.testing.assert_array_equal(first, other_first)
    np.testing.assert_array_equal(second[:8], other_second[:8])
    assert np.abs(second[8:] - other_second[8:]).max() > 0.01
    assert sets[0][0] == sets[1][0]
    assert sets[0][1] != sets[1][1]


@pytest.mark.parametrize("policy", ["h2o", "released-code", "snapkv"])
def test_kernel_and_graph_look_at_the_same_attention(tiny: Tiny, policy: str) -> None:
    seen = []
    for by_graph in (False, True):
        llm = load(tiny(SHARED), Debug(policy=POLICIES[policy], by_graph=by_graph), **SINGLE)
        llm.eval(PROMPT)
        seen.append(native.read_attention(ctx_of(llm), 0, 1))
    np.testing.assert_allclose(*seen, atol=1e-5)


# -- MLA ---------------------------------------------------------------------------------------------------------------


def test_values_are_no_rows_of_their_own(tiny: Tiny) -> None:
    llm = load(tiny(MLA), ReFreeKV(n_min=0), codes=True)
    info = native.layer(ctx_of(llm), 0)
    assert (info.n_head_kv, info.n_embd_head, info.row_numbers, info.row_bytes) == (1, 48, 48, 96)
    llm.eval(PROMPT)
    assert llm.kv_stats.bytes == 4 * 768 * 96
    assert llm.prune_kv() > 0
    assert llm.kv_stats.bytes == 4 * 128 * 96
    bits, meta = 4, 2 * 16 / 64  # of the codes, and what each channel of 64 cells has beside them
    assert llm.kv_stats.bytes_codes == pytest.approx(4 * (700 - 124) * 48 * (bits + meta) / 8, rel=0.15)


@pytest.mark.parametrize("by_graph", [False, True])
@pytest.mark.parametrize("cold", [{"kv_cold": "memory"}, {"kv_cold": "file"}, {"kv_cold_type": "q8_0"}], ids=str)
def test_rows_come_back(tiny: Tiny, cold: dict[str, Any], by_graph: bool) -> None:
    full = load(tiny(MLA), "full", **SINGLE)
    full.eval(PROMPT)
    policy = Debug(policy=POLICIES["streaming"], by_graph=by_graph)
    llm = load(tiny(MLA), policy, **{**SINGLE, "kv_cold": "memory", **cold})
    llm.eval(PROMPT)
    n_evicted = llm.prune_kv()
    assert native.restore(ctx_of(llm), 0) == n_evicted > 0
    assert error(feed(llm, MORE), feed(full, MORE)) < (0.2 if "kv_cold_type" in cold else 2e-3)


def test_as_many_heads_as_deepseek_3(tmp_path: Path) -> None:
    """128 of them share the one KV head."""
    path = tmp_path / "model.gguf"
    keys = {**ARCHITECTURES[MLA].keys, "attention.head_count": 128, "block_count": 2}
    replace(ARCHITECTURES[MLA], keys=keys).write(path)
    full = load(path, "full", **SINGLE)
    full.eval(PROMPT)
    llm = load(path, EXACT, codes=True, kv_cold="memory", **SINGLE)
    llm.eval(PROMPT)
    assert llm.prune_kv() > 0
    assert llm.kv_stats.theta > 0
    assert usual_error(feed(llm, MORE), feed(full, MORE)) < 1e-4


def test_what_was_read_is_opened_from_the_library(tiny: Tiny, tmp_path: Path) -> None:
    options = {"kv_cold": "memory", **SINGLE}
    books.write(tiny(MLA), tmp_path / "library", **options)
    other = books.read(books.reader(tiny(MLA), tmp_path / "other", **options))
    llm = books.opened(tiny(MLA), tmp_path / "library", **options)
    assert llm.kv_stats.n_opened == len(books.TEXT)
    assert kept(llm) == kept(other)
    assert llm.kv_stats.bytes_codes == other.kv_stats.bytes_codes
    np.testing.assert_array_equal(feed(llm, books.MORE), feed(other, books.MORE))
    assert native.restore(ctx_of(llm), 0) == native.restore(ctx_of(other), 0) > 0


# -- conversations -----------------------------------------------------------------------------------------------------

QUESTIONS = ["a b c d e f g h " * 60, "and what of i j k l m n " * 12, "o p q r"]


def talk(llm: Llama, history: list[dict[str, str]], question: str) -> str:
    history.append({"role": "user", "content": question})
    answer = llm.create_chat_completion(history, temperature=0.0, max_tokens=12)["choices"][0]["message"]["content"]
    history.append({"role": "assistant", "content": answer})
    return str(answer)


@pytest.mark.parametrize("evicted", ["keep", "restore"])
@pytest.mark.parametrize("name", [SHARED, MLA, GROK, SINKS, HYBRID])
def test_three_turns_of_chat(tiny: Tiny, name: str, evicted: str) -> None:
    """With all exact rows the answers are the full cache's; an answer comes again, and goes on from a state."""
    answers = {}
    policies: dict[str, Policy | str] = {"full": "full", "exact": EXACT}
    for which, policy in policies.items():
        options = {"kv_evicted": evicted, "kv_cold": "memory"} if policy is EXACT else {}
        llm = load(tiny(name), policy, codes=True, chat_format="chatml", n_ctx=4096, **SINGLE, **options)
        history: list[dict[str, str]] = []
        answers[which] = [talk(llm, history, question) for question in QUESTIONS]
        if policy is EXACT:
            assert llm.kv_stats.cells_kept != (llm.n_tokens,) * n_layers(llm)
        state = llm.save_state()

        again = history[:-2]
        answers[which].append(talk(llm, again, QUESTIONS[-1]))

        other = load(tiny(name), policy, codes=True, chat_format="chatml", n_ctx=4096, **SINGLE, **options)
        other.load_state(state)
        answers[which].append(talk(other, list(history), "s t u v"))
    assert answers["exact"] == answers["full"]
    assert answers["full"][3] == answers["full"][2]


@pytest.mark.parametrize("name", [SHARED, MLA])
def test_a_state_with_codes_comes_back(tiny: Tiny, name: str) -> None:
    llm = load(tiny(name), EXACT, codes=True, kv_cold="memory", **SINGLE)
    llm.eval(PROMPT)
    assert llm.prune_kv() > 0
    state, sets = llm.save_state(), kept(llm)
    expected = feed(llm, MORE)
    other = load(tiny(name), EXACT, codes=True, kv_cold="memory", **SINGLE)
    other.load_state(state)
    assert kept(other) == sets
    assert other.kv_stats.bytes_codes > 0
    assert error(feed(other, MORE), expected) < 5e-3


@pytest.mark.parametrize("type_name", ["f16", "bf16", "f32"])
def test_cache_types_of_mla(tiny: Tiny, type_name: str) -> None:
    kind = CACHE_TYPES[type_name]
    full = load(tiny(MLA), "full", type_k=kind, type_v=kind, flash_attn=False)
    full.eval(PROMPT)
    llm = load(tiny(MLA), EXACT, codes=True, kv_cold="memory", type_k=kind, type_v=kind, flash_attn=False)
    llm.eval(PROMPT)
    assert llm.prune_kv() > 0
    assert float(np.median(np.abs(feed(llm, MORE) - feed(full, MORE)))) < 0.02


# -- devices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"kv_policy": "refreekv"}, {"kv_policy": "full", "kv_elastic": True}], ids=str)
def test_split_mode_tensor_is_refused_before_anything_is_loaded(tmp_path: Path, options: dict[str, Any]) -> None:
    no_model = tmp_path / "model.gguf"
    no_model.write_text("not a model")
    with pytest.raises(
        UnsupportedModelError, match=r"split_mode=3 \(tensor\): must be one of 0 \(none\), 1 .* 2 \(row\)"
    ):
        Llama(str(no_model), split_mode=llama_cpp.LLAMA_SPLIT_MODE_TENSOR, verbose=False, **options)


def test_split_mode_row_changes_nothing_here(tiny_model: Path) -> None:
    logits = []
    for mode in (llama_cpp.LLAMA_SPLIT_MODE_LAYER, llama_cpp.LLAMA_SPLIT_MODE_ROW):
        llm = load(tiny_model, ReFreeKV(n_min=0), codes=True, split_mode=mode)
        llm.eval(PROMPT)
        assert llm.prune_kv() > 0
        logits.append(feed(llm, MORE))
    np.testing.assert_array_equal(*logits)
