"""Puts Metal's source of our kernels into a C++ source, since Metal compiles it where it runs.

    embed_metal.py SOURCE INCLUDE OUT

OUT becomes C++ with the text of SOURCE as `refreekv_metal_source`. A line `#include "..."` is replaced by the file of
that name in the folder INCLUDE, the first time that it is named; llama.cpp embeds its own kernels in the same way.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

QUOTED = re.compile(r'#include "(.+)"')


def flatten(source: Path, include: Path, seen: set[Path]) -> str:
    """The text of a file, with that of the files it includes."""
    if source in seen:
        return ""
    seen.add(source)
    lines = []
    for line in source.read_text(encoding="utf-8").splitlines():
        if match := QUOTED.match(line):
            lines.append(flatten(include / match[1], include, seen))
        elif line != "#pragma once":
            lines.append(line)
    return "\n".join(lines) + "\n"


def main() -> None:
    source, include, out = map(Path, sys.argv[1:])
    text = flatten(source, include, set())
    name = "const char * const refreekv_metal_source"
    out.write_text(f'extern {name};\n{name} = R"METAL({text})METAL";\n', encoding="utf-8")


if __name__ == "__main__":
    main()
