"""The exceptions of refreekv_cpp. Each is also the built-in exception that llama-cpp-python users would catch."""

from __future__ import annotations


class RefreeKVError(Exception):
    """Something that refreekv_cpp refuses or failed at. The message says what is valid or what to do."""


class PolicyError(RefreeKVError, ValueError):
    """An unknown KV policy, or an option that it does not have or cannot take."""


class UnsupportedModelError(RefreeKVError, ValueError):
    """The model's memory cannot have a KV policy; `kv_policy="full"` runs it."""


class ContextError(RefreeKVError, ValueError):
    """The model has no context of so many tokens, or this machine has no room for it."""


class ContextFullError(ContextError, RuntimeError):
    """The context has no room for more tokens. It is a RuntimeError too, which llama-cpp-python raises here after it
    has read some of them."""


class TokenError(RefreeKVError, ValueError, RuntimeError):
    """A token is not in the model's vocabulary. llama-cpp-python raises a RuntimeError here, or the process ends."""


class CacheStateError(RefreeKVError, RuntimeError):
    """The pruned cache cannot do this (rewind into or copy a part of what was pruned, ...)."""


class CacheMemoryError(RefreeKVError, MemoryError):
    """The KV cache could not grow. The cache is what it was before the call."""


class ComputeError(RefreeKVError, RuntimeError):
    """The backend could not compute the eviction."""


class ClosedError(RefreeKVError, RuntimeError):
    """The `Llama` is closed, could not be loaded, or was made before `os.fork()`."""
