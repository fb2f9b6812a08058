"""docs/how-to/apps.md: what it promises to each program, by way of the openai client."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from serving import SWITCH, serving, user

PAGE = Path(__file__).parents[2] / "docs/how-to/apps.md"
OPTIONS = {"max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def client(tiny_model: Path) -> Iterator[openai.OpenAI]:
    command = ["--alias", "local", "--api-key", "secret", "--n-ctx", "2048", "--threads", "1"]
    with serving(tiny_model, *command) as client:
        yield client


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_the_snippet_runs(client: openai.OpenAI, capsys: pytest.CaptureFixture[str]) -> None:
    [snippet] = [code for code in blocks("python") if code.startswith("from openai")]
    exec(snippet.replace("http://127.0.0.1:8000/v1", str(client.base_url)), {})
    *_, cached, kept = capsys.readouterr().out.split()
    assert int(cached) >= 0
    assert int(kept) > 0


def test_settings_files_can_be_parsed() -> None:
    yaml = pytest.importorskip("yaml")
    assert [yaml.safe_load(text) for text in blocks("yaml")]
    assert [json.loads(text) for text in blocks("json")]
    for code in blocks("python"):
        compile(code, PAGE.name, "exec")


def test_the_name_of_the_model(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["local"]
    said = client.chat.completions.create(model="another", messages=user("x"), **OPTIONS)
    assert said.model == "local"


def test_a_stream_ends_with_what_was_read(client: openai.OpenAI) -> None:
    options = {**OPTIONS, "stream": True, "stream_options": {"include_usage": True}}
    for _ in range(2):
        *_, last = client.chat.completions.create(model="local", messages=user("x" * 50), **options)
    assert last.usage.prompt_tokens_details.cached_tokens == last.usage.prompt_tokens - 1
    assert last.timings["kv_n_tokens"] == last.usage.total_tokens - 1


def test_a_request_with_what_zed_sends(client: openai.OpenAI) -> None:
    said = client.chat.completions.create(
        model="local",
        messages=user([{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]),
        max_completion_tokens=4,
        temperature=0,
        parallel_tool_calls=False,
    )
    assert said.usage is not None
    assert 0 < said.usage.completion_tokens <= 4


def test_a_browser_may_ask(client: openai.OpenAI) -> None:
    """As the page of another address."""
    asks = {"Origin": "http://app.localhost", "Access-Control-Request-Method": "POST"}
    allowed = client._client.options(f"{client.base_url}chat/completions", headers=asks).headers
    assert allowed["Access-Control-Allow-Origin"] in ("*", asks["Origin"])
    assert "POST" in allowed["Access-Control-Allow-Methods"]


def test_tools_of_a_model_without_them_are_ignored(client: openai.OpenAI) -> None:
    options = {**OPTIONS, "tools": [SWITCH], "tool_choice": "required"}
    said = client.chat.completions.create(model="local", messages=user("x"), **options)
    assert said.choices[0].message.tool_calls is None


def test_a_prompt_that_is_too_long_says_how_long(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="local", messages=user("x" * 5000), **OPTIONS)
    body = error.value.body
    assert isinstance(body, dict)
    assert body["type"] == "exceed_context_size_error"
    assert body["n_prompt_tokens"] > 5000
    assert body["n_ctx"] == 2048


def test_embeddings_need_a_server_of_their_own(client: openai.OpenAI, tiny_model: Path) -> None:
    with pytest.raises(openai.InternalServerError) as error:
        client.embeddings.create(model="local", input="x")
    assert error.value.status_code == 501
    options = ["--embeddings", "--pooling", "mean", "--kv-policy", "full", "--n-ctx", "512", "--threads", "1"]
    with serving(tiny_model, *options) as embedder:
        assert len(embedder.embeddings.create(model="embed", input=["x", "y"]).data) == 2
        with pytest.raises(openai.BadRequestError, match="too large"):
            embedder.embeddings.create(model="embed", input="x" * 600)
    options += ["--option", "n_batch=1024", "--option", "n_ubatch=1024", "--n-ctx", "1024"]
    with serving(tiny_model, *options) as embedder:
        assert len(embedder.embeddings.create(model="embed", input="x" * 600).data) == 1
