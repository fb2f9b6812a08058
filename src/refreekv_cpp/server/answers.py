"""Responses that a model generates: one at a time, and only as long as the client is connected."""

from __future__ import annotations

import json
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any

import anyio
from sse_starlette.sse import EventSourceResponse
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from refreekv_cpp.server.errors import error_response
from refreekv_cpp.server.models import CountingLlama, Interrupted, Models

Chunk = dict[str, Any]


class Answer(Response):
    """A response whose content a model generates while the response is being sent.

    It first waits until no other response uses the model. An error before the first token becomes an error response
    with the right HTTP status. When the client disconnects, a response that still waits is dropped at once, and one
    that uses the model stops before the next batch of the prompt or before the next token.

    Args:
        models: the models of the server.
        model: the name of the one that is asked; None: the first.
        ask: called with the model in another thread; it returns the body of the response, or an iterator over the
            events of a stream.
        give_way: whether a stream ends early when another request waits for the model.
        ping: makes the messages that keep the connection of a stream open; None: sse-starlette's own.
    """

    def __init__(
        self,
        models: Models,
        model: str | None,
        ask: Callable[[CountingLlama], Chunk | Iterator[Chunk]],
        *,
        give_way: bool = False,
        ping: Callable[[], Any] | None = None,
    ) -> None:
        super().__init__()
        self._models = models
        self._model = model
        self._ask = ask
        self._give_way = give_way
        self._ping = ping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = threading.Event()
        async with anyio.create_task_group() as tasks:

            async def watch() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                gone.set()
                tasks.cancel_scope.cancel()

            tasks.start_soon(watch)
            await self._respond(gone.is_set, scope, send)
            tasks.cancel_scope.cancel()

    async def _respond(self, gone: Callable[[], bool], scope: Scope, send: Send) -> None:
        async with self._models.turn:
            try:
                text, rest = await run_in_threadpool(self._begin, gone)
            except Interrupted:
                return
            except Exception as error:
                response: Response = error_response(error)
            else:
                if rest is not None:
                    try:
                        await self._stream(text, rest)(scope, _never, send)
                    finally:
                        # in a thread, because a pruning may be due at the end of a generation
                        with anyio.CancelScope(shield=True):
                            await run_in_threadpool(rest.close)
                    return
                response = Response(text, media_type="application/json")
        await response(scope, _never, send)

    def _begin(self, gone: Callable[[], bool]) -> tuple[str, Generator[str, None, None] | None]:
        """The answer in JSON, and None; or the first chunk of a stream, and the others."""
        llm = self._models.load(self._model)
        llm.interrupted = gone
        answer = self._ask(llm)
        if isinstance(answer, dict):
            return _to_json(answer), None
        chunks = (_to_json(chunk) for chunk in answer)
        return next(chunks), chunks

    def _stream(self, first: str, rest: Generator[str, None, None]) -> EventSourceResponse:
        async def events() -> AsyncIterator[dict[str, str]]:
            text: str | None = first
            while text is not None:
                yield {"data": text}
                if self._give_way and self._models.turn.statistics().tasks_waiting:
                    break
                try:
                    text = await run_in_threadpool(next, rest, None)
                except Interrupted:
                    return
            yield {"data": "[DONE]"}

        return EventSourceResponse(events(), sep="\n", ping_message_factory=self._ping)


def _to_json(answer: Chunk) -> str:
    return json.dumps(answer, default=float)  # logprobs are numpy's


async def _never() -> Message:
    """Replaces `receive` for the inner responses: `Answer` itself watches for the client's disconnect."""
    await anyio.sleep_forever()
    raise AssertionError
