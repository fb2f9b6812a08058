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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from refreekv_cpp import _option_text, fit
from refreekv_cpp._option_text import LLAMA_OPTIONS, OBJECTS
from refreekv_cpp._suggest import did_you_mean
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
from refreekv_cpp.options import OPTIONS, KVOptions

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
# a model with these cannot answer
_NO_ANSWERS = ("embedding", "vocab_only")


def parse_option(text: str) -> tuple[str, Any]:
    """NAME=VALUE of --option.

    Raises:
        ValueError: it is not NAME=VALUE, there is no such option, or the value is not valid.
    """
    name, value = _option_text.parse(text)
    if name in _OWN_NAMES:
        raise ValueError(f"--option {name}: use {_OWN_NAMES[name]} where the command has it")
    if name not in LLAMA_OPTIONS:
        raise ValueError(f"--option {name}: there is no such option of Llama{did_you_mean(name, LLAMA_OPTIONS)}")
    if name in OBJECTS:
        raise ValueError(f"--option {name}: cannot be written as text")
    if name in _NO_ANSWERS and value:
        raise ValueError(f"--option {text}: the commands need a model that answers")
    try:
        _option_text.check(name, value)
    except ValueError as error:
        raise ValueError(f"--option {text}: {str(error).partition(': ')[2]}") from None
    return name, value


def _check_number(option: str, text: str, words: tuple[str, ...]) -> None:
    if text not in words and not (text.isdecimal() and len(text) <= 10 and int(text) < 2**31):
        raise ValueError(f"{option} {text}: must be {', '.join(words)} or a number below 2^31")


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

    def refuse(self, *names: str) -> None:
        """
        Raises:
            ValueError: --option says one of these, which the command decides itself.
        """
        if given := next((name for name in names if name in self.others), None):
            raise ValueError(f"--option {given}: this command sets it itself")

    def llama_options(self, model: Path, **own: Any) -> dict[str, Any]:
        """The options of `Llama` for a model. `own`: those that the command itself decides, such as n_ctx.

        Raises:
            ValueError: --option says one of those, too.
        """
        self.refuse(*own)
        options = {**self.machine, **own}
        return {**options, "n_gpu_layers": self.n_gpu_layers(model, **options)}

    @property
    def machine(self) -> dict[str, Any]:
        """The options of `Llama` that do not depend on the model."""
        layers = {} if self.gpu_layers == "auto" else {"n_gpu_layers": fit.layers_number(self.gpu_layers)}
        return {
            "flash_attn": "auto" if self.flash_attn is None else self.flash_attn,
            "n_threads": self.threads,
            "n_threads_batch": self.threads,
            **layers,
            **self.others,
        }

    def n_gpu_layers(self, model: Path, **options: Any) -> int:
        """What --gpu-layers says, as `Llama` wants it; what was chosen is printed. `options`: of `Llama`, to fit by."""
        with common.interrupts_held():
            return fit.chosen_layers(self.gpu_layers, model, **options)


@dataclass(frozen=True)
class LoadOptions(MachineOptions):
    """... and with which cache, where there is only one."""

    n_ctx: NCtxOption = "auto"
    kv_policy: PolicyOption = "refreekv"
    kv_evicted: EvictedOption = "keep"
    kv_memory_limit: MemoryLimitOption = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_number("--n-ctx", self.n_ctx, ("auto",))
        others = {name: value for name, value in self.others.items() if name in OPTIONS}
        KVOptions.of(
            kv_policy=self.kv_policy, kv_evicted=self.kv_evicted, kv_memory_limit=self.kv_memory_limit, **others
        )

    def llama_options(self, model: Path, **own: Any) -> dict[str, Any]:
        """As `MachineOptions.llama_options`. A number that the user gives as --n-ctx wins over the command's."""
        options = {
            "kv_policy": self.kv_policy,
            "kv_evicted": self.kv_evicted,
            "kv_memory_limit": self.kv_memory_limit,
            **own,
        }
        if self.n_ctx != "auto":
            options["n_ctx"] = int(self.n_ctx)
        elif "n_ctx" not in options:
            with common.interrupts_held():
                options["n_ctx"] = fit.n_ctx(model, **self.machine, **options)
        return super().llama_options(model, **options)

    def load(self, model: Path) -> common.ReadingLlama:
        """The model, ready to read a prompt."""
        return common.load(model, self.llama_options(model))


@dataclass(frozen=True)
class ChatOptions(LoadOptions):
    """... and whether what it reads is kept in the library."""

    library: Annotated[
        bool | None,
        typer.Option(
            "--library/--no-library",
            help="Keep what was read in files (4 GiB at most), and open it from there the next time.",
            show_default="on in a chat, a server, and with --file",
        ),
    ] = None

    def llama_options(self, model: Path, **own: Any) -> dict[str, Any]:
        """As `LoadOptions.llama_options`."""
        options = super().llama_options(model, **own)
        return {"kv_library": True, **options} if self.library else options

    def with_library(self, wanted: bool = True, *, needed: bool = False) -> ChatOptions:
        """With a library, unless the user has said something else, or the policy cannot have one.

        Raises:
            PolicyError: it is needed, and the policy cannot have one.
        """
        cache = {"kv_policy": self.kv_policy, "kv_evicted": self.kv_evicted}
        if needed:
            KVOptions.of(**cache, kv_library=True)
        on = wanted if self.library is None else self.library
        return dataclasses.replace(self, library=needed or (on and KVOptions.of(**cache).can_have_library))


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
