"""Requests that are not valid, and valid ones of kinds that upstream's server does not take."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import openai
import pytest
from compatibility.images import LLAVA, N_EMBD, ask
from serving import OPTIONS, QUICK, SWITCH, send, serving, user, write_config
from tiny import N_SPECIAL
from tiny_projector import random_png, write_projector

from refreekv_cpp import _grammar
from refreekv_cpp.server.models import CountingLlama
from refreekv_cpp.server.requests import ChatCompletionRequest, CompletionRequest

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
LONE = "\ud83d"
CALL = {"name": "switch", "arguments": '{"on": true}'}
PIXEL = "data:image/png;base64,AAAA"


@pytest.fixture(scope="module")
def client(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """Of a server with the models `text`, `tools` and `embeddings`."""
    common = {"model": str(tiny_model), "kv_policy": "streaming", **QUICK}
    models = [
        {**common, "model_alias": "text"},
        {**common, "model_alias": "tools", "chat_format": "chatml-function-calling"},
        {**common, "model_alias": "embeddings", "embedding": True},
    ]
    with serving(
        "--python", "--config_file", write_config(tmp_path_factory.mktemp("server"), models, api_key="secret")
    ) as client:
        yield client


def assert_refused(client: openai.OpenAI, path: str, body: Any, param: str | None, *parts: str, **how: Any) -> None:
    """The request is answered with OpenAI's error, and the server goes on."""
    status, text = send(client, path, body, **how)
    assert (status, text[:9]) == (400, '{"error":'), text
    error = json.loads(text)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    for part in parts:
        assert part in error["message"]


# of either route
EITHER = [
    ({"logprobs": 1}, "logprobs", "logits_all"),
    ({"logprobs": 0}, "logprobs", "logits_all"),
    ({"logit_bias": {"cat": 1}}, "logit_bias", "'cat' must be the number of a token, 0 to 258"),
    ({"logit_bias": {"259": 1}}, "logit_bias", "'259' must be the number of a token, 0 to 258"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "'-1' must be the number"),
    ({"logit_bias": {"9" * 5000: 1}}, "logit_bias", "must be the number"),
    ({"logit_bias": {"5": 1e39}}, "logit_bias", "less than"),
    ({"logit_bias": [5]}, "logit_bias", "dict"),
    ({"grammar": "root ::= ["}, "grammar", "cannot be used"),
    ({"grammar": "root ::= root"}, "grammar", "cannot be used"),
    ({"grammar": 'answer ::= "a"'}, "grammar", "cannot be used"),
    ({"grammar": f"root ::= {'(' * 20000}'a'{')' * 20000}"}, "grammar", "nest more than 4000"),
    ({"grammar": "root ::= a0\n" + "".join(f"a{i} ::= a{i + 1}\n" for i in range(10000))}, "grammar", "100000 at most"),
    ({"grammar": 'root ::= "\\x00"'}, None, "no token that goes on"),
    ({"repeat_penalty": 0}, "repeat_penalty", "greater than 0"),
    ({"temperature": "hot"}, "temperature", "valid number"),
    ({"max_tokens": "many"}, "max_tokens", "valid integer"),
    ({"stop": LONE}, "stop", "lone surrogate"),
    ({"user": ["x", {LONE: 1}]}, "user", "lone surrogate"),
    ({LONE: 1}, None, "lone surrogate"),
    ({"stream_options": {"include_usage": "perhaps"}}, "stream_options", "valid boolean"),
    ({"model": 5}, "model", "valid string"),
]
OF_COMPLETIONS = [
    ({"prompt": ["x", "y"]}, "prompt", "must be text, or a list of one"),
    ({"prompt": {"text": "x"}}, "prompt", "valid string"),
    ({"prompt": f"x{LONE}"}, "prompt", "lone surrogate"),
    ({"prompt": "x" * 2100}, None, "maximum context length is 2048 tokens"),
]
OF_CHATS = [
    ({"messages": []}, "messages", "at least 1 item"),
    ({"messages": "x"}, "messages", "valid list"),
    ({"messages": user("x" * 2100)}, None, "maximum context length is 2048 tokens"),
    ({"messages": user(f"x{LONE}")}, "messages", "lone surrogate"),
    ({"messages": user(5)}, "messages", "messages.0.content: must be text, a list of parts, or null"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages", "messages.0.role: ", "'system'"),
    ({"messages": [{"content": "x"}]}, "messages", "messages.0.role: Field required"),
    ({"messages": user([{"type": "image_url", "image_url": {"url": PIXEL}}])}, "messages", "text only"),
    ({"messages": user([{"type": "input_audio", "input_audio": {}}])}, "messages", "'text', 'image_url'"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages", "tool_calls.0.type"),
    ({"tools": [SWITCH], "tool_choice": "sometimes"}, "tool_choice", "'required'"),
    ({"tools": [SWITCH], "tool_choice": {"type": "function", "function": {"name": "swich"}}}, "tool_choice", "switch"),
    ({"tool_choice": {"type": "function", "function": {"name": "switch"}}}, "tool_choice", "there are none"),
    ({"functions": [SWITCH["function"]], "function_call": {"name": "swich"}}, "function_call", "switch"),
    ({"tools": ["switch"]}, "tools", "valid dictionary"),
    ({"response_format": {"type": "json"}}, "response_format", "'json_object'"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format", "`schema`"),
    ({"response_format": {"type": "json_object", "schema": {"type": "txt"}}}, "response_format", "no grammar"),
    (
        {"response_format": {"type": "json_object", "schema": {"type": "array", "minItems": 10**12, "items": {}}}},
        "response_format",
        "more than 4000 times",
    ),
    (
        {"tools": [{"type": "function", "function": {"name": "x", "parameters": {"pattern": "^(a{3000}){3000}$"}}}]},
        "tools",
        "more than 4000 times",
    ),
]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("path", "request_", "param", "parts"),
    [(COMPLETIONS, request, param, parts) for request, param, *parts in EITHER + OF_COMPLETIONS]
    + [(CHAT, request, param, parts) for request, param, *parts in EITHER + OF_CHATS],
    ids=lambda value: str(value)[:40] if isinstance(value, (dict, str)) else "",
)
def test_a_request_that_is_not_valid(
    client: openai.OpenAI, path: str, request_: dict[str, Any], param: str | None, parts: list[str], stream: bool
) -> None:
    if path == CHAT and "logprobs" in request_:
        request_ = {"logprobs": True, "top_logprobs": request_["logprobs"]}
    start: dict[str, Any] = {"prompt": "x"} if path == COMPLETIONS else {"messages": user("x")}
    assert_refused(client, path, {"model": "text", **start, **request_, "stream": stream}, param, *parts)


PATHS = [COMPLETIONS, CHAT, "/v1/embeddings", "/extras/tokenize", "/extras/tokenize/count", "/extras/detokenize"]


@pytest.mark.parametrize("path", PATHS)
def test_a_body_that_is_no_object(client: openai.OpenAI, path: str) -> None:
    for body in (b"{'prompt': 1}", b'{"prompt": "x"', b'{"prompt": "\xff"}', b"[" * 100_000):
        assert_refused(client, path, body, None)
    assert_refused(client, path, b'{"prompt": x}', None, "no JSON: Expecting value at character 11")
    for body in (b"", b"[]", b"5", b"null", b'"x"'):
        assert_refused(client, path, body, None, "must be a JSON object")
    form = "application/x-www-form-urlencoded"  # what curl -d sends
    assert_refused(client, path, b'{"prompt": "x"}', None, "Content-Type: application/json", kind=form)


def test_a_number_that_is_none(client: openai.OpenAI) -> None:
    for number in (b"NaN", b"Infinity", b"1e999"):
        for name in (b"temperature", b"top_p", b"presence_penalty"):
            assert_refused(client, COMPLETIONS, b'{"prompt": "x", "%s": %s}' % (name, number), name.decode())


def test_errors_of_http_are_openais_too(client: openai.OpenAI) -> None:
    def error(status: int, path: str, **how: Any) -> str:
        found, text = send(client, path, {"prompt": "x"}, **how)
        assert found == status
        message: str = json.loads(text)["error"]["message"]
        return message

    assert error(401, COMPLETIONS, key="guessed") == "Invalid API key"
    assert error(404, "/v1/completion") == "Not Found"
    assert error(405, "/v1/models") == "Method Not Allowed"


def test_embeddings_and_tokens(client: openai.OpenAI) -> None:
    assert_refused(client, "/v1/embeddings", {"model": "text", "input": "x"}, None, "setting embedding")
    request = {"model": "embeddings"}
    for body in ({}, {"input": []}, {"input": 5}, {"input": [5]}, {"input": LONE}):
        assert_refused(client, "/v1/embeddings", {**request, **body}, "input")
    for text in ("", "x" * 5000, ["x", ""]):
        status, _ = send(client, "/v1/embeddings", {**request, "input": text})
        assert status == 200
    # what the official client sends
    assert len(client.embeddings.create(model="embeddings", input=["x", "y"]).data) == 2

    assert_refused(client, "/extras/tokenize", {"input": LONE}, "input")
    assert_refused(client, "/extras/tokenize", {}, "input", "Field required")
    for token in (-1, 259, 2**40, 2**70):
        assert_refused(client, "/extras/detokenize", {"tokens": [5, token]}, "tokens")
    tokens = json.loads(send(client, "/extras/tokenize", {"input": "aé"})[1])["tokens"]
    assert json.loads(send(client, "/extras/tokenize/count", {"input": "aé"})[1])["count"] == len(tokens)
    assert json.loads(send(client, "/extras/detokenize", {"tokens": tokens})[1])["text"].strip("▁") == "aé"
    half = json.loads(send(client, "/extras/detokenize", {"tokens": tokens[:-1]})[1])["text"]
    assert half.strip("▁") == "a\N{REPLACEMENT CHARACTER}"


def test_what_a_grammar_allows_goes_before_all_else(client: openai.OpenAI) -> None:
    for more in ({"min_tokens": 5}, {"logit_bias": {"2": -1e9}}, {"temperature": 0}, {"seed": 2**80}):
        options = {"model": "text", "extra_body": {"grammar": 'root ::= "ab"', **more}}
        assert client.completions.create(prompt="x", **options).choices[0].text == "ab"
        chunks = client.chat.completions.create(messages=user("x"), stream=True, **options)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "ab"


def test_a_grammar_is_parsed_twice_at_most(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once to check it before the answer begins, and once to sample by it."""
    parsed: list[str] = []
    make = _grammar.make_sampler
    monkeypatch.setattr(
        _grammar, "make_sampler", lambda vocab, text, root: parsed.append(text) or make(vocab, text, root)
    )
    with contextlib.closing(CountingLlama(str(tiny_model), **QUICK)) as llm:
        request = CompletionRequest(prompt="x", grammar='root ::= "ab"', max_tokens=2)
        assert llm.create_completion(**request.options(llm))["choices"][0]["text"] == "ab"
        assert len(parsed) == 2
        schema = {"type": "json_object", "schema": {"type": "boolean"}}
        chat = ChatCompletionRequest(messages=user("x"), response_format=schema, max_tokens=8)
        answer = llm.create_chat_completion(**chat.options(llm))["choices"][0]["message"]["content"]
        assert json.loads(answer) in (True, False)
        assert len(parsed) == 4


def test_schemas(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
    for response_format in (
        {"type": "json_object", "schema": schema},
        {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}},
    ):
        answer = client.chat.completions.create(
            model="text", messages=user("x"), response_format=response_format, max_tokens=50, temperature=0
        )
        assert json.loads(answer.choices[0].message.content).keys() == {"on"}


def test_null_is_the_default(client: openai.OpenAI) -> None:
    names = ["temperature", "top_p", "presence_penalty", "frequency_penalty", "stop", "stream", "n", "logprobs", "user"]
    nulls = {**dict.fromkeys([*names, "logit_bias", "seed", "stream_options"]), "max_tokens": 2, "model": "text"}
    assert send(client, COMPLETIONS, {"prompt": "x", **nulls})[0] == 200
    nulls |= dict.fromkeys(["tools", "tool_choice", "response_format", "functions", "function_call"])
    assert send(client, CHAT, {"messages": user("x"), **nulls})[0] == 200


@pytest.mark.parametrize("model", ["text", "tools"])
def test_text_in_parts(client: openai.OpenAI, model: str) -> None:
    def answer(messages: list[Any]) -> tuple[str, int]:
        request = {"model": model, "messages": messages, **OPTIONS}
        *chunks, last = client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True})
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        whole = client.chat.completions.create(**request)
        assert streamed == whole.choices[0].message.content
        assert last.usage.prompt_tokens == whole.usage.prompt_tokens
        return streamed, whole.usage.prompt_tokens

    parts = [{"type": "text", "text": "abc"}, {"type": "text", "text": "def"}]
    assert answer(user(parts)) == answer(user("abc\ndef"))
    assert answer(user(parts[:1])) == answer(user("abc"))
    system = [{"role": "system", "content": parts[:1]}, *user("x")]
    assert answer(system) == answer([{"role": "system", "content": "abc"}, *user("x")])


@pytest.mark.parametrize("model", ["text", "tools"])
@pytest.mark.parametrize("content", [{"content": None}, {}, {"content": ""}, {"content": []}], ids=str)
def test_calls_without_content(client: openai.OpenAI, model: str, content: dict[str, Any]) -> None:
    call = {"id": "1", "type": "function", "function": CALL}
    messages = [
        *user("x"),
        {"role": "assistant", **content, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "done"}]},
    ]
    for stream in (False, True):
        status, text = send(client, CHAT, {"model": model, "messages": messages, "stream": stream, **OPTIONS})
        assert status == 200
        assert "error" not in text


def test_tools_of_all_kinds(client: openai.OpenAI) -> None:
    request = {"model": "tools", "messages": user("x"), "max_tokens": 50, "temperature": 0}
    plain = {"type": "function", "function": {"name": "now"}}  # it has no parameters
    answer = client.chat.completions.create(tools=[plain], tool_choice="required", **request)
    assert answer.choices[0].message.tool_calls[0].function.name == "now"
    quote = {"type": "function", "function": {"name": 'say "', "parameters": {}}}
    assert_refused(
        client, CHAT, {**request, "tools": [SWITCH, plain], "tool_choice": "required"}, "tool_choice", "'auto'"
    )
    assert_refused(client, CHAT, {**request, "tools": [quote], "tool_choice": "auto"}, "tools", "pattern")


@pytest.mark.parametrize("setting", ["logits_all=true", "draft_model=prompt-lookup-decoding"])
def test_logprobs_and_drafts_to_the_end_of_the_context(tiny_model: Path, setting: str) -> None:
    options = ["--n-ctx", "1024", "--threads", "1", "--verbose", "false", "--option", setting]
    with serving("--python", tiny_model, *options) as client:
        request = {"model": "x", "prompt": "x" * 900, "max_tokens": 400, "logprobs": 2}
        answer = client.completions.create(**request)
        assert answer.choices[0].finish_reason in ("length", "stop")
        assert len(answer.choices[0].logprobs.tokens) > 50
        *_, last = client.completions.create(**request, stream=True)
        assert last.choices[0].finish_reason in ("length", "stop")


def test_an_answer_ends_with_the_context(client: openai.OpenAI) -> None:
    """Also where the last token is the first byte of a character, at which upstream does not stop."""
    half = {"logit_bias": {str(N_SPECIAL + 0xE2): 100}, "temperature": 0, "max_tokens": 400}
    answer = client.completions.create(model="text", prompt="x" * 2000, **half)
    assert answer.usage.completion_tokens + answer.usage.prompt_tokens <= 2049
    *_, last = client.completions.create(model="text", prompt="x" * 2000, stream=True, **half)
    assert last.choices[0].finish_reason in ("length", "stop")


def test_a_vocabulary_answers_nothing(tiny_model: Path) -> None:
    with serving("--python", tiny_model, "--option", "vocab_only=true", "--verbose", "false") as client:
        for path, body in ((COMPLETIONS, {"prompt": "x"}), (CHAT, {"messages": user("x"), "stream": True})):
            assert_refused(client, path, body, None, "vocab_only")
        assert send(client, "/extras/tokenize", {"input": "x"})[0] == 200


def test_images(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    projector = tmp_path / "projector.gguf"
    write_projector(projector, LLAVA.kind, N_EMBD)
    options = ["--chat-format", "llava-1-5", "--clip-model-path", projector, "--threads", "1", "--verbose", "false"]
    with serving("--python", tiny(LLAVA.model), "--n-ctx", "2048", *options) as client:
        messages = ask(random_png(160, 96))
        answer = client.chat.completions.create(model="x", messages=messages, **OPTIONS)
        assert answer.usage.prompt_tokens > 30
        messages[1]["content"][0]["image_url"] = messages[1]["content"][0]["image_url"]["url"]
        assert client.chat.completions.create(model="x", messages=messages, **OPTIONS).usage.prompt_tokens > 30

        for url in (
            PIXEL,
            "data:image/png;base64",
            "data:image/png;base64,%",
            "nowhere",
            "http://127.0.0.1:9/x.png",
            "",
        ):
            for stream in (False, True):
                body = {"messages": user([{"type": "image_url", "image_url": url}]), "stream": stream}
                assert_refused(client, CHAT, body, None)


JUNK: list[Any] = [
    None, True, 0, -1, 2**31, 2**70, 0.5, 1e308, 1e-320, "", "x", "\0", LONE, "x" * 3000, [], ["x"], [[]], [None], {},
    {"a": 1}, {"type": "text"}, {"5": 100}, {"cat": 1}, "auto", "required", "json_object", "{{ 7 * 7 }}", "</s>",
    'root ::= "a"', "root ::= [a-z]*", 'root ::= <[300]> | !<[5]>', "root ::= [^\\x01-\\U0010FFFF]", "root ::= (",
    {"type": "function", "function": {"name": "switch"}}, {"type": "json_object", "schema": {"$ref": "#/x"}},
    {"type": "json_object", "schema": {"enum": []}}, {"type": "json_object", "schema": {"properties": 5}},
    {"type": "json_object", "schema": {"type": "string", "pattern": "("}},
]  # fmt: skip
TURNS = [
    {"role": "system", "content": "x"},
    {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": CALL}]},
    {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "x"}]},
]
VALID: list[tuple[str, dict[str, Any]]] = [
    (COMPLETIONS, {"prompt": "x", "suffix": "y", "echo": True, "stop": ["a"], "seed": 1, "grammar": 'root ::= "ab"'}),
    (COMPLETIONS, {"prompt": ["x"], "temperature": 0.5, "top_k": 5, "repeat_penalty": 2, "min_tokens": 1}),
    (CHAT, {"messages": TURNS, "tools": [SWITCH], "tool_choice": "auto", "mirostat_mode": 2, "mirostat_tau": 1}),
    (CHAT, {"messages": user("x"), "functions": [SWITCH["function"]], "function_call": {"name": "switch"}}),
    (CHAT, {"messages": user("x"), "response_format": {"type": "json_object"}, "logit_bias": {"5": 1}}),
    ("/v1/embeddings", {"input": ["a", "b"]}),
    ("/extras/detokenize", {"tokens": [5, 6]}),
]


def changed(random: Random, value: Any) -> Any:
    """A JSON value with something else in one place of it."""
    if not value or not isinstance(value, (dict, list)) or random.random() < 0.2:
        return copy.deepcopy(random.choice(JUNK))
    res = copy.copy(value)
    key = random.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if isinstance(res, dict) and random.random() < 0.2:
        del res[key]
    else:
        res[key] = changed(random, value[key])
    return res


@pytest.mark.parametrize("model", ["text", "tools", "embeddings"])
def test_no_request_is_too_much(client: openai.OpenAI, model: str) -> None:
    random = Random(model)
    for _ in range(150):
        path, valid = random.choice(VALID)
        body = valid
        for _ in range(random.randint(1, 3)):
            name = random.choice(list(valid))
            body = {**body, name: changed(random, body[name])}
        body = {**body, "model": model, "max_tokens": 3, "stream": random.random() < 0.3}
        status, text = send(client, path, body)
        assert status in (200, 400), (path, body, text)
        assert "internal_server_error" not in text, (path, body, text)
