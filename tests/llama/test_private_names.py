"""The private names of llama-cpp-python that this package uses: where a move of the pinned version changes one, a test
here says which.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from llama_cpp import _internals
from llama_cpp.llama_chat_format import LlamaChatCompletionHandlerRegistry
from llama_cpp.llama_grammar import LlamaGrammar, SchemaConverter

import refreekv_cpp
from refreekv_cpp import Llama, _upstream
from refreekv_cpp._lifetime import Lifetime

(STOCK,) = Lifetime.__bases__  # llama_cpp.Llama, before a drop-in takes its place
PACKAGE = Path(refreekv_cpp.__file__).parent
UPSTREAM = Path(llama_cpp.__file__).parent
ADAPTER = Path(_upstream.__file__)
# the adapter; what imports llama-cpp-python; and a program that drives stock llama-cpp-python as well
MAY_USE_THEM = {ADAPTER, PACKAGE / "_llama_cpp.py", PACKAGE / "lab" / "bench" / "worker.py"}

# the parameters of upstream's private methods that `Llama` overrides
OVERRIDDEN = {
    "_create_completion": """
        prompt suffix max_tokens temperature top_p min_p typical_p logprobs echo stop frequency_penalty presence_penalty
        repeat_penalty top_k stream seed tfs_z mirostat_mode mirostat_tau mirostat_eta model stopping_criteria
        logits_processor grammar logit_bias
    """,
    "_init_sampler": """
        top_k top_p min_p typical_p temp repeat_penalty frequency_penalty presence_penalty tfs_z mirostat_mode
        mirostat_eta mirostat_tau penalize_nl logits_processor grammar
    """,
    "__getstate__": "",
}
# arguments of public methods that `Llama` looks at: those that it takes by their place, then those that it looks for
LOOKED_AT = {
    "create_chat_completion": (["messages"], []),
    "embed": (["input"], []),
    "eval": (["tokens"], []),
    "generate": (["tokens"], ["reset"]),
    "load_state": (["state"], []),
    "sample": ([], ["idx"]),
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def chain(node: ast.expr) -> tuple[str, str]:
    """ "llm", "_ctx.decode" of llm._ctx.decode; "", "" of what has no name at its root."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return f"{node.func.id}()", ".".join(names)
    return (node.id, ".".join(names)) if isinstance(node, ast.Name) else ("", "")


def own_names(tree: ast.AST) -> Iterator[str]:
    """The private names that a module or a class gives its objects: methods, attributes of the class and of self."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and is_private(node.name):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and chain(node) == ("self", node.attr):
            yield node.attr
        elif isinstance(node, (ast.AnnAssign, ast.Assign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))


def class_of(path: Path, name: str) -> ast.ClassDef:
    return next(node for node in parsed(path).body if isinstance(node, ast.ClassDef) and node.name == name)


def test_every_name_that_the_adapter_uses_is_there(tiny_model: Path) -> None:
    roots: dict[str, Any] = {
        "llm": STOCK(str(tiny_model), verbose=False),
        "grammar": LlamaGrammar.from_string('root ::= "a"'),
        "registry": LlamaChatCompletionHandlerRegistry(),  # type: ignore[no-untyped-call]
        "_server()": importlib.import_module("llama_cpp.server.app"),
        "SchemaConverter": SchemaConverter,
        "_internals": _internals,
    }
    roots["context"] = roots["llm"]._ctx
    seen = []
    for node in ast.walk(parsed(ADAPTER)):
        root, names = chain(node) if isinstance(node, ast.Attribute) else ("", "")
        if root in roots or any(map(is_private, names.split("."))):
            try:
                attrgetter(names)(roots[root])
            except AttributeError:
                pytest.fail(f"llama-cpp-python has no {root}.{names} any more, which {ADAPTER.name} uses")
            seen.append(names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("_"):
            assert node.value in vars(roots["llm"]), f"a Llama of llama-cpp-python has no {node.value} any more"
            seen.append(node.value)
    assert {"_ctx.kv_cache_seq_rm", "_model.vocab", "_batch", "_stack", "_chat_handlers", "_root"} <= set(seen)


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_what_llama_overrides_has_the_same_parameters(name: str) -> None:
    assert hasattr(STOCK, name), f"llama-cpp-python's Llama has no {name} any more, which refreekv_cpp.Llama overrides"
    parameters = list(inspect.signature(getattr(STOCK, name)).parameters)[1:]
    assert parameters == OVERRIDDEN[name].split(), (
        f"llama-cpp-python's Llama.{name} has other parameters than refreekv_cpp.Llama.{name} was written for; look "
        "whether it is still right, then change them here"
    )


@pytest.mark.parametrize("name", LOOKED_AT)
def test_public_methods_have_the_arguments_that_llama_looks_at(name: str) -> None:
    first, others = LOOKED_AT[name]
    parameters = list(inspect.signature(getattr(STOCK, name)).parameters)[1:]
    assert parameters[: len(first)] == first
    assert set(others) <= set(parameters)


def test_a_grammar_is_passed_by_name() -> None:
    """`Llama` looks for it in the keyword arguments of these."""
    calls = [
        node
        for node in ast.walk(parsed(UPSTREAM / "llama.py"))
        if isinstance(node, ast.Call)
        and chain(node.func) in [("self", "_create_completion"), ("self", "_init_sampler")]
    ]
    assert len(calls) >= 2
    for call in calls:
        assert any(keyword.arg == "grammar" for keyword in call.keywords), f"llama.py:{call.lineno} passes no grammar="


def test_our_private_names_hide_none_of_upstreams() -> None:
    theirs = set(filter(is_private, own_names(class_of(UPSTREAM / "llama.py", "Llama"))))
    for kind in Llama.__mro__[: Llama.__mro__.index(STOCK)]:
        path = inspect.getfile(kind)
        ours = set(filter(is_private, own_names(class_of(Path(path), kind.__name__))))
        both = (ours & theirs) - OVERRIDDEN.keys()
        assert not both, f"{path}: {kind.__name__} hides {', '.join(both)} of llama-cpp-python's Llama: rename"


def test_only_the_adapter_uses_upstreams_private_names() -> None:
    theirs = {name for path in UPSTREAM.rglob("*.py") for name in filter(is_private, own_names(parsed(path)))}
    assert {"_ctx", "_model", "_input_ids", "_init_sampler", "_format_literal", "_llama_proxy"} <= theirs
    for path in PACKAGE.rglob("*.py"):
        if path in MAY_USE_THEM or UPSTREAM.parent in path.parents:
            continue
        tree = parsed(path)
        others = theirs - set(own_names(tree))
        for node in ast.walk(tree):
            where = f"{path}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Attribute):
                assert node.attr not in others, f"{where} uses {node.attr}, which is private to llama-cpp-python"
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llama_cpp."):
                assert not any(map(is_private, (node.module or "").split("."))), f"{where} imports {node.module}"
