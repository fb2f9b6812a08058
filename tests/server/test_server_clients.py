"""Clients of the server that leave before they have been answered."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn
from llama_cpp.server.settings import ServerSettings
from serving import OPTIONS, QUICK, free_port

from refreekv_cpp.server import app
from refreekv_cpp.server.models import CountingLlama, Models
from refreekv_cpp.server.settings import ModelSettings

LONG = "x" * 1500
PATIENCE = 60  # seconds until a test is given up


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class Watched:
    """A server in this process, and what its model decodes.

    Attributes:
        batches: the tokens of each batch since `start`.
        before: called before each batch.
    """

    def __init__(self, client: openai.OpenAI, models: Models, llm: CountingLlama) -> None:
        self.client = client
        self.models = models
        self.llm = llm
        decode = llm._ctx.decode

        def watched(batch: Any) -> None:
            self.before()
            decode(batch)
            self.batches.append(batch.n_tokens())

        llm._ctx.decode = watched  # type: ignore[method-assign]
        self.start(lambda: None)

    def start(self, before: Callable[[], None]) -> None:
        self.batches: list[int] = []
        self.before = before

    def n_waiting(self) -> int:
        return self.models.turn.statistics().tasks_waiting

    def request(self, **request: Any) -> socket.socket:
        """A connection over which a completion was asked for."""
        body = json.dumps({**OPTIONS, **request}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        connection = socket.create_connection(("127.0.0.1", self.client.base_url.port))
        connection.sendall(head.encode() + body)
        return connection

    def answer(self, prompt: str) -> tuple[str, float]:
        """What the server says to somebody who stays, and the part of the cache that it keeps for it."""
        self.start(lambda: None)
        answer: Any = self.client.completions.create(model="x", prompt=prompt, **OPTIONS)
        return answer.choices[0].text, answer.usage.kv["budget"]


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[Watched]:
    options = {**QUICK, "n_batch": 128, "kv_policy": "streaming"}
    port = free_port()
    settings = ServerSettings(host="127.0.0.1", port=port, interrupt_requests=False)
    served = app.create_app(settings, [ModelSettings(model=str(tiny_model), **options)])
    web = uvicorn.Server(uvicorn.Config(served, "127.0.0.1", port, log_config=None))
    thread = threading.Thread(target=web.run)
    thread.start()
    try:
        wait_until(lambda: web.started)
        models = app._models()
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0) as client:
            yield Watched(client, models, models.load(None))
        models.free()
    finally:
        web.should_exit = True
        thread.join()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("n_read", [1, 2, 12, 20])
def test_an_answer_ends_where_its_client_leaves(server: Watched, stream: bool, n_read: int) -> None:
    """While its prompt is read, which takes 12 batches, and later."""
    expected = server.answer(LONG)
    server.answer("y")  # nothing of the long prompt is there any more
    reached = threading.Event()

    def hold() -> None:
        if len(server.batches) == n_read - 1 and not reached.is_set():
            reached.set()
            wait_until(lambda: server.llm.interrupted())

    server.start(hold)
    with contextlib.closing(server.request(prompt=LONG, max_tokens=400, stream=stream)):
        assert reached.wait(PATIENCE)
    wait_until(lambda: not server.models.turn.locked())
    assert len(server.batches) == n_read - 1
    assert server.answer(LONG) == expected


def test_those_who_leave_the_queue_are_not_answered(server: Watched) -> None:
    expected = server.answer("the last one")
    n_prompt = server.llm.n_prompt
    reached, release = threading.Event(), threading.Event()

    def hold() -> None:
        reached.set()
        assert release.wait(PATIENCE)

    server.start(hold)
    with contextlib.closing(server.request(prompt="abc")) as first:
        assert reached.wait(PATIENCE)
        waiting = [server.request(prompt=LONG, stream=stream) for stream in (False, True, False)]
        wait_until(lambda: server.n_waiting() == 3)
        # who asks for nothing of the model does not wait for it
        assert [model.id for model in server.client.models.list()]
        for connection in waiting:
            connection.close()
        wait_until(lambda: server.n_waiting() == 0)
        release.set()
        assert first.recv(12) == b"HTTP/1.1 200"
    assert server.llm.n_prompt == n_prompt + len(server.llm.tokenize(b"abc"))
    assert server.answer("the last one") == expected


def test_a_stream_gives_way_to_the_next_request(server: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """As upstream's, unless interrupt_requests is false."""
    monkeypatch.setattr(app.upstream._server_settings, "interrupt_requests", True)
    server.start(lambda: None)
    chunks = server.client.completions.create(model="x", prompt="abc", stream=True, **{**OPTIONS, "max_tokens": 1500})
    next(iter(chunks))
    release = threading.Event()
    server.start(lambda: release.wait(PATIENCE) and None)
    with contextlib.closing(server.request(prompt="y")) as second:
        wait_until(lambda: server.n_waiting() == 1)
        release.set()
        assert second.recv(12) == b"HTTP/1.1 200"
    for chunk in chunks:
        assert chunk.choices[0].finish_reason is None
    assert len(server.batches) < 100
