"""`refreekv serve --python`, with the official client."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import llama_cpp
import openai
import pytest
from command import assert_one_error_line, refreekv
from serving import OPTIONS, QUICK, SWITCH, serving, user, write_config
from tiny import TinyModel
from typer.testing import Result

from refreekv_cpp import Llama, fit
from refreekv_cpp._cache_types import CACHE_TYPES
from refreekv_cpp.cli.serve_python import _settings
from refreekv_cpp.document import QUESTION, SECRET, write_document
from refreekv_cpp.server import models
from refreekv_cpp.server.receipts import kv_receipt
from refreekv_cpp.server.settings import ModelSettings, read_config_file

LONG = "x" * 1500


def serve(*args: str | Path) -> Result:
    return refreekv("serve", "--python", *args)


@pytest.fixture(scope="module")
def client(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """Of a server with the models `pruned`, `whole`, `limited` and `tools`."""
    common = {"model": str(tiny_model), **QUICK}
    models = [
        {**common, "model_alias": "pruned", "kv_policy": "streaming"},
        {**common, "model_alias": "whole", "kv_policy": "full"},
        {**common, "model_alias": "limited", "kv_policy": "full", "kv_elastic": True, "kv_memory_limit": "300KiB"},
        {**common, "model_alias": "tools", "kv_policy": "streaming", "chat_format": "chatml-function-calling"},
    ]
    with serving(
        "--python", "--config_file", write_config(tmp_path_factory.mktemp("server"), models, api_key="secret")
    ) as client:
        yield client


def test_usage_has_the_receipt_of_the_models_policy(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="pruned", messages=user(LONG), **OPTIONS)
    assert len(answer.choices[0].message.content) == 4
    assert answer.usage.prompt_tokens + answer.usage.completion_tokens == answer.usage.total_tokens
    assert answer.usage.completion_tokens == 4
    receipt = answer.usage.kv
    figures = {"policy", "n_tokens", "budget", "bytes", "bytes_full", "prune_ms", "n_opened"}
    assert receipt.keys() == {"memory", *figures}
    assert receipt["policy"] == "streaming"
    assert receipt["n_tokens"] == answer.usage.total_tokens - 1  # the last one is not read
    assert 0.3 < receipt["budget"] < 0.6
    assert receipt["bytes"] < receipt["bytes_full"]
    assert receipt["prune_ms"] > 0

    # short prompts are left whole: what was pruned before is none of this request's
    answer = client.completions.create(model="pruned", prompt="x", **OPTIONS)
    assert answer.usage.kv["budget"] == 1
    assert answer.usage.kv["prune_ms"] == 0

    answer = client.completions.create(model="whole", prompt=LONG, **OPTIONS)
    assert (answer.usage.kv["policy"], answer.usage.kv["budget"]) == ("full", 1)


def test_a_stream_says_what_the_response_does(client: openai.OpenAI) -> None:
    request = {"model": "pruned", "messages": user(LONG), **OPTIONS}
    answer = client.chat.completions.create(**request)
    *chunks, last = client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True})
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == answer.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"
    assert last.choices == []
    assert last.id == chunks[0].id
    untimed = [
        {**usage.model_dump(), "kv": {**usage.kv, "prune_ms": 0, "memory": None}}
        for usage in (last.usage, answer.usage)
    ]
    assert untimed[0] == untimed[1]

    # the token that ends an answer is not counted
    request = {"model": "pruned", "prompt": "x", "logit_bias": {"2": 100}, "temperature": 0}
    answer = client.completions.create(**request)
    *_, last = client.completions.create(**request, stream=True, stream_options={"include_usage": True})
    assert last.usage.completion_tokens == answer.usage.completion_tokens == 0

    for chunk in client.completions.create(model="pruned", prompt="x", **OPTIONS, stream=True):
        assert chunk.usage is None
        assert chunk.choices


def test_a_receipt_leads_with_the_memory_of_the_process() -> None:
    @dataclass
    class Memory:
        rss: int
        kv: int

    memory = Memory(rss=100, kv=7)
    stats: Any = SimpleNamespace(
        policy="full", n_tokens=5, budget=1.0, bytes=7, bytes_full=8, prune_ms=3.0, n_opened=0, memory=memory
    )
    llm: Any = SimpleNamespace(kv_stats=stats)
    assert next(iter(kv_receipt(llm, before=stats).items())) == ("memory", {"rss": 100, "kv": 7})


def test_tools(client: openai.OpenAI) -> None:
    request = {"model": "tools", "tools": [SWITCH], **OPTIONS, "max_tokens": 100}
    choice = {"type": "function", "function": {"name": "switch"}}
    answer = client.chat.completions.create(messages=user(LONG), tool_choice=choice, **request)
    call = answer.choices[0].message.tool_calls[0].function
    assert call.name == "switch"
    assert json.loads(call.arguments).keys() == {"on"}
    assert answer.usage.kv["budget"] < 0.6

    chunks = list(client.chat.completions.create(messages=user(LONG), tool_choice=choice, stream=True, **request))
    calls = [chunk.choices[0].delta.tool_calls for chunk in chunks]
    assert "".join(call[0].function.arguments for call in calls if call) == call.arguments


def test_errors_say_whose_they_are(client: openai.OpenAI) -> None:
    def error(kind: type[openai.APIError], *parts: str, **request: Any) -> None:
        with pytest.raises(kind) as raised:
            for _ in client.chat.completions.create(**{"model": "pruned", "messages": user("x"), **OPTIONS, **request}):
                pass
        for part in parts:
            assert part in str(raised.value)

    bad = openai.BadRequestError
    error(bad, "temperature: ", "valid number", temperature="hot")
    error(bad, "messages: ", "valid list", messages="x")
    error(bad, "maximum context length is 2048 tokens", messages=user("x" * 2100))
    error(bad, "kv_memory_limit is 307200", model="limited", messages=user(LONG))
    unknown = "The model `prund` does not exist; it must be one of pruned, whole, limited, tools"
    error(openai.NotFoundError, unknown, model="prund")

    # of a stream, too, as long as it has not begun
    error(openai.NotFoundError, unknown, model="prund", stream=True)
    too_long = "maximum context length is 2048 tokens"
    error(bad, too_long, messages=user("x" * 2100), stream=True)
    error(bad, "kv_memory_limit is 307200", model="limited", messages=user(LONG), stream=True)

    with pytest.raises(bad, match="prompt: must be text, or a list of one"):
        client.completions.create(model="pruned", prompt=["x", "y"])
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="guessed").completions.create(model="pruned", prompt="x")
    assert client.completions.create(model="pruned", prompt=["x"], **OPTIONS).usage.completion_tokens == 4


def test_a_stream_that_is_given_up_leaves_the_next_request_whole(client: openai.OpenAI) -> None:
    request = {"model": "pruned", **OPTIONS}
    expected = client.completions.create(prompt=LONG, **request)
    for _ in range(3):
        stream = client.completions.create(prompt=LONG[:1400], **{**request, "max_tokens": 500}, stream=True)
        next(iter(stream))
        stream.close()
        answer = client.completions.create(prompt=LONG, **request)
        assert answer.choices[0].text == expected.choices[0].text
        assert answer.usage.kv["budget"] == expected.usage.kv["budget"]


def test_a_single_model_answers_to_any_name(tiny_model: Path) -> None:
    options = ["--n-ctx=1024", "--kv-policy", "streaming", "--kv_memory_limit", "1MiB", "--verbose", "false"]
    with serving("--python", "--model", tiny_model, *options) as client:
        assert [model.id for model in client.models.list()] == [str(tiny_model)]
        answer = client.completions.create(model="gpt-4o", prompt="x" * 900, **OPTIONS)
        assert answer.usage.kv["policy"] == "streaming"
        assert answer.usage.kv["budget"] < 1


# -- settings ----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_served_is_one_line(tiny_model: Path, tmp_path: Path) -> None:
    refused = tmp_path / "refused.gguf"
    TinyModel(causal=False).write(refused)
    model = ["--model", tiny_model]
    assert_one_error_line(serve(), "model: Field required")
    assert_one_error_line(serve(tiny_model, *model), "MODEL and --model: only one")
    assert_one_error_line(serve(tiny_model, "--gpu-layers", "some"), "must be auto, all or a number")
    assert_one_error_line(serve(tiny_model, "--flash-attn=some"), "must be true, false or auto")
    assert_one_error_line(serve(tiny_model, "--option", "kv_protect"), "must be NAME=VALUE")
    assert_one_error_line(serve(tiny_model, "--option", "kv_protekt=1"), "did you mean 'kv_protect'")
    assert_one_error_line(serve(tiny_model, "--gpu-layers", "0", "--option", "kv_protect=1"), "kv_protect=1")
    assert_one_error_line(serve(tiny_model, "--option", "type_k=q9"), "must be one of f32, f16")
    quiet = ["--verbose", "false", "--option"]
    assert_one_error_line(serve(tiny_model, *quiet, "pooling_type=mean"), "pooling_type: must be a whole")
    for n_threads in ("--threads", "--n_threads", "--n_threads_batch"):
        assert_one_error_line(serve(tiny_model, n_threads, "513"), "from -1 to 512")
    assert_one_error_line(serve(tiny_model, "--chat_format", "nope"), "chat_format nope: must be", "chatml")
    assert_one_error_line(serve(tiny_model, "--chat_format", "llava-1-5"), "chat_format llava-1-5: must be")
    assert_one_error_line(serve(tiny_model, "--port", "99999999"), "port: ", "65535")
    assert_one_error_line(serve(tiny_model, "--n-ctx", "many"), "n_ctx: must be auto or a number of tokens")
    for n_ctx in ("999999999", str(2**32), "1" + "0" * 30):
        assert_one_error_line(serve(tiny_model, "--gpu-layers", "0", "--n-ctx", n_ctx), "n_ctx=", "must be")
    assert_one_error_line(serve(tiny_model, "--n-batch", str(2**32)), "n_batch=", "from 1 to")
    assert_one_error_line(serve(tiny_model, "--ssl_certfile", tmp_path), "a folder, not a file")
    assert_one_error_line(serve(tiny_model, "--ssl_keyfile", tiny_model), "needs ssl_certfile")
    half = tmp_path / "half.gguf"
    half.write_bytes(tiny_model.read_bytes()[: tiny_model.stat().st_size // 2])
    assert_one_error_line(
        serve(half, "--verbose", "false", "--gpu-layers", "0"),
        "half.gguf",
        "llama.cpp cannot load it",
    )
    assert_one_error_line(serve("--model", tmp_path / "none.gguf"), "none.gguf")
    assert_one_error_line(serve(*model, "--kv-policy", "refrekv"), "did you mean 'refreekv'")
    assert_one_error_line(serve(*model, "--kv-evicted", "dorp"), "kv_evicted: ", "'recompute' or 'drop'")
    assert_one_error_line(serve(*model, "--kv-memory-limit", "1x"), "must be a positive number of bytes")
    assert_one_error_line(serve("--model", refused, "--verbose", "false", "--gpu-layers", "0"), "not causal")
    config = ["--config-file", tmp_path / "none.json"]
    assert_one_error_line(serve(*config), "none.json")
    assert_one_error_line(serve(*config, "--port", "80", "--n-ctx", "8"), "--n_ctx: with --config_file")
    config = ["--config-file", write_config(tmp_path, [{"model": "x"}])]
    assert_one_error_line(serve(*config, "--port", "99999999"), "port: ", "65535")


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([{"model": "x", "kv_polcy": "full"}], "models.0: kv_polcy: unknown setting, did you mean 'kv_policy'?"),
        ([{"model": "x"}, {"model": "y", "kv_policy": "ful"}], "models.1: kv_policy='ful': unknown, did you mean"),
        ([{"model": "x", "kv_policy": "full", "kv_memory_limit": 5}], "models.0: kv_memory_limit: upstream's cache"),
        ([], "models: List should have at least 1 item"),
    ],
    ids=str,
)
def test_a_config_file_that_is_not_valid(tmp_path: Path, models: list[dict[str, Any]], message: str) -> None:
    path = write_config(tmp_path, models)
    with pytest.raises(ValueError, match=r"config\.json: ") as raised:
        read_config_file(path)
    assert message in str(raised.value)


def of_command_line(*args: str) -> dict[str, Any]:
    """The settings of the one model, those that are not the defaults."""
    (model,) = _settings(list(args))[1]
    settings: dict[str, Any] = model.model_dump(exclude_unset=True)
    return settings


def test_the_options_of_the_other_commands() -> None:
    assert of_command_line("a.gguf") == {"model": "a.gguf"}
    assert of_command_line("--gpu-layers", "auto", "a.gguf") == {"model": "a.gguf", "n_gpu_layers": "auto"}
    assert of_command_line("a.gguf", "--gpu-layers=all")["n_gpu_layers"] == "all"
    assert of_command_line("a.gguf", "--gpu-layers", "-1")["n_gpu_layers"] == -1
    assert of_command_line("a.gguf", "--n_gpu_layers", "7")["n_gpu_layers"] == 7
    given = of_command_line("--n-ctx", "512", "--kv-policy", "full", "--kv-evicted", "drop", "--threads", "3", "a.gguf")
    threads = {"n_threads": 3, "n_threads_batch": 3}
    assert given == {"model": "a.gguf", "n_ctx": 512, "kv_policy": "full", "kv_evicted": "drop", **threads}
    assert of_command_line("a.gguf", "--threads", "3", "--n_threads", "2")["n_threads"] == 2
    assert of_command_line("a.gguf", "--n_threads", "-1")["n_threads"] == os.cpu_count()

    assert ModelSettings(model="a.gguf").flash_attn == "auto"
    assert of_command_line("--flash-attn", "a.gguf") == {"model": "a.gguf", "flash_attn": True}
    assert of_command_line("a.gguf", "--no-flash-attn")["flash_attn"] is False
    assert of_command_line("a.gguf", "--flash_attn", "false")["flash_attn"] is False
    assert of_command_line("a.gguf", "--flash-attn=auto")["flash_attn"] == "auto"


def test_any_option_of_llama() -> None:
    options = ["kv_protect=[[0, 4]]", "kv-cold-dir=/tmp", "n_ctx=512", "swa_full=False"]
    (model,) = _settings(["a.gguf", *(f"--option={option}" for option in options)])[1]
    passed = model.llama_options()
    assert (passed["kv_protect"], passed["kv_cold_dir"]) == ([[0, 4]], "/tmp")
    assert passed["swa_full"] is False
    assert model.n_ctx == 512
    assert "n_ctx" not in passed
    assert of_command_line("a.gguf", "--option", "type_k=q8_0", "--type-v", "f16")["type_k"] == CACHE_TYPES["q8_0"]


def test_layers_and_context_are_chosen_by_the_same_code_as_elsewhere(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"kv_policy": "refreekv", "mul_mat_q": True, "vocab_only": False}

    def chosen(layers: Any, n_ctx: Any, **more: Any) -> tuple[int, int]:
        made = models.fitted(str(tiny_model), {**options, **more, "n_gpu_layers": layers, "n_ctx": n_ctx})
        assert made["mul_mat_q"] is True
        return made["n_gpu_layers"], made["n_ctx"]

    monkeypatch.setattr(llama_cpp, "llama_supports_gpu_offload", lambda: False)
    assert chosen("auto", "auto") == (0, 4096)  # the model's own
    assert chosen("all", 512) == (-1, 512)
    assert chosen(7, 0) == (7, 0)
    monkeypatch.setattr(fit.search, "gpu_layers", lambda path, **options: 3)
    with caplog.at_level(logging.INFO):
        assert chosen("auto", 512) == (3, 512)
    assert "GPU layers: 3" in caplog.text
    monkeypatch.setattr(fit.needs, "host_free", lambda: 2**20)
    assert chosen(0, "auto") == (0, 512)
    assert chosen("auto", "auto", vocab_only=True) == (0, 512)


def test_the_context_is_what_fits_by_default() -> None:
    assert ModelSettings(model="a.gguf").n_ctx == "auto"
    assert of_command_line("a.gguf", "--n-ctx", "auto")["n_ctx"] == "auto"


def test_an_option_reaches_the_model(tiny_model: Path) -> None:
    options = ["--option", "kv_protect=[[0, 600]]", "--threads", "1", "--option", "verbose=false"]
    with serving("--python", tiny_model, "--kv-policy", "streaming", "--n-ctx", "1024", *options) as client:
        protected = client.completions.create(model="x", prompt="x" * 900, **OPTIONS).usage.kv["budget"]
    assert protected > 0.6


def kv_settings(model: ModelSettings) -> dict[str, Any]:
    return {name: value for name, value in model.llama_options().items() if name.startswith("kv_")}


def test_a_config_file_in_yaml(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("port: 8001\nmodels:\n- model: a.gguf\n  kv_memory_limit: 1000000\n- {model: b, kv_policy: full}\n")
    settings = read_config_file(path)
    assert settings.port == 8001
    cold = {"kv_cold": "auto", "kv_cold_dir": None, "kv_cold_limit": None, "kv_cold_type": None, "kv_cold_state": True}
    others = {"kv_evicted": "keep", "kv_elastic": None, **cold, "kv_library_limit": 4 * 2**30}
    assert [kv_settings(model) for model in settings.models] == [
        {"kv_policy": "refreekv", "kv_memory_limit": 1000000, "kv_library": True, **others},
        {"kv_policy": "full", "kv_memory_limit": None, "kv_library": False, **others},
    ]
    path.write_text("models: [")
    with pytest.raises(ValueError, match=r"config\.yaml: while parsing"):
        read_config_file(path)


def test_missing_packages_are_named(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert_one_error_line(serve("--model", tiny_model), "uvicorn", 'pip install "refreekv-cpp[server]"')


def test_help_has_upstreams_options_and_ours() -> None:
    result = serve("--help")
    assert result.exit_code == 0
    assert "--kv_policy" in result.stdout
    assert "--chat_format" in result.stdout


@pytest.mark.model
def test_a_fact_planted_early_is_answered(default_model: Path) -> None:
    vocabulary = Llama(str(default_model), vocab_only=True, verbose=False)
    document = write_document(2000, lambda text: len(vocabulary.tokenize(text.encode(), add_bos=False)))
    options = ["--n_ctx", "4096", "--n_threads", "2", "--verbose", "false"]
    with serving("--python", "--model", default_model, *options) as client:
        answer = client.chat.completions.create(
            model="x", messages=user(f"{document}\n\n{QUESTION}"), temperature=0, max_tokens=24
        )
    assert SECRET in answer.choices[0].message.content
    assert answer.usage.kv["policy"] == "refreekv"
    assert answer.usage.kv["budget"] < 0.15
