"""Upstream's settings, with the kv_ options of `Llama` for each model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

# argparse takes its types from these annotations (llama_cpp.server.cli), and does not know `X | None`
from typing import Any, Literal, Optional, Union

import llama_cpp.server.settings as upstream
import yaml
from llama_cpp.server.settings import ServerSettings
from pydantic import Field, ValidationError, model_validator
from typing_extensions import Self

from refreekv_cpp import _options, faults

_KV_OPTIONS = (
    "kv_policy",
    "kv_evicted",
    "kv_faults",
    "kv_elastic",
    "kv_memory_limit",
    "kv_cold",
    "kv_cold_dir",
    "kv_cold_limit",
    "kv_cold_type",
    "kv_cold_state",
)


class ModelSettings(upstream.ModelSettings):
    """What to load a model with."""

    kv_policy: str = Field(
        default="refreekv",
        description="Which cells of the KV cache stay after the prompt: full, refreekv, paper, streaming, ...",
    )
    kv_evicted: Literal["restore", "recompute", "drop"] = Field(
        default="restore",
        description="When the next turn follows a pruned one: restore (what was evicted comes back first), recompute "
        "(read it all again) or drop (go on).",
    )
    kv_faults: Optional[float] = Field(  # noqa: UP045
        default=None,
        description="What of a head's attention evicted cells may draw that take no part in it, while an answer is "
        "given: by default 0.05, where the cache is in host memory. 0: whatever it is.",
    )
    kv_cold: Literal["auto", "memory", "file"] = Field(
        default="auto", description="Where evicted rows wait to be restored."
    )
    kv_cold_dir: Optional[str] = Field(  # noqa: UP045
        default=None, description="Folder of their file; by default the user's cache folder."
    )
    kv_cold_limit: Union[str, int, None] = Field(  # noqa: UP007
        default=None, description="A cap on them, such as 4GiB; what does not fit is read again when it is wanted."
    )
    kv_cold_type: Optional[Literal["q8_0"]] = Field(  # noqa: UP045
        default=None, description="What they are rounded to; by default they stay as they are."
    )
    kv_cold_state: bool = Field(
        default=True, description="Whether cached states (cache: true) have the evicted rows in them."
    )
    kv_elastic: Optional[bool] = Field(  # noqa: UP045
        default=None, description="With kv_policy full: let memory follow the contents."
    )
    kv_memory_limit: Union[str, int, None] = Field(  # noqa: UP007
        default=None,
        description="A cap on the KV cache, such as 512MiB; a longer prompt is pruned while it is read.",
    )
    logits_all: bool = Field(
        default=False,
        description="Keep the logits of the whole prompt, which logprobs need: n_ctx times n_vocab floats.",
    )

    @model_validator(mode="after")
    def _check_kv_options(self) -> Self:
        _options.check(
            self.kv_policy,
            self.kv_evicted,
            self.kv_elastic,
            self.kv_memory_limit,
            self.kv_cold,
            self.kv_cold_dir,
            self.kv_cold_limit,
            self.kv_cold_type,
            self.kv_cold_state,
        )
        faults.check(self.kv_faults, self.kv_evicted)
        return self

    def kv_options(self) -> dict[str, Any]:
        """Those that are arguments of `Llama`, by name."""
        return {name: getattr(self, name) for name in _KV_OPTIONS}


class Settings(ServerSettings, ModelSettings):
    """Those of a server with one model."""


class ConfigFileSettings(ServerSettings):
    """Those of a configuration file."""

    models: list[ModelSettings] = Field(min_length=1, description="The first one is loaded at the start.")


def read_config_file(path: Path) -> ConfigFileSettings:
    """A configuration file, YAML by its name (.yaml, .yml) or JSON.

    Raises:
        OSError: it cannot be read.
        ValueError: it is neither, or a setting in it is unknown or not valid.
    """
    text = path.read_text(encoding="utf-8")
    try:
        settings = yaml.safe_load(text) if path.suffix in (".yaml", ".yml") else json.loads(text)
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
