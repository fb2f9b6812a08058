"""The text form of a policy's parameters: NAME[:PARAMETER=VALUE]..., such as refreekv:theta=0.01:n_hot=128."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from refreekv_cpp.errors import PolicyError
from refreekv_cpp.policies.base import Policy

_WORDS = {"true": True, "false": False, "none": None, "null": None}


def with_parameters(policy: Policy, parameters: Sequence[str]) -> Policy:
    """The policy with parameters of its own.

    Args:
        parameters: each PARAMETER=VALUE; the first may be a value alone, which is that of the policy's first parameter.

    Raises:
        PolicyError: one of them is not written so, is there twice, is not one of the policy's, or is not valid.
    """
    if not parameters:
        return policy
    names = [field.name for field in dataclasses.fields(policy) if field.init]
    options: dict[str, Any] = {}
    for i, parameter in enumerate(parameters):
        name, equals, value = parameter.partition("=")
        if not equals and parameter and names and i == 0:
            name, value = names[0], parameter
        elif not equals:
            valid = ", ".join(names) or "none"
            raise PolicyError(f"{parameter!r}: must be PARAMETER=VALUE; the parameters are: {valid}")
        if name in options:
            raise PolicyError(f"{parameter!r}: {name} has a value already, {options[name]!r}")
        options[name] = _value(value)
    # through the class, which names a parameter that it does not have
    return type(policy)(**{**{name: getattr(policy, name) for name in names}, **options})


def _value(text: str) -> Any:
    """A truth value, None, a number, or text."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
