"""KV heads that are kept whole: a layer in two groups, and the induction heads that they are for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
import reference
from policies import Debug
from support import CACHE_TYPES, F32, ctx_of, feed, kept, load
from tiny import BOS, TinyModel, random_tokens

from refreekv_cpp import CacheStateError, Llama, PolicyError, ReFreeKV, induction, native

PROMPT = random_tokens(1060)
DECODED = random_tokens(41, seed=1)[1:]

# one head of two, both heads, the first of four, two that are apart
WHOLE = {
    "gqa": [(0, 1), (2, 0), (3, 0), (3, 1)],
    "mha": [(0, 0), (1, 1), (2, 0), (2, 2), (3, 3)],
    "gqa64": [(1, 0), (3, 1)],
}
POLICY = ReFreeKV.window()
EXACT = {"type_k": F32, "type_v": F32}

Tiny = Callable[[str], Path]


def load_divided(path: Path, heads: list[induction.Head], policy=POLICY, **options) -> Llama:
    llm = load(path, policy, **options)
    llm._heads = heads  # what it would find; set before its first prompt
    native.keep_heads(ctx_of(llm), heads)
    return llm


def groups(llm: Llama) -> list[tuple[int, int, bool]]:
    """Layer, KV heads, and whether it is kept whole, of each."""
    infos = [native.group(ctx_of(llm), i) for i in range(native.stats(ctx_of(llm)).n_group)]
    return [(info.il, info.n_head_kv, bool(info.whole)) for info in infos]


def test_a_layer_becomes_two_groups(tiny: Tiny) -> None:
    llm = load_divided(tiny("gqa"), WHOLE["gqa"])
    assert groups(llm) == [(0, 1, False), (0, 1, True), (1, 2, False), (2, 1, False), (2, 1, True), (3, 2, True)]
    assert llm.kv_stats.n_whole_heads == 4
    native.keep_heads(ctx_of(llm), [])
    assert groups(llm) == [(layer, 2, False) for layer in range(4)]


@pytest.mark.parametrize("flash_attn", [False, True])
@pytest.mark.parametrize("name", WHOLE)
def test_a_division_changes_no_answer(tiny: Tiny, name: str, flash_attn: bool) -> None:
    logits = []
    for heads in ([], WHOLE[name]):
        llm = load_divided(tiny(name), heads, flash_attn=flash_attn)
        llm.eval(PROMPT)
        logits.append(feed(llm, DECODED))
    np.testing.assert_allclose(*logits, atol=2e-3 if flash_attn else 1e-4)


@pytest.mark.parametrize("name", WHOLE)
def test_the_policy_prunes_the_other_heads_by_their_own_attention(tiny: Tiny, name: str) -> None:
    llm = load_divided(tiny(name), WHOLE[name], **EXACT)
    llm.eval(PROMPT)
    before = llm.kv_stats
    rows = []
    for index in range(len(groups(llm))):
        queries, query_pos = native.read_queries(ctx_of(llm), 0, index)
        keys, key_pos = native.read_keys(ctx_of(llm), 0, index)
        scale = native.group(ctx_of(llm), index).kq_scale
        rows.append(reference.attention_rows(queries, query_pos, keys, key_pos, scale))
    assert llm.prune_kv() > 0

    for (_, _, whole), positions, attention in zip(groups(llm), kept(llm), rows, strict=True):
        if whole:
            assert positions == list(range(len(PROMPT)))
        else:
            assert positions == reference.select(POLICY, attention, 256).kept
    after = llm.kv_stats
    assert after.bytes_kept < after.bytes_full == before.bytes_full
    assert after.bytes_freed == before.bytes - after.bytes > 0


@pytest.mark.parametrize("flash_attn", [False, True])
@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("debug", [{"mask_only": True}, {"by_graph": True}], ids=str)
def test_moved_is_the_same_as_masked(tiny: Tiny, name: str, flash_attn: bool, debug: dict[str, bool]) -> None:
    logits = []
    for policy in (POLICY, Debug(policy=POLICY, **debug)):
        llm = load_divided(tiny(name), WHOLE[name], policy, flash_attn=flash_attn)
        llm.eval(PROMPT)
        assert llm.prune_kv() > 0
        logits.append(feed(llm, DECODED))
    np.testing.assert_allclose(*logits, atol=2e-3 * np.std(logits))


def test_a_layer_counts_the_heads_of_its_groups(tiny: Tiny) -> None:
    llm = load_divided(tiny("gqa"), [(1, 0), (2, 0), (2, 1)])
    llm.eval(PROMPT)
    for layer in range(4):
        native.keep(ctx_of(llm), 0, layer, np.arange(10))
    everything = len(PROMPT)
    assert llm.kv_stats.cells_per_layer() == [10, (10 + everything) / 2, everything, 10]


def test_by_hand_whole_heads_stay_whole(tiny: Tiny) -> None:
    llm = load_divided(tiny("gqa"), [(1, 0), (2, 0), (2, 1)])
    llm.eval(PROMPT)
    for layer in range(4):
        native.keep(ctx_of(llm), 0, layer, np.arange(10))
    everything = len(PROMPT)
    assert [len(positions) for positions in kept(llm)] == [10, 10, everything, everything, 10]


def test_heads_with_alibi_are_not_separated(tiny: Tiny) -> None:
    llm = load_divided(tiny("mpt (ALiBi)"), [(1, 2)])
    assert groups(llm) == [(0, 4, False), (1, 4, True), (2, 4, False), (3, 4, False)]


def test_what_cannot_be_divided_is_refused(tiny_model: Path) -> None:
    llm = load(tiny_model, POLICY)
    with pytest.raises(PolicyError, match="layer 9 has no KV head 0"):
        native.keep_heads(ctx_of(llm), [(9, 0)])
    with pytest.raises(PolicyError, match="layer 1 has no KV head 2"):
        native.keep_heads(ctx_of(llm), [(1, 2)])
    llm.eval(PROMPT[:10])
    with pytest.raises(CacheStateError, match="only an empty cache"):
        native.keep_heads(ctx_of(llm), [(0, 0)])
    assert groups(llm) == [(layer, 2, False) for layer in range(4)]
    full = load(tiny_model, "full")
    with pytest.raises(CacheStateError, match="no KV policy"):
        native.keep_heads(ctx_of(full), [(0, 0)])


def test_a_state_brings_its_division(tiny_model: Path) -> None:
    llm = load_divided(tiny_model, WHOLE["gqa"])
    llm.eval(PROMPT)
    assert llm.prune_kv() > 0
    state, expected = llm.save_state(), feed(llm, DECODED)

    other = load(tiny_model, POLICY)
    other.load_state(state)
    assert groups(other) == groups(llm)
    np.testing.assert_array_equal(feed(other, DECODED), expected)


@pytest.mark.parametrize("options", [{}, {"flash_attn": True}, {"flash_attn": True, "type_k": 8, "type_v": 6}], ids=str)
@pytest.mark.parametrize("name", [*WHOLE, "mpt (ALiBi)"])
def test_a_state_of_a_whole_cache_is_divided_as_the_context_is(tiny: Tiny, name: str, options: dict) -> None:
    path = tiny("gqa64" if name == "gqa" and "type_k" in options else name)
    if "type_k" in options and name != "gqa":
        pytest.skip("heads of this model cannot be quantised")
    divisions = [WHOLE.get(name, [(1, 2)]), [(0, 0)], []]
    states, expected = [], []
    for heads in divisions:
        llm = load_divided(path, heads, "streaming" if "mpt" in name else POLICY, **options)
        llm.eval(PROMPT[:300])
        llm.eval(PROMPT[300:])
        llm.n_tokens -= 50  # a hole before the last tokens
        llm.eval(PROMPT[-50:])
        states.append(llm.save_state())
        expected.append(feed(llm, DECODED))
    for heads, logits in zip(divisions[:2], expected, strict=False):
        for state in states:
            llm = load_divided(path, heads, "streaming" if "mpt" in name else POLICY, **options)
            division = groups(llm)
            llm.load_state(state)
            assert groups(llm) == division
            np.testing.assert_allclose(feed(llm, DECODED), logits, atol=1e-5 * np.std(logits))


def test_a_pruned_state_is_not_divided_anew(tiny_model: Path) -> None:
    llm = load_divided(tiny_model, WHOLE["gqa"])
    llm.eval(PROMPT)
    assert llm.prune_kv() > 0
    other = load_divided(tiny_model, [(0, 0)])
    other.load_state(llm.save_state())
    assert groups(other) == groups(llm)


def test_the_division_of_a_state_ends_with_its_conversation(tiny_model: Path) -> None:
    llm = load_divided(tiny_model, WHOLE["gqa"])
    llm.eval(PROMPT)
    other = load(tiny_model, POLICY)
    other.load_state(llm.save_state())
    assert other.kv_stats.n_whole_heads == len(WHOLE["gqa"])
    other.reset()
    other.eval(PROMPT)
    assert other.kv_stats.n_whole_heads == 0


def test_a_state_that_fails_leaves_no_division(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(induction, "load", lambda path, n_window: {(1, 1): 1.0})
    llm = load(tiny_model, ReFreeKV())
    llm.eval(PROMPT)
    state = load_divided(tiny_model, WHOLE["gqa"])
    state.eval(PROMPT)
    damaged = state.save_state()
    damaged.llama_state = damaged.llama_state[: len(damaged.llama_state) // 2]
    damaged.llama_state_size = len(damaged.llama_state)
    with pytest.raises(CacheStateError):
        llm.load_state(damaged)
    llm.eval(PROMPT)
    assert [group for group in groups(llm) if group[2]] == [(1, 1, True)]


def test_heads_may_be_as_scattered_as_they_like(tmp_path: Path) -> None:
    """... in as many layers: the graph has room for it."""
    path = tmp_path / "wide.gguf"
    TinyModel(n_layer=32, n_embd=64, n_head=16, n_head_kv=16, n_embd_head=8, n_ff=32).write(path)
    llm = load_divided(path, [(layer, head) for layer in range(32) for head in range(0, 16, 2)], n_ctx=512)
    llm.eval(PROMPT[:300])
    assert np.isfinite(feed(llm, DECODED[:2])).all()


# -- induction heads ---------------------------------------------------------------------------------------------------


def test_the_score_is_the_attention_to_what_followed_the_previous_occurrence(tiny: Tiny) -> None:
    llm = load(tiny("gqa"), ReFreeKV(n_min=0), **EXACT)
    tokens = induction.random_tokens(llm._model.model)
    assert tokens[: induction.N_RANDOM] * 2 == tokens
    assert BOS not in tokens
    llm.eval(tokens)
    scores = induction.measure(ctx_of(llm))

    model = reference.LlamaReference(tiny("gqa"))
    model.read(tokens)
    positions = np.arange(len(tokens))
    last = positions[-64:]  # as many queries as the policy's window has
    for layer in range(4):
        attention = reference.attention_rows(
            model.last_queries[layer][last], last, model.keys[layer], positions, 1 / np.sqrt(model.n_embd_head)
        )
        by_head = attention[:, np.arange(64), last - induction.N_RANDOM + 1].mean(axis=1)
        expected = by_head.reshape(2, 2).max(axis=1)
        np.testing.assert_allclose([scores[layer, 0], scores[layer, 1]], expected, rtol=0.02)


@pytest.mark.parametrize("what", ["llama_vocab_is_control", "llama_vocab_type"])
def test_any_vocabulary_will_do(tiny_model: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """... one of special tokens only, and none at all."""
    llm = load(tiny_model, POLICY)
    monkeypatch.setattr(llama_cpp, what, lambda *_: what == "llama_vocab_is_control")
    tokens = induction.random_tokens(llm._model.model)
    assert len(tokens) == 2 * induction.N_RANDOM
    assert len(set(tokens)) > 20


def test_heads_above_the_threshold_are_kept_whole(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {(layer, head): 0.25 for layer in range(4) for head in range(2)} | {(1, 1): 0.5, (2, 0): 0.31}
    monkeypatch.setattr(induction, "load", lambda path, options: scores)
    llm = load(tiny_model, ReFreeKV())
    llm.eval(PROMPT)
    assert [group for group in groups(llm) if group[2]] == [(1, 1, True), (2, 1, True)]
    few = load(tiny_model, ReFreeKV(induction=0.4))
    few.eval(PROMPT)
    assert few.kv_stats.n_whole_heads == 1


def test_scores_are_measured_once_per_model_file(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFREEKV_CACHE_DIR", str(tmp_path))
    expected = None
    for _ in range(2):
        llm = load(tiny_model, ReFreeKV())
        llm.eval(PROMPT)
        logits = feed(llm, DECODED)
        # the measurement leaves nothing behind
        expected = logits if expected is None else expected
        np.testing.assert_array_equal(logits, expected)
        monkeypatch.setattr(induction, "measure", lambda ctx: pytest.fail("measured twice"))
    assert len(induction.load(tiny_model, induction.options_of(llm, 64)) or {}) == 8


def test_scores_belong_to_the_options_they_were_measured_with(tiny_model: Path) -> None:
    options = [{}, {"type_k": CACHE_TYPES["f32"]}, {"rope_freq_base": 5e5}, {"kv_overrides": {"llama.x": 1}}]
    texts = [induction.options_of(load(tiny_model, ReFreeKV(), **each), 64) for each in options]
    assert len({*texts, induction.options_of(load(tiny_model, ReFreeKV()), 32)}) == 5
    assert induction.options_of(load(tiny_model, ReFreeKV(), n_ctx=512), 64) == texts[0]


def test_every_query_of_the_window_is_looked_at(tiny_model: Path) -> None:
    scores = []
    for step in (1, 3):
        llm = load(tiny_model, ReFreeKV(window_step=step))
        llm.eval(induction.random_tokens(llm._model.model))
        scores.append(induction.measure(ctx_of(llm)))
    assert scores[0] == scores[1]


def test_a_damaged_or_unwritable_store_of_scores_does_no_harm(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFREEKV_CACHE_DIR", str(tmp_path / "file"))
    (tmp_path / "file").write_text("no folder")
    llm = load(tiny_model, ReFreeKV())
    llm.eval(PROMPT)
    assert induction.load(tiny_model, induction.options_of(llm, 64)) is None

    monkeypatch.setenv("REFREEKV_CACHE_DIR", str(tmp_path))
    induction.save(tiny_model, "", {(0, 0): 0.5})
    assert induction.load(tiny_model, "") == {(0, 0): 0.5}
    next((tmp_path / "induction").iterdir()).write_text('{"format": 1, "scores": [[1]]}')
    assert induction.load(tiny_model, "") is None
