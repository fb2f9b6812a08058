"""Brings the pinned llama-cpp-python into the build: download, verify, unpack, patch.

    prepare_upstream.py OUT [--source DIR] [--downloads DIR] [--stock] [--tests] [--ui] [--bundle]

OUT/llama.cpp becomes the patched llama.cpp, OUT/python/llama_cpp the Python package without its native part, and
OUT/licenses has the licence texts. Files that have not changed keep their time stamps, so that a changed patch rebuilds
what it touches and nothing else.

--source names an unpacked llama-cpp-python sdist, or a folder that --bundle wrote, to use in place of a download. It is
only read, and gets the same patches. --stock applies just NNNN-fix-*.patch: upstream but for mended bugs. --tests
brings upstream's tests and what they are built with, too, --ui the sources of the server's page. --bundle writes to
OUT what a build reads, and patches nothing: our own sdist carries that, so that it builds without a download. Anything
unexpected ends the build.
"""

from __future__ import annotations

import argparse
import filecmp
import hashlib
import logging
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import patch_ng
from dependencies import check_dependencies
from licenses import check_listed, collect
from mirrored import check_mirrored
from upstream_pin import PIN_FILE, read_pin

PATCHES = sorted((PIN_FILE.parent / "patches").glob("*.patch"))

# what the build reads of vendor/llama.cpp
NEEDED = [
    *("CMakeLists.txt", "LICENSE", "cmake", "common", "ggml", "include", "licenses", "scripts/ui-assets.cmake", "src"),
    *("tools/mtmd", "tools/server", "vendor"),
    # without the page's sources (--ui) the server has an empty list of its files
    *(f"tools/ui/{name}" for name in ("CMakeLists.txt", "sources.cmake", "ui.cpp.in", "ui.h.in")),
]
NEEDED_BY_TESTS = ["tests"]
NEEDED_BY_UI = ["tools/ui"]

# and of the rest of the sdist
PYTHON = ["llama_cpp", "LICENSE.md", "PKG-INFO"]


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def download(version: str, sha256: str, folder: Path) -> Path:
    """The sdist, through pip (which has the user's index, proxy and cache settings)."""
    sdist = folder / f"llama_cpp_python-{version}.tar.gz"
    if not sdist.exists():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=:all:", "--no-build-isolation"]
        subprocess.run([*command, f"--dest={folder}", f"llama-cpp-python=={version}"], check=True)
    found = hashlib.sha256(sdist.read_bytes()).hexdigest()
    if found != sha256:
        sdist.unlink()
        raise SystemExit(f"{sdist.name}: SHA-256 is {found}, upstream.txt says {sha256}")
    return sdist


def unpack(sdist: Path, folder: Path) -> Path:
    with tarfile.open(sdist) as archive:
        if sys.version_info >= (3, 12):
            archive.extractall(folder, filter="data")
        else:
            archive.extractall(folder)
    return next(folder.iterdir())


def check_source(source: Path, version: str) -> None:
    init = source / "llama_cpp" / "__init__.py"
    if not init.exists() or f'"{version}"' not in read(init):
        raise SystemExit(f"{source}: not an unpacked sdist of llama-cpp-python {version}")


def apply_patches(tree: Path, patches_to_apply: list[Path]) -> None:
    for path in patches_to_apply:
        patches = patch_ng.fromfile(str(path))
        if not patches or not patches.apply(strip=1, root=str(tree)):
            raise SystemExit(f"{path.name} does not apply to this llama.cpp (is it patched already?)")
        added = [line[1:] for line in read(path).splitlines() if line.startswith("+") and not line.startswith("+++")]
        text = "".join(read(tree / item.target.decode().removeprefix("b/")) for item in patches.items)
        missing = [line for line in added if line not in text]
        if missing:
            raise SystemExit(f"{path.name} left no trace of: {missing[0].strip()}")


def synchronise(new: Path, out: Path) -> None:
    """Make `out` equal to `new`, touching only what differs."""
    wanted = {path.relative_to(new) for path in new.rglob("*") if path.is_file()}
    for path in list(out.rglob("*")):
        if path.is_file() and path.relative_to(out) not in wanted:
            path.unlink()
    for name in wanted:
        target = out / name
        if not target.exists() or not filecmp.cmp(new / name, target, shallow=False):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(new / name, target)


def copy(source: Path, names: list[str], target: Path) -> None:
    """Copy these files and folders of `source`, given by their paths in it, to the same places in `target`."""
    for name in names:
        if (source / name).is_dir():
            shutil.copytree(
                source / name, target / name, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True
            )
        else:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--source", type=Path)
    parser.add_argument("--downloads", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--stock", action="store_true")
    parser.add_argument("--tests", action="store_true")
    parser.add_argument("--ui", action="store_true")
    parser.add_argument("--bundle", action="store_true")
    args = parser.parse_args()

    logging.getLogger("patch_ng").setLevel(logging.ERROR)
    version, sha256 = read_pin()

    with tempfile.TemporaryDirectory() as scratch:
        if args.source:
            source = args.source
            check_source(source, version)
        else:
            args.downloads.mkdir(parents=True, exist_ok=True)
            source = unpack(download(version, sha256, args.downloads), Path(scratch) / "sdist")
        check_dependencies(source / "PKG-INFO", PIN_FILE.parent / "pyproject.toml")
        check_listed(source)
        check_mirrored(source)

        new = Path(scratch) / "new"
        if args.bundle:
            copy(source, PYTHON, new)
            copy(source / "vendor" / "llama.cpp", NEEDED, new / "vendor" / "llama.cpp")
            synchronise(new, args.out)
            print(f"sources of llama-cpp-python {version}: {args.out}")
            return

        copy(source, PYTHON, new / "python")
        more = [*(NEEDED_BY_TESTS if args.tests else []), *(NEEDED_BY_UI if args.ui else [])]
        copy(source / "vendor" / "llama.cpp", NEEDED + more, new / "llama.cpp")
        patches = [path for path in PATCHES if "-fix-" in path.name or not args.stock]
        apply_patches(new / "llama.cpp", patches)
        collect(source, new / "licenses")
        for name in ("llama.cpp", "python", "licenses"):
            synchronise(new / name, args.out / name)

    print(f"llama-cpp-python {version} with {len(patches)} patches: {args.out}")


if __name__ == "__main__":
    main()
