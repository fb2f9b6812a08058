"""The options that commands which load a model share: what each of them makes of it."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
import typer.main
from command import refreekv
from typer.testing import CliRunner, Result

from refreekv_cpp import Llama, Streaming, _checks, fit, llama_server, models
from refreekv_cpp.cli import app, common, options
from refreekv_cpp.cli.options import LoadOptions, MachineOptions, parse_option

COMMANDS_WITH_THREADS = [
    *(["run", "--prompt", "x"], ["chat"], ["demo", "--model"], ["plan"], ["bench"], ["memory"], ["turns"]),
    *(["eval", "--out", "out"], ["serve"]),
]
MACHINE = {"--gpu-layers", "--flash-attn", "--threads", "--option"}
ONE_CACHE = {"--n-ctx", "--kv-policy", "--kv-evicted", "--kv-memory-limit"}


class StopError(ValueError):
    """Raised where a model would be loaded."""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that has one."""
    monkeypatch.setattr(llama_cpp, "llama_supports_gpu_offload", lambda: True)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options that models would be loaded with."""
    seen: list[dict[str, Any]] = []

    def load(model: Path, chosen: dict[str, Any]) -> None:
        seen.append(chosen)
        raise StopError("stopped")

    monkeypatch.setattr(common, "load", load)
    return seen


# -- the same names in every command -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        *((name, MACHINE | ONE_CACHE) for name in ("run", "chat", "demo")),
        *((name, MACHINE | {"--kv-policy"}) for name in ("bench", "memory", "turns")),
        ("eval", MACHINE),
    ],
)
def test_options_have_the_same_names(command: str, expected: set[str]) -> None:
    group: Any = typer.main.get_command(app)
    context = group.commands[command].make_context(command, [], resilient_parsing=True)
    found = {name for parameter in context.command.params for name in parameter.opts}
    assert expected <= found


@pytest.mark.parametrize(("layers", "number"), [("auto", -1), ("all", -1), ("7", 7), ("0", 0)])
@pytest.mark.usefixtures("gpu")
def test_layers_on_the_gpu(tiny_model: Path, loaded: list[dict[str, Any]], layers: str, number: int) -> None:
    commands = [
        ["run", "--prompt", "x"],
        ["chat"],
        ["demo", "--tokens", "2000", "--model"],
        ["turns", "--tokens", "500"],
    ]
    for command in commands:
        result = refreekv(*command, tiny_model, "--gpu-layers", layers, "--threads", "3", "--option", "n_ubatch=64")
        assert result.exit_code == 2, result.output
        assert result.stderr.splitlines()[-1] == "stopped"
        assert ("GPU layers: all (as many as fit)" in result.stderr) == (layers == "auto")
    assert [each["n_gpu_layers"] for each in loaded] == [number] * len(commands)
    for each in loaded:
        assert (each["n_threads"], each["n_threads_batch"], each["n_ubatch"]) == (3, 3, 64)


@pytest.mark.usefixtures("gpu")
def test_layers_on_the_gpu_of_other_processes(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def stop(*args: Any, **named: Any) -> None:
        seen.append((args, named))
        raise StopError

    given = ["--gpu-layers", "5", "--option", "kv_cold=memory"]
    monkeypatch.setattr(importlib.import_module("refreekv_cpp.lab.commands.bench"), "run", stop)
    refreekv("bench", tiny_model, "--tokens", "64", "--threads", "1", *given)
    contestants = seen.pop()[0][0]
    assert {contestant.n_gpu_layers for contestant in contestants} == {5}
    assert all(contestant.options == {"kv_cold": "memory"} for contestant in contestants)

    monkeypatch.setattr(importlib.import_module("refreekv_cpp.lab.commands.eval"), "Run", stop)
    refreekv("eval", tiny_model, "--out", tmp_path, "--lengths", "64", "--depths", "0", "--generate", "needle", *given)
    settings = seen.pop()[0][-1]
    assert (settings.n_gpu_layers, settings.options) == (5, {"kv_cold": "memory"})


def test_what_was_chosen_is_said(tiny_model: Path, loaded: list[dict[str, Any]]) -> None:
    if llama_cpp.llama_supports_gpu_offload():
        pytest.skip("this build has a GPU backend")
    result = refreekv("run", tiny_model, "--prompt", "x")
    assert "GPU layers: 0 (this build has no GPU backend)" in result.stderr
    result = refreekv("run", tiny_model, "--prompt", "x", "--gpu-layers", "all")
    assert "--gpu-layers all: this build has no GPU backend, the CPU computes all" in result.stderr
    assert [each["n_gpu_layers"] for each in loaded] == [0, -1]
    assert refreekv("run", tiny_model, "--prompt", "x", "--gpu-layers", "0").stderr == "stopped\n"


# -- the context -------------------------------------------------------------------------------------------------------


def test_the_context_is_at_most_32k_unless_a_number_is_given(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(given: str, **own: Any) -> int:
        number: int = LoadOptions(n_ctx=given, gpu_layers="0").llama_options(tiny_model, **own)["n_ctx"]
        return number

    assert chosen("auto") == 4096  # the model's own
    monkeypatch.setattr(llama_cpp._internals.LlamaModel, "n_ctx_train", lambda model: 131072)
    assert chosen("auto") == 32768
    assert chosen("auto", n_ctx=700) == 700  # what a command needs
    assert chosen("900", n_ctx=700) == 900
    assert chosen("0") == 0


def test_a_context_shorter_than_the_models_is_said(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["run", tiny_model, "--prompt", "x", "--max-tokens", "1", "--threads", "1", "--gpu-layers", "0"]
    assert "context" not in refreekv(*arguments).stderr
    monkeypatch.setattr(fit.needs, "host_free", lambda: 2**20)
    result = refreekv(*arguments)
    assert result.exit_code == 0, result.output
    assert "context: 512 of the model's 4096 tokens (--n-ctx)\n" in result.stderr


# -- any other option --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("n_batch=256", ("n_batch", 256)),
        ("n-batch=256", ("n_batch", 256)),
        ("kv_cold=memory", ("kv_cold", "memory")),
        ("kv_cold_state=false", ("kv_cold_state", False)),
        ("kv_protect=[[0, 16]]", ("kv_protect", [[0, 16]])),
        ("use_mmap=False", ("use_mmap", False)),
        ("chat_format=chatml", ("chat_format", "chatml")),
        ("lora_base=a=b", ("lora_base", "a=b")),
        ("rope_freq_base=1", ("rope_freq_base", 1)),
        ("type_k=q8_0", ("type_k", 8)),
        ("kv_cold_limit=null", ("kv_cold_limit", None)),
    ],
)
def test_an_option_of_llama(text: str, expected: tuple[str, Any]) -> None:
    assert parse_option(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n_batch", "--option n_batch: must be NAME=VALUE"),
        ("kv_cld=memory", "kv_cld: there is no such option of Llama, did you mean 'kv_cold'?"),
        ("n_ctx=5", "use --n-ctx"),
        ("n_gpu_layers=5", "use --gpu-layers"),
        ("kv_policy=full", "use --kv-policy"),
        ("verbose=true", "use refreekv --verbose"),
        ("draft_model=x", "draft_model: cannot be written as text"),
        ("model_path=x", "model_path: there is no such option"),
        ("n_batch=many", "n_batch=many: must be a whole number"),
        ("n_batch=true", "must be a whole number"),
        ("use_mmap=1", "use_mmap=1: must be true or false"),
        ("rope_freq_base=x", "must be a number"),
        ("type_v=q9", "type_v=q9: must be one of f32, f16"),
        ("chat_format=nope", "chat_format=nope: must be chat_template.NAME .* or one of alpaca, .*, chatml,"),
        ("kv_overrides=x", "kv_overrides=x: must be a JSON object"),
        ('kv_overrides={"a": []}', "must be a JSON object"),
        ("tensor_split=5", "tensor_split=5: must be a JSON list"),
        ("tensor_split=[true]", "must be a JSON list"),
        ("lora_path=5", "lora_path=5: must be text or null"),
        ("kv_cold_dir=5", "kv_cold_dir=5: must be text or null"),
        ("kv_elastic=1", "kv_elastic=1: must be true or false or null"),
        ("numa=x", "numa=x: must be true or false or a whole number"),
        ("vocab_only=true", "vocab_only=true: the commands need a model that answers"),
        ("embedding=true", "embedding=true: the commands need a model that answers"),
    ],
)
def test_no_option_of_llama(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        parse_option(text)


def test_options_reach_llama(tiny_model: Path) -> None:
    given = LoadOptions(
        n_ctx="300",
        gpu_layers="0",
        threads=1,
        flash_attn=True,
        kv_policy="streaming:n_sink=8",
        kv_evicted="drop",
        kv_memory_limit="1MiB",
        option=["n_batch=64", "kv_cold_limit=5"],
    )
    llm = given.load(tiny_model)
    assert (llm.kv_policy, llm.kv_evicted, llm.kv_memory_limit) == (Streaming(n_sink=8), "drop", 2**20)
    assert (llm.n_batch, llm.kv_cold_limit, llm.context_params.n_threads) == (64, 5, 1)
    assert llm.context_params.flash_attn_type == llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    assert llm.n_ctx() == 512


def test_a_value_that_nothing_has_checked_is_one_line(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options._option_text, "check", lambda name, value: None)
    monkeypatch.setattr(_checks, "_check_split", lambda split: None)
    result = refreekv("run", tiny_model, "--prompt", "x", "--n-ctx", "256", "--option", "tensor_split=5")
    assert result.exit_code == 2, result.output
    assert result.stderr.splitlines()[-1].startswith("an option has a value of a wrong kind: ")


# -- checked first -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu-layers", "-1"], "--gpu-layers -1: must be auto, all or a number"),
        (["--n-ctx", "12k"], "--n-ctx 12k: must be auto or a number"),
        (["--n-ctx", str(2**32)], "must be auto or a number below 2^31"),
        (["--n-ctx", "1" * 5000], "must be auto or a number below 2^31"),
        (["--gpu-layers", str(2**32)], "must be auto, all or a number below 2^31"),
        (["--option", "n_batch=0"], "n_batch=0: must be a whole number from 1 to"),
        (["--option", "n_batch=-1"], "n_batch=-1: must be a whole number from 1 to"),
        (["--kv-policy", "refrekv"], "did you mean 'refreekv'?"),
        (["--kv-evicted", "dorp"], "kv_evicted='dorp': must be one of 'keep', 'restore', 'recompute', 'drop'"),
        (["--kv-policy", "refreekv:tetha=0.01"], "ReFreeKV has no option 'tetha', did you mean 'theta'?"),
        (["--kv-memory-limit", "much"], "'much'"),
        (["--option", "kv_cold=disk"], "kv_cold=disk: must be one of 'auto', 'memory', 'file'"),
        (["--option", "kv_elastic=false"], "kv_elastic=False: only with kv_policy='full'"),
        (["--option", "kv_cld=x"], "did you mean 'kv_cold'?"),
    ],
    ids=str,
)
@pytest.mark.parametrize("command", [["run", "--prompt", "x"], ["chat"], ["demo", "--model"]])
def test_options_are_checked_before_a_model_is_fetched(
    command: list[str], arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_from_hub", lambda text: pytest.fail("fetched"))
    result = refreekv(*command, "hf:a/b", *arguments)
    assert result.exit_code == 2
    [line] = result.stderr.splitlines()
    assert message in line


@pytest.mark.parametrize("command", COMMANDS_WITH_THREADS, ids=str)
def test_threads_have_a_bound(command: list[str], tiny_model: Path) -> None:
    """ggml has an array of 512, and does not look."""
    result = refreekv(*command, tiny_model, "--threads", "513")
    assert result.exit_code == 2
    assert "threads" in result.stderr
    assert "512" in result.stderr


@pytest.mark.parametrize(
    ("command", "given"),
    [
        (["turns"], "kv_elastic=false"),
        (["bench"], "type_k=q8_0"),
        (["memory"], "type_v=q8_0"),
        (["eval", "--out", "out"], "kv_elastic=false"),
    ],
    ids=str,
)
def test_what_a_command_sets_itself_is_refused(command: list[str], given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_from_hub", lambda text: pytest.fail("fetched"))
    result = refreekv(*command, "hf:a/b", "--option", given)
    assert result.exit_code == 2
    assert result.stderr == f"--option {given.partition('=')[0]}: this command sets it itself\n"


@pytest.mark.parametrize(
    "command",
    [
        ["bench", "--tokens"],
        ["memory", "--tokens", "9000", "--n-ctx", "9999"],
        ["demo", "--tokens", "999999999", "--model"],
        ["turns", "--turns", "1", "--tokens"],
        ["eval", "--out", "out", "--lengths"],
    ],
    ids=str,
)
def test_a_text_longer_than_the_models_context_is_refused(command: list[str], tiny_model: Path) -> None:
    """`bench` wrote a document of so many tokens, token by token."""
    many = {"--model": [], "9999": [], "--lengths": ["1000000"]}.get(command[-1], ["999999999"])
    result = refreekv(*command, *many, tiny_model)
    assert result.exit_code == 2, result.output
    assert ": must be at most 4096, which the model was made for" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("command", [["run", "--prompt", "x"], ["chat"], ["plan"], ["memory"]], ids=str)
def test_a_context_that_no_machine_has_room_for_is_refused(command: list[str], tiny_model: Path) -> None:
    """llama.cpp's table of the cells is allocated by C++, which ends the process where it cannot be had."""
    result = refreekv(*command, tiny_model, "--n-ctx", str(2**31 - 1))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "n_ctx=2147483647: must be at most " in result.stderr.splitlines()[-1]


def test_a_context_that_llama_cpp_does_not_make_is_an_error_that_says_where_to_look(tiny_model: Path) -> None:
    options = ["--n-ctx", "512", "--no-flash-attn", "--option", "type_v=q8_0"]  # llama.cpp wants flash attention for it
    result = refreekv("run", tiny_model, "--prompt", "x", *options)
    assert result.exit_code == 2
    assert "the context could not be created" in result.stderr.splitlines()[-1]
    assert "refreekv --verbose" in result.stderr.splitlines()[-1]


def test_a_port_that_another_program_uses_is_refused(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_server, "run", lambda line: 7)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        command = ["serve", tiny_model, "--n-ctx", "512", "--port", str(port)]
        result = refreekv(*command)
        assert refreekv(*command, "--reuse-port").exit_code == 7
        assert refreekv(*command, "--host", f"{64 * 'x'}ü.sock").exit_code == 7
    assert refreekv(*command).exit_code == 7
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == f"--port {port}: another program uses it; --port must be one that is free"


def test_a_server_allocates_no_longer_context_than_it_gives(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[list[str]] = []
    monkeypatch.setattr(llama_server, "run", lambda line: lines.append(line) or 0)
    result = refreekv("serve", tiny_model, "--n-ctx", "400000000", "--port", "0")
    assert "--n-ctx 400000000: llama-server gives a request 4096" in result.stderr
    assert lines[0][lines[0].index("--kv-unified-per-slot") + 1] == "4096"


def test_a_prompt_longer_than_the_context_is_refused(tiny_model: Path) -> None:
    result = refreekv("memory", tiny_model, "--tokens", "9000", "--n-ctx", "1024")
    assert (result.exit_code, result.stderr) == (2, "--tokens 9000: must be at most 952 with --n-ctx 1024\n")


def test_a_command_can_have_an_option_of_its_own_instead() -> None:
    seen: list[Any] = []

    @options.takes_options
    def command(machine: MachineOptions, name: str, threads: int = 2) -> None:
        seen.append((machine, name, threads))

    program = typer.Typer()
    program.command()(command)
    assert CliRunner().invoke(program, ["x", "--gpu-layers", "3"]).exit_code == 0
    assert seen == [(MachineOptions(gpu_layers="3", threads=2, option=seen[0][0].option), "x", 2)]


# -- MODEL -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        *(["run", "--prompt", "x"], ["chat"], ["demo", "--model"], ["info"], ["bench"], ["memory"], ["turns"]),
        ["eval", "--out", "out"],
    ],
    ids=str,
)
def test_every_command_takes_every_kind_of_model(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def fetch(text: str) -> Path:
        asked.append(text)
        raise StopError("stopped")

    monkeypatch.setattr(models, "_from_hub", fetch)
    monkeypatch.setattr(models, "default_model", lambda: fetch("smollm2"))
    for text in ("hf:a/b:Q8_0", "smollm2"):
        result = refreekv(*command, text)
        assert (result.exit_code, result.stderr.splitlines()[-1]) == (2, "stopped"), result.output
    assert asked == ["hf:a/b:Q8_0", "smollm2"]


# -- what is logged ----------------------------------------------------------------------------------------------------


@pytest.fixture
def logs(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`refreekv`, with a `Llama` that logs while it loads."""
    load = Llama.__init__

    def load_and_log(llm: Llama, *args: Any, **named: Any) -> None:
        load(llm, *args, **named)
        logging.getLogger("refreekv_cpp.llama").warning("a [red]warning of %d", 1)
        logging.getLogger("refreekv_cpp.llama").info("a detail")

    monkeypatch.setattr(Llama, "__init__", load_and_log)
    return refreekv


def test_warnings_are_shown_and_details_with_verbose(logs: Callable[..., Result], tiny_model: Path) -> None:
    arguments = ["run", tiny_model, "--prompt", "x", "--max-tokens", "1", "--n-ctx", "256", "--gpu-layers", "0"]
    shown = logs(*arguments)
    assert shown.exit_code == 0, shown.output
    assert shown.stderr.splitlines()[0] == "a [red]warning of 1"
    assert "a detail" not in shown.stderr
    assert "a detail" in logs("--verbose", *arguments).stderr
    assert "a detail" not in logs(*arguments).stderr


def test_a_template_that_the_model_does_not_have(tiny_model: Path) -> None:
    result = refreekv("run", tiny_model, "--prompt", "x", "--n-ctx", "512", "--option", "chat_format=chat_template.x")
    assert result.exit_code == 2
    assert result.stderr.endswith("--option chat_format=chat_template.x: the model's file has no such template\n")


def test_ctrl_c_while_a_model_is_loaded(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    def load(*args: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        loaded.append(common.Llama(*args, **options))
        return loaded[0]

    monkeypatch.setattr(common, "ReadingLlama", load)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # programs in the background begin without it
    try:
        with pytest.raises(KeyboardInterrupt):
            common.load(tiny_model, {"n_ctx": 512})
        assert loaded  # it was not raised where ctypes or llama.cpp would have swallowed it
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
