"""The bodies of requests: upstream's models, with the checks that upstream lacks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import llama_cpp
from llama_cpp.llama_grammar import LlamaGrammar
from llama_cpp.server.types import (
    CreateChatCompletionRequest,
    CreateCompletionRequest,
    CreateEmbeddingRequest,
    DetokenizeInputRequest,
    TokenizeInputRequest,
)
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from typing_extensions import NotRequired, Self, TypedDict

from refreekv_cpp import _grammar, _upstream
from refreekv_cpp.server import grammars
from refreekv_cpp.server.errors import RequestError
from refreekv_cpp.server.models import CountingLlama

# of a request, not of the methods of Llama
_NOT_OPTIONS = {"n", "best_of", "logit_bias_type", "user", "min_tokens", "stream_options"}
# far beyond all logits, but small enough that a logit plus a bias is still finite
_MAX_BIAS = 1e9


class _Request(BaseModel):
    """null means the default of a parameter, as in OpenAI's API, except for max_tokens, where it means no limit."""

    model_config = ConfigDict(allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _prepare(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, value in data.items():
            for text in _texts([name, value]):
                if not _is_unicode(text):
                    raise RequestError(
                        f"{name}: must be Unicode text, and has a lone surrogate (half of a \\uD800-\\uDFFF pair)",
                        param=name if _is_unicode(name) else None,
                    )
        return {name: value for name, value in data.items() if value is not None or name == "max_tokens"}


def _texts(value: Any) -> Iterator[str]:
    """All texts in a JSON value, however deep."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            waiting += value.keys()
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class StreamOptions(BaseModel):
    include_usage: bool = False


class _GenerationRequest(_Request):
    stream_options: StreamOptions | None = None
    # upstream takes 0 and divides by it
    repeat_penalty: float = Field(default=1.1, gt=0)
    logit_bias: dict[str, Annotated[float, Field(ge=-_MAX_BIAS, le=_MAX_BIAS)]] | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def options(self, llm: CountingLlama) -> dict[str, Any]:
        """The arguments of the model's method.

        Raises:
            RequestError: this model cannot do that.
        """
        request: Any = self
        # it would warn of contents, which have become text
        options = self.model_dump(exclude=_NOT_OPTIONS, warnings=False)
        if request.logprobs is not None and request.logprobs is not False and not _upstream.keeps_all_logits(llm):
            raise RequestError(
                "logprobs: this model is served without them; the setting logits_all turns them on", param="logprobs"
            )
        if self.logit_bias is not None:
            options["logit_bias"] = _biases(llm, self.logit_bias, words=request.logit_bias_type == "tokens")
        if request.grammar is not None:
            options["grammar"] = _grammar_of(llm, request.grammar, "grammar")
        if request.min_tokens > 0:
            processor = _MinTokens(request.min_tokens, llm.token_eos())
            options["logits_processor"] = llama_cpp.LogitsProcessorList([processor])
        return options


class _MinTokens(llama_cpp.MinTokensLogitsProcessor):
    """Upstream's, but with a large finite bias in place of -inf. At the end of a grammar only the token that ends the
    answer is allowed, and with a finite bias it can still be chosen."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        scores = super().__call__(input_ids, scores)
        scores[self.token_eos] = max(scores[self.token_eos], -_MAX_BIAS)
        return scores


def _biases(llm: CountingLlama, biases: dict[str, float], *, words: bool) -> dict[str, float]:
    """By the number of the token, as text."""
    if words:
        return {
            str(token): bias
            for word, bias in biases.items()
            for token in llm.tokenize(word.encode(), add_bos=False, special=True)
        }
    for token in biases:
        # Python reads numbers of some thousand digits at most
        if not (token.isascii() and token.isdecimal() and len(token) <= 10 and int(token) < llm.n_vocab()):
            raise RequestError(
                f"logit_bias: {token!r} must be the number of a token, 0 to {llm.n_vocab() - 1}; with "
                "logit_bias_type: tokens it can be text",
                param="logit_bias",
            )
    return biases


def _grammar_of(llm: CountingLlama, text: str, param: str) -> LlamaGrammar:
    grammar = LlamaGrammar.from_string(text)
    try:
        _grammar.check(_upstream.vocab(llm), grammar)
    except ValueError as error:
        raise RequestError(f"{param}: {error}", param=param) from error
    return grammar


def _single_prompt(prompt: Any) -> Any:
    if isinstance(prompt, list) and len(prompt) == 1:
        return prompt[0]
    if isinstance(prompt, list):
        raise ValueError("must be text, or a list of one")
    return prompt


class CompletionRequest(_GenerationRequest, CreateCompletionRequest):
    prompt: Annotated[str, BeforeValidator(_single_prompt)] = ""


# -- chats -------------------------------------------------------------------------------------------------------------


class _Text(TypedDict):
    type: Literal["text"]
    text: str


class _ImageURL(TypedDict):
    url: str
    detail: NotRequired[Literal["auto", "low", "high"]]


class _Image(TypedDict):
    type: Literal["image_url"]
    image_url: Annotated[_ImageURL, BeforeValidator(lambda url: {"url": url} if isinstance(url, str) else url)]


def _as_parts(content: Any) -> Any:
    if content is None:
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise ValueError("must be text, a list of parts, or null")
    return content


def _as_text(parts: list[Any]) -> Any:
    """One text, for templates that know no parts; with images among them, the parts."""
    return parts if any(part["type"] != "text" for part in parts) else "\n".join(part["text"] for part in parts)


_Part = Annotated[_Text | _Image, Field(discriminator="type")]
_Content = Annotated[list[_Part], BeforeValidator(_as_parts), AfterValidator(_as_text)]


class _FunctionCall(TypedDict):
    name: str
    arguments: str


class _ToolCall(TypedDict):
    id: str
    type: Literal["function"]
    function: _FunctionCall


class _Message(TypedDict):
    role: Literal["system", "user", "assistant", "tool", "function"]
    content: _Content
    name: NotRequired[str]
    tool_call_id: NotRequired[str]
    tool_calls: NotRequired[list[_ToolCall]]
    function_call: NotRequired[_FunctionCall]


def _without_nulls(value: Any) -> Any:
    """null is the same as nothing; templates ask whether a message has tool_calls, not which."""
    return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


def _with_content(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    message = {"content": None, **_without_nulls(message)}
    # OpenAI's newer name; templates know the older one
    return {**message, "role": "system"} if message.get("role") == "developer" else message


def _with_parameters(function: Any) -> Any:
    if not isinstance(function, dict):
        return function
    return {"parameters": {"type": "object", "properties": {}}, **_without_nulls(function)}


class _FunctionFields(TypedDict):
    name: Annotated[str, Field(pattern=r'^[^"\\\x00-\x1f]+$')]  # it becomes a part of grammars
    description: NotRequired[str]
    parameters: Annotated[dict[str, Any], AfterValidator(grammars.check_schema)]


_Function = Annotated[_FunctionFields, BeforeValidator(_with_parameters)]


class _Tool(TypedDict):
    type: Literal["function"]
    function: _Function


class _Named(TypedDict):
    name: str


class _ToolChoice(TypedDict):
    type: Literal["function"]
    function: _Named


class _FormatFields(TypedDict):
    type: Literal["text", "json_object"]
    schema: NotRequired[dict[str, Any]]


def _as_json_object(value: Any) -> Any:
    """OpenAI's json_schema is upstream's json_object with a schema."""
    if not (isinstance(value, dict) and value.get("type") == "json_schema"):
        return _without_nulls(value)
    schema = value.get("json_schema")
    if not (isinstance(schema, dict) and isinstance(schema.get("schema"), dict)):
        raise ValueError("json_schema must be an object whose `schema` is a JSON schema")
    return {"type": "json_object", "schema": schema["schema"]}


_Format = Annotated[_FormatFields, BeforeValidator(_as_json_object)]


class ChatCompletionRequest(_GenerationRequest, CreateChatCompletionRequest):
    messages: list[Annotated[_Message, BeforeValidator(_with_content)]] = Field(min_length=1)  # type: ignore[assignment]
    tools: list[_Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | _ToolChoice | None = None
    functions: list[_Function] | None = None
    function_call: Literal["none", "auto"] | _Named | None = None
    response_format: _Format | None = None  # type: ignore[assignment]

    @model_validator(mode="after")
    def _check_choices(self) -> Self:
        if isinstance(self.tool_choice, dict):
            names = [tool["function"]["name"] for tool in self.tools or []]
            _check_choice("tool_choice", self.tool_choice["function"]["name"], names, "tools")
        if isinstance(self.function_call, dict):
            names = [function["name"] for function in self.functions or []]
            _check_choice("function_call", self.function_call["name"], names, "functions")
        return self

    def options(self, llm: CountingLlama) -> dict[str, Any]:
        options = super().options(llm)
        if not llm.takes_images and any(isinstance(message["content"], list) for message in self.messages):
            raise RequestError("messages: this model takes text only, no images", param="messages")
        if self.response_format is not None and "schema" in self.response_format:
            try:
                grammar = grammars.from_schema(self.response_format["schema"])
            except ValueError as error:
                raise RequestError(f"response_format: {error}", param="response_format") from error
            # what llama-cpp-python would make of the schema
            options |= {"grammar": _grammar_of(llm, grammar, "response_format"), "response_format": None}
        if self.tool_choice == "required" and self.tools and llm.chat_format == "chatml-function-calling":
            if len(self.tools) > 1:
                raise RequestError(
                    "tool_choice: this chat format has no 'required'; it must be 'auto', 'none' or one of the tools",
                    param="tool_choice",
                )
            options["tool_choice"] = {"type": "function", "function": {"name": self.tools[0]["function"]["name"]}}
        return options


def _check_choice(param: str, name: str, names: list[str], where: str) -> None:
    if name not in names:
        known = f"must be one of {', '.join(names)}" if names else "there are none"
        raise RequestError(f"{param}: {name!r} is not among the {where}: {known}", param=param)


# -- the rest ----------------------------------------------------------------------------------------------------------


class EmbeddingRequest(_Request, CreateEmbeddingRequest):
    input: str | Annotated[list[str], Field(min_length=1)]


class TokenizeRequest(_Request, TokenizeInputRequest):
    pass


class DetokenizeRequest(_Request, DetokenizeInputRequest):
    pass
