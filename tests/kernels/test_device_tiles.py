"""The kernels for devices: their tiles, compiled for the host, against NumPy. No GPU is needed, and none is tested."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import reference
from device_attention import CASES, CELLS, F32, Attention, Case, compile_tiles, pointer


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    out = tmp_path_factory.mktemp("tiles") / "tiles.so"
    # a product and a sum rounded at once are another result than both by themselves
    compile_tiles("device_tiles.cpp", out, "-O2", "-shared", "-fPIC", "-ffp-contract=off")
    return ctypes.CDLL(str(out))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_attention(library: ctypes.CDLL, case: Case) -> None:
    attention = Attention(library, case)
    found, n_found = attention.run()
    expected, n_expected = attention.expected()
    assert n_found == n_expected
    assert (sum(n_found) > 0) == (case.theta > 0)
    # a block that draws less than 1e-5 may be left out
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_a_token_that_sees_nothing_gets_zeros(library: ctypes.CDLL) -> None:
    attention = Attention(library, Case())
    attention.mask[1] = -np.inf
    assert not attention.run()[0][1].any()


def test_slots_that_are_not_seen_may_have_anything_in_them(library: ctypes.CDLL) -> None:
    case = Case(type_cache=F32, type_exact=F32)
    attention = Attention(library, case)
    attention.mask[:, -70:] = -np.inf
    expected = attention.run()[0]
    for rows in (attention.held_k, attention.held_v):
        rows.view(np.float32)[-70:] = np.nan
    np.testing.assert_array_equal(attention.run()[0], expected)


@pytest.mark.parametrize("n_threads", [1, 5, 32])
def test_the_number_of_threads_changes_no_bit(library: ctypes.CDLL, n_threads: int) -> None:
    """A missing barrier, or a sum in the order of threads, would."""
    case = Case(n_gqa=6, n_k=32, n_v=48, n_coded=10 * CELLS, n_held=2 * CELLS, hidden=0.1, n_head_kv=1)
    attention = Attention(library, case)
    found, n_found = attention.run(n_threads)
    expected, n_expected = attention.run()
    assert n_found == n_expected
    np.testing.assert_array_equal(found, expected)


def test_every_barrier_that_threads_need_is_there(tmp_path: Path) -> None:
    program = tmp_path / "races"
    try:
        compile_tiles("device_races.cpp", program, "-O1", "-g", "-fsanitize=thread", "-ffp-contract=off")
    except subprocess.CalledProcessError:
        pytest.skip("the compiler has no ThreadSanitizer")
    run = subprocess.run([str(program)], capture_output=True, text=True, timeout=600)
    if "unexpected memory mapping" in run.stderr:
        pytest.skip("ThreadSanitizer does not run on this kernel")
    assert "WARNING" not in run.stderr
    assert run.returncode == 0
    assert re.fullmatch(r"[1-9]\d* rows, the same\n", run.stdout)


def test_tokens_in_pieces(library: ctypes.CDLL) -> None:
    attention = Attention(library, Case(n_tokens=5, hidden=0.2))
    whole = attention.run()
    for n in (1, 2, 4):
        found = attention.run(n_at_once=n)
        np.testing.assert_array_equal(found[0], whole[0])
        assert found[1] == whole[1]


@pytest.mark.parametrize("n", [16, 64, 80, 256])
@pytest.mark.parametrize("bits", range(2, 7))
def test_codes_of_any_number_of_bits(library: ctypes.CDLL, bits: int, n: int) -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(CELLS, n)).astype(np.float32)
    codes = reference.encode(rows, bits)[2]
    size = 4 * n + CELLS * n * bits // 8
    factors = {False: rng.normal(size=(4, n)), True: rng.normal(size=(4, CELLS))}
    for v, function in ((False, library.tiles_dot), (True, library.tiles_add)):
        packed = np.empty(size, np.uint8)
        library.codes_encode(
            pointer(rows), ctypes.c_int64(CELLS), ctypes.c_int64(n), bits, ctypes.c_bool(v), pointer(packed)
        )
        left = factors[v].astype(np.float32)
        out = np.empty((n if v else CELLS, 4), np.float32)
        function(pointer(packed), n, bits, pointer(left), pointer(out))
        np.testing.assert_allclose(out, (left @ (codes if v else codes.T)).T, rtol=1e-4, atol=1e-3)


def test_every_half(library: ctypes.CDLL) -> None:
    library.tiles_half.restype = ctypes.c_float
    halves = np.arange(1 << 16, dtype=np.uint16)
    found = np.array([library.tiles_half(ctypes.c_uint16(x)) for x in halves.tolist()], np.float32)
    np.testing.assert_array_equal(found, halves.view(np.float16).astype(np.float32))
