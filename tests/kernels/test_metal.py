"""Our kernels for Metal, as far as clang can check them and run them on the host. No Mac has run them."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from device_attention import CASES, CELLS, Attention, Case, compile_tiles
from gpu.check_metal import check_kernels
from native_build import ROOT, upstream_tree

KERNELS = Path("kernels") / "device"

# Apple's clang knows no OpenCL
pytestmark = pytest.mark.skipif(
    not (shutil.which("clang") and shutil.which("clang++")) or sys.platform == "darwin", reason="needs clang"
)


def test_clang_finds_nothing_wrong() -> None:
    assert check_kernels(ROOT / "native") == ""


@pytest.mark.parametrize(
    ("name", "right", "wrong", "message"),
    [
        ("call.h", "device_ptr<const float>   q;", "team_ptr<const float> q;", "cannot initialize return object"),
        ("judge.h", "const team_ptr<float> tops = room;", "float * tops = room;", "without a kind of memory"),
        ("judge.h", "in<call> c, int head", "const call & c, int head", "without a kind of memory"),
        ("attend.h", "(team_ptr<int32_t>) (weights", "(int32_t *) (weights", "changes address space"),
        ("call.h", "device_ptr<float> lse", "float * lse", "without a kind of memory"),
        ("call.h", "REFREEKV_CONSTANT int SPAN", "constexpr int SPAN", "must reside in constant address space"),
    ],
    ids=["the wrong kind", "none", "a reference to none", "a cast to none", "a result without one", "a variable"],
)
def test_clang_finds_pointers_to_the_wrong_memory(
    tmp_path: Path, name: str, right: str, wrong: str, message: str
) -> None:
    shutil.copytree(ROOT / "native" / KERNELS, tmp_path / KERNELS)
    file = tmp_path / KERNELS / name
    text = file.read_text()
    assert right in text
    file.write_text(text.replace(right, wrong))
    assert message in check_kernels(tmp_path)


@pytest.fixture(scope="module")
def metal(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The hooks and the kernels, with a Metal that is C++ on the host."""
    folder = tmp_path_factory.mktemp("metal")
    embedded, text, kernels = folder / "embedded.cpp", folder / "decode.metal", folder / "kernels.o"
    source = [str(ROOT / "native" / KERNELS / "decode.metal"), str(ROOT / "native")]
    subprocess.run([sys.executable, str(ROOT / "cmake" / "embed_metal.py"), *source, str(embedded)], check=True)
    match = re.search(r'R"METAL\((.*)\)METAL"', embedded.read_text(), re.DOTALL)
    assert match
    # buffers are called by their order
    assert re.findall(r"\[\[buffer\((\d+)\)\]\]", match[1]) == [str(i) for i in range(10)]
    text.write_text(re.sub(r"\[\[.*?\]\]", "", match[1]))
    # Metal's language is C++14. The namespace has types of another form than that of the hooks
    command = ["clang++", "-std=c++14", "-O1", "-fPIC", "-ffp-contract=off", "-w", "-Drefreekv=refreekv_on_metal"]
    headers = f"-I{ROOT / 'tests' / 'helpers' / 'metal'}"
    subprocess.run([*command, headers, "-x", "c++", "-c", str(text), "-o", str(kernels)], check=True)
    ggml = upstream_tree() / "ggml" / "src"
    include = [f"-I{ggml}", f"-I{ggml / 'ggml-metal'}"]
    options = ["-O1", "-shared", "-fPIC", "-ffp-contract=off", *include, str(embedded), str(kernels)]
    compile_tiles("metal_tiles.cpp", folder / "metal.so", *options)
    return ctypes.CDLL(str(folder / "metal.so"))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_attention(metal: ctypes.CDLL, case: Case) -> None:
    attention = Attention(metal, replace(case, theta=0.0))
    call, out, n_read = attention.call()
    call.theta = case.theta  # exact rows are there, and wanted, but Metal does not read them
    threads(metal, 1)
    assert metal.metal_run(ctypes.byref(call)) == 0
    expected, _ = attention.expected()
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert not n_read.any()


def threads(metal: ctypes.CDLL, n: int) -> None:
    ctypes.c_int.in_dll(metal, "metal_threads").value = n


@pytest.mark.parametrize("n_threads", [1, 6, 50])
def test_no_bit_differs_from_what_the_host_computes(metal: ctypes.CDLL, n_threads: int) -> None:
    attention = Attention(metal, Case(theta=0.0, hidden=0.1, n_head_kv=1, n_coded=9 * CELLS, n_held=2 * CELLS))
    call, out, _ = attention.call()
    threads(metal, n_threads)
    assert metal.metal_run(ctypes.byref(call)) == 0
    np.testing.assert_array_equal(out, attention.run()[0])


def test_tokens_in_pieces(metal: ctypes.CDLL) -> None:
    """The scratch has room for 150 of them at a time."""
    case = Case(theta=0.0, n_gqa=16, n_k=16, n_v=16, n_head_kv=1, n_coded=100 * CELLS, n_held=CELLS, n_tokens=160)
    attention = Attention(metal, case)
    call, out, _ = attention.call()
    threads(metal, 1)
    assert metal.metal_run(ctypes.byref(call)) == 0
    np.testing.assert_array_equal(out, attention.run()[0])


def test_what_does_not_fit_into_the_memory_of_a_team_is_refused(metal: ctypes.CDLL) -> None:
    attention = Attention(metal, Case(theta=0.0, n_gqa=1024, n_k=16, n_v=16, n_tokens=1, n_coded=CELLS, n_held=CELLS))
    assert metal.metal_run(ctypes.byref(attention.call()[0])) == -1
