"""Collects the licence texts of everything that a wheel contains, from upstream's sources."""

from __future__ import annotations

from pathlib import Path

# What is compiled into the libraries, or copied beside them: the file in llama-cpp-python's sdist that has its licence.
# Some libraries have it as a comment, at the beginning or at the end of their header.
SOURCES = {
    "llama-cpp-python": "LICENSE.md",
    "llama.cpp": "vendor/llama.cpp/LICENSE",
    "cpp-httplib": "vendor/llama.cpp/vendor/cpp-httplib/LICENSE",
    "llamafile": "vendor/llama.cpp/ggml/src/ggml-cpu/llamafile/sgemm.cpp",
    "nlohmann-json": "vendor/llama.cpp/licenses/LICENSE-jsonhpp",
    "miniaudio": "vendor/llama.cpp/vendor/miniaudio/miniaudio.h",
    "stb_image": "vendor/llama.cpp/vendor/stb/stb_image.h",
    "subprocess.h": "vendor/llama.cpp/vendor/sheredom/subprocess.h",
    "xxHash": "vendor/llama.cpp/vendor/hash/xxhash/LICENSE",
    "sha256": "vendor/llama.cpp/vendor/hash/sha256/LICENSE",
    "sha1": "vendor/llama.cpp/vendor/hash/sha1/sha1.c",
    "rotate-bits": "vendor/llama.cpp/vendor/hash/rotate-bits/LICENSE.md",
}

# folders of llama.cpp's vendor/ with source files and without one of these licences
OTHER_FOLDERS = (
    "hash",  # llama.cpp's own; the libraries in it have folders of their own
    "nlohmann",  # its licence is in llama.cpp's licenses/
)

# every licence has one of these words
_MARKS = ("permission is hereby granted", "redistribution and use", "public domain")


def _is_licence(text: str) -> bool:
    return any(mark in text.lower() for mark in _MARKS)


def check_listed(sdist: Path) -> None:
    """
    Raises:
        SystemExit: llama.cpp brings a library of others, or a licence of one, that is not among SOURCES.
    """
    llama_cpp = sdist / "vendor" / "llama.cpp"
    vendor = llama_cpp / "vendor"
    files = [path for path in vendor.rglob("*") if path.is_file() and path.name != "CMakeLists.txt"]
    listed = {sdist / path for path in SOURCES.values()}
    known = {path.parent for path in listed} | {vendor / name for name in OTHER_FOLDERS}
    new = {path.parent for path in files} - known | set((llama_cpp / "licenses").iterdir()) - listed
    if new:
        names = ", ".join(sorted(path.relative_to(sdist).as_posix() for path in new))
        raise SystemExit(f"cmake/licenses.py must list the licences of what is new in llama.cpp: {names}")


def collect(sdist: Path, out: Path) -> None:
    """Write LICENSE-NAME.txt for each of SOURCES to the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    for name, path in SOURCES.items():
        text = (sdist / path).read_text(encoding="utf-8")
        if Path(path).suffix in (".c", ".h", ".cpp"):
            text = _comment(text)
        if not _is_licence(text):
            raise SystemExit(f"{path}: there is no licence text where it was expected")
        (out / f"LICENSE-{name}.txt").write_text(text.strip() + "\n", encoding="utf-8")


def _comment(text: str) -> str:
    """The comment of a source file that has its licence: of // lines at the beginning, or the first or last block."""
    lines = text.splitlines()
    if lines[0].startswith("//"):
        head = lines[: next(i for i, line in enumerate(lines) if not line.startswith("//"))]
        if _is_licence("\n".join(head)):
            return "\n".join(line.removeprefix("//").removeprefix(" ") for line in head)
    blocks = [block.split("*/")[0] for block in text.split("/*")[1:]]
    return next((block for block in (blocks[-1], *blocks[:3]) if _is_licence(block)), "")
