"""K and V of 64 cells in a few bits: the kernels against NumPy, in each instruction set that this machine has."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import reference
from native_build import ROOT, upstream_tree

Floats = npt.NDArray[np.float32]

# what a build needs of the processor, as Linux calls it
SETS = {
    "": [],
    "-mssse3": ["ssse3"],
    "-mavx2 -mfma -mf16c": ["avx2", "fma", "f16c"],
    "-mavx2 -mfma -mf16c -mavxvnni": ["avx_vnni"],
    "-march=skylake-avx512": ["avx512bw", "avx512dq", "avx512vl", "avx512cd"],
    "-march=icelake-client": ["avx512_vnni", "avx512_vbmi2"],
    "-march=native": [],
}
BITS = range(2, 7)
SIZES = [16, 64, 80, 128, 256]


class Kernels:
    """One build of native/kernels/codes.cpp."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.codes_bytes.restype = ctypes.c_size_t
        self._library.codes_fit.restype = ctypes.c_bool

    def fit(self, n: int, bits: int) -> bool:
        return bool(self._library.codes_fit(ctypes.c_int64(n), bits))

    def encode(self, rows: Floats, bits: int, v: bool) -> npt.NDArray[np.uint8]:
        n_cells, n = rows.shape
        res = np.empty(self._library.codes_bytes(ctypes.c_int64(n), bits), dtype=np.uint8)
        self._call("encode", rows, n_cells, n, bits, v, res)
        return res

    def decode(self, codes: npt.NDArray[np.uint8], n_cells: int, n: int, bits: int, v: bool) -> Floats:
        res = np.empty((n_cells, n), dtype=np.float32)
        for cell in range(n_cells):
            self._call("decode", codes, cell, n, bits, v, res[cell])
        return res

    def turn(self, codes: npt.NDArray[np.uint8], n: int, n_v: int) -> npt.NDArray[np.uint8]:
        res = np.empty(self._library.codes_bytes(ctypes.c_int64(n_v), 4), dtype=np.uint8)
        self._call("turn", codes, n, n_v, res)
        return res

    def dot(self, codes: npt.NDArray[np.uint8], queries: Floats, unit: Floats, bits: int) -> Floats:
        res = np.empty((len(queries), 64), dtype=np.float32)
        self._call("dot", codes, queries.shape[1], bits, queries, unit.astype(np.float32), len(queries), res)
        return res

    def add(self, codes: npt.NDArray[np.uint8], weights: Floats, bits: int, to: Floats) -> Floats:
        res = to.copy()
        self._call("add", codes, res.shape[1], bits, weights, len(weights), res)
        return res

    def _call(self, name: str, *arguments: Any) -> None:
        def as_c(x: Any) -> Any:
            if isinstance(x, np.ndarray):
                assert x.flags.c_contiguous
                return ctypes.c_void_p(x.ctypes.data)
            return ctypes.c_bool(x) if isinstance(x, bool) else ctypes.c_int64(x)

        getattr(self._library, f"codes_{name}")(*map(as_c, arguments))


@pytest.fixture(scope="module", params=SETS, ids=lambda flags: flags or "plain")
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    compiler = shutil.which("g++") or shutil.which("c++")
    cpu = Path("/proc/cpuinfo")
    if not compiler or not cpu.exists() or (request.param and platform.machine() != "x86_64"):
        pytest.skip("no compiler, or not for this machine")
    has = cpu.read_text().split()
    if missing := [name for name in SETS[request.param] if name not in has]:
        pytest.skip(f"this machine lacks {', '.join(missing)}")
    library = tmp_path_factory.mktemp("codes") / "codes.so"
    command = [compiler, "-std=c++17", "-O2", "-w", "-shared", "-fPIC", *request.param.split()]
    include = [f"-I{ROOT / 'native'}", f"-I{upstream_tree() / 'ggml' / 'include'}"]
    subprocess.run(
        [*command, *include, str(ROOT / "tests" / "helpers" / "codes_kernels.cpp"), "-o", str(library)], check=True
    )
    return Kernels(library)


def numbers(shape: tuple[int, ...], seed: int = 0) -> Floats:
    """Channels of other sizes and middles, as those of keys are."""
    rng = np.random.default_rng(seed)
    size, middle = np.exp(rng.normal(size=shape[-1])), 3 * rng.normal(size=shape[-1])
    return (rng.normal(size=shape) * size + middle).astype(np.float32)


@pytest.mark.parametrize("v", [False, True], ids=["K", "V"])
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_codes_are_the_nearest_of_each_channel(kernels: Kernels, bits: int, n: int, v: bool) -> None:
    for n_cells in (64, 17, 1):
        rows = numbers((n_cells, n))
        rows[:, 3] = 1.5  # a channel that does not change
        decoded = kernels.decode(kernels.encode(rows, bits, v), n_cells, n, bits, v)
        least, step, codes = reference.encode(rows, bits)
        np.testing.assert_allclose(decoded, least + step * codes, rtol=1e-6, atol=1e-6)
        assert (decoded[:, 3] == 1.5).all()


@pytest.mark.parametrize(("n", "n_v"), [(16, 16), (48, 32), (80, 64), (576, 512)])
def test_codes_of_k_are_those_of_a_v_that_is_its_beginning(kernels: Kernels, n: int, n_v: int) -> None:
    rows = numbers((64, n))
    turned = kernels.turn(kernels.encode(rows, 4, False), n, n_v)
    np.testing.assert_array_equal(turned, kernels.encode(np.ascontiguousarray(rows[:, :n_v]), 4, True))


# channels and query heads
SHAPES = [(16, 1), (64, 3), (64, 4), (80, 2), (128, 7), (256, 16)]


@pytest.mark.parametrize("times", [1, 2.5])
@pytest.mark.parametrize(("n", "n_heads"), SHAPES)
@pytest.mark.parametrize("bits", BITS)
def test_logits(kernels: Kernels, bits: int, n: int, n_heads: int, times: float) -> None:
    rows, queries = numbers((64, n)), numbers((n_heads, n), seed=1)
    queries[0, : n // 2] = 0
    if n_heads > 1:
        queries[1] = 0
    least, step, codes = reference.encode(rows, bits)
    exact = queries.astype(np.float64) @ (least + step * codes).T
    scaled = queries * step
    unit = (times * np.abs(scaled).max(axis=1) / 127).astype(np.float32)
    ours = kernels.dot(kernels.encode(rows, bits, v=False), queries, unit, bits)

    # what rounding takes is there as if all codes were the middle one
    middle = (2**bits - 1) / 2
    bound = unit[:, None] / 2 * np.abs(codes - middle).sum(axis=1)
    slack = 1e-5 * (np.abs(queries) @ np.abs(least + step * codes).T)
    assert (np.abs(ours - exact) <= bound + slack).all()
    rounded = np.rint(scaled / np.where(unit, unit, 1)[:, None]) * unit[:, None]
    np.testing.assert_allclose(
        ours,
        exact - (scaled - rounded) @ (codes - middle).T,
        rtol=1e-4,
        atol=2e-4 * np.abs(exact).max() + bound.max() / n,
    )


@pytest.mark.parametrize(("n", "n_heads"), SHAPES)
@pytest.mark.parametrize("bits", BITS)
def test_weighted_sums(kernels: Kernels, bits: int, n: int, n_heads: int) -> None:
    rng = np.random.default_rng(2)
    rows = numbers((64, n))
    weights = np.exp(3 * rng.normal(size=(n_heads, 64))).astype(np.float32)
    weights[:, ::5] = 0
    before = rng.normal(size=(n_heads, n)).astype(np.float32)
    least, step, codes = reference.encode(rows, bits)
    exact = before + weights.astype(np.float64) @ (least + step * codes)
    ours = kernels.add(kernels.encode(rows, bits, v=True), weights, bits, before)

    unit = weights.max(axis=1) / 127
    bound = unit[:, None] / 2 * (np.abs(codes - (2**bits - 1) / 2) * step).sum(axis=0)
    slack = 1e-5 * (weights @ np.abs(least + step * codes))
    assert (np.abs(ours - exact) <= bound + slack + 1e-5).all()


def test_nothing_is_added_where_no_weight_is(kernels: Kernels) -> None:
    codes = kernels.encode(numbers((64, 64)), 3, v=True)
    before = numbers((3, 64), seed=3)
    np.testing.assert_array_equal(kernels.add(codes, np.zeros((3, 64), np.float32), 3, before), before)


def test_the_largest_factors_do_not_overflow(kernels: Kernels) -> None:
    for bits in BITS:
        rows = np.zeros((64, 256), np.float32)
        rows[0] = 2**bits - 1  # of all channels the step is 1, and one cell has the largest code everywhere
        for sign in (1, -1):
            queries = np.full((4, 256), sign, np.float32)
            ours = kernels.dot(kernels.encode(rows, bits, v=False), queries, np.full(4, 1 / 127), bits)
            np.testing.assert_allclose(ours[:, 0], sign * 256 * (2**bits - 1), rtol=1e-5)
            np.testing.assert_allclose(ours[:, 1:], 0, atol=1e-2)


def test_sizes_that_fit(kernels: Kernels) -> None:
    assert all(kernels.fit(n, bits) for n in SIZES for bits in BITS)
    assert not any(kernels.fit(*size) for size in [(72, 4), (64, 1), (64, 7), (64, 8)])
