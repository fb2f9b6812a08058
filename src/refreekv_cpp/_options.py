"""The kv_ options of `Llama`: what was passed, else what the environment says, else the defaults; checked."""

from __future__ import annotations

import contextlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from refreekv_cpp import native
from refreekv_cpp._cache_dir import cache_dir
from refreekv_cpp._cache_types import CACHE_TYPES
from refreekv_cpp._checks import check_path
from refreekv_cpp._units import parse_bytes
from refreekv_cpp.errors import PolicyError
from refreekv_cpp.policies import Full, Policy, as_policy

Evicted = Literal["restore", "recompute", "drop"]
Cold = Literal["auto", "memory", "file"]
ColdType = Literal["q8_0"]

POLICY_VARIABLE = "REFREEKV_POLICY"
EVICTED_VARIABLE = "REFREEKV_EVICTED"
MEMORY_LIMIT_VARIABLE = "REFREEKV_MEMORY_LIMIT"


@dataclass(frozen=True)
class KVOptions:
    """The kv_ options of one `Llama`.

    Attributes:
        memory_limit: bytes of K and V; None: no limit.
        cold_limit: bytes of evicted rows that are kept; None: no limit.
        cold_type: what they are rounded to; None: they stay as they are.
        cold_state: saved states carry them.
        from_environment: the environment chose the policy, the program did not.
    """

    policy: Policy
    evicted: Evicted
    elastic: bool
    memory_limit: int | None
    cold: Cold
    cold_dir: Path | None
    cold_limit: int | None
    cold_type: ColdType | None = None
    cold_state: bool = True
    from_environment: bool = False

    def make_cold_dir(self) -> Path:
        """The folder of the cold store's file: `cold_dir`, or one in the cache folder, or that of temporary files.

        Raises:
            PolicyError: `cold_dir` is no folder that can be written.
        """
        if self.cold_dir is not None:
            if not _can_write(self.cold_dir):
                raise PolicyError(f"kv_cold_dir={str(self.cold_dir)!r}: not a folder that can be written")
            return self.cold_dir
        folder = cache_dir() / "cold"
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder if _can_write(folder) else Path(tempfile.gettempdir())

    def cold_params(self) -> dict[str, Any]:
        """The fields of refreekv_params that say where evicted rows go.

        Raises:
            PolicyError: `cold_dir` is no folder that can be written.
        """
        if isinstance(self.policy, Full) or self.evicted != "restore":
            return {}
        return {
            "cold": native.enum_value(f"COLD_{self.cold}".upper()),
            "cold_dir": "" if self.cold == "memory" else str(self.make_cold_dir()),
            "cold_limit": self.cold_limit or 0,
            "cold_type": -1 if self.cold_type is None else CACHE_TYPES[self.cold_type],
            "cold_state": self.cold_state,
        }


def _can_write(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def check(
    policy: str | Policy,
    evicted: str | None = None,
    elastic: bool | None = None,
    memory_limit: int | str | None = None,
    cold: str | None = None,
    cold_dir: str | os.PathLike[str] | None = None,
    cold_limit: int | str | None = None,
    cold_type: str | None = None,
    cold_state: bool | None = None,
    *,
    from_environment: bool = False,
) -> KVOptions:
    """The options that were passed, None for those that were not.

    Raises:
        PolicyError: one of them is not valid, or they contradict each other.
    """
    policy = as_policy(policy)
    evicted = "restore" if evicted is None else evicted
    cold = "auto" if cold is None else cold
    cold_state = True if cold_state is None else cold_state
    for name, value, choices in (
        ("kv_evicted", evicted, get_args(Evicted)),
        ("kv_cold", cold, get_args(Cold)),
        ("kv_cold_type", cold_type, (None, *get_args(ColdType))),
        ("kv_cold_state", cold_state, (True, False)),
        ("kv_elastic", elastic, (None, True, False)),
    ):
        if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
            raise PolicyError(f"{name}={value!r}: must be one of {', '.join(map(repr, choices))}")
    if cold_dir is not None:
        try:
            cold_dir = check_path("kv_cold_dir", cold_dir)
        except ValueError as error:
            raise PolicyError(str(error)) from None
    evicts = not isinstance(policy, Full)
    if evicts and elastic is False:
        raise PolicyError(f"kv_elastic=False: only with kv_policy='full'; {policy.name!r} gives memory back")
    elastic = evicts if elastic is None else elastic
    n_bytes = None if memory_limit is None else parse_bytes(memory_limit)
    if n_bytes is not None and not elastic:
        raise PolicyError(
            "kv_memory_limit: upstream's cache is allocated at load; add kv_elastic=True or an evicting kv_policy"
        )
    return KVOptions(
        policy,
        cast(Evicted, evicted),
        elastic,
        n_bytes,
        cast(Cold, cold),
        None if cold_dir is None else Path(cold_dir),
        None if cold_limit is None else parse_bytes(cold_limit, option="kv_cold_limit"),
        cast("ColdType | None", cold_type),
        cold_state,
        from_environment,
    )


def from_environment() -> KVOptions | None:
    """What REFREEKV_POLICY, REFREEKV_EVICTED and REFREEKV_MEMORY_LIMIT say; None: the first is not set, or empty.

    Raises:
        PolicyError: one of them is not valid, or they contradict each other.
    """
    values = {name: os.environ.get(name) or None for name in (POLICY_VARIABLE, EVICTED_VARIABLE, MEMORY_LIMIT_VARIABLE)}
    policy, evicted, memory_limit = values.values()
    if policy is None:
        return None
    try:
        return check(policy, evicted, None, memory_limit, from_environment=True)
    except PolicyError as error:
        shown = " ".join(f"{name}={value}" for name, value in values.items() if value)
        raise PolicyError(f"environment variables {shown}: {error}") from None


def resolve(
    policy: str | Policy | None,
    evicted: str | None,
    elastic: bool | None,
    memory_limit: int | str | None,
    cold: str | None,
    cold_dir: str | os.PathLike[str] | None,
    cold_limit: int | str | None,
    cold_type: str | None,
    cold_state: bool | None,
) -> KVOptions:
    """The options of a `Llama` that was passed these, None for those that it was not.

    Where no policy was passed, nor the upstream's cache asked for with kv_elastic=False, the environment's counts, with
    the rest of what it says; an option that was passed wins.

    Raises:
        PolicyError: one of them is not valid, or they contradict each other.
    """
    chosen = from_environment() if policy is None and elastic is not False else None
    if chosen is not None:
        policy = chosen.policy
        evicted = chosen.evicted if evicted is None else evicted
        memory_limit = chosen.memory_limit if memory_limit is None else memory_limit
    return check(
        "full" if policy is None else policy,
        evicted,
        elastic,
        memory_limit,
        cold,
        cold_dir,
        cold_limit,
        cold_type,
        cold_state,
        from_environment=chosen is not None,
    )
