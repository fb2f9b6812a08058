from __future__ import annotations

import dataclasses
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from refreekv_cpp import fit
from refreekv_cpp._cache_types import CACHE_TYPES
from refreekv_cpp._units import mebibytes
from refreekv_cpp.cli import common
from refreekv_cpp.cli.common import ModelArgument
from refreekv_cpp.cli.options import LoadOptions, takes_options
from refreekv_cpp.errors import UnsupportedModelError
from refreekv_cpp.fit import Device, Needs
from refreekv_cpp.models import resolve


@dataclass(frozen=True)
class Cache:
    """One way to keep K and V, and what it needs: from ... to, the same where it is known."""

    title: str
    low: Needs
    high: Needs


@common.user_errors()
@takes_options
def plan(
    model: ModelArgument,
    options: LoadOptions,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Length of the longest prompt that is read.", show_default="the whole context"),
    ] = None,
) -> None:
    """What a model will need of this machine's memory, and the longest context that fits. Reads no weights."""
    path = resolve(model)
    fit.check_model(path)
    try:
        llama_options = options.llama_options(path)
        policy = _measure(path, llama_options, tokens)
    except UnsupportedModelError as error:
        common.print_warning(error)
        options = dataclasses.replace(options, kv_policy="full", kv_memory_limit=None)
        llama_options = options.llama_options(path)
        policy = _measure(path, llama_options, tokens)
    llama_options["n_ctx"] = policy.n_ctx
    caches = list(_caches(path, llama_options, tokens, policy))
    base = fit.base_bytes(path, policy.n_ctx)
    with fit.opened(path, **llama_options) as llm:
        largest = fit.largest_n_ctx(llm, max(policy.n_ctx_train, policy.n_ctx) // 256 * 256, base)

    common.print_tables(_needs_table(caches, base, policy), _machine_table(policy, base))
    _print_advice(model, options, policy, largest, llama_options["n_gpu_layers"])


def _measure(path: Path, llama_options: dict[str, Any], tokens: int | None) -> Needs:
    with fit.opened(path, **llama_options) as llm:
        return fit.measure(llm, llama_options["n_ctx"], tokens)


def _caches(path: Path, llama_options: dict[str, Any], tokens: int | None, policy: Needs) -> Iterator[Cache]:
    plain = {name: value for name, value in llama_options.items() if not name.startswith("kv_")}
    for kind in ("f16", "q8_0"):
        types = {"type_k": CACHE_TYPES[kind], "type_v": CACHE_TYPES[kind]}
        try:
            needs = _measure(path, {**plain, **types, "kv_policy": "full"}, tokens)
        except ValueError:  # rows that are no whole blocks of q8_0, or flash attention that was refused
            continue
        yield Cache(f"full, {kind}", needs, needs)
    name = policy.policy.name
    if not policy.evicts:
        if llama_options.keys() & {"type_k", "type_v", "kv_elastic"}:
            yield Cache("full, as asked for", policy, policy)
        return
    yield Cache(f"{name}, reading", policy, policy)
    kept = policy.kept()
    shares = kept or (0.0, 1.0)
    low, high = (policy.settled(share) for share in shares)
    yield Cache(f"{name}, settled" + ("" if kept else " (by the text)"), low, high)


def _needs_table(caches: list[Cache], base: int, policy: Needs) -> Table:
    table = Table(
        "",
        *(cache.title for cache in caches),
        title=f"A prompt of {policy.n_tokens} tokens in a context of {policy.n_ctx}",
        title_justify="left",
    )
    for column in table.columns[1:]:
        column.justify = "right"

    def add(name: str, value: Callable[[Needs], int], *, always: bool = True) -> None:
        pairs = [sorted((value(cache.low), value(cache.high))) for cache in caches]
        if always or any(high for _, high in pairs):
            table.add_row(name, *(_between(low, high) for low, high in pairs))

    add("weights", lambda needs: sum(device.weights for device in needs.devices))
    add("weights, copied for the CPU's kernels", lambda needs: needs.host.repacked, always=False)
    add("KV cache, and what belongs to it", lambda needs: needs.context)
    add("compute buffers, reserved", lambda needs: needs.compute)
    add("compute buffers and scratch memory, used", _compute_used)
    table.add_row("Python, libraries, vocabulary", *(mebibytes(base) for _ in caches))
    where = "in memory" if policy.cold == "memory" else "on disk"
    add(f"evicted rows, {where}", lambda needs: needs.cold_bytes, always=False)
    table.add_section()
    add("process, resident (RAM)", lambda needs: fit.process_bytes(needs, base))
    for i, device in enumerate(policy.devices[:-1]):
        add(f"{device.name} (VRAM)", partial(_device_bytes, i))
    return table


def _device_bytes(i: int, needs: Needs) -> int:
    return needs.devices[i].bytes


def _compute_used(needs: Needs) -> int:
    return sum(device.compute_used + device.work if device.is_host else device.compute for device in needs.devices)


def _between(low: int, high: int) -> str:
    if low == high:
        return mebibytes(low)
    return f"{low / 2**20:.1f} to {mebibytes(high)}"


def _machine_table(policy: Needs, base: int) -> Table:
    table = Table("this machine", "total", "free", "needed at most", "fits", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"

    def add(name: str, total: int, free: int, needed: int, fits: bool) -> None:
        answer = Text("yes", "green") if fits else Text("no", "red")
        table.add_row(Text(name), mebibytes(total), mebibytes(free), mebibytes(needed), answer)

    for device in policy.devices:
        needed = fit.needed_bytes(policy, device, base)
        fits = fit.missing_bytes(policy, device, base) <= 0
        add("RAM" if device.is_host else _gpu_name(device), device.total, device.free, needed, fits)
    if policy.cold == "file" and (folder := policy.cold_dir):
        usage = shutil.disk_usage(folder)
        needed = policy.settled(0.0).cold_bytes
        add(f"disk of {folder}", usage.total, usage.free, needed, needed <= usage.free)
    return table


def _gpu_name(device: Device) -> str:
    return f"{device.name} ({device.description})"


def _print_advice(model: str, options: LoadOptions, policy: Needs, largest: int, n_gpu_layers: int) -> None:
    if largest == 0:
        print("No context fits into the memory that is free: close other programs, or take a smaller model.")
        return
    trained = f"the model was made for {policy.n_ctx_train}"
    print(f"largest context that fits with {policy.policy.name}: {largest} tokens ({trained})")
    command = ["refreekv", "chat", str(model), "--n-ctx", str(min(policy.n_ctx, largest))]
    command += ["--kv-policy", options.kv_policy, "--gpu-layers", "all" if n_gpu_layers < 0 else str(n_gpu_layers)]
    if options.kv_memory_limit is not None:
        command += ["--kv-memory-limit", options.kv_memory_limit]
    if options.kv_evicted != "keep":
        command += ["--kv-evicted", options.kv_evicted]
    if options.flash_attn is not None:
        command.append("--flash-attn" if options.flash_attn else "--no-flash-attn")
    if options.threads is not None:
        command += ["--threads", str(options.threads)]
    for option in options.option or []:
        command += ["--option", option]
    print(quoted(command))


def quoted(command: list[str], platform: str = sys.platform) -> str:
    """For this system's shell."""
    return subprocess.list2cmdline(command) if platform == "win32" else shlex.join(command)
