"""Compares what llama-cpp-python needs with what we say that we need: its Python package is ours once it is copied."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from email.parser import Parser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import Specifier, SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

EXTRA = "server"  # of both packages


def check_dependencies(pkg_info: Path, pyproject: Path) -> None:
    """
    Args:
        pkg_info: llama-cpp-python's PKG-INFO.

    Raises:
        SystemExit: something that it needs, alone or with its extra `server`, is not among our dependencies, or ours
            allows a version that it does not.
    """
    upstream = Parser().parsestr(pkg_info.read_text(encoding="utf-8")).get_all("Requires-Dist") or []
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    ours = {"": _by_name(project["dependencies"]), EXTRA: _by_name(project["optional-dependencies"][EXTRA])}
    for requirement in map(Requirement, upstream):
        for extra, where in (("", "dependencies"), (EXTRA, f"the extra {EXTRA}")):
            with_extra = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
            if not with_extra or (extra and requirement.marker is None):
                continue
            name = canonicalize_name(requirement.name)
            found = ours[extra].get(name, ours[""].get(name))
            if found is None:
                raise SystemExit(f"pyproject.toml: {where} must name {requirement.name}, which llama-cpp-python needs")
            missing = [str(clause) for clause in requirement.specifier if not _implied(clause, found)]
            if missing:
                raise SystemExit(
                    f"pyproject.toml: {requirement.name} of {where} must be {','.join(missing)}, as llama-cpp-python's"
                )


def _by_name(requirements: Iterable[str]) -> dict[str, SpecifierSet]:
    parsed = map(Requirement, requirements)
    return {canonicalize_name(requirement.name): requirement.specifier for requirement in parsed}


def _implied(theirs: Specifier, ours: SpecifierSet) -> bool:
    """Whether every version that ours allows is one that this clause of theirs allows."""
    if theirs in ours:
        return True
    if theirs.operator == ">=":
        lowest = [Version(each.version) for each in ours if each.operator in (">=", ">")]
        return any(version >= Version(theirs.version) for version in lowest)
    if theirs.operator in ("<", "<="):
        highest = [Version(each.version) for each in ours if each.operator == "<"]
        return any(version <= Version(theirs.version) for version in highest)
    return False
