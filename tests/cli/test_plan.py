"""`refreekv plan`: what it says, what it refuses, and that it comes true."""

from __future__ import annotations

import importlib
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import CACHE_TYPES
from typer.testing import CliRunner, Result

from refreekv_cpp import fit
from refreekv_cpp.cli import app

plan_command: Any = importlib.import_module("refreekv_cpp.cli.plan")

Tiny = Callable[[str], Path]


def plan(*args: str | Path) -> Result:
    return CliRunner().invoke(app, ["plan", *map(str, args)])


def rows(result: Result) -> dict[str, list[str]]:
    """The cells of each row of the tables, by the first one."""
    assert result.exit_code == 0, result.output
    lines = [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in _table_lines(result)]
    return {line[0]: line[1:] for line in lines}


def _table_lines(result: Result) -> list[str]:
    return [line for line in result.stdout.splitlines() if line.startswith(("│", "┃"))]


def test_it_says_what_each_cache_needs(tiny: Tiny) -> None:
    table = rows(plan(tiny("gqa64"), "--n-ctx", "1024", "--kv-policy", "streaming"))
    assert table[""] == ["full, f16", "full, q8_0", "streaming, reading", "streaming, settled"]
    with fit.opened(tiny("gqa64"), kv_policy="streaming") as llm:
        needs = fit.measure(llm, 1024)
    f16, q8_0, reading, settled = table["KV cache, and what belongs to it"]
    assert f16 == f"{needs.prunable / 2**20:.1f} MiB"
    assert reading == f"{needs.context / 2**20:.1f} MiB"
    assert [float(text.split()[0]) for text in (q8_0, settled)] < [float(f16.split()[0])] * 2
    assert table["evicted rows, on disk"][-1] == f"{needs.settled(0.4).cold_bytes / 2**20:.1f} MiB"
    assert table["RAM"][-1] == "yes"
    assert any(name.startswith("disk of ") for name in table)


def test_the_default_settles_within_a_range(tiny: Tiny) -> None:
    table = rows(plan(tiny("gqa64"), "--n-ctx", "4096"))
    assert " to " in table["KV cache, and what belongs to it"][-1]
    assert " to " in table["process, resident (RAM)"][-1]


def test_of_other_policies_nobody_knows(tiny: Tiny) -> None:
    table = rows(plan(tiny("gqa64"), "--n-ctx", "4096", "--kv-policy", "paper"))
    assert table[""][-1] == "paper, settled (by the text)"


def test_the_command_can_be_pasted(tiny: Tiny) -> None:
    result = plan(
        tiny("gqa"), "--n-ctx", "700", "--option", "n_ubatch=64", "--kv-memory-limit", "1MiB", "--threads", "1"
    )
    *_, largest, command = result.stdout.splitlines()
    assert largest == "largest context that fits with refreekv: 4096 tokens (the model was made for 4096)"
    words = shlex.split(command)
    assert words[:3] == ["refreekv", "chat", str(tiny("gqa"))]
    rest = dict(zip(words[3::2], words[4::2], strict=True))
    assert rest == {
        "--n-ctx": "768",
        "--kv-policy": "refreekv",
        "--gpu-layers": "0",
        "--kv-memory-limit": "1MiB",
        "--threads": "1",
        "--option": "n_ubatch=64",
    }


def test_the_command_is_quoted_for_the_shell() -> None:
    command = ["refreekv", "chat", "C:\\my models\\a.gguf"]
    assert plan_command.quoted(command, "win32") == 'refreekv chat "C:\\my models\\a.gguf"'
    assert plan_command.quoted(command, "linux") == "refreekv chat 'C:\\my models\\a.gguf'"


def test_heads_that_q8_0_cannot_have(tiny: Tiny) -> None:
    table = rows(plan(tiny("gqa"), "--n-ctx", "512", "--kv-policy", "full"))
    assert table[""] == ["full, f16"]


def test_a_model_without_a_policy_is_planned_without(tiny: Tiny) -> None:
    result = plan(tiny("mamba (recurrent)"), "--n-ctx", "512")
    assert rows(result)[""] == ["full, f16"]
    assert "recurrent memory, there is no KV cache to prune" in result.stderr
    assert "--kv-policy full" in result.stdout


def test_memory_that_is_too_small(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit.needs, "host_free", lambda: 2**20)
    result = plan(tiny("gqa"), "--n-ctx", "2048")
    assert rows(result)["RAM"][-1] == "no"
    assert "No context fits" in result.stdout


def test_a_context_that_does_not_fit_is_not_pasted(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    with fit.opened(tiny("gqa"), kv_policy="refreekv") as llm:
        needs = fit.measure(llm, 1024)
    monkeypatch.setattr(plan_command.fit, "base_bytes", lambda *_: 2**20)
    needed = fit.needed_bytes(needs, needs.host, 2**20)
    monkeypatch.setattr(fit.needs, "host_free", lambda: needed * 8 // 7 + 8)
    result = plan(tiny("gqa"), "--n-ctx", "2048")
    assert rows(result)["RAM"][-1] == "no"
    assert "largest context that fits with refreekv: 1024 tokens" in result.stdout
    assert "--n-ctx 1024" in result.stdout


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"not a model", "not a GGUF file"),
        (b"GGUF\x03\0\0\0", "llama.cpp cannot load it"),
    ],
)
def test_bad_models_are_one_sentence(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "model.gguf"
    if content is not None:
        path.write_bytes(content)
    for n_ctx in ("512", "auto"):
        result = plan(path, "--n-ctx", n_ctx)
        assert result.exit_code == 2
        assert result.stdout == ""
        assert f"{path}: {message}" in result.stderr.splitlines()[-1]


@pytest.mark.model
@pytest.mark.parametrize("policy", ["full", "refreekv"])
@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_it_comes_true(default_model: Path, policy: str, kind: str) -> None:
    """RSS of a process that reads a prompt, in a process of its own."""
    options: dict[str, Any] = {"kv_policy": policy, "n_threads": 2, "n_threads_batch": 2, "flash_attn": True}
    options |= {"type_k": CACHE_TYPES[kind], "type_v": CACHE_TYPES[kind]}
    with fit.opened(default_model, **options) as llm:
        needs = fit.measure(llm, 2048, 1024)
    foreseen = fit.process_bytes(needs, fit.base_bytes(default_model, 2048))
    script = f"""
from refreekv_cpp import Llama
from refreekv_cpp._process import rss
llm = Llama({str(default_model)!r}, n_ctx=2048, verbose=False, **{json.loads(json.dumps(options))!r})
llm.eval([100 + i % 1000 for i in range(1024)])
print(rss())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert foreseen == pytest.approx(int(done.stdout), rel=0.05)
