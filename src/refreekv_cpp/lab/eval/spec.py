"""Caches to compare, as they are written on the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from refreekv_cpp._cache_types import CACHE_TYPES
from refreekv_cpp.errors import PolicyError
from refreekv_cpp.lab.eval.rounding import Rounding
from refreekv_cpp.policies import Full, Policy, ReFreeKV, as_policy


@dataclass(frozen=True)
class Spec:
    """A policy and the types its keys and values are stored in.

    Attributes:
        text: what was written, and the name in reports.
        cache_type: of both, or that of K and that of V with a slash between them.
        rounding: of the prompt's cells before the last ones, which are of `cache_type`.
    """

    text: str
    policy: Policy
    cache_type: str
    rounding: Rounding | None = None

    def llama_options(self) -> dict[str, Any]:
        """For `Llama`. A quantised cache needs flash attention (llama.cpp stores V transposed without it)."""
        options: dict[str, Any] = {"kv_policy": self.policy, "kv_elastic": True, "kv_evicted": "drop"}
        if (self.policy.native_options() or {}).get("theta"):
            options |= {"kv_evicted": "keep"}  # rows are read from the cold store
        if self.cache_type != "f16":
            type_k, type_v = _types(self.cache_type)
            options |= {"type_k": CACHE_TYPES[type_k], "type_v": CACHE_TYPES[type_v], "flash_attn": True}
        return options


REFERENCE = "full"
_NEVER = 2**31 - 1  # tokens from which on a prompt is pruned


def parse_specs(text: str, *, same_kernel: bool = False) -> list[Spec]:
    """The caches in a list separated by commas; `full` comes first, whether it is named or not.

    Args:
        same_kernel: have the kernel of pruned caches attend to `full` too. Its sums are rounded as theirs are then.

    Raises:
        PolicyError: one of them is no policy, or its parameters or its type are not valid.
    """
    names = [name.strip() for name in text.split(",")]
    first, *others = [parse_spec(name) for name in dict.fromkeys([REFERENCE, *names])]
    if same_kernel:
        first = Spec(REFERENCE, ReFreeKV(n_min=_NEVER), "f16")
    return [first, *others]


def parse_spec(text: str) -> Spec:
    """POLICY[@TYPE] or POLICY[@TYPE_K/TYPE_V]: a policy as `as_policy` takes it, and the types of K and V.

    `full@TYPE+N`: the last N tokens of the prompt are exact (f16), and those before them of this type.

    Raises:
        PolicyError: as `parse_specs`.
    """
    policy, at, cache_type = text.partition("@")
    cache_type, plus, n_exact = cache_type.partition("+")
    types = _types(cache_type)
    if plus:
        if not isinstance(as_policy(policy), Full) or not set(types) <= set(Rounding.TYPES) or not n_exact.isdecimal():
            raise PolicyError(f"{text!r}: must be full@TYPE+N, with a type of {', '.join(Rounding.TYPES)} and N tokens")
        return Spec(text, Full(), "f16", Rounding(*types, int(n_exact)))
    if at and not all(name in CACHE_TYPES for name in types):
        raise PolicyError(f"{text!r}: the type must be one of {', '.join(CACHE_TYPES)}")
    return Spec(text, as_policy(policy), cache_type or "f16")


def _types(text: str) -> tuple[str, str]:
    """Of K and of V."""
    type_k, _, type_v = text.partition("/")
    return type_k, type_v or type_k
