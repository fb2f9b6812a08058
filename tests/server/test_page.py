"""The page that shows the cache at work, which `refreekv serve` has at /cache."""

from __future__ import annotations

import http.server
import os
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from command import assert_one_error_line, refreekv
from serving import free_port, send, serving

from refreekv_cpp import _open_page

OPTIONS = ["--n-ctx", "2048", "--threads", "1", "--log-verbosity", "1", "--kv-policy", "streaming"]


@pytest.fixture(scope="module")
def client(tiny_model: Path) -> Iterator[openai.OpenAI]:
    with serving(tiny_model, *OPTIONS) as client:
        yield client


def address(client: openai.OpenAI) -> str:
    return str(client.base_url).removesuffix("/v1/")


def get(client: openai.OpenAI, path: str) -> tuple[int, str, str]:
    """Status, type and text."""
    try:
        with urllib.request.urlopen(address(client) + path) as answer:
            return answer.status, answer.headers["content-type"], answer.read().decode()
    except urllib.error.HTTPError as error:
        error.close()
        return error.code, "", ""


def test_it_is_served_as_it_is_written(client: openai.OpenAI) -> None:
    page = Path(__file__).parents[2] / "native" / "server" / "cache.html"
    assert get(client, "/cache") == (200, "text/html; charset=utf-8", page.read_text(encoding="utf-8"))


def test_the_address_alone_has_a_page(client: openai.OpenAI) -> None:
    """The chat, or this page in a build without it."""
    status, kind, _ = get(client, "/")
    assert status == 200
    assert kind.startswith("text/html")


def test_it_asks_for_nothing_that_the_server_does_not_say(client: openai.OpenAI) -> None:
    send(client, "/completion", {"prompt": "x" * 700, "n_predict": 4})
    page = get(client, "/cache")[2]
    metrics = get(client, "/metrics")[2]
    asked = set(re.findall(r"\bm\.(\w+)", page))
    assert asked >= {"kv_bytes", "kv_bytes_full", "process_resident_bytes"}
    assert asked <= set(re.findall(r"^llamacpp:(\w+)", metrics, re.MULTILINE))


def test_the_page_needs_no_key_and_its_figures_do(tiny_model: Path) -> None:
    with serving(tiny_model, *OPTIONS, "--api-key", "secret") as client:
        assert [get(client, path)[0] for path in ("/cache", "/slots", "/metrics")] == [200, 401, 401]


class Health(http.server.BaseHTTPRequestHandler):
    """A server that loads its model while the first requests come."""

    n_asked = 0

    def do_GET(self) -> None:
        type(self).n_asked += 1
        self.send_response(200 if self.n_asked > 2 else 503)
        self.end_headers()


def test_the_page_is_opened_once_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    server = http.server.HTTPServer(("127.0.0.1", 0), Health)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    opened: list[str] = []
    monkeypatch.setattr(_open_page.webbrowser, "open", opened.append)
    there = f"http://127.0.0.1:{server.server_port}"
    _open_page.main(there, "/cache", os.getppid())
    server.shutdown()
    server.server_close()
    assert Health.n_asked == 3
    assert opened == [f"{there}/cache"]


def test_who_waits_for_a_server_that_is_gone_ends() -> None:
    address = f"http://127.0.0.1:{free_port()}"
    parent = f"from refreekv_cpp import llama_server; llama_server.open_when_ready({address!r}, '/cache')"
    # returns once nobody has the pipe of its output any more
    subprocess.run([sys.executable, "-c", parent], capture_output=True, timeout=60, check=True)


def test_a_port_that_is_not_known(tiny_model: Path) -> None:
    assert_one_error_line(refreekv("ui", tiny_model, "--port", "0"), "--port must be one from 1 to 65535")
