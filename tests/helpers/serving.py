"""A server for tests, and requests that no client library would send."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
from tiny import N_SPECIAL

# ASCII only: llama-cpp-python does not count tokens that leave a character unfinished
OPTIONS = {
    "max_tokens": 4,
    "temperature": 0,
    "logit_bias": {str(N_SPECIAL + byte): -100 for byte in range(128, 256)} | {"2": -100},
}
SWITCH = {
    "type": "function",
    "function": {
        "name": "switch",
        "parameters": {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]},
    },
}
QUICK = {"n_ctx": 2048, "n_threads": 1, "n_threads_batch": 1, "verbose": False}


def user(text: Any) -> list[Any]:
    return [{"role": "user", "content": text}]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@contextlib.contextmanager
def serving(*args: str | Path, env: dict[str, str] | None = None) -> Iterator[openai.OpenAI]:
    """A client of `refreekv serve` with these arguments."""
    port = free_port()
    code = "from refreekv_cpp.cli import main; main()"
    options = ["--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen([sys.executable, "-c", code, "serve", *options, *args], env=env)
    try:
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="secret", max_retries=0) as client:
            deadline = time.monotonic() + 300  # a machine that is busy takes long to start Python
            while True:
                with contextlib.suppress(openai.APIConnectionError, openai.InternalServerError):  # 503: it is loading
                    client.models.list()
                    break
                assert process.poll() is None, "the server ended"
                assert time.monotonic() < deadline
                time.sleep(0.1)
            yield client
    finally:
        process.terminate()
        process.wait()


def write_config(folder: Path, models: list[dict[str, Any]], **server: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**server, "models": models}))
    return path


def send(
    client: openai.OpenAI, path: str, body: Any, *, key: str = "secret", kind: str = "application/json"
) -> tuple[int, str]:
    """Status and text of the response to a POST. body: of JSON, or bytes that are sent as they are."""
    connection = http.client.HTTPConnection(client.base_url.host, client.base_url.port, timeout=60)
    with contextlib.closing(connection):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", path, data, {"Content-Type": kind, "Authorization": f"Bearer {key}"})
        response = connection.getresponse()
        return response.status, response.read().decode()
