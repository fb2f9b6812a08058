"""Writes the cffi binding (ABI mode, out of line) from the public C header.

build_binding.py HEADER OUT
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import cffi

# what refreekv.h takes from llama.h
LLAMA_TYPES = """
struct llama_context;
struct llama_model;
typedef int32_t llama_pos;
typedef int32_t llama_seq_id;
typedef int32_t llama_token;
"""


def declarations(header: str) -> str:
    header = re.sub(r"#ifdef __cplusplus.*?#endif", "", header, flags=re.DOTALL)
    header = re.sub(r"^\s*#.*$", "", header, flags=re.MULTILINE)
    return LLAMA_TYPES + header.replace("REFREEKV_API ", "")


def main() -> None:
    header, out = map(Path, sys.argv[1:3])
    ffi = cffi.FFI()
    ffi.cdef(declarations(header.read_text(encoding="utf-8")))
    ffi.set_source(f"refreekv_cpp.{out.stem}", None)
    ffi.emit_python_code(str(out))


if __name__ == "__main__":
    main()
