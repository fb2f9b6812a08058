"""The parts of `refreekv eval` that need no model: scores, fidelity, items, caches by name, reports."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refreekv_cpp import Full, PolicyError, ReFreeKV, Streaming
from refreekv_cpp._cache_types import CACHE_TYPES
from refreekv_cpp.document import FACT, write_document
from refreekv_cpp.lab.eval import scores
from refreekv_cpp.lab.eval.data import draw, of_datasets, read_items
from refreekv_cpp.lab.eval.fidelity import Fidelity, compare, first_divergence, summarise
from refreekv_cpp.lab.eval.generators import GENERATORS, generate
from refreekv_cpp.lab.eval.plots import write_plots
from refreekv_cpp.lab.eval.records import RECORDS, SETTINGS
from refreekv_cpp.lab.eval.report import write_report
from refreekv_cpp.lab.eval.spec import parse_spec, parse_specs

# -- scores ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "answer", "expected", "score"),
    [
        ("exact", "The  Heron!", "heron", 1),
        ("exact", "a heron there", "heron", 0),
        ("found", "It is the Silver Heron.", "silver heron", 1),
        ("found", "It is silver; a heron.", "silver heron", 0),
        ("number", "First 3, so it costs $1,234.50.", "1234.5", 1),
        ("number", "18 eggs, less 3", "18", 0),
        ("number", "none", "18", 0),
        ("number", "so x is -2", "-2", 1),
        ("number", "that is True", "true", 1),
        ("f1", "the red cat sat", "a cat", 2 * 1 / (3 + 1)),
        ("f1", "cat cat cat", "cat cat dog", 2 / 3),  # each word counts as often as both have it
        ("f1", "", "cat", 0),
        ("f1", "The.", "a", 1),  # nothing is left of either
        ("rouge_l", "a b c d", "a x c d", 3 / 4),
        ("rouge_l", "d c b a", "a b c d", 1 / 4),  # the order matters, unlike with f1
        ("rouge_l", "one two", "one two three four", 2 * 2 / 6),
        ("rouge_l", "", "a", 0),
    ],
)
def test_scores_by_hand(name: str, answer: str, expected: str, score: float) -> None:
    assert scores.score(name, answer, [expected]) == pytest.approx(score)


def test_the_best_of_several_answers_counts() -> None:
    assert scores.score("exact", "ferry", ["boat", "ferry", "ship"]) == 1


def test_the_share_of_all_answers_counts() -> None:
    assert scores.score("all_found", "They are 7 and 12, I think.", ["12", "7", "9", "5"]) == 0.5


def test_the_bootstrap_covers() -> None:
    rng = np.random.default_rng(0)
    n_runs, hits = 300, 0
    for _ in range(n_runs):
        interval = scores.bootstrap(rng.exponential(2.0, 60), n_resamples=1000)
        assert interval.low < interval.mean < interval.high
        hits += interval.low <= 2.0 <= interval.high
    assert 0.89 <= hits / n_runs <= 0.98  # skewed data and few items: a little below 95 %


def test_the_bootstrap_is_as_wide_as_it_should_be_and_repeats() -> None:
    values = np.random.default_rng(1).normal(0, 1, 400)
    interval = scores.bootstrap(values)
    assert (interval.high - interval.low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.05)
    assert scores.bootstrap(values) == interval
    assert scores.bootstrap(values, seed=1) != interval
    assert scores.bootstrap([0.5]) == scores.Interval(0.5, 0.5, 0.5)


# -- fidelity ----------------------------------------------------------------------------------------------------------


def logits(*probabilities: list[float]) -> Any:
    with np.errstate(divide="ignore"):
        return np.log(np.array(probabilities)).astype(np.float32) + np.float32(3)


def test_fidelity_by_hand() -> None:
    result = compare(logits([0.5, 0.5, 0], [0.2, 0.8, 0]), logits([0.9, 0.1, 0], [0.2, 0.8, 0]), [1, 0])
    assert result.kl == (pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1), rel=1e-6), 0)
    assert result.same_top == (True, True)
    assert result.delta_p == (pytest.approx(-0.4, rel=1e-6), 0)
    assert result.nll == pytest.approx((-math.log(0.1), -math.log(0.2)), rel=1e-6)
    assert result.nll_full == pytest.approx((-math.log(0.5), -math.log(0.2)), rel=1e-6)
    assert compare(logits([0.6, 0.4]), logits([0.4, 0.6]), [0]).same_top == (False,)


def test_kl_is_of_full_against_pruned() -> None:
    # what the full cache finds impossible costs nothing, the other way round it costs all
    assert compare(logits([1, 0]), logits([0.5, 0.5]), [0]).kl == pytest.approx((math.log(2),), rel=1e-6)
    assert compare(logits([0.5, 0.5]), logits([1, 0]), [0]).kl == (math.inf,)


def test_kl_keeps_what_single_precision_would_lose() -> None:
    wide = np.zeros((1, 50_000), dtype=np.float32)
    near = wide.copy()
    near[0, 0] = 1e-3
    assert compare(wide, near, [0]).kl[0] == pytest.approx(1e-6 / 2 / 50_000, rel=1e-3)


def test_summary_by_hand() -> None:
    first = Fidelity((0.0, 1.0), (True, True), (0.3, -0.4), (1.0, 2.0), (1.0, 1.0))
    second = Fidelity((2.0,), (False,), (0.0,), (3.0,), (1.0,))
    summary = summarise([first, second])
    assert summary is not None
    assert (summary.n, summary.kl_mean, summary.kl_median, summary.kl_max) == (3, 1, 1, 2)
    assert (summary.kl_95, summary.kl_99) == (pytest.approx(1.9), pytest.approx(1.98))
    assert summary.kl_999 == pytest.approx(1.998)
    assert summary.same_top == pytest.approx(2 / 3)
    assert summary.delta_p_rms == pytest.approx(math.sqrt((0.09 + 0.16) / 3))
    assert summary.perplexity_ratio == pytest.approx(math.e)  # exp(mean(0, 1, 2))
    assert summarise([]) is None
    assert summarise([Fidelity((), (), (), (), ())]) is None


@pytest.mark.parametrize(
    ("tokens", "where"), [([1, 2, 3], None), ([1, 5, 3], 1), ([1, 2], 2), ([1, 2, 3, 4], 3), ([], 0)]
)
def test_first_divergence(tokens: list[int], where: int | None) -> None:
    assert first_divergence(tokens, [1, 2, 3]) == where


# -- caches by name ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "policy", "cache_type"),
    [
        ("full", Full(), "f16"),
        ("full@q8_0", Full(), "q8_0"),
        ("streaming:0.3", Streaming(budget=0.3), "f16"),
        ("streaming:budget=300@q4_0", Streaming(budget=300), "q4_0"),
        ("full@q8_0/q4_0", Full(), "q8_0/q4_0"),
        ("refreekv:theta=0.01", ReFreeKV(theta=0.01), "f16"),
    ],
)
def test_caches_by_name(text: str, policy: Any, cache_type: str) -> None:
    spec = parse_spec(text)
    assert (spec.text, spec.policy, spec.cache_type) == (text, policy, cache_type)
    quantised = spec.llama_options().get("type_k")
    assert (quantised is None) == (cache_type == "f16")


def test_k_and_v_of_different_types() -> None:
    options = parse_spec("full@q8_0/q4_0").llama_options()
    assert (options["type_k"], options["type_v"]) == (CACHE_TYPES["q8_0"], CACHE_TYPES["q4_0"])


@pytest.mark.parametrize(
    ("text", "evicted"),
    [
        ("refreekv", "keep"),
        ("refreekv:theta=0.01@q8_0", "keep"),
        ("refreekv:theta=0", "drop"),
        ("paper", "drop"),
        ("snapkv:0.3", "drop"),
    ],
)
def test_a_cache_that_reads_evicted_rows_keeps_them(text: str, evicted: str) -> None:
    assert parse_spec(text).llama_options()["kv_evicted"] == evicted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("refreekv:theta=2", "theta=2: must be from 0 to less than 1"),
        ("refrekv", "did you mean 'refreekv'"),
        ("full@q9", "the type must be one of f32, f16"),
        ("full@q8_0/q9", "the type must be one of f32, f16"),
        ("refreekv@q4_0+256", "must be full@TYPE+N, with a type of q8_0"),
        ("full@f32+256", "must be full@TYPE+N, with a type of q8_0"),
        ("full@q4_0+x", "must be full@TYPE+N, with a type of q8_0"),
        ("refreekv:treshold=1", "did you mean 'threshold'"),
        ("", "kv_policy='': unknown"),
    ],
)
def test_caches_that_are_none(text: str, message: str) -> None:
    with pytest.raises(PolicyError) as raised:
        parse_specs(f"full,{text}")
    assert message in str(raised.value)


def test_the_full_cache_is_always_the_first() -> None:
    assert [spec.text for spec in parse_specs("paper, full,paper")] == ["full", "paper"]


# -- items -------------------------------------------------------------------------------------------------------------

ITEM = {"id": "a", "dataset": "d", "context": "text", "question": "why?", "answers": ["so"], "meta": {}}


def write_items(folder: Path, *items: dict[str, Any], name: str = "d.jsonl") -> Path:
    (folder / name).write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder


def test_items_are_read(tmp_path: Path) -> None:
    second = {"question": "and?", "answers": ["yes", "no"]}
    write_items(
        tmp_path, ITEM, {**ITEM, "id": "b", "dataset": "qmsum"}, {**ITEM, "id": "c", "score": "exact", "second": second}
    )
    a, b, c = read_items(tmp_path)
    assert (a.question.text, a.question.answers, a.second, a.score) == ("why?", ("so",), None, "f1")
    assert b.score == "rouge_l"
    assert c.score == "exact"
    assert c.second is not None
    assert c.second.answers == ("yes", "no")


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ([], "an item is a JSON object"),
        ({**ITEM, "id": 5}, "'id' must be a text"),
        ({**ITEM, "context": None}, "'context' must be a text"),
        ({**ITEM, "answers": "so"}, "'answers' must be a list of texts"),
        ({**ITEM, "answers": []}, "'answers' must be a list of texts"),
        ({**ITEM, "second": {"question": "x"}}, "'answers' must be"),
        ({**ITEM, "second": "x"}, "'second' must be an object"),
        ({**ITEM, "score": "bleu"}, "score 'bleu': must be one of f1, rouge_l"),
        ({**ITEM, "context": "", "question": ""}, "neither context nor question"),
        ({**ITEM, "id": "first"}, "the id 'first' was there before"),
    ],
    ids=str,
)
def test_lines_that_are_no_items(tmp_path: Path, item: Any, message: str) -> None:
    write_items(tmp_path, {**ITEM, "id": "first"}, item)
    with pytest.raises(ValueError, match=r"d\.jsonl:2: ") as raised:
        read_items(tmp_path)
    assert message in str(raised.value)


def test_a_folder_without_items(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no \\*\\.jsonl"):
        read_items(tmp_path)


def test_items_are_drawn_by_the_seed(tmp_path: Path) -> None:
    for dataset in ("d", "e"):
        rows = [{**ITEM, "id": f"{dataset}{i}", "dataset": dataset} for i in range(30)]
        write_items(tmp_path, *rows, name=f"{dataset}.jsonl")
    items = read_items(tmp_path)
    drawn = draw(items, 5, seed=0)
    assert [item.dataset for item in drawn] == ["d"] * 5 + ["e"] * 5
    assert draw(items, 5, seed=0) == drawn
    assert draw(items, 5, seed=1) != drawn
    assert draw(of_datasets(items, ["e"]), 5, seed=0) == drawn[5:]
    assert draw(items, 100, seed=0) == items
    with pytest.raises(ValueError, match="dataset 'f': not there"):
        of_datasets(items, ["f"])


def words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize("name", GENERATORS)
def test_made_up_items(name: str) -> None:
    lengths, depths = [300, 900], [0.0, 0.4, 1.0]
    items = generate([name], lengths, depths, words, seed=3)
    assert items == generate([name], lengths, depths, words, seed=3)
    assert [item.context for item in items] != [
        item.context for item in generate([name], lengths, depths, words, seed=4)
    ]
    assert len({item.id for item in items}) == 6
    for item in items:
        assert words(item.context) == pytest.approx(item.meta["length"], rel=0.1, abs=30)
        asked = item.second or item.question
        (answer,) = asked.answers
        assert item.context.count(answer) == 1
        where = item.context.index(answer) / len(item.context)
        assert where == pytest.approx(item.meta["depth"], abs=0.12)
        if item.second:
            assert item.question.answers != item.second.answers
            assert item.question.answers[0] in item.context


def test_facts_anywhere_in_the_document() -> None:
    document = write_document(500, words, facts=[(1, "Last."), (0, "First."), (0.5, "Half.")], seed=1)
    assert document.startswith("First. ")
    assert document.endswith(" Last.")
    assert document.index("Half.") == pytest.approx(len(document) / 2, rel=0.1)
    assert document != write_document(500, words, facts=[(1, "Last."), (0, "First."), (0.5, "Half.")], seed=2)
    assert FACT not in document


# -- reports -----------------------------------------------------------------------------------------------------------


def record(item: str, cache: str, score: float | None, **more: Any) -> dict[str, Any]:
    one = {"kl": [0.5], "same_top": [True], "delta_p": [0.1], "nll": [2.0], "nll_full": [1.0]}
    return {
        "item": item,
        "dataset": "d",
        "cache": cache,
        "mode": "seen",
        "meta": {},
        "n_tokens": 100,
        "budget": 0.5,
        "cells_kept": [20, 80],
        "bytes": 2**20,
        "bytes_reference": 2**21,
        "greedy": one,
        "real": one,
        "divergence": None,
        "score_name": "f1",
        "score": score,
        "seconds": {"prefill": 2.0, "prune": 0.25, "decode": 0.01},
        **more,
    }


def rows_of(report: str, title: str) -> list[list[str]]:
    """The cells of the table under this title."""
    section = report.split(f"## {title}\n\n")[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines()[2:]]


def test_report_by_hand(tmp_path: Path) -> None:
    (tmp_path / SETTINGS).write_text('{"model": "m.gguf", "seed": 0}')
    records = [
        record("a", "full", 1.0, budget=1.0, bytes=2**21),
        record("b", "full", 0.5, budget=1.0, bytes=2**21),
        record("c", "full", 1.0, budget=1.0, bytes=2**21),
        record("a", "paper", 0.0, divergence=4),
        record("b", "paper", 0.5, cells_kept=[40, 100]),
        record("d", "paper", 0.25),  # has no partner, and no part in the comparison
    ]
    (tmp_path / RECORDS).write_text("".join(json.dumps(line) + "\n" for line in records))
    report = write_report(tmp_path)
    assert (tmp_path / "report.md").read_text() == report

    (tasks,) = rows_of(report, "Tasks")
    low_high = "-1.00 to +0.00"
    assert tasks == [
        *["d", "f1", "paper", "seen", "2", "0.75", "0.25", "-0.50"],
        *[low_high, "50%", "1.0 MiB (50%)"],
    ]
    fidelity = rows_of(report, "Fidelity: along the full cache's greedy answer")
    assert [row[0] for row in fidelity] == ["full", "paper"]
    assert fidelity[1][2:] == [
        *["3", "50%", "1.0 MiB (50%)", "0.5", "0.5", "0.5", "0.5", "0.5", "0.5", "100.0%", "10.0%"],
        *["× 2.718", "2 of 3", "token 4"],
    ]
    assert rows_of(report, "Mean KL along the full cache's greedy answer, per dataset") == [["d", "0.5"]]
    assert rows_of(report, "Cells kept, per layer") == [["0", "27%"], ["1", "87%"]]
    assert rows_of(report, "Speed")[1][2:5] == ["50", "250", "10.0"]


def test_a_long_answer_in_parts(tmp_path: Path) -> None:
    (tmp_path / SETTINGS).write_text('{"model": "m.gguf", "seed": 0}')
    n_tokens = {"a": 300, "b": 130}
    columns = ("same_top", "delta_p", "nll", "nll_full")
    records = [
        record(
            item, cache, None, greedy={"kl": [float(i < 128) for i in range(n)], **{key: [1.0] * n for key in columns}}
        )
        for cache in ("full", "paper")
        for item, n in n_tokens.items()
    ]
    (tmp_path / RECORDS).write_text("".join(json.dumps(line) + "\n" for line in records))
    report = write_report(tmp_path)
    rows = rows_of(report, "Mean KL from token to token of that answer")
    assert rows == [["1 to 128", "1"], ["129 to 256", "0"], ["257 to 512", "0"]]
    worst = rows_of(report, "The tokens that are furthest off")
    assert worst == [["a", "greedy", str(i + 1), "0.37", "0.37", "1"] for i in range(10)]
    assert tmp_path / "along.png" in write_plots(tmp_path)
    assert tmp_path / "tasks.png" not in write_plots(tmp_path)  # there is one dataset only, without scores


def test_pictures_of_the_full_cache_alone(tmp_path: Path) -> None:
    """There is nothing to compare it with, in several datasets or along a long answer."""
    long = {"kl": [0.0] * 300, **{key: [1.0] * 300 for key in ("same_top", "delta_p", "nll", "nll_full")}}
    records = [record(name, "full", 0.5, dataset=name, greedy=long) for name in ("a", "b")]
    (tmp_path / RECORDS).write_text("".join(json.dumps(line) + "\n" for line in records))
    assert write_plots(tmp_path) == [tmp_path / "quality.png", tmp_path / "layers.png"]


def test_a_retrieval_map_by_hand(tmp_path: Path) -> None:
    (tmp_path / SETTINGS).write_text('{"model": "m.gguf", "seed": 0}')
    places = {"a": (0.5, 100), "b": (0.5, 100), "c": (0.5, 200), "e": (0, 100)}
    records = [
        record(item, cache, score, meta={"depth": places[item][0], "length": places[item][1]})
        for cache in ("full", "paper")
        for item, score in (("a", 1.0), ("b", 0.0), ("c", 0.25), ("e", 0.75))
        if (cache, item) != ("paper", "e")
    ]
    second = record("f", "full", 0.0, second_score=1.0, dataset="two", meta={"depth": 0.1, "length": 50})
    (tmp_path / RECORDS).write_text("".join(json.dumps(line) + "\n" for line in [*records, second]))
    d, two = write_report(tmp_path).split("## Where a fact was found\n\n")[1].split("\n## ")[0].split("two:\n")
    cells = [line.strip("| ").split(" | ") for line in d.splitlines()[4:] if line]
    assert cells == [["0", "100", "0.75", "-"], ["0.5", "100", "0.50", "0.50"], ["0.5", "200", "0.25", "0.25"]]
    assert "| 0.1 | 50 | 1.00 | - |" in two
