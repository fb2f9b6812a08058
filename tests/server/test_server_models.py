"""`refreekv serve` with the models people run: conversations, and drafts, with a policy.

Drafts make an answer faster and no other: a greedy answer is the one without. With random weights most are refused, so
what has been read of them is taken back.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from serving import send, serving
from tiny import N_SPECIAL
from tiny_architectures import DFLASH, EAGLE3, SHARING_DRAFT

Tiny = Callable[[str], Path]

HEADS = "qwen35 (hybrid, with a draft head)"
SHARED = "gemma4 (E2B: layers that share K and V)"
SINKS = "gpt-oss (attention sinks, sliding window, experts)"
MLA = "deepseek2 (MLA, experts)"
MODELS = [SHARED, HEADS, SINKS, MLA]

QUICK = ["--n-ctx", "2048", "--threads", "1", "--parallel", "1", "--log-verbosity", "1", "--no-library"]
# of the same rows sums in f32 hardly depend on how many tokens are read at once
EXACT = ["--option", "type_k=f32", "--option", "type_v=f32", "--no-flash-attn"]
POLICY = ["--kv-policy", "refreekv:theta=1e-9"]  # all evicted rows that count at all are read exactly
PRINTABLE = [[N_SPECIAL + byte, False] for byte in (*range(32), *range(127, 256))] + [[2, False]]
QUESTIONS = ["".join(chr(97 + i * i % 26) for i in range(900)), "and what of i j k l m n " * 9, "o p q r"]


def ask(client: openai.OpenAI, path: str, **body: Any) -> dict[str, Any]:
    fixed = {"temperature": 0, "logit_bias": PRINTABLE, "max_tokens": 12, "id_slot": 0}
    status, text = send(client, path, {**fixed, **body})
    assert status == 200, text
    answer: dict[str, Any] = json.loads(text)
    return answer


def talk(client: openai.OpenAI, history: list[dict[str, str]], question: str, **options: Any) -> dict[str, Any]:
    """The timings of an answer, which is added to the conversation."""
    history.append({"role": "user", "content": question})
    answer = ask(client, "/v1/chat/completions", messages=history, **options)
    history.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
    timings: dict[str, Any] = answer["timings"]
    return timings


# -- conversations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_three_turns_of_chat(tiny: Tiny, tmp_path: Path, model: str, capfd: pytest.CaptureFixture[str]) -> None:
    """What was evicted comes back for a prompt, so an answer is that of whoever reads all of it."""
    options = [*POLICY, "--kv-evicted", "restore", "--slot-save-path", f"{tmp_path}/"]
    with serving(tiny(model), *QUICK, *EXACT, *options) as client:
        history: list[dict[str, str]] = []
        for question in QUESTIONS:
            timings = talk(client, history, question)
            assert timings["kv_cells_kept"] < 0.9 * timings["kv_n_tokens"]
        assert timings["prompt_n"] < 300  # of 1,100 tokens before
        said = history[-1]
        assert ask(client, "/slots/0?action=save", filename="talk")["n_saved"] > 1000

        again = history[:-2]
        talk(client, again, QUESTIONS[-1])
        assert again[-1] == said

        ask(client, "/slots/0?action=erase")
        assert ask(client, "/slots/0?action=restore", filename="talk")["n_restored"] > 1000
        after = list(history)
        timings = talk(client, after, "s t u v")
        assert model != MLA or timings["cache_n"] > 1000  # llama.cpp keeps no checkpoints for others in such a file

        for messages in (history, after):
            whole = messages[:-2]
            talk(client, whole, messages[-2]["content"], cache_prompt=False)
            assert whole[-1] == messages[-1]
    assert " E " not in capfd.readouterr().err  # an eviction before a batch is no error


# -- drafts ------------------------------------------------------------------------------------------------------------


def answers(path: Path, *options: str | Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Of two turns: what is said, and the timings."""
    with serving(path, *QUICK, *EXACT, *options) as client:
        texts, timings, prompt = [], [], QUESTIONS[0]
        for _ in range(2):
            answer = ask(client, "/completion", prompt=prompt, n_predict=24)
            texts.append(answer["content"])
            timings.append(answer["timings"])
            prompt += answer["content"] + " and then?"
    return texts, timings


@pytest.fixture(scope="module")
def without_draft(tiny: Tiny) -> dict[str, list[str]]:
    """What is said, by the model."""
    return {model: answers(tiny(model), *POLICY)[0] for model in (HEADS, "qwen3")}


@pytest.mark.parametrize(
    ("model", "draft", "kind"),
    [
        (HEADS, None, "draft-mtp"),
        (HEADS, "qwen3", "draft-simple"),
        ("qwen3", EAGLE3.title, "draft-eagle3"),
        ("qwen3", DFLASH.title, "draft-dflash"),
        ("qwen3", "qwen3", "draft-simple"),
        ("qwen3", None, "ngram-simple"),
    ],
)
def test_an_answer_with_a_draft_is_that_without(
    tiny: Tiny, without_draft: dict[str, list[str]], model: str, draft: str | None, kind: str
) -> None:
    options: list[str | Path] = ["--spec-type", kind]
    if draft:
        options += ["--model-draft", tiny(draft)]
    if kind == "ngram-simple":
        options += ["--spec-ngram-simple-size-n", "2", "--spec-ngram-simple-size-m", "4"]
    texts, timings = answers(tiny(model), *POLICY, *options)
    assert texts == without_draft[model]
    assert sum(turn.get("draft_n", 0) for turn in timings) > 0
    if model == draft:
        assert timings[0]["draft_n_accepted"] > 0
    for turn in timings:
        assert turn["kv_cells_kept"] < 0.9 * turn["kv_n_tokens"]


def test_a_draft_that_attends_to_the_targets_cells_is_refused_by_name(tiny: Tiny) -> None:
    draft = ["--model-draft", tiny(SHARING_DRAFT.title), "--spec-type", "draft-mtp"]
    model = "gemma4 (sliding window)"
    command = [sys.executable, "-m", "refreekv_cpp", "serve", tiny(model), *QUICK, *draft, "--port", "0"]
    result = subprocess.run([*command, *POLICY], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "gemma4-assistant: a draft model that reads another context's cache" in result.stderr
    _, timings = answers(tiny(model), *draft, "--kv-policy", "full")
    assert timings[0]["draft_n"] > 0
