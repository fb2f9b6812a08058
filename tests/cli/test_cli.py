"""The command line tool."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command import assert_one_error_line, assert_one_line, refreekv

from refreekv_cpp import Llama
from refreekv_cpp.cli import common
from refreekv_cpp.document import FACT, write_document

# without a word on what was chosen for the GPU and the context
_CHOSEN = ["--n-ctx", "512", "--gpu-layers", "0"]
_SHORT = [*_CHOSEN, "--max-tokens", "4", "--temperature", "0"]


@pytest.fixture
def no_model(tmp_path: Path) -> Path:
    """A file that is there, and no GGUF."""
    path = tmp_path / "model.gguf"
    path.write_text("not a model")
    return path


@pytest.mark.parametrize("command", [["run", "--prompt", "hi"], ["chat"], ["info"], ["demo", "--model"]])
def test_missing_model(command: list[str], tmp_path: Path) -> None:
    result = refreekv(*command, tmp_path / "none.gguf")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == f"{tmp_path / 'none.gguf'}: no such file"


@pytest.mark.parametrize("command", [["run", "--prompt", "hi"], ["chat"], ["demo", "--model"]])
def test_unknown_policy(command: list[str], no_model: Path) -> None:
    result = refreekv(*command, no_model, "--kv-policy", "refrekv")
    assert_one_error_line(result, "kv_policy='refrekv': unknown, did you mean 'refreekv'?", "'streaming'")


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [(["run", "--prompt", "hi"], ["--gpu-layers", "0"], "not a GGUF file"), (["info"], [], "not a GGUF file")],
)
def test_not_a_model(command: list[str], options: list[str], message: str, no_model: Path) -> None:
    result = refreekv(*command, no_model, *options)
    assert_one_error_line(result, message, str(no_model))


def test_unknown_type(no_model: Path) -> None:
    assert_one_error_line(refreekv("info", no_model, "--type-k", "q9"), "'q9'", "q8_0")


def test_prompt_is_text_once(no_model: Path, tmp_path: Path) -> None:
    binary = tmp_path / "prompt.txt"
    binary.write_bytes(b"caf\xe9 au lait")
    assert_one_error_line(refreekv("run", no_model, "--file", binary), "UTF-8", str(binary))
    assert_one_error_line(refreekv("run", no_model, "--file", tmp_path / "none.txt"), "no such file")
    assert_one_error_line(refreekv("run", no_model, "--file", tmp_path), f"{tmp_path}: a folder, not a file")
    assert_one_error_line(refreekv("run", no_model, stdin=" \n"), "the prompt is empty")
    for words in ([""], ["Why", "is it"]):
        assert_one_error_line(refreekv("run", no_model, *words), repr(" ".join(words)), "must be written as --prompt")
    assert_one_error_line(refreekv("run", no_model, "--prompt", "a", "--file", binary), "UTF-8", str(binary))
    assert_one_error_line(refreekv("run", no_model, "--prompt", "a", "--raw", "--system", "b"), "--system")


@pytest.mark.parametrize("n_ctx", ["auto", "512"])
@pytest.mark.parametrize("command", [["run", "--prompt", "hi"], ["chat"], ["plan"], ["info"]], ids=str)
def test_half_a_model(command: list[str], n_ctx: str, tiny_model: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.gguf"
    half.write_bytes(tiny_model.read_bytes()[: tiny_model.stat().st_size // 2])
    options = ["--n-ctx", "512"] if command == ["info"] else ["--n-ctx", n_ctx, "--gpu-layers", "0"]
    assert_one_error_line(refreekv(*command, half, *options), str(half))


def test_text_is_shown_as_it_is(tmp_path: Path) -> None:
    """rich takes :a: for an emoji, and [red] for a colour."""
    name = ":a: [red] :smile:.gguf"
    assert refreekv("run", tmp_path / name, "--prompt", "x").stderr == f"{tmp_path / name}: no such file\n"


def test_document_has_the_fact_once_near_its_start() -> None:
    document = write_document(3000, lambda text: len(text.split()))
    assert document == write_document(3000, lambda text: len(text.split()))
    assert document.count(FACT) == 1
    assert document.index(FACT) < len(document) / 8
    assert 3000 <= len(document.split()) < 3030


def test_info_of_quantised_cache(tiny: Callable[[str], Path]) -> None:
    result = refreekv("info", tiny("gqa64"), "--type-k", "q8_0", "--type-v", "q8_0")
    assert result.exit_code == 0
    assert "1.06 KiB" in result.stdout  # 4 layers, K and V, 2 heads of 64 values, 34 bytes for 32


@pytest.mark.parametrize(
    ("name", "attention", "per_token"),
    [
        (
            "gemma4 (E2B: layers that share K and V)",
            "2 of 8, and 2 that share their K and V; others have a window of 128 tokens",
            "0.25 KiB",
        ),
        (
            "gpt-oss (attention sinks, sliding window, experts)",
            "2 of 4; others have a window of 128 tokens",
            "0.25 KiB",
        ),
        ("qwen35 (hybrid, with a draft head)", "2 of 4; others are recurrent", "0.25 KiB"),
        ("deepseek2 (MLA, experts)", "4 of 4", "0.38 KiB"),  # 4 layers, one row of 48 values for K and V
    ],
)
def test_info_of_each_kind_of_layer(tiny: Callable[[str], Path], name: str, attention: str, per_token: str) -> None:
    result = refreekv("info", tiny(name))
    assert result.exit_code == 0
    lines = [line.strip("│ ").split("│") for line in result.stdout.splitlines() if "│" in line]
    shown = {name.strip(): value.strip() for name, value in lines}
    assert shown["attention layers"] == attention
    assert shown["KV cache per token"] == per_token
    assert shown["KV policies"] == "yes"


# a context is as long as llama.cpp rounds it up to
@pytest.mark.parametrize("n_ctx", ["200", "256"])
def test_run_too_long(tiny_model: Path, n_ctx: str) -> None:
    result = refreekv("run", tiny_model, "--prompt", "x" * 250, "--n-ctx", n_ctx, "--gpu-layers", "0")
    assert_one_error_line(result, "exceed context window of 256")


def test_chat_keeps_an_answer_that_was_stopped(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def stopped(llm: Llama, history: list[dict[str, str]], **options: float) -> Iterator[str]:
        asked.append([message["content"] for message in history])
        yield "Well, "
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "stream_chat", stopped)
    assert refreekv("chat", tiny_model, *_SHORT, stdin="Hello.\nGo on.\n").exit_code == 0
    assert asked == [["Hello."], ["Hello.", "Well, ", "Go on."]]


@pytest.mark.model
def test_info(default_model: Path) -> None:
    result = refreekv("info", default_model, "--n-ctx", "1024")
    assert result.exit_code == 0
    lines = [line.strip("│ ").split("│") for line in result.stdout.splitlines() if "│" in line]
    shown = {name.strip(): value.strip() for name, value in lines}
    assert shown["architecture"] == "llama"
    assert shown["attention layers"] == "30 of 30"
    assert shown["heads"] == "9"
    assert shown["KV heads"] == "3"
    assert shown["head size"] == "64"
    # 30 layers, K and V, 3 heads of 64 values of 2 bytes
    assert shown["KV cache per token"] == "22.50 KiB"
    assert shown["KV cache of 1024 tokens (full)"] == "22.5 MiB"
    assert shown["KV policies"] == "yes"


@pytest.mark.model
def test_run(default_model: Path) -> None:
    options = [*_CHOSEN, "--max-tokens", "8", "--temperature", "0"]
    result = refreekv("run", default_model, "--prompt", "Say hello.", *options)
    assert result.exit_code == 0
    assert result.stdout.strip()
    assert_one_line(result.stderr, "(refreekv: ")


@pytest.mark.model
def test_run_raw_counts_up(default_model: Path) -> None:
    options = [*_CHOSEN, "--max-tokens", "6", "--temperature", "0", "--kv-policy", "full", "--raw"]
    result = refreekv("run", default_model, "--prompt", "1, 2, 3, 4, 5, 6, 7,", *options)
    assert result.exit_code == 0
    assert "8, 9" in result.stdout
    assert_one_line(result.stderr, "(full: ")


@pytest.mark.model
def test_run_from_stdin(default_model: Path) -> None:
    result = refreekv("run", default_model, *_SHORT, stdin="Say hello.")
    assert result.exit_code == 0
    assert result.stdout == refreekv("run", default_model, *_SHORT, "--prompt", "Say hello.").stdout
    assert_one_line(result.stderr, "process ", " tokens (refreekv: full size ")


@pytest.mark.model
def test_run_prunes_a_long_prompt(default_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("The ships of Velling carry salt, and those of Dunmere carry wool. " * 40)
    result = refreekv("run", default_model, *_SHORT, "--n-ctx", "1024", "--file", file)
    assert result.exit_code == 0
    assert_one_line(result.stderr, "process ", "pruned once")


@pytest.mark.model
def test_chat(default_model: Path) -> None:
    result = refreekv("chat", default_model, *_SHORT, stdin="Hello.\n\n/clear\nGood morning.\n/exit\nNot read.\n")
    assert result.exit_code == 0
    assert len(result.stderr.splitlines()) == 2  # a receipt for each answer


@pytest.mark.model
def test_chat_goes_on_after_a_message_that_is_too_long(default_model: Path) -> None:
    result = refreekv("chat", default_model, *_SHORT, stdin=f"{'word ' * 600}\nHello.\n")
    assert result.exit_code == 0
    too_long, receipt = result.stderr.splitlines()
    assert "exceed context window of 512" in too_long
    assert receipt.startswith("process ")


def test_turns_asks_for_another_fact_each_time(tiny_model: Path) -> None:
    result = refreekv(
        "turns", tiny_model, "--tokens", "700", "--turns", "3", "--max-tokens", "2", "--threads", "1",
        "--kv-policy", "streaming", "--kv-evicted", "restore,recompute",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.output.count("3 of 3") >= 1  # the full cache's answers are its own
    assert_one_error_line(refreekv("turns", tiny_model, "--kv-evicted", "restor"), "restor", "restore, recompute, drop")


def test_turns_holds_dialogues_of_a_file(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "dialogues.jsonl"
    turns = [{"question": f"Which is number {i}?", "answers": ["none", "any"]} for i in range(2)]
    lines = [{"context": "one two three " * 60, "turns": turns}, {"context": "four " * 90, "turns": turns[:1]}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ("--kv-policy", "streaming", "--kv-evicted", "restore", "--max-tokens", "2", "--threads", "1")
    result = refreekv("turns", tiny_model, "--data", file, "--tokens", "700", *options)
    assert result.exit_code == 0, result.output
    assert "3 of 3" in result.output  # answers of the full cache: two turns and one
    file.write_text('{"context": "one", "turns": [{"question": "Which?"}]}\n')
    assert_one_error_line(refreekv("turns", tiny_model, "--data", file), "dialogues.jsonl:1", "answers")
