"""The options of commands that load a model, each written once.

A command takes them all by one parameter:

    @common.user_errors()
    @takes_options
    def run(model: ModelArgument, options: LoadOptions, ...) -> None:
        llm = options.load(resolve(model))
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import llama_cpp

from refreekv_cpp import fit
from refreekv_cpp._cache_types import CACHE_TYPES
from refreekv_cpp._options import Evicted
from refreekv_cpp._suggest import did_you_mean
from refreekv_cpp._units import parse_bytes
from refreekv_cpp.cli import common
from refreekv_cpp.cli.common import (
    EvictedOption,
    FlashAttnOption,
    GpuLayersOption,
    MemoryLimitOption,
    NCtxOption,
    OtherOptions,
    PolicyOption,
    ThreadsOption,
)
from refreekv_cpp.llama import Llama
from refreekv_cpp.policies import as_policy

# the options of `Llama` that commands have by another name, or decide themselves
_OWN_NAMES = {
    "n_ctx": "--n-ctx",
    "n_gpu_layers": "--gpu-layers",
    "n_threads": "--threads",
    "n_threads_batch": "--threads",
    "flash_attn": "--flash-attn",
    "kv_policy": "--kv-policy",
    "kv_evicted": "--kv-evicted",
    "kv_memory_limit": "--kv-memory-limit",
    "verbose": "refreekv --verbose",
}
_OBJECTS = ("chat_handler", "draft_model", "tokenizer")  # cannot be written as text
_PYTHON_WORDS = {"True": True, "False": False, "None": None}
_KINDS = {bool: "true or false", int: "a whole number", float: "a number"}


def _llama_options() -> dict[str, inspect.Parameter]:
    """Those that --option takes."""
    parameters = {
        **inspect.signature(llama_cpp.Llama.__init__).parameters,
        **inspect.signature(Llama.__init__).parameters,
    }
    return {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in (*_OWN_NAMES, *_OBJECTS)
    }


def parse_option(text: str) -> tuple[str, Any]:
    """NAME=VALUE of --option. The value is JSON where it can be read as that, and text otherwise.

    Raises:
        ValueError: it is not NAME=VALUE, there is no such option, or the value is of another kind.
    """
    name, equals, value_text = text.partition("=")
    name = name.strip().replace("-", "_")
    if not equals:
        raise ValueError(f"--option {text}: must be NAME=VALUE")
    if name in _OWN_NAMES:
        raise ValueError(f"--option {name}: use {_OWN_NAMES[name]} where the command has it")
    known = _llama_options()
    if name not in known:
        why = "cannot be written as text" if name in _OBJECTS else "there is no such option of Llama"
        raise ValueError(f"--option {name}: {why}{did_you_mean(name, known)}")
    value: Any
    if name in ("type_k", "type_v") and value_text in CACHE_TYPES:
        value = CACHE_TYPES[value_text]
    elif value_text in _PYTHON_WORDS:
        value = _PYTHON_WORDS[value_text]
    else:
        try:
            value = json.loads(value_text)
        except ValueError:
            value = value_text
    kind = int if name in ("type_k", "type_v") else type(known[name].default)
    allowed = {bool: (bool,), int: (int,), float: (int, float)}.get(kind)
    if allowed and not (isinstance(value, allowed) and (kind is bool or not isinstance(value, bool))):
        what = f"one of {', '.join(CACHE_TYPES)}" if name in ("type_k", "type_v") else _KINDS[kind]
        raise ValueError(f"--option {text}: must be {what}")
    return name, value


def _check_number(option: str, text: str, words: tuple[str, ...]) -> None:
    if text not in words and not text.isdecimal():
        raise ValueError(f"{option} {text}: must be {', '.join(words)} or a number")


@dataclass(frozen=True)
class MachineOptions:
    """How a model is run, whatever cache it has."""

    gpu_layers: GpuLayersOption = "auto"
    flash_attn: FlashAttnOption = None
    threads: ThreadsOption = None
    option: OtherOptions = None

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: one of them is not valid. This is before anything is loaded or fetched.
        """
        _check_number("--gpu-layers", self.gpu_layers, ("auto", "all"))
        self.others  # noqa: B018

    @property
    def others(self) -> dict[str, Any]:
        """What --option says."""
        return dict(parse_option(text) for text in self.option or [])

    def llama_options(self, model: Path, **own: Any) -> dict[str, Any]:
        """The options of `Llama` for a model. `own`: those that the command itself decides, such as n_ctx."""
        options = {**self.machine, **own}
        return {**options, "n_gpu_layers": self.n_gpu_layers(model, **options)}

    @property
    def machine(self) -> dict[str, Any]:
        """The options of `Llama` that do not depend on the model."""
        layers = {} if self.gpu_layers == "auto" else {"n_gpu_layers": self.asked_layers}
        return {
            "flash_attn": "auto" if self.flash_attn is None else self.flash_attn,
            "n_threads": self.threads,
            "n_threads_batch": self.threads,
            **layers,
            **self.others,
        }

    @property
    def asked_layers(self) -> int:
        return -1 if self.gpu_layers == "all" else int(self.gpu_layers)

    def n_gpu_layers(self, model: Path, **options: Any) -> int:
        """What --gpu-layers says, as `Llama` wants it; what was chosen is printed. `options`: of `Llama`, to fit by."""
        if self.gpu_layers == "auto":
            n_layers = fit.gpu_layers(model, **options)
            number = "all" if n_layers < 0 else str(n_layers)
            why = "as many as fit" if llama_cpp.llama_supports_gpu_offload() else "this build has no GPU backend"
            common.print_note(f"GPU layers: {number} ({why})")
            return n_layers
        n_layers = self.asked_layers
        if n_layers and not llama_cpp.llama_supports_gpu_offload():
            common.print_note(f"--gpu-layers {self.gpu_layers}: this build has no GPU backend, the CPU computes all")
        return n_layers


@dataclass(frozen=True)
class LoadOptions(MachineOptions):
    """... and with which cache, where there is only one."""

    n_ctx: NCtxOption = "auto"
    kv_policy: PolicyOption = "refreekv"
    kv_evicted: EvictedOption = "restore"
    kv_memory_limit: MemoryLimitOption = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_number("--n-ctx", self.n_ctx, ("auto",))
        as_policy(self.kv_policy)
        if self.kv_evicted not in get_args(Evicted):
            raise ValueError(f"--kv-evicted {self.kv_evicted}: must be one of {', '.join(get_args(Evicted))}")
        if self.kv_memory_limit is not None:
            parse_bytes(self.kv_memory_limit)

    def llama_options(self, model: Path, **own: Any) -> dict[str, Any]:
        """As `MachineOptions.llama_options`. A number that the user gives as --n-ctx wins over the command's."""
        options = {
            "kv_policy": as_policy(self.kv_policy),
            "kv_evicted": self.kv_evicted,
            "kv_memory_limit": self.kv_memory_limit,
            **own,
        }
        if self.n_ctx != "auto":
            options["n_ctx"] = int(self.n_ctx)
        elif "n_ctx" not in options:
            options["n_ctx"] = fit.n_ctx(model, **self.machine, **options)
        return super().llama_options(model, **options)

    def load(self, model: Path) -> common.ReadingLlama:
        """The model, ready to read a prompt; a context that is shorter than the model's own is printed."""
        llm = common.load(model, self.llama_options(model))
        if self.n_ctx == "auto" and llm.n_ctx() < (most := llm._model.n_ctx_train()):
            common.print_note(f"context: {llm.n_ctx()} of the model's {most} tokens (--n-ctx)")
        return llm


def takes_options(command: Callable[..., None]) -> Callable[..., None]:
    """For typer: a parameter that is `MachineOptions` or `LoadOptions` becomes one parameter for each of its fields.

    Where the command has a parameter of the same name itself, that takes the field's place, and has its value, too.
    """
    hints = get_type_hints(command, include_extras=True)
    parameters: dict[str, inspect.Parameter] = {}
    own = inspect.signature(command).parameters
    groups = {name: hints[name] for name in own if dataclasses.is_dataclass(hints[name])}
    for name, parameter in own.items():
        if name not in groups:
            parameters[name] = parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
            continue
        field_hints = get_type_hints(groups[name], include_extras=True)
        for field in dataclasses.fields(groups[name]):
            if field.name not in own:
                parameters[field.name] = inspect.Parameter(
                    field.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=field.default,
                    annotation=field_hints[field.name],
                )

    @functools.wraps(command)
    def with_fields(**values: Any) -> None:
        made = {
            name: group(**{field.name: values[field.name] for field in dataclasses.fields(group)})
            for name, group in groups.items()
        }
        command(**made, **{name: value for name, value in values.items() if name in own})

    with_fields.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    with_fields.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()}
    return with_fields
