"""llama.cpp's distributed backend, of a library that was built with GGML_RPC=ON.

python tests/helpers/rpc.py 127.0.0.1:50052      serves this machine's CPU, as upstream's rpc-server does
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable

from refreekv_cpp._llama_cpp import library_dir


def _ggml(part: str = "") -> ctypes.CDLL:
    return ctypes.CDLL(str(library_dir() / f"libggml{part}.so"))


def add_servers(endpoints: Iterable[str]) -> None:
    """Models that are loaded after this put their GPU layers on these servers (HOST:PORT), in equal parts.

    Raises:
        ConnectionError: nobody serves there.
    """
    rpc = _ggml("-rpc")
    rpc.ggml_backend_rpc_add_server.restype = ctypes.c_void_p
    for endpoint in endpoints:
        server = rpc.ggml_backend_rpc_add_server(endpoint.encode())
        if server is None:
            raise ConnectionError(f"{endpoint}: no RPC server")
        _ggml().ggml_backend_register(ctypes.c_void_p(server))


def serve(endpoint: str, n_threads: int = 1) -> None:
    """Until the process ends."""
    ggml = _ggml()
    ggml.ggml_backend_dev_by_type.restype = ctypes.c_void_p
    devices = (ctypes.c_void_p * 1)(ggml.ggml_backend_dev_by_type(0))  # the CPU
    _ggml("-rpc").ggml_backend_rpc_start_server(
        endpoint.encode(), None, ctypes.c_size_t(n_threads), ctypes.c_size_t(1), devices
    )


if __name__ == "__main__":
    serve(sys.argv[1])
