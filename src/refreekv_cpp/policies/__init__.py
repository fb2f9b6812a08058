"""KV policies: which cells of the cache stay once the prompt has been read.

A policy is a file here with its parameters and one in native/policies with its rule (CONTRIBUTING.md has all of the
steps), or a subclass of `PythonPolicy`.
"""

from __future__ import annotations

from collections.abc import Callable

from refreekv_cpp._suggest import did_you_mean
from refreekv_cpp.errors import PolicyError
from refreekv_cpp.policies.base import Policy
from refreekv_cpp.policies.full import Full
from refreekv_cpp.policies.h2o import H2O
from refreekv_cpp.policies.pyramidkv import PyramidKV
from refreekv_cpp.policies.python import PythonPolicy
from refreekv_cpp.policies.refreekv import ReFreeKV
from refreekv_cpp.policies.snapkv import SnapKV
from refreekv_cpp.policies.streaming import Streaming
from refreekv_cpp.policies.text import with_parameters
from refreekv_cpp.policies.top_p import TopP

__all__ = [
    "H2O",
    "REGISTRY",
    "Full",
    "Policy",
    "PyramidKV",
    "PythonPolicy",
    "ReFreeKV",
    "SnapKV",
    "Streaming",
    "TopP",
    "as_policy",
]

REGISTRY: dict[str, Callable[[], Policy]] = {
    "full": Full,
    "refreekv": ReFreeKV,
    "paper": ReFreeKV.paper,
    "released-code": ReFreeKV.released_code,
    "streaming": Streaming,
    "snapkv": SnapKV,
    "h2o": H2O,
    "pyramidkv": PyramidKV,
    "top-p": TopP,
}


def as_policy(policy: str | Policy) -> Policy:
    """The policy that a text names, or the object itself.

    Args:
        policy: NAME[:PARAMETER=VALUE]..., such as "refreekv" or "refreekv:theta=0.01". The first parameter may be a
            value alone, as in "streaming:0.4". docs/reference/policies.md lists the names.

    Raises:
        PolicyError: there is no policy of this name, it has no such parameter, or a value is not valid.
    """
    if isinstance(policy, Policy):
        return policy
    name, *parameters = policy.split(":") if isinstance(policy, str) else [""]
    if name not in REGISTRY:
        hint = did_you_mean(name, REGISTRY) or ";"
        raise PolicyError(
            f"kv_policy={policy!r}: unknown{hint} must be one of {', '.join(map(repr, REGISTRY))}, one of them with "
            "parameters, such as 'refreekv:threshold=0.5', or an object such as ReFreeKV(threshold=0.5)"
        )
    try:
        return with_parameters(REGISTRY[name](), parameters)
    except PolicyError as error:
        raise PolicyError(f"kv_policy={policy!r}: {error}") from None
