"""A device for tests whose memory the host cannot see, on any machine: far_device.cpp says what it is good for."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from native_build import ROOT, upstream_tree

from refreekv_cpp._llama_cpp import library_dir


class _Crossing(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char * 64), ("size", ctypes.c_uint64), ("to_host", ctypes.c_int32)]


@dataclass(frozen=True)
class Crossing:
    """Bytes of a tensor that went from the host to the device, or back."""

    name: str
    size: int
    to_host: bool


class FarDevice:
    def __init__(self, library: Path) -> None:
        self._device = ctypes.CDLL(str(library))
        self._device.far_device_n_crossings.restype = ctypes.c_uint64

    def forget(self) -> None:
        """... what has crossed so far."""
        self._device.far_device_forget()

    def crossings(self) -> list[Crossing]:
        res = []
        for i in range(self._device.far_device_n_crossings()):
            entry = _Crossing()
            self._device.far_device_crossing(ctypes.c_uint64(i), ctypes.byref(entry))
            res.append(Crossing(entry.name.decode(), entry.size, bool(entry.to_host)))
        return res

    def to_host(self) -> list[Crossing]:
        return [crossing for crossing in self.crossings() if crossing.to_host]

    @contextmanager
    def without(self, *operations: str) -> Iterator[None]:
        """The device has no kernels for these (ggml's names, "GET_ROWS")."""
        for operation in operations:
            self._device.far_device_refuse(operation.encode())
        try:
            yield
        finally:
            self._device.far_device_refuse(None)

    @contextmanager
    def without_shared_memory(self) -> Iterator[None]:
        """There is no more host memory that the device can read."""
        self._device.far_device_share(ctypes.c_bool(False))
        try:
            yield
        finally:
            self._device.far_device_share(ctypes.c_bool(True))


def compile_device(folder: Path) -> Path:
    """Seconds, once llama.cpp's headers are there."""
    ggml = upstream_tree() / "ggml"
    out = folder / "libfar-device.so"
    subprocess.run(
        [
            *[os.environ.get("CXX", "c++"), "-std=c++17", "-O2", "-shared", "-fPIC"],
            *[
                f"-I{ggml / 'include'}",
                f"-I{ggml / 'src'}",
                str(ROOT / "tests" / "helpers" / "far_device.cpp"),
                "-o",
                str(out),
            ],
            *[f"-L{library_dir()}", "-lggml", "-lggml-base"],
        ],
        check=True,
        stdout=sys.__stderr__,
    )
    return out


@contextmanager
def plugged_in(library: Path) -> Iterator[FarDevice]:
    """Models that are loaded inside put their GPU layers on it."""
    ggml = ctypes.CDLL(str(library_dir() / "libggml.so"))
    ggml.ggml_backend_load.restype = ctypes.c_void_p
    device = FarDevice(library)  # it stays loaded, whoever still has memory there
    registered = ctypes.c_void_p(ggml.ggml_backend_load(str(library).encode()))
    assert registered.value is not None
    try:
        yield device
    finally:
        ggml.ggml_backend_unload(registered)
