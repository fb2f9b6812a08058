"""The kv_ options of `Llama`: each is written once here, and read by `Llama`, by the command line, by the server's
settings and from the environment.
"""

# `_option` makes fields; and the parser of upstream's server does not know `X | None`
# ruff: noqa: RUF009, UP007, UP045

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional, Union, get_args

from refreekv_cpp import native, spans
from refreekv_cpp._cache_dir import cache_dir
from refreekv_cpp._cache_types import CACHE_TYPES
from refreekv_cpp._checks import check_path
from refreekv_cpp._files import why_not_private
from refreekv_cpp._units import parse_bytes
from refreekv_cpp.errors import PolicyError
from refreekv_cpp.policies import Full, Policy, as_policy

Evicted = Literal["keep", "restore", "recompute", "drop"]
Cold = Literal["auto", "memory", "file"]
ColdType = Literal["q8_0"]


def _one_of(*choices: Any) -> Callable[[str, Any], Any]:
    def read(name: str, value: Any) -> Any:
        if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
            raise PolicyError(f"{name}={value!r}: must be one of {', '.join(map(repr, choices))}")
        return value

    return read


def _path(name: str, value: Any) -> Path:
    try:
        return Path(check_path(name, value))
    except ValueError as error:
        raise PolicyError(str(error)) from None


def _library(name: str, value: Any) -> Path | None:
    """The folder; True is the one in the cache folder, False and None none."""
    value = {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value
    if value is None or value is False:
        return None
    try:
        folder = cache_dir() / "library" if value is True else _path(name, value).expanduser()
    except RuntimeError as error:  # ~ of a user who is not there
        raise PolicyError(f"{name}={value!r}: {error}") from None
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise PolicyError(f"{name}={str(value)!r}: must be a folder, or a name that nothing has yet")
    if (reason := why_not_private(folder)) is not None:
        raise PolicyError(f"{name}: {folder}: must be a folder of yours that nobody else can write to; {reason}")
    return folder


def _n_bytes(name: str, value: Any) -> int:
    return parse_bytes(value, option=name)


def _option(
    default: Any, read: Callable[[str, Any], Any], setting: Any, help: str, *, variable: str | None = None
) -> Any:
    """A field of `KVOptions`.

    Args:
        default: its value where neither the program nor the environment gives one.
        read: turns the name of the option and what was passed for it into its value, or raises a PolicyError.
        setting: its type in the server's settings; None: it has no setting of its own.
        help: its help text on the command line and in the server's settings.
        variable: the environment variable that can give it.
    """
    return field(default=default, metadata={"read": read, "setting": setting, "help": help, "variable": variable})


@dataclass(frozen=True, kw_only=True)
class KVOptions:
    """The kv_ options of one `Llama`. The docstring of `Llama` says what they mean; `of` makes them from its arguments.

    Attributes:
        kv_elastic: memory follows the contents. `of` never leaves it None.
        kv_memory_limit: bytes of K and V; None: no limit.
        kv_cold_limit: bytes of evicted rows that are kept; None: no limit.
        kv_library: the folder of the library; None: there is none.
        kv_library_limit: bytes of its files.
        from_environment: the environment chose the policy, the program did not.
    """

    kv_policy: Policy = _option(
        Full(),
        lambda name, value: as_policy(value),
        str,
        "Which cells of the KV cache stay after the prompt: full, refreekv, paper, streaming, ..., with parameters as "
        "in refreekv:theta=0.01.",
        variable="REFREEKV_POLICY",
    )
    kv_evicted: Evicted = _option(
        "keep",
        _one_of(*get_args(Evicted)),
        Evicted,
        "What becomes of the exact rows of evicted cells: keep (in a file or in memory, and read where they get much "
        "attention), restore (all of them come back before the next prompt), recompute (discarded; the next prompt "
        "reads the conversation again) or drop (discarded).",
        variable="REFREEKV_EVICTED",
    )
    kv_elastic: bool | None = _option(
        None, _one_of(None, True, False), Optional[bool], "With kv_policy full: let the cache grow with the prompt."
    )
    kv_memory_limit: int | None = _option(
        None,
        _n_bytes,
        Union[str, int, None],
        "A cap on the KV cache, such as 512MiB; a longer prompt is pruned while it is read.",
        variable="REFREEKV_MEMORY_LIMIT",
    )
    kv_protect: Literal["system"] | tuple[spans.Span, ...] = _option(
        (), lambda name, value: spans.check(value), None, "Positions that are never evicted."
    )
    kv_cold: Cold = _option("auto", _one_of(*get_args(Cold)), Cold, "Where evicted rows are kept.")
    kv_cold_dir: Path | None = _option(
        None, _path, Optional[str], "Folder of the file of evicted rows; by default the user's cache folder."
    )
    kv_cold_limit: int | None = _option(
        None,
        _n_bytes,
        Union[str, int, None],
        "A cap on the evicted rows that are kept, such as 4GiB; what does not fit is lost.",
    )
    kv_cold_type: ColdType | None = _option(
        None,
        _one_of(None, *get_args(ColdType)),
        Optional[ColdType],
        "The type that evicted rows are rounded to; by default they stay exact.",
    )
    kv_cold_state: bool = _option(True, _one_of(True, False), bool, "Whether saved states contain the evicted rows.")
    kv_library: Path | None = _option(
        None,
        _library,
        Union[str, bool, None],
        "Keep what was read in files, and open it from there the next time: true (in the cache folder) or a folder.",
        variable="REFREEKV_LIBRARY",
    )
    kv_library_limit: int = _option(
        4 * 2**30,
        _n_bytes,
        Union[str, int],
        "A cap on the bytes of these files, such as 4GiB; what was unused for longest is removed first.",
    )
    from_environment: bool = False

    @classmethod
    def of(cls, **passed: Any) -> KVOptions:
        """The options that were passed (None: it was not passed), else those of the environment, else the defaults.

        The environment is read only where neither a policy nor kv_elastic=False was passed, and REFREEKV_POLICY is set.

        Raises:
            PolicyError: an option is not valid, or they contradict each other.
        """
        passed = {name: value for name, value in passed.items() if value is not None}
        if "kv_policy" in passed or passed.get("kv_elastic") is False:
            return cls._read(passed)
        said = {name: value for name, variable in VARIABLES.items() if (value := os.environ.get(variable))}
        if "kv_policy" not in said:
            return cls._read(passed)
        try:
            cls._read(said)
        except PolicyError as error:
            shown = " ".join(f"{VARIABLES[name]}={value}" for name, value in said.items())
            raise PolicyError(f"environment variables {shown}: {error}") from None
        return cls._read({**said, **passed, "from_environment": True})

    @classmethod
    def _read(cls, values: dict[str, Any]) -> KVOptions:
        options = cls(**{name: read_option(name, value) for name, value in values.items()})
        if options.evicts and options.kv_elastic is False:
            name = options.kv_policy.name
            raise PolicyError(f"kv_elastic=False: only with kv_policy='full'; {name!r} gives memory back")
        if options.kv_memory_limit is not None and not (options.evicts or options.kv_elastic):
            raise PolicyError(
                "kv_memory_limit: upstream's cache is allocated at load; add kv_elastic=True or an evicting kv_policy"
            )
        policy = options.kv_policy.native_options() or {}
        if policy.get("max_error", 0) > 0 and options.evicts and not options.has_cold_store:
            raise PolicyError(
                f"kv_evicted={options.kv_evicted!r}: with max_error rows are read from the cold store; must be one of "
                "'keep', 'restore'"
            )
        if options.kv_library is not None and not options.can_have_library:
            raise PolicyError(
                "kv_library: it has codes and exact rows of what is evicted; kv_policy must be 'refreekv' (with theta "
                "above 0, and no other parameter of its rule), and kv_evicted 'keep', 'restore' or 'drop'"
            )
        return dataclasses.replace(options, kv_elastic=options.evicts or bool(options.kv_elastic))

    @property
    def evicts(self) -> bool:
        return not isinstance(self.kv_policy, Full)

    @property
    def can_have_library(self) -> bool:
        policy = self.kv_policy.native_options() or {}
        return policy.get("theta", 0) > 0 and policy.get("n_hot", 0) > 0 and self.kv_evicted != "recompute"

    @property
    def library_evicts_with(self) -> str:
        """What the answers in a library depend on, besides the parameters of the policy."""
        return f"{self.kv_evicted} {self.kv_protect}"

    @property
    def has_cold_store(self) -> bool:
        return self.evicts and (self.kv_evicted in ("keep", "restore") or self.kv_library is not None)

    def public(self) -> dict[str, Any]:
        """The options by name."""
        return {name: getattr(self, name) for name in OPTIONS}

    def native_params(self) -> Any | None:
        """The `refreekv_params` of a context with these options; None: upstream's own cache.

        Raises:
            PolicyError: `kv_cold_dir` is no folder that can be written.
        """
        if not self.kv_elastic:
            return None
        policy = self.kv_policy.native_options() or {"policy": native.ELASTIC}
        return native.make_params(**policy, memory_limit=self.kv_memory_limit or 0, **self._cold_params())

    def _cold_params(self) -> dict[str, Any]:
        """The fields of `refreekv_params` that say where evicted rows go."""
        if not self.has_cold_store:
            return {}
        folder = self.cold_folder()
        kind = "memory" if folder is None else self.kv_cold
        return {
            "cold": native.enum_value(f"COLD_{kind}".upper()),
            "cold_dir": str(folder or ""),
            "cold_limit": self.kv_cold_limit or 0,
            "cold_type": -1 if self.kv_cold_type is None else CACHE_TYPES[self.kv_cold_type],
            "cold_state": self.kv_cold_state,
        }

    def cold_folder(self) -> Path | None:
        """The folder of the cold store's file, if there is to be one: `kv_cold_dir`, or one in the cache folder, which
        is made, or that of temporary files. None: there is none that can be written, or no file is wanted.

        Raises:
            PolicyError: `kv_cold_dir` is no folder that can be written, or a file is wanted and there is no such folder
                elsewhere.
        """
        if not self.has_cold_store or self.kv_cold == "memory":
            return None
        if self.kv_cold_dir is not None:
            if not _can_write(self.kv_cold_dir):
                raise PolicyError(f"kv_cold_dir={str(self.kv_cold_dir)!r}: not a folder that can be written")
            return self.kv_cold_dir
        folder = cache_dir() / "cold"
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _can_write(folder):
            return folder
        with contextlib.suppress(FileNotFoundError):
            return Path(tempfile.gettempdir())
        if self.kv_cold == "file":
            raise PolicyError("kv_cold='file': no folder can be written; kv_cold_dir must be one")
        return None


def _can_write(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


OPTIONS = {each.name: each for each in dataclasses.fields(KVOptions) if each.metadata}
"""The fields of `KVOptions` that are options of `Llama`, by name."""

HELP: dict[str, str] = {name: each.metadata["help"] for name, each in OPTIONS.items()}
"""The help text of each."""

VARIABLES: dict[str, str] = {name: v for name, each in OPTIONS.items() if (v := each.metadata["variable"])}
"""The environment variables that can give an option, by the option's name."""


def read_option(name: str, value: Any) -> Any:
    """The value of a field of `KVOptions`, from what was passed for it.

    Raises:
        PolicyError: it is not valid.
    """
    return OPTIONS[name].metadata["read"](name, value) if name in OPTIONS else value
