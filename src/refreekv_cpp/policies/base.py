"""What a KV policy is to Python: parameters. The work is done in native/policies, but for a `PythonPolicy`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields
from typing import Any

from typing_extensions import Self

from refreekv_cpp import native
from refreekv_cpp._suggest import did_you_mean
from refreekv_cpp.errors import PolicyError

# the annotations that are checked
_NUMBERS: dict[str, Any] = {"int": int, "float": (int, float)}


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """Parameters of one KV policy. Frozen: a policy can be shared between models.

    Raises:
        PolicyError: there is no such parameter, or it is out of range; checked on creation.
    """

    def __new__(cls, **options: Any) -> Self:
        valid = [field.name for field in fields(cls)]
        for option in options:
            if option not in valid:
                hint = did_you_mean(option, valid) or ";"
                raise PolicyError(
                    f"{cls.__name__} has no option {option!r}{hint} its options are: {', '.join(valid) or 'none'}"
                )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            name, optional, _ = str(field.type).partition(" | None")
            if optional and value is None:
                continue
            if name == "bool" and not isinstance(value, bool):
                raise PolicyError(f"{field.name}={value!r}: must be one of True, False")
            kind = _NUMBERS.get(name)
            if kind and (
                isinstance(value, bool) or not isinstance(value, kind) or (kind is int and abs(value) >= 2**31)
            ):
                raise PolicyError(f"{field.name}={value!r}: must be a number of type {field.type}")

    @property
    @abstractmethod
    def name(self) -> str:
        """How it is called in `kv_stats`."""

    @abstractmethod
    def native_options(self) -> dict[str, Any] | None:
        """The fields of `refreekv_params` (native/refreekv.h) it sets; None: upstream's own cache."""

    def prune(self, ctx: Any, seq_id: int) -> int:
        """Apply it to a sequence of a context that was created with it. Returns the cells evicted, over all layers.

        Raises:
            CacheStateError: the last query of the sequence is not there any more.
        """
        return native.prune(ctx, seq_id)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
