"""Collects the licence texts of everything that a wheel contains, from upstream's sources."""

from __future__ import annotations

from pathlib import Path

# What is compiled into the libraries, or copied beside them: the file in llama-cpp-python's sdist that has its licence.
# Some libraries have it as a comment, at the beginning or at the end of their header.
SOURCES = {
    "llama-cpp-python": "LICENSE.md",
    "llama.cpp": "vendor/llama.cpp/LICENSE",
    "llamafile": "vendor/llama.cpp/ggml/src/ggml-cpu/llamafile/sgemm.cpp",
    "nlohmann-json": "vendor/llama.cpp/licenses/LICENSE-jsonhpp",
    "miniaudio": "vendor/llama.cpp/vendor/miniaudio/miniaudio.h",
    "stb_image": "vendor/llama.cpp/vendor/stb/stb_image.h",
    "subprocess.h": "vendor/llama.cpp/vendor/sheredom/subprocess.h",
    "xxHash": "vendor/llama.cpp/vendor/hash/xxhash/LICENSE",
    "sha256": "vendor/llama.cpp/vendor/hash/sha256/LICENSE",
    "rotate-bits": "vendor/llama.cpp/vendor/hash/rotate-bits/LICENSE.md",
}

# every licence has one of these words
_MARKS = ("permission is hereby granted", "redistribution and use", "public domain")


def _is_licence(text: str) -> bool:
    return any(mark in text.lower() for mark in _MARKS)


def collect(sdist: Path, out: Path) -> None:
    """Write LICENSE-NAME.txt for each of SOURCES to the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    for name, path in SOURCES.items():
        text = (sdist / path).read_text(encoding="utf-8")
        if Path(path).suffix in (".h", ".cpp"):
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
