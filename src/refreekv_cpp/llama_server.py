"""llama.cpp's own server (`llama-server`), which the build puts beside the libraries, with our cache in its slots."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import llama_cpp

from refreekv_cpp import native
from refreekv_cpp._cache_types import CACHE_TYPES
from refreekv_cpp._llama_cpp import library_dir
from refreekv_cpp.errors import PolicyError
from refreekv_cpp.options import OPTIONS, KVOptions
from refreekv_cpp.policies import PythonPolicy

# options of `Llama` and what they are called there
_FLAGS = {
    "n_batch": "--batch-size",
    "n_ubatch": "--ubatch-size",
    "n_threads": "--threads",
    "n_threads_batch": "--threads-batch",
    "n_gpu_layers": "--n-gpu-layers",
    "seed": "--seed",
    "clip_model_path": "--mmproj",
    "rope_freq_base": "--rope-freq-base",
    "rope_freq_scale": "--rope-freq-scale",
}
# MiB for conversations whose slot another one took, unless there is a library, which has them
_CACHE_RAM = 1024
# fields of `refreekv_params` that the server sets itself, or that are for debugging
_NOT_PASSED = ("cold_dir", "turns", "mask_only", "by_graph")


def program() -> Path:
    """
    Raises:
        FileNotFoundError: this build has none.
    """
    for name in ("llama-server", "llama-server.exe"):
        if (path := library_dir() / name).is_file():
            return path
    raise FileNotFoundError(f"{library_dir() / 'llama-server'} is missing: install the package again")


def policy_text(kv: KVOptions) -> str | None:
    """The value of its option --kv-policy (native/server/server.h); None: upstream's own cache.

    Raises:
        PolicyError: the policy, or another option, is one that only `Llama` can have.
    """
    if isinstance(kv.kv_policy, PythonPolicy):
        raise PolicyError(f"kv_policy={kv.kv_policy.name!r}: a policy that is written in Python runs in `Llama` alone")
    if kv.kv_protect == "system":
        raise PolicyError(
            "kv_protect='system': llama-server does not know where that message ends: must be a list of positions; "
            "`refreekv serve --python` finds it"
        )
    params: Any = kv.native_params()
    if params is None:
        return None
    options = {name: value for name, value in native.params_fields(params).items() if name not in _NOT_PASSED}
    if folder := kv.cold_folder():
        options["cold_dir"] = str(folder)
    if kv.kv_protect:
        options["protect"] = kv.kv_protect
    if kv.kv_library is not None:
        limits = {"limit": kv.kv_library_limit, "evicts_with": kv.library_evicts_with}
        options["library"] = {"folder": str(kv.kv_library), **limits}
    return json.dumps({**options, "evicted": kv.kv_evicted if kv.evicts else "drop"})


def arguments(
    model: Path,
    options: dict[str, Any],
    *,
    slots: int,
    shared: bool = False,
    host: str,
    port: int,
) -> list[str]:
    """The command line, without the program.

    Args:
        options: of `Llama`; n_ctx is the most that a slot may have.
        shared: all slots together may have no more. With kv_policy "full" that is always so, and with n_ctx 0 (the
            model's own).

    Raises:
        ValueError: one of them has no counterpart there.
    """
    options = {name: value for name, value in options.items() if value is not None}
    kv = KVOptions.of(**{name: options.pop(name) for name in OPTIONS if name in options})
    n_ctx = options.pop("n_ctx")
    flash_attn = options.pop("flash_attn", "auto")
    if not llama_cpp.llama_supports_gpu_offload():
        options.pop("n_gpu_layers", None)  # it would warn
    line = ["--model", str(model), "--host", host, "--port", str(port)]
    # Slots share the cells of one cache, so that a batch may have tokens of several. Where memory follows the contents,
    # each may have n_ctx of them; else all of it is allocated at the start
    line += [
        "--parallel",
        str(slots),
        "--kv-unified",
        "--ctx-size",
        str(n_ctx * slots if kv.kv_elastic and not shared else n_ctx),
    ]
    if n_ctx:
        line += ["--kv-unified-per-slot", str(n_ctx)]
    line += ["--flash-attn", {True: "on", False: "off"}.get(flash_attn, "on" if kv.evicts else "auto")]
    # n_ctx and the layers on the GPU are decided; a conversation stays in its slot
    line += ["--fit", "off", "--no-cache-idle-slots", "--cache-ram", str(_CACHE_RAM), "--metrics"]
    if text := policy_text(kv):
        line += ["--kv-policy", text]
    for name, option in (("type_k", "--cache-type-k"), ("type_v", "--cache-type-v")):
        if (number := options.pop(name, None)) is not None:
            line += [option, next(word for word, value in CACHE_TYPES.items() if value == number)]
    options.setdefault("n_batch", 512)  # as Llama's: a long prompt leaves the other slots a turn after each batch
    for name, value in options.items():
        if name not in _FLAGS:
            raise ValueError(
                f"--option {name}: is not one that llama-server has by this name; its own options follow MODEL, and "
                "`refreekv serve MODEL --usage` lists them"
            )
        line += [_FLAGS[name], str(value)]
    return line


def address(host: str, port: int) -> str:
    """Of the server, for a program on this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def open_when_ready(address: str, path: str) -> None:
    """Have another process open a page of a server that is about to start, once it has loaded its model.

    Args:
        address: of the server, as http://127.0.0.1:8000.
    """
    subprocess.Popen([sys.executable, "-m", "refreekv_cpp._open_page", address, path, str(os.getpid())])


def run(line: list[str]) -> int:
    """Become the server. Where a process cannot become another one (Windows): its exit code, when it has ended."""
    command = [str(program()), *line]
    if os.name == "posix":
        os.execv(command[0], command)
    process = subprocess.Popen(command)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the server has it, too, and ends
            continue
