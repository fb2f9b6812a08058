"""Upstream's settings, with the kv_ options of `Llama` for each model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

# argparse takes its types from these annotations (llama_cpp.server.cli), and does not know `X | None`
from typing import TYPE_CHECKING, Any, Union

import llama_cpp.server.settings as upstream
import yaml
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError, create_model, model_validator
from pydantic_settings import SettingsConfigDict
from typing_extensions import Annotated, Self  # noqa: UP035

from refreekv_cpp import _checks, _option_text
from refreekv_cpp._cache_types import CACHE_TYPES
from refreekv_cpp._files import check_file
from refreekv_cpp._option_text import LLAMA_OPTIONS, OBJECTS
from refreekv_cpp._suggest import did_you_mean
from refreekv_cpp.options import HELP, OPTIONS, KVOptions

_DEFAULTS = {"kv_policy": "refreekv"}
"""Where the server's default is not that of `Llama`."""


def _as_number(value: Any, *words: str, least: int = 0, what: str) -> Any:
    try:
        number = value if value in words else int(value)
    except (TypeError, ValueError):
        number = least - 1
    if isinstance(number, int) and number < least:
        raise ValueError(f"must be {', '.join(words)} or a number of {what}")
    return number


def _as_layers(value: Any) -> Any:
    return _as_number(value, "auto", "all", least=-1, what="layers")


def _as_n_ctx(value: Any) -> Any:
    return _as_number(value, "auto", what="tokens")


def _as_switch(value: Any) -> Any:
    try:
        return value if value == "auto" else _BOOL.validate_python(value)
    except ValidationError:
        raise ValueError("must be true, false or auto") from None


def _as_type(value: Any) -> Any:
    try:
        return value if value is None else CACHE_TYPES[value] if value in CACHE_TYPES else int(value)
    except (TypeError, ValueError):
        raise ValueError(f"must be one of {', '.join(CACHE_TYPES)}, or ggml's number of a type") from None


_BOOL = TypeAdapter(bool)
_Type = Annotated[Union[str, int, None], BeforeValidator(_as_type)]  # noqa: UP007


if TYPE_CHECKING:
    from llama_cpp.server.settings import ModelSettings as _WithKVOptions
else:
    _WithKVOptions = create_model(
        "_WithKVOptions",
        __base__=upstream.ModelSettings,
        **{
            name: (each.metadata["setting"], Field(default=_DEFAULTS.get(name, each.default), description=HELP[name]))
            for name, each in OPTIONS.items()
            if each.metadata["setting"] is not None
        },
    )


class ModelSettings(_WithKVOptions):
    """What to load a model with. Options of `Llama` that have no field here are extra fields."""

    model_config = SettingsConfigDict(extra="allow")

    model: str = Field(description="A GGUF file, or what else MODEL can be.")
    # `str` comes first where a text of the command line is looked at by a validator here, and not by argparse
    n_gpu_layers: Annotated[Union[str, int], BeforeValidator(_as_layers)] = Field(  # type: ignore[assignment]  # noqa: UP007
        default="auto",
        description="Layers on the GPU: auto (as many as fit; 0 in a build without GPU), all (also -1), or a number.",
    )
    n_ctx: Annotated[Union[str, int], BeforeValidator(_as_n_ctx)] = Field(  # type: ignore[assignment]  # noqa: UP007
        default="auto",
        description="Tokens of context: a number, or auto (what fits, 32768 at most). 0 is as many as the model was "
        "made for.",
    )
    flash_attn: Annotated[Union[str, bool], BeforeValidator(_as_switch)] = Field(  # type: ignore[assignment]  # noqa: UP007
        default="auto", description="Flash attention: true, false or auto."
    )
    type_k: _Type = Field(default=None, description="What keys are stored in: f16 (the default), q8_0, ...")  # type: ignore[assignment]
    type_v: _Type = Field(default=None, description="What values are stored in.")  # type: ignore[assignment]
    logits_all: bool = Field(
        default=False,
        description="Keep the logits of the whole prompt, which logprobs need: n_ctx times n_vocab floats.",
    )

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, values: Any) -> Any:
        for name in values:
            if name not in cls.model_fields:
                if name not in LLAMA_OPTIONS - OBJECTS:
                    known = sorted({*ModelSettings.model_fields, *(LLAMA_OPTIONS - OBJECTS)})
                    raise ValueError(f"{name}: unknown setting{did_you_mean(name, known)}")
                _option_text.check(name, values[name])
        for name in ("n_threads", "n_threads_batch"):
            if values.get(name) == "-1":
                values[name] = -1  # upstream compares it with the number
        return values

    @model_validator(mode="after")
    def _check_kv_options(self) -> Self:
        KVOptions.of(**self._kv_options())
        return self

    @model_validator(mode="after")
    def _check_llama_options(self) -> Self:
        # "kv_overrides" is a list of texts here, which becomes the dictionary that `Llama` checks
        names = LLAMA_OPTIONS - {"kv_overrides"}
        values = {name: value for name, value in self if name in names and value not in ("auto", "all")}
        _checks.check_options(values)
        return self

    @model_validator(mode="after")
    def _check_chat_format(self) -> Self:
        others = (self.clip_model_path, self.hf_tokenizer_config_path, self.hf_pretrained_model_name_or_path)
        if self.chat_format is not None and others == (None, None, None):  # with these it has further names
            _option_text.check_chat_format(self.chat_format)
        return self

    def llama_options(self) -> dict[str, Any]:
        """Arguments of `Llama` that upstream's proxy does not pass, by name."""
        return {**self._kv_options(), **(self.model_extra or {})}

    def _kv_options(self) -> dict[str, Any]:
        options = {name: getattr(self, name) for name in OPTIONS if name in type(self).model_fields}
        if options["kv_library"] is None:  # on where that is possible
            options["kv_library"] = KVOptions.of(**options).can_have_library and not self.logits_all
        return options


class ServerSettings(upstream.ServerSettings):
    """What to serve with."""

    port: int = Field(default=8000, ge=0, le=65535, description="Listen port; 0 is any that is free.")

    @model_validator(mode="after")
    def _check_files(self) -> Self:
        for path in filter(None, (self.ssl_keyfile, self.ssl_certfile)):
            try:
                check_file(path)
            except FileNotFoundError as error:
                raise ValueError(str(error)) from None
        if self.ssl_keyfile and not self.ssl_certfile:
            raise ValueError("ssl_keyfile: needs ssl_certfile, too")
        return self


class Settings(ServerSettings, ModelSettings):
    """Those of a server with one model."""


class ConfigFileSettings(ServerSettings):
    """Those of a configuration file."""

    models: list[ModelSettings] = Field(min_length=1, description="The first one is loaded at the start.")


def read_config_file(path: Path, **server: Any) -> ConfigFileSettings:
    """A configuration file, YAML by its name (.yaml, .yml) or JSON. server: settings in the place of those in it.

    Raises:
        OSError: it cannot be read.
        ValueError: it is neither, or a setting in it is unknown or not valid.
    """
    text = path.read_text(encoding="utf-8")
    try:
        settings = yaml.safe_load(text) if path.suffix in (".yaml", ".yml") else json.loads(text)
        if isinstance(settings, dict):
            settings |= server
        return ConfigFileSettings.model_validate(settings)
    except ValidationError as error:
        raise ValueError(f"{path}: {explain(error.errors())}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def explain(errors: Iterable[Mapping[str, Any]]) -> str:
    """pydantic's errors in one line."""
    texts = []
    for error in errors:
        where = ".".join(str(part) for part in error["loc"] if part != "body")
        what = error["msg"].removeprefix("Value error, ")
        texts.append(f"{where}: {what}" if where else what)
    return "; ".join(texts)
