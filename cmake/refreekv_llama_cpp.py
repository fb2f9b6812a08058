"""Finds `llama_cpp` where no other llama-cpp-python is installed: it is the private copy in refreekv_cpp.

Python imports this module when it starts (refreekv_llama_cpp.pth), so it imports next to nothing itself. With it
`from llama_cpp import LlamaGrammar` works above `from refreekv_cpp import Llama`, too, which is the order of isort.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType


class _Loader:
    """Hands over the module that importing refreekv_cpp has made."""

    @staticmethod
    def create_module(spec: ModuleSpec) -> ModuleType:
        return sys.modules["llama_cpp"]

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


class _Finder:
    """The last one in sys.meta_path: it is asked when nobody else has `llama_cpp`."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "llama_cpp":
            return None
        from importlib.machinery import ModuleSpec

        import refreekv_cpp  # noqa: F401

        # importlib takes the spec of a module that is there by now, and would run the module once more with it
        module = sys.modules["llama_cpp"]
        module.__spec__ = ModuleSpec(name, _Loader, loader_state=module.__spec__)  # type: ignore[arg-type]
        return module.__spec__


sys.meta_path.append(_Finder)
