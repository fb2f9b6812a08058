"""`refreekv eval` as a whole: the harness must itself be beyond doubt before what it says about caches is."""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import refreekv
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from support import ctx_of, feed, load, logits
from tiny import random_tokens
from typer.testing import Result

from refreekv_cpp import Streaming, native
from refreekv_cpp.lab.eval.data import Item, Question
from refreekv_cpp.lab.eval.generators import generate
from refreekv_cpp.lab.eval.prompts import Prompter, _render
from refreekv_cpp.lab.eval.records import PACKED, RECORDS, SETTINGS, read_records
from refreekv_cpp.lab.eval.session import Session
from refreekv_cpp.lab.eval.spec import parse_spec
from refreekv_cpp.lab.eval.turn import Settings, Turn

# full@f16 is the full cache again, in a context of its own; all of the tiny models' prompts are short
CACHES = "full,full@f16,full@q8_0,refreekv:theta=0:n_min=0,streaming:0.01:n_min=0"
SHORT = ["--continuation", "8", "--threads", "1"]
MADE_UP = ["--lengths", "600", "--depths", "0.2", "--policies", CACHES, *SHORT]


def evaluate(model: Path, out: Path, *args: str | Path) -> Result:
    result = refreekv("eval", model, "--out", out, *args)
    assert result.exit_code == 0, result.output
    return result


def without_seconds(folder: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name != "seconds"} for line in read_records(folder)]


@pytest.fixture(scope="module")
def model(tiny: Callable[[str], Path]) -> Path:
    """One whose cache can be quantised."""
    return tiny("gqa64")


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run: three made-up items, five caches, the question seen and hidden."""
    folder = tmp_path_factory.mktemp("run") / "out"
    evaluate(model, folder, *MADE_UP)
    return folder


def mean_kl(folder: Path, cache: str, mode: str, continuation: str = "greedy") -> float:
    kl = [
        record[continuation]["kl"]
        for record in read_records(folder)
        if (record["cache"], record["mode"]) == (cache, mode)
    ]
    assert len(kl) == 3
    return float(np.mean(np.concatenate(kl)))


# -- the harness -------------------------------------------------------------------------------------------------------


def test_a_cache_that_takes_over_what_another_has_read_is_as_good_as_one_that_reads(finished: Path) -> None:
    records = [record for record in read_records(finished) if record["cache"] == "full@f16"]
    assert len(records) == 6
    for record in records:
        assert max(record["greedy"]["kl"] + record["real"]["kl"]) < 1e-6
        assert record["divergence"] is None
        assert record["seconds"]["prefill"] is None


def test_the_full_cache_against_itself_is_exactly_the_same(finished: Path) -> None:
    records = [record for record in read_records(finished) if record["cache"] == "full"]
    assert len(records) == 6
    for record in records:
        for continuation in ("greedy", "real"):
            part = record[continuation]
            assert set(part["kl"]) == {0.0}
            assert set(part["delta_p"]) == {0.0}
            assert all(part["same_top"])
            assert part["nll"] == part["nll_full"]
        assert record["divergence"] is None
        assert record["budget"] == 1
        assert record["bytes"] == record["bytes_reference"]


@pytest.mark.parametrize("mode", ["seen", "hidden"])
def test_the_less_is_kept_the_worse_it_scores(finished: Path, mode: str) -> None:
    quantised, pruned, hardly_any = (mean_kl(finished, cache, mode) for cache in CACHES.split(",")[2:])
    assert 0 < quantised < pruned < hardly_any
    assert hardly_any > 100 * quantised


def test_a_cache_of_few_bits_with_an_exact_end(model: Path, tmp_path: Path) -> None:
    parts = {"full@q4_0+9999": 1.0, "full@q4_0+256": None, "full@q4_0+0": 18 / 64, "full@q8_0/q4_0+0": (34 + 18) / 128}
    evaluate(model, tmp_path / "out", *MADE_UP, "--policies", ",".join(parts))
    kl = [mean_kl(tmp_path / "out", cache, "seen") for cache in parts]
    assert kl[0] < 1e-6 < kl[1] < kl[2]
    assert kl[3] < kl[2]
    for record in read_records(tmp_path / "out"):
        part = parts.get(record["cache"])
        if part is not None:
            assert record["bytes"] / record["bytes_reference"] == pytest.approx(part)


def test_the_kernel_of_pruned_caches_reads_the_full_one(model: Path, tmp_path: Path) -> None:
    unpruned, pruned = "refreekv:n_min=9999", "refreekv:n_min=0"
    for name in ("kernel", "stock"):
        same = ["--same-kernel"] if name == "kernel" else []
        evaluate(model, tmp_path / name, *MADE_UP, "--policies", f"{unpruned},{pruned}", *same)
    assert mean_kl(tmp_path / "kernel", "full", "seen") == 0
    # the last token was read in another batch
    assert mean_kl(tmp_path / "kernel", unpruned, "seen") < mean_kl(tmp_path / "stock", unpruned, "seen") / 10
    assert mean_kl(tmp_path / "kernel", pruned, "seen") > 0


def test_cost_stands_beside_quality(finished: Path) -> None:
    by_cache = {record["cache"]: record for record in read_records(finished) if record["mode"] == "seen"}
    assert by_cache["full@q8_0"]["bytes"] == pytest.approx(by_cache["full"]["bytes"] * 34 / 64, rel=0.02)
    assert by_cache["full@q8_0"]["budget"] == 1
    pruned = by_cache["streaming:0.01:n_min=0"]
    assert pruned["budget"] < 0.35
    assert sum(pruned["cells_kept"]) / len(pruned["cells_kept"]) == pytest.approx(pruned["budget"] * pruned["n_tokens"])
    assert pruned["bytes"] < pruned["bytes_reference"] == by_cache["full"]["bytes"]
    assert pruned["seconds"]["prune"] > 0


@pytest.mark.parametrize("part", [0.0, 0.62])
def test_a_run_that_was_stopped_goes_on(model: Path, finished: Path, tmp_path: Path, part: float) -> None:
    """Killed at any byte: the records and the report are those of a run that was not."""
    records = (finished / RECORDS).read_bytes()
    cut = records[: int(len(records) * part)]
    (tmp_path / SETTINGS).write_text((finished / SETTINGS).read_text())
    (tmp_path / RECORDS).write_bytes(cut)
    result = evaluate(model, tmp_path, *MADE_UP)
    n_there = cut.count(b"\n")
    assert f"{n_there} records are there, {30 - n_there} to do" in result.stderr
    assert (tmp_path / RECORDS).read_bytes().startswith(cut[: cut.rfind(b"\n") + 1])
    assert without_seconds(tmp_path) == without_seconds(finished)
    reports = [(folder / "report.md").read_text().split("## Speed") for folder in (tmp_path, finished)]
    assert reports[0][0] == reports[1][0]


def test_a_packed_run_is_reported_and_goes_on(model: Path, finished: Path, tmp_path: Path) -> None:
    packed = lzma.compress((finished / RECORDS).read_bytes().partition(b"\n")[0] + b"\n")
    (tmp_path / SETTINGS).write_text((finished / SETTINGS).read_text())
    (tmp_path / PACKED).write_bytes(packed)
    assert "1 item" in refreekv("eval-report", tmp_path).stdout
    assert not (tmp_path / RECORDS).exists()
    assert "1 records are there" in evaluate(model, tmp_path, *MADE_UP).stderr
    assert without_seconds(tmp_path) == without_seconds(finished)

    (tmp_path / RECORDS).unlink()
    (tmp_path / PACKED).write_bytes(packed[:-8])
    result = refreekv("eval-report", tmp_path)
    assert result.exit_code == 2
    assert "damaged" in result.stderr


def test_more_caches_join_a_run(model: Path, tmp_path: Path) -> None:
    options = ["--generate", "needle", "--lengths", "600", "--depths", "0.2", *SHORT, "--question", "hidden"]
    evaluate(model, tmp_path, *options, "--policies", "full")
    evaluate(model, tmp_path, *options, "--policies", "paper")
    assert [record["cache"] for record in read_records(tmp_path)] == ["full", "paper"]


def test_more_items_join_a_run(model: Path, tmp_path: Path) -> None:
    options = ["--generate", "needle", "--depths", "0.2", *SHORT, "--question", "hidden", "--policies", "full"]
    evaluate(model, tmp_path, *options, "--lengths", "600")
    (first,) = read_records(tmp_path)
    evaluate(model, tmp_path, *options, "--lengths", "500,600")
    assert [record["item"] for record in read_records(tmp_path)] == [first["item"], "needle/500/0.2/0"]
    assert read_records(tmp_path)[0] == first
    assert "2 items" in (tmp_path / "report.md").read_text()


def test_an_item_that_has_changed_does_not_join_a_run(model: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for answer, code in (("red", 0), ("blue", 2)):
        item = {
            "id": "x/1",
            "dataset": "x",
            "context": "The door is red. " * 20,
            "question": "Which?",
            "answers": [answer],
        }
        (data / "x.jsonl").write_text(json.dumps(item) + "\n")
        result = refreekv("eval", model, "--out", tmp_path / "run", "--data", data, *SHORT, "--policies", "full")
        assert result.exit_code == code, result.stderr
    assert "x/1 was another one" in result.stderr


def test_a_folder_holds_one_run(model: Path, finished: Path) -> None:
    before = (finished / RECORDS).read_bytes()
    for options, message in (
        (["--seed", "1"], "seed 0, not 1"),
        (["--continuation", "9"], "n_continuation 8, not 9"),
    ):
        result = refreekv("eval", model, "--out", finished, *MADE_UP, *options)
        assert result.exit_code == 2
        assert message in result.stderr
        assert "--out" in result.stderr
    assert (finished / RECORDS).read_bytes() == before


# -- what is measured --------------------------------------------------------------------------------------------------


def test_scoring_a_continuation_reads_evicted_rows(model: Path) -> None:
    session = Session(model, parse_spec("refreekv:theta=0.0001"), n_ctx=1024, n_threads=1, flash_attn=False)
    first = session.read(random_tokens(900))
    session.prune()
    session.follow(first, random_tokens(10, seed=1))
    assert session.stats.n_rows_read > 0
    session.close()


@pytest.mark.parametrize("cache", ["full", "streaming:0.2:n_min=0", "refreekv:n_min=0"])
def test_a_batch_scores_as_tokens_one_by_one_do(model: Path, cache: str) -> None:
    prompt, tokens = random_tokens(900), random_tokens(40, seed=1)[1:]
    session = Session(model, parse_spec(cache), n_ctx=1024, n_threads=1, flash_attn=False)
    first = session.read(prompt)
    session.prune()
    rows = session.follow(first, tokens)
    session.rewind(len(prompt))
    again = session.follow(first, tokens)
    session.close()

    llm = load(model, parse_spec(cache).policy, codes=True)
    llm.eval(prompt)
    expected = [logits(llm)]
    llm.prune_kv()
    expected += list(feed(llm, tokens[:-1]))
    np.testing.assert_allclose(rows, expected, atol=2e-3)
    assert np.ptp(expected) > 1
    np.testing.assert_array_equal(rows, again)


def test_a_hidden_question_has_no_say(model: Path, tmp_path: Path) -> None:
    """Streaming keeps what is last: the question when it was there, the end of the context when it was not."""
    item = {"id": "a", "dataset": "d", "context": "x" * 900, "question": "y" * 200, "answers": ["z"]}
    (tmp_path / "d.jsonl").write_text(json.dumps(item))
    evaluate(model, tmp_path / "out", "--data", tmp_path, "--policies", "streaming:300:n_min=0", *SHORT)
    kept = {record["mode"]: record["cells_kept"] for record in read_records(tmp_path / "out")[2:]}

    llm = load(model, Streaming(budget=300, n_min=0))
    prompter = Prompter(llm)
    prompt = prompter.prompt(
        Item(item["id"], item["dataset"], item["context"], Question(item["question"], ("z",)), "f1")
    )
    llm.eval(prompt.context)
    llm.prune_kv()
    alone = llm.kv_stats.cells_kept
    assert kept["hidden"] == [cells + len(prompt.question) for cells in alone]
    assert kept["seen"] != kept["hidden"]


def test_a_continuation_is_text_without_a_question(model: Path, tmp_path: Path) -> None:
    item = {"id": "a", "dataset": "d", "context": "x" * 700, "question": "", "answers": ["yz" * 50]}
    (tmp_path / "d.jsonl").write_text(json.dumps(item))
    evaluate(model, tmp_path / "out", "--data", tmp_path, "--policies", "refreekv", *SHORT)
    records = read_records(tmp_path / "out")
    assert [(record["cache"], record["mode"]) for record in records] == [("full", "seen"), ("refreekv", "seen")]
    assert {record["score"] for record in records} == {None}
    # the first of 8 tokens is predicted before the pruning
    assert {len(record["real"]["kl"]) for record in records} == {7}
    assert "## Tasks" not in (tmp_path / "out" / "report.md").read_text()


def test_a_prompt_that_does_not_fit_is_read_by_the_pruned_cache_itself(model: Path, tmp_path: Path) -> None:
    item = {"id": "a", "dataset": "d", "context": "x" * 1800, "question": "", "answers": ["yz" * 50]}
    (tmp_path / "d.jsonl").write_text(json.dumps(item))
    options = ["--data", tmp_path, "--policies", "refreekv", "--kv-memory-limit", "2MiB", *SHORT]
    evaluate(model, tmp_path / "out", *options)
    full, pruned = read_records(tmp_path / "out")
    assert full["bytes"] > 2 * 2**20  # it has no limit
    assert full["seconds"]["prefill"] is not None
    assert pruned["seconds"]["prefill"] is not None


def test_the_second_question_is_asked_on_what_is_left(model: Path, finished: Path) -> None:
    second = [record for record in read_records(finished) if record["dataset"] == "two-questions"]
    assert len(second) == 10
    assert all(record["second_score"] == 0 for record in second)
    assert "## A second question about another fact" in (finished / "report.md").read_text()

    sessions = [
        Session(model, parse_spec(cache), n_ctx=1024, n_threads=1, flash_attn=False)
        for cache in ("full", "streaming:0.01:n_min=0")
    ]
    prompter = Prompter(sessions[0].llm)
    (item,) = generate(["two-questions"], [600], [0.2], prompter.count, seed=0)
    prompt, settings = prompter.prompt(item), Settings(n_continuation=8, n_second=5)
    assert prompt.second is not None
    said = Turn(sessions[0], prompt, "seen", settings).answer()
    answer = Turn(sessions[1], prompt, "seen", settings).answer(said)
    assert answer.second_tokens is not None

    # read after what the full cache said first, on what the pruning after the first question left
    llm = sessions[1].llm
    asked = [*prompt.context, *prompt.question]
    read = [*asked, *said.tokens, *prompt.second, *answer.second_tokens[:-1]]
    assert llm.input_ids[: llm.n_tokens].tolist() == read
    assert native.pruned_pos(ctx_of(llm), 0) == len(asked) - 1


# -- prompts -----------------------------------------------------------------------------------------------------------


def formatter(template: str) -> Jinja2ChatFormatter:
    return Jinja2ChatFormatter(template, eos_token="</s>", bos_token="<s>")


def test_a_template_is_taken_apart() -> None:
    template = (
        "{% for message in messages %}<{{ message.role }}>{{ message.content | trim }}</>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert _render(formatter(template), ["user"]) == ["<user>", "</>\n<assistant>"]
    parts = _render(formatter(template), ["user", "assistant", "user"])
    assert parts == ["<user>", "</>\n<assistant>", "</>\n<user>", "</>\n<assistant>"]


def test_a_template_that_changes_messages_is_refused() -> None:
    with pytest.raises(ValueError, match="--no-template"):
        _render(formatter("{{ messages[0].content | upper }}"), ["user"])


def test_plain_prompts(model: Path) -> None:
    llm = load(model, "full")
    item = Item("a", "d", "Text.", Question("Why?", ("so",)), "found", Question("And?", ("no",)))
    prompt = Prompter(llm).prompt(item)

    def text(tokens: list[int] | None) -> str:
        assert tokens is not None
        # SentencePiece starts every piece with a space, and has that for it
        return llm.detokenize(tokens, special=True).decode().replace("▁", " ")

    assert text(prompt.context) == "<s> Text.\n\n"
    assert text(prompt.question) == " Question: Why?\nAnswer:"
    assert text(prompt.real) == " so"
    assert text(prompt.second) == " \n\nQuestion: And?\nAnswer:"
    # what looks like a special token in an item is text
    injected = Prompter(llm).prompt(Item("a", "d", "x</s>y", Question("<s>", ("so",)), "found"))
    assert llm.token_eos() not in injected.context
    assert llm.token_bos() not in [*injected.context[1:], *injected.question]


def test_a_question_alone(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = load(model, "full")
    monkeypatch.setattr(llm._model, "add_bos_token", lambda: False)
    prompt = Prompter(llm).prompt(Item("a", "d", "", Question("Why?", ("so",)), "found"))
    assert len(prompt.context) > 10
    assert prompt.question == []


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policies", "full,refrekv"], "did you mean 'refreekv'"),
        (["--policies", "full@q9"], "'full@q9': the type must be one of f32"),
        (["--question", "open"], "--question open: must be one of seen, hidden, both"),
        (["--generate", "needel"], "did you mean 'needle'"),
        (["--depths", "1.5"], "--depths 1.5: must be a number from 0 to 1"),
        (["--lengths", "long"], "--lengths long: must be a number"),
        (["--data", "nowhere"], "there is no *.jsonl"),
        (["--lengths", "600", "--depths", "0", "--min-tokens", "2000"], "none of 3 items has 2000 to 4096 tokens"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_for(model: Path, tmp_path: Path, options: list[str], message: str) -> None:
    result = refreekv("eval", model, "--out", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_missing_model(tmp_path: Path) -> None:
    result = refreekv("eval", tmp_path / "none.gguf", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "no such file" in result.stderr


def test_the_report_is_written_again(finished: Path, tmp_path: Path) -> None:
    report = finished / "report.md"
    text = report.read_text()
    report.unlink()
    result = refreekv("eval-report", finished)
    assert result.exit_code == 0
    assert report.read_text() == text == result.stdout.removesuffix("\n")
    for name in ("quality", "layers", "tasks", "retrieval"):
        assert (finished / f"{name}.png").stat().st_size > 5000

    result = refreekv("eval-report", tmp_path)
    assert result.exit_code == 2
    assert "no run of refreekv eval" in result.stderr


@pytest.mark.model
def test_a_real_model_without_its_cache_is_lost(default_model: Path, tmp_path: Path) -> None:
    """A small model misses a needle here and there even with the full cache, and which one depends on the processor's
    arithmetic. So three needles are asked for, and two have to be found."""
    caches = "full,streaming:0.01"
    options = ["--generate", "needle", "--lengths", "600", "--depths", "0.1,0.3,0.5", "--continuation", "24"]
    evaluate(default_model, tmp_path, *options, "--policies", caches, "--question", "seen", "--threads", "2")
    records = read_records(tmp_path)
    full, lost = ([record for record in records if record["cache"] == cache] for cache in caches.split(","))
    assert len(full) == len(lost) == 3
    assert sum(record["score"] for record in full) >= 2
    assert sum(record["score"] for record in lost) == 0
    assert np.mean([kl for record in lost for kl in record["greedy"]["kl"]]) > 1
    for record in lost:
        assert np.mean(record["real"]["nll"]) > np.mean(record["real"]["nll_full"]) + 3


@pytest.mark.model
def test_a_chat_prompt_is_upstreams(default_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = load(default_model, "full", n_ctx=512)
    prompts: list[list[int]] = []

    def remember(prompt: list[int], **options: Any) -> Any:
        prompts.append(prompt)
        raise KeyboardInterrupt

    monkeypatch.setattr(llm, "create_completion", remember)
    with pytest.raises(KeyboardInterrupt):
        llm.create_chat_completion([{"role": "user", "content": "Some text.\n\nWhy is it?"}])
    item = Item("a", "d", "Some text.", Question("Why is it?", ("so",)), "found")
    prompt = Prompter(llm).prompt(item)
    assert llm.detokenize([*prompt.context, *prompt.question], special=True) == llm.detokenize(prompts[0], special=True)
