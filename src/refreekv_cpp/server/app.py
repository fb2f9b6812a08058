"""Upstream's FastAPI app, whose two completion routes are ours: with receipts, stream_options, and errors by kind."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import anyio
import llama_cpp
import llama_cpp.server.app
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from llama_cpp.server.errors import ErrorResponse, RouteErrorHandler
from llama_cpp.server.settings import ServerSettings
from llama_cpp.server.types import CreateChatCompletionRequest, CreateCompletionRequest
from pydantic import BaseModel
from sse_starlette.sse import EventSourceResponse
from starlette.concurrency import run_in_threadpool

from refreekv_cpp.errors import CacheMemoryError
from refreekv_cpp.server.models import Models, UnknownModelError
from refreekv_cpp.server.receipts import complete
from refreekv_cpp.server.settings import ModelSettings, explain

# its state is in the module
upstream: Any = llama_cpp.server.app
# what it makes its proxy of
upstream.LlamaProxy = Models


class StreamOptions(BaseModel):
    include_usage: bool = False


class CompletionRequest(CreateCompletionRequest):
    stream_options: StreamOptions | None = None


class ChatCompletionRequest(CreateChatCompletionRequest):
    stream_options: StreamOptions | None = None


class ErrorsByKind(RouteErrorHandler):
    """Upstream answers 500 to whatever it has no pattern for, and clients try that again."""

    def error_message_wrapper(self, error: Exception, body: Any = None) -> tuple[int, ErrorResponse]:
        if isinstance(error, RequestValidationError):
            return 400, _error(explain(error.errors()), None)
        if isinstance(error, UnknownModelError):
            return 404, _error(str(error), "model_not_found")
        if isinstance(error, CacheMemoryError):
            return 400, _error(str(error), "kv_cache_memory_exceeded")
        return super().error_message_wrapper(error, body)


def _error(message: str, code: str | None) -> ErrorResponse:
    return ErrorResponse(message=message, type="invalid_request_error", param=None, code=code)


# not in the schema: upstream's routes, which these come before, describe them
router = APIRouter(route_class=ErrorsByKind, dependencies=[Depends(upstream.authenticate)], include_in_schema=False)


@router.post("/v1/completions", response_model=None)
async def create_completion(request: Request, body: CompletionRequest) -> Any:
    if isinstance(body.prompt, list):
        if len(body.prompt) != 1:
            raise RequestValidationError([{"loc": ("body", "prompt"), "msg": "must be text, or a list of one"}])
        body.prompt = body.prompt[0]
    return await _respond(request, body, llama_cpp.Llama.create_completion)


@router.post("/v1/chat/completions", response_model=None)
async def create_chat_completion(request: Request, body: ChatCompletionRequest) -> Any:
    return await _respond(request, body, llama_cpp.Llama.create_chat_completion)


# of a request, not of the methods of Llama
_NOT_OPTIONS = {"n", "best_of", "logit_bias_type", "user", "min_tokens", "stream_options"}


async def _respond(
    request: Request, body: CompletionRequest | ChatCompletionRequest, method: Callable[..., Any]
) -> dict[str, Any] | EventSourceResponse:
    call: Callable[..., Any] = partial(
        complete,
        method,
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
        describe_error=partial(request.scope["route"].error_message_wrapper, body=body),
    )
    options = body.model_dump(exclude=_NOT_OPTIONS)
    if body.stream:
        # now, while there can be a status
        upstream._llama_proxy.check(body.model)
        send, receive = anyio.create_memory_object_stream[Any](10)
        publish = partial(
            upstream.get_event_publisher,
            request=request,
            inner_send_chan=send,
            body=body,
            body_model=body.model,
            llama_call=call,
            kwargs=options,
        )
        return EventSourceResponse(
            receive, data_sender_callable=publish, sep="\n", ping_message_factory=upstream._ping_message_factory
        )
    async with contextlib.asynccontextmanager(upstream.get_llama_proxy)() as proxy:
        llm = upstream.prepare_request_resources(body, proxy, body.model, options)
        response: dict[str, Any] = await run_in_threadpool(call, llm, **options)
        return response


def create_app(server: ServerSettings, models: Sequence[ModelSettings]) -> FastAPI:
    """The app, with the first model loaded. One per process, as upstream's.

    Raises:
        ValueError: the model cannot be loaded, or cannot have its policy.
    """
    os.environ.pop("CONFIG_FILE", None)  # upstream's function would read it in place of what it is passed
    app: FastAPI = upstream.create_app(server_settings=server, model_settings=list(models))
    app.router.routes[:0] = router.routes
    return app
