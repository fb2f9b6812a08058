"""Caches to compare, as they are written on the command line."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from refreekv_cpp._cache_types import CACHE_TYPES
from refreekv_cpp.errors import PolicyError
from refreekv_cpp.policies import Policy, as_policy

_VALID = (
    "must be a policy's name, its parameters and a cache type: refreekv, streaming:0.4, refreekv:theta=0.01, full@q8_0"
)


@dataclass(frozen=True)
class Spec:
    """A policy and the type its keys and values are stored in. `text` is what was written, and its name in reports."""

    text: str
    policy: Policy
    cache_type: str

    def llama_options(self) -> dict[str, Any]:
        """For `Llama`. A quantised cache needs flash attention (llama.cpp stores V transposed without it)."""
        options: dict[str, Any] = {"kv_policy": self.policy, "kv_elastic": True, "kv_evicted": "drop"}
        if (self.policy.native_options() or {}).get("theta"):
            options |= {"kv_evicted": "restore"}  # rows are read from the cold store
        if self.cache_type != "f16":
            number = CACHE_TYPES[self.cache_type]
            options |= {"type_k": number, "type_v": number, "flash_attn": True}
        return options


REFERENCE = "full"


def parse_specs(text: str) -> list[Spec]:
    """The caches in a list separated by commas; `full` comes first, whether it is named or not.

    Raises:
        PolicyError: one of them is no policy, or its parameters or its type are not valid.
    """
    names = [name.strip() for name in text.split(",")]
    return [parse_spec(name) for name in dict.fromkeys([REFERENCE, *names])]


def parse_spec(text: str) -> Spec:
    """NAME[:PARAMETER=VALUE]...[@TYPE]; a value alone is the policy's first parameter.

    Raises:
        PolicyError: as `parse_specs`.
    """
    head, at, cache_type = text.partition("@")
    if at and cache_type not in CACHE_TYPES:
        raise PolicyError(f"{text!r}: no cache type {cache_type!r}; valid are {', '.join(CACHE_TYPES)}")
    name, *parameters = head.split(":")
    policy = as_policy(name)
    options: dict[str, Any] = {}
    for parameter in parameters:
        key, equals, value = parameter.partition("=")
        if not equals:
            fields = dataclasses.fields(policy)
            if not fields or options:
                raise PolicyError(f"{text!r}: {parameter!r} is no parameter; {_VALID}")
            key, value = fields[0].name, key
        options[key] = _value(value)
    try:
        # through the class, which names a parameter that it does not have
        policy = type(policy)(**{**policy.as_dict(), **options})
    except PolicyError as error:
        raise PolicyError(f"{text!r}: {error}") from error
    return Spec(text, policy, cache_type or "f16")


def _value(text: str) -> Any:
    if text in ("True", "true", "False", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
