"""Policies written in Python (`PythonPolicy`): what they are shown, and what becomes of their answer."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from by_definition import CONTEXTS, MODEL_TOLERANCE, attention_of
from native_build import ROOT
from policies import PythonStreaming
from support import F16, F32, Sequences, ctx_of, feed, generate, kept, load
from tiny import random_tokens

from refreekv_cpp import CacheStateError, Llama, Policy, PolicyError, PythonPolicy, ReFreeKV, Streaming, native

DOCUMENT = ROOT / "docs" / "how-to" / "own-policy.md"
N_PROMPT = 1060
PROMPT = random_tokens(N_PROMPT)
QUESTION = random_tokens(300, seed=2)


@dataclass(frozen=True, kw_only=True)
class PythonReFreeKV(PythonPolicy):
    """`ReFreeKV` a second time: it leaves out whole blocks by itself, by its own ranking."""

    threshold: float = 0.35
    n_window: int = 64

    def select(self, attention: Any, positions: Any, layer: int) -> Any:
        rule = ReFreeKV(threshold=self.threshold)
        selection = reference.select_refreekv(rule, attention.astype(np.float64), self.n_block)
        return np.isin(np.arange(len(positions)), selection.kept)


class Answers(PythonPolicy):
    """Answers in each layer what the function says, given the number of cells."""

    answer: Any = None

    def select(self, attention: Any, positions: Any, layer: int) -> Any:
        return type(self).answer(len(positions), layer)


def answering(answer: Callable[[int, int], Any], **options: Any) -> PythonPolicy:
    return type("Answers", (Answers,), {"answer": staticmethod(answer)})(**options)


def cells(*which: int) -> Callable[[int, int], Any]:
    return lambda n_cells, layer: np.isin(np.arange(n_cells), which)


# -- the same as native ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("native_policy", "python_policy"),
    [
        (Streaming(budget=0.3), PythonStreaming()),
        (Streaming(budget=0.7, n_sink=20), PythonStreaming(budget=0.7, n_sink=20)),
        (ReFreeKV(), PythonReFreeKV()),
        (ReFreeKV(threshold=0.7), PythonReFreeKV(threshold=0.7)),
    ],
    ids=["streaming", "streaming-0.7", "refreekv", "refreekv-0.7"],
)
@pytest.mark.parametrize("model", ["gqa", "mha"])
def test_it_keeps_what_the_same_policy_in_native_keeps(
    tiny: Callable[[str], Path], model: str, native_policy: Policy, python_policy: PythonPolicy
) -> None:
    results = []
    for policy in (native_policy, python_policy):
        llm = load(tiny(model), policy, type_k=F32, type_v=F32)
        answer = generate(llm, PROMPT)
        stats = llm.kv_stats
        assert stats.n_prunes == 1
        assert stats.bytes_freed > 0
        results.append((kept(llm), answer, stats.bytes, stats.n_layouts, stats.bytes_freed))
    assert results[0] == results[1]


def test_it_sees_and_prunes_a_pruned_cache(tiny_model: Path) -> None:
    by_native, by_python = load(tiny_model, ReFreeKV()), load(tiny_model, PythonReFreeKV())
    for llm in (by_native, by_python):
        llm.eval(PROMPT)
        llm.prune_kv()
        llm.eval(random_tokens(601, seed=1)[1:])
    assert by_python.prune_kv() == by_native.prune_kv() > 0
    assert kept(by_python) == kept(by_native)
    assert by_python.kv_stats.n_prunes == 2
    np.testing.assert_array_equal(feed(by_python, QUESTION[:5]), feed(by_native, QUESTION[:5]))


def test_it_keeps_to_a_memory_limit(tiny_model: Path) -> None:
    by_native, by_python = (
        load(tiny_model, policy, kv_memory_limit="300KiB", n_batch=256)
        for policy in (Streaming(budget=0.3), PythonStreaming())
    )
    for llm in (by_native, by_python):
        llm.eval(random_tokens(2000))
    assert by_python.kv_stats.n_limit_prunes == by_native.kv_stats.n_limit_prunes > 0
    assert kept(by_python) == kept(by_native)


# -- what it is shown --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", CONTEXTS)
def test_the_attention_is_that_of_the_queries_to_the_keys(tiny: Callable[[str], Path], context: str) -> None:
    model, type_k, flash_attn, n_prompt = CONTEXTS[context]
    llm = load(tiny(model), PythonStreaming(n_window=48), type_k=type_k, flash_attn=flash_attn)
    llm.eval(random_tokens(n_prompt))
    for _ in range(2):
        for layer in range(native.stats(ctx_of(llm)).n_layer):
            attention = native.read_attention(ctx_of(llm), 0, layer)
            expected = attention_of(llm, llm.kv_policy, layer, type_k)
            assert attention.shape == (native.layer(ctx_of(llm), layer).n_head, 48, len(kept(llm)[layer]))
            np.testing.assert_allclose(attention, expected, atol=MODEL_TOLERANCE)
        llm.prune_kv()  # and again, where slots and cells are not the same any more
        llm.eval(QUESTION[:50])


def test_the_attention_of_a_layer_too_large_for_one_graph(tiny: Callable[[str], Path]) -> None:
    llm = load(tiny("many-heads"), PythonStreaming(n_window=256))
    llm.eval(random_tokens(1800))
    attention = native.read_attention(ctx_of(llm), 0, 0)
    np.testing.assert_allclose(attention, attention_of(llm, llm.kv_policy, 0, F16), atol=MODEL_TOLERANCE)


@pytest.mark.parametrize("kv_unified", [True, False])
def test_the_attention_of_one_sequence_among_others(tiny_model: Path, kv_unified: bool) -> None:
    # their tokens come in turn, so that the slots of a sequence are not those of its positions
    sequences = Sequences(tiny_model, PythonStreaming(n_window=40), kv_unified=kv_unified)
    for i in range(3):
        sequences.read_together({seq_id: random_tokens(150, seed=10 * i + seq_id) for seq_id in range(2)})
    for seq_id in range(2):
        queries, query_pos = native.read_queries(sequences.ctx, seq_id, 2)
        keys, key_pos = native.read_keys(sequences.ctx, seq_id, 2)
        expected = reference.attention_rows(queries, query_pos, keys, key_pos, native.layer(sequences.ctx, 2).kq_scale)
        attention = native.read_attention(sequences.ctx, seq_id, 2)
        assert attention.shape == (4, 40, 450)
        np.testing.assert_allclose(attention, expected, atol=MODEL_TOLERANCE)


def test_the_policy_gets_attention_positions_and_layer(tiny_model: Path) -> None:
    seen = []

    class Looks(PythonPolicy):
        def select(self, attention: Any, positions: Any, layer: int) -> Any:
            seen.append((attention.shape, positions.tolist(), layer))
            positions[:] = 0  # its own copy
            return np.arange(len(positions)) % 2 == 0

    llm = load(tiny_model, Looks(n_window=20))
    llm.eval(PROMPT)
    llm.prune_kv()
    assert seen == [((4, 20, N_PROMPT), list(range(N_PROMPT)), layer) for layer in range(4)]
    first = kept(llm)
    seen.clear()
    llm.eval(QUESTION)
    llm.prune_kv()
    assert [positions[: -len(QUESTION)] for _, positions, _ in seen] == first


def test_attention_is_read_with_or_without_a_policy_that_evicts(tiny_model: Path) -> None:
    rows = []
    for policy in (ReFreeKV(n_window=32), PythonStreaming()):
        llm = load(tiny_model, policy)
        llm.eval(PROMPT)
        rows.append(native.read_attention(ctx_of(llm), 0, 1))
    np.testing.assert_array_equal(*rows)


# -- what becomes of the answer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (cells(5), [5, *range(N_PROMPT - 35, N_PROMPT)]),  # 1059 are left out, of which 4 blocks may leave
        (cells(N_PROMPT - 1), list(range(N_PROMPT - 36, N_PROMPT))),
        (cells(*range(36)), list(range(36))),
        (cells(*range(37)), [*range(37), *range(N_PROMPT - 255, N_PROMPT)]),
        (cells(*range(N_PROMPT - 255)), list(range(N_PROMPT))),
        (cells(*range(N_PROMPT)), list(range(N_PROMPT))),
    ],
    ids=["one", "the-last", "four-blocks", "four-blocks-less-one-cell", "less-than-a-block", "all"],
)
def test_cells_leave_in_whole_blocks(tiny_model: Path, answer: Callable[[int, int], Any], expected: list[int]) -> None:
    llm = load(tiny_model, answering(answer))
    llm.eval(PROMPT)
    assert llm.prune_kv() == 4 * (N_PROMPT - len(expected))
    assert kept(llm) == [expected] * 4
    generate(llm, QUESTION, n=3, reset=False)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            lambda n, layer: np.ones(n),
            r"layer 0: must return an array of bool, shape \(1060,\); it .* float64",
        ),
        (lambda n, layer: np.arange(5), r"it returned one of int64, shape \(5,\)"),
        (lambda n, layer: np.ones(n - 1, dtype=bool), r"it returned one of bool, shape \(1059,\)"),
        (lambda n, layer: np.ones((1, n), dtype=bool), r"shape \(1, 1060\)"),
        (lambda n, layer: None, "it returned one of object"),
        (lambda n, layer: np.zeros(n, dtype=bool), "layer 0: at least one cell has to stay"),
        (lambda n, layer: cells(7)(n, layer) if layer < 2 else True, r"Answers.select: layer 2: .* shape \(\)"),
    ],
    ids=["floats", "indices", "short", "two-dimensional", "none", "nothing", "in-a-later-layer"],
)
def test_answers_that_are_no_mask_are_refused_before_anything_is_evicted(
    tiny_model: Path, answer: Callable[[int, int], Any], message: str
) -> None:
    llm = load(tiny_model, answering(answer))
    llm.eval(PROMPT)
    with pytest.raises(PolicyError, match=message):
        llm.prune_kv()
    assert kept(llm) == [list(range(N_PROMPT))] * 4
    assert native.pruned_pos(ctx_of(llm), 0) == -1


def test_errors_of_the_policy_come_through(tiny_model: Path) -> None:
    def fails_in_layer_1(n_cells: int, layer: int) -> Any:
        if layer == 1:
            raise KeyError("not mine")
        return cells(7)(n_cells, layer)

    llm = load(tiny_model, answering(fails_in_layer_1))
    with pytest.raises(KeyError, match="not mine"):
        generate(llm, PROMPT)
    assert kept(llm) == [list(range(N_PROMPT))] * 4


@pytest.mark.parametrize("n_min", [N_PROMPT, N_PROMPT + 1])
def test_prompts_shorter_than_n_min_are_left_whole(tiny_model: Path, n_min: int) -> None:
    llm = load(tiny_model, PythonStreaming(n_min=n_min))
    llm.eval(PROMPT)
    assert (llm.prune_kv() > 0) == (n_min <= N_PROMPT)


# -- what it cannot do -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_window": 0}, "n_window=0: must be from 1 to 256"),
        ({"n_min": -1}, "n_min=-1: must not be negative"),
        ({"n_sinks": 4}, "PythonStreaming has no option 'n_sinks', did you mean 'n_sink'"),
    ],
    ids=str,
)
def test_its_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError) as raised:
        PythonStreaming(**options)
    assert message in str(raised.value)


def test_select_has_to_be_defined() -> None:
    with pytest.raises(TypeError, match="select"):
        type("Nothing", (PythonPolicy,), {})()


def test_a_cache_whose_last_query_is_gone_is_not_judged(tiny_model: Path) -> None:
    llm = load(tiny_model, PythonStreaming())
    llm.eval(PROMPT)
    llm.n_tokens = 600
    with pytest.raises(CacheStateError, match="the last query of sequence 0 is not there any more"):
        llm.prune_kv()


@pytest.mark.parametrize("policy", [ReFreeKV(), PythonStreaming()], ids=lambda policy: policy.name)
def test_a_restored_cache_has_no_queries_to_judge_by(tiny_model: Path, policy: Policy) -> None:
    before, after = load(tiny_model, policy), load(tiny_model, policy)
    before.eval(PROMPT)
    after.load_state(before.save_state())
    with pytest.raises(CacheStateError, match="the last query of sequence 0 is not there any more"):
        after.prune_kv()


def test_a_context_that_keeps_no_queries_has_no_attention_to_read(tiny_model: Path) -> None:
    llm = load(tiny_model, Streaming())
    llm.eval(PROMPT)
    with pytest.raises(CacheStateError, match="layer 0 has no queries of sequence 0"):
        native.read_attention(ctx_of(llm), 0, 0)
    full = load(tiny_model, "full")
    with pytest.raises(CacheStateError, match="this context has no KV policy"):
        native.read_attention(ctx_of(full), 0, 0)


@pytest.mark.parametrize(("seq_id", "index"), [(1, 0), (-1, 0), (0, 4), (0, -1)])
def test_attention_of_what_is_not_there(tiny_model: Path, seq_id: int, index: int) -> None:
    llm = load(tiny_model, PythonStreaming())
    llm.eval(PROMPT)
    with pytest.raises(PolicyError, match=r"has no tokens|must be 0 to 3"):
        native.read_attention(ctx_of(llm), seq_id, index)


def test_a_pickled_llama_keeps_its_policy(tiny_model: Path) -> None:
    llm = pickle.loads(pickle.dumps(load(tiny_model, PythonStreaming(budget=0.5))))
    llm.eval(PROMPT)
    assert llm.prune_kv() > 0
    assert llm.kv_stats.policy == "PythonStreaming"


# -- the document ------------------------------------------------------------------------------------------------------


def test_the_example_in_the_document_runs(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert 'model_path="model.gguf"' in example
    (tmp_path / "model.gguf").symlink_to(tiny_model)
    (tmp_path / "report.txt").write_text("All is well. " * 100, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(example, str(DOCUMENT), "exec"), names)
    llm: Llama = names["llm"]
    assert llm.kv_stats.n_prunes == 1
    assert llm.kv_stats.budget < 0.9
    assert "HeaviestHalf" in capsys.readouterr().out
