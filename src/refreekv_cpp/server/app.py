"""Upstream's FastAPI app, with its routes made anew: with receipts, stream_options, and errors by kind."""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import llama_cpp
import llama_cpp.server.app
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from refreekv_cpp import _upstream
from refreekv_cpp.models import resolve
from refreekv_cpp.server.answers import Answer, Chunk
from refreekv_cpp.server.errors import RequestError, error_response
from refreekv_cpp.server.models import CountingLlama, Models
from refreekv_cpp.server.receipts import complete
from refreekv_cpp.server.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from refreekv_cpp.server.settings import ModelSettings, ServerSettings

# its state is in the module
upstream: Any = llama_cpp.server.app
# what it makes its proxy of
upstream.LlamaProxy = Models


class Route(APIRoute):
    """A route whose errors are OpenAI's."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_errors(request: Request) -> Response:
            try:
                return await handle(request)
            except Exception as error:
                return error_response(error)

        return handle_errors


# not in the schema: upstream's routes, which these come before, describe them
router = APIRouter(route_class=Route, dependencies=[Depends(upstream.authenticate)], include_in_schema=False)


@router.post("/v1/completions")
async def create_completion(body: CompletionRequest) -> Response:
    return _complete(body, llama_cpp.Llama.create_completion)


@router.post("/v1/engines/copilot-codex/completions")
async def create_copilot_completion(body: CompletionRequest) -> Response:
    body.model = "copilot-codex" if "copilot-codex" in _models() else None
    return _complete(body, llama_cpp.Llama.create_completion)


@router.post("/v1/chat/completions")
async def create_chat_completion(body: ChatCompletionRequest) -> Response:
    return _complete(body, llama_cpp.Llama.create_chat_completion)


@router.post("/v1/embeddings")
async def create_embedding(body: EmbeddingRequest) -> Response:
    def embed(llm: CountingLlama) -> Chunk:
        if not llm.context_params.embeddings:
            raise RequestError("This model is served without embeddings; the setting embedding turns them on.")
        texts = [body.input] if isinstance(body.input, str) else body.input
        if any(not llm.tokenize(text.encode()) for text in texts):
            raise RequestError("input: must not be empty", param="input")
        response: Any = llm.create_embedding(body.input, model=body.model)
        return dict(response)

    return _answer(body.model, embed)


@router.get("/v1/models")
async def get_models() -> dict[str, Any]:
    models = [{"id": name, "object": "model", "owned_by": "me", "permissions": []} for name in _models()]
    return {"object": "list", "data": models}


@router.post("/extras/tokenize")
async def tokenize(body: TokenizeRequest) -> Response:
    return _answer(body.model, lambda llm: {"tokens": llm.tokenize(body.input.encode(), special=True)})


@router.post("/extras/tokenize/count")
async def count_tokens(body: TokenizeRequest) -> Response:
    return _answer(body.model, lambda llm: {"count": len(llm.tokenize(body.input.encode(), special=True))})


@router.post("/extras/detokenize")
async def detokenize(body: DetokenizeRequest) -> Response:
    def as_text(llm: CountingLlama) -> Chunk:
        if unknown := [token for token in body.tokens if not 0 <= token < llm.n_vocab()]:
            raise RequestError(f"tokens: {unknown[0]} must be 0 to {llm.n_vocab() - 1}", param="tokens")
        return {"text": llm.detokenize(body.tokens).decode(errors="replace")}

    return _answer(body.model, as_text)


def _complete(body: CompletionRequest | ChatCompletionRequest, method: Callable[..., Any]) -> Response:
    def ask(llm: CountingLlama) -> Any:
        if llm.model_params.vocab_only:
            raise RequestError("This model is served for its vocabulary only; the setting vocab_only is on.")
        return complete(method, llm, include_usage=body.include_usage, options=body.options(llm))

    return _answer(body.model, ask)


def _answer(model: str | None, ask: Callable[[CountingLlama], Any]) -> Response:
    give_way = _upstream.server_settings().interrupt_requests
    return Answer(_models(), model, ask, give_way=give_way, ping=_upstream.ping_message())


def _models() -> Models:
    models: Models = _upstream.served_models()
    return models


async def _http_error(_: Request, error: Exception) -> Response:
    return error_response(error)


def create_app(server: ServerSettings, models: Sequence[ModelSettings]) -> FastAPI:
    """The app, with the first model loaded. One per process, as upstream's.

    Raises:
        OSError: the file of a model is not there.
        ValueError: a model cannot be fetched, or the first one not loaded, or it cannot have its policy.
    """
    os.environ.pop("CONFIG_FILE", None)  # upstream's function would read it in place of what it is passed
    app: FastAPI = upstream.create_app(server_settings=server, model_settings=[_found(model) for model in models])
    app.router.routes[:0] = router.routes
    app.add_exception_handler(HTTPException, _http_error)
    return app


def _found(settings: ModelSettings) -> ModelSettings:
    """The settings with the model's file in them, under the name by which it was asked for."""
    if settings.hf_model_repo_id is not None:
        return settings  # upstream fetches it
    alias = settings.model_alias or settings.model
    return settings.model_copy(update={"model": str(resolve(settings.model)), "model_alias": alias})
