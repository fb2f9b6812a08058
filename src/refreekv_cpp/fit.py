"""What a model needs of a machine's memory, before its weights are read, and what fits.

The figures are llama.cpp's own: it makes a model and a context that allocate nothing, and says what they would take. So
sliding windows, hybrids and quantised caches are counted exactly as they are allocated later.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from ctypes import byref, c_void_p
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import llama_cpp
import psutil
from llama_cpp._internals import LlamaContext

from refreekv_cpp import native
from refreekv_cpp._binding import ffi  # written by the build from native/refreekv.h
from refreekv_cpp._cache_types import CACHE_TYPES
from refreekv_cpp.errors import PolicyError, UnsupportedModelError
from refreekv_cpp.llama import Llama
from refreekv_cpp.policies import Policy, ReFreeKV

_logger = logging.getLogger(__name__)

_LOG_LEVEL_ERROR = 4  # GGML_LOG_LEVEL_ERROR of ggml.h

MOST_CONTEXT = 32768
"""The longest context that is chosen without being asked for, in tokens."""

_LEAST_CONTEXT = 512
_CONTEXT_STEP = 256  # llama.cpp rounds contexts up to this
_LAYERS_CONTEXT = 8192  # that is to fit beside the layers on the GPU, where nobody says which context is wanted

# of the default policy: the shares of the rows of K and V that stayed after long prompts (docs/fidelity.md)
_KEPT_BY_DEFAULT = (0.39, 0.66)
# of the bytes that evicted rows have in f16: what decoding keeps of their keys, where it has faults (docs/memory.md)
_SKETCH_SHARE = 1 / 7

# what a first prompt takes beside all that is counted: code of kernels that is read now, graphs, stacks, logits
_FIRST_PROMPT_BYTES = 4 * 2**20
_FIRST_PROMPT_BYTES_PER_WORD = 24  # of the vocabulary


@dataclass(frozen=True)
class Device:
    """What a model and its context take of the memory of one device, in bytes.

    Attributes:
        name: ggml's: "CUDA0", "CPU".
        description: what the machine calls it.
        is_host: it is the host's memory.
        free, total: as the device has it now; 0 and 0 where it does not say.
        weights: on a device. Of the host's, those that are used from the file's pages (or were read from there).
        repacked: weights that the CPU's kernels want in another order than the file has, as copies.
        context: the full cache of n_ctx, and what else belongs to it: windows, recurrent states, query rings.
        compute: compute buffers, as reserved.
        compute_used: what of them is ever written to, when logits are wanted of single tokens.
        work: scratch memory of the CPU's threads beside them.
    """

    name: str
    description: str
    is_host: bool
    free: int
    total: int
    weights: int
    repacked: int
    context: int
    compute: int
    compute_used: int
    work: int

    @property
    def bytes(self) -> int:
        """All of it. On the host, memory that is reserved and never written to takes none."""
        compute = self.compute_used + self.work if self.is_host else self.compute
        return self.weights + self.repacked + self.context + compute


@dataclass(frozen=True)
class Needs:
    """What a `Llama` with some options needs, with its cache full.

    Attributes:
        devices: those of the model, then the host.
        n_ctx: tokens of context that this is for.
        n_tokens: of the longest prompt that is read into it.
        n_ctx_train: tokens of context that the model was made for.
        n_layers: of the model, with the output layer, as n_gpu_layers counts them.
        n_vocab: words of the model's vocabulary.
        policy: of the cache.
        evicts: the policy evicts.
        prunable: bytes of K and V that grow with the prompt and that a policy works on, within `devices[...].context`.
        prunable_f16: what those would be in f16.
        faults: decoding keeps sketches of what is evicted.
        cold: where evicted rows go, "memory", "file" or "" (nowhere).
        cold_dir: the folder of the file.
        cold_share: bytes of an evicted row in the cold store, over those that it has in the cache.
        cold_limit: of the bytes there; None: none.
    """

    devices: tuple[Device, ...]
    n_ctx: int
    n_tokens: int
    n_ctx_train: int
    n_layers: int
    n_vocab: int
    policy: Policy
    evicts: bool
    prunable: int
    prunable_f16: int
    faults: bool
    cold: str
    cold_dir: Path | None
    cold_share: float
    cold_limit: int | None

    @property
    def host(self) -> Device:
        return self.devices[-1]

    @property
    def context(self) -> int:
        """Bytes, on all devices."""
        return sum(device.context for device in self.devices)

    @property
    def compute(self) -> int:
        """Bytes of compute buffers as reserved, on all devices."""
        return sum(device.compute for device in self.devices)

    def with_cache(self, prunable: int) -> Needs:
        """The same with so many bytes of K and V in the part of the cache that a policy works on."""
        less, context = self.prunable - prunable, max(self.context, 1)
        devices = (replace(d, context=d.context - round(less * d.context / context)) for d in self.devices)
        return replace(self, devices=tuple(devices), prunable=prunable)

    def kept(self) -> tuple[float, float] | None:
        """The share of the rows of K and V that stays after the longest prompt, from ... to; None: it is not known.

        A policy with a fixed budget says what it keeps. The default keeps what the text needs: these are the shares
        that were measured.
        """
        budget = getattr(self.policy, "budget", None)
        if budget is not None:
            share = min(budget if budget <= 1 else budget / self.n_tokens, 1.0)
            return share, share
        if not self.evicts:
            return 1.0, 1.0
        return _KEPT_BY_DEFAULT if self.policy == ReFreeKV() else None

    def settled(self, share: float) -> Needs:
        """After a pruning of the longest prompt that left this share of the rows of K and V."""
        sketches = _SKETCH_SHARE * (1 - share) * self.prunable_f16 if self.faults else 0.0
        return self.with_cache(round(share * self.prunable + sketches))

    def cold_bytes(self, share: float) -> int:
        """In the cold store, after such a pruning."""
        if not self.cold:
            return 0
        n_bytes = round((1 - share) * self.prunable * self.cold_share)
        return n_bytes if self.cold_limit is None else min(n_bytes, self.cold_limit)


class Unallocated(Llama):
    """A `Llama` that can tell what it would take: model and context are there, their memory is not. It cannot read.

    llama-cpp-python turns options into fields of `model_params` as it does for every model; here that says "no memory"
    whenever it is looked at.
    """

    asked: Mapping[str, Any] = MappingProxyType({})
    """The options that `opened` got."""

    @property
    def model_params(self) -> Any:
        params = self.__dict__["model_params"]
        params.no_alloc = True
        params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
        return params

    @model_params.setter
    def model_params(self, params: Any) -> None:
        self.__dict__["model_params"] = params


def check_model(model_path: str | os.PathLike[str]) -> str:
    """
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no GGUF file.
    """
    path = os.fspath(model_path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path}: not a GGUF file")
    return path


@contextmanager
def opened(model_path: str | os.PathLike[str], **options: Any) -> Iterator[Unallocated]:
    """The model without memory, and with a short context; `measure` makes those that are asked for.

    Args:
        model_path: a GGUF file.
        **options: those of `Llama`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no GGUF file, or llama.cpp cannot load it.
        PolicyError, TypeError: an option is not valid.
        UnsupportedModelError: the model cannot have this policy.
    """
    path = check_model(model_path)
    # no context of n_ctx yet: llama-cpp-python makes a batch for it
    short = max(_LEAST_CONTEXT, options.get("n_batch", 0))
    # LoRA adapters are small, and would be read
    plain = {**options, "n_ctx": short, "verbose": False, "lora_path": None}
    with _quiet() as errors:
        try:
            llm = Unallocated(path, **plain)
        except (PolicyError, UnsupportedModelError):
            raise
        except ValueError as error:
            raise ValueError(f"{path}: llama.cpp cannot load it: {errors[0] if errors else error}") from error
    with closing(llm):
        llm.asked = options
        yield llm


@contextmanager
def _quiet() -> Iterator[list[str]]:
    """llama.cpp prints nothing inside; its errors come here."""
    errors: list[str] = []

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def collect(level: int, text: bytes, _: Any) -> None:
        if level == _LOG_LEVEL_ERROR:
            errors.append(text.decode(errors="replace").strip().removeprefix("llama_model_load: "))

    before, data = llama_cpp.llama_log_callback(), c_void_p()
    llama_cpp.llama_log_get(byref(before), byref(data))
    llama_cpp.llama_log_set(collect, c_void_p(0))
    try:
        yield errors
    finally:
        llama_cpp.llama_log_set(before, data)


@contextmanager
def _context(llm: Unallocated, n_ctx: int) -> Iterator[Any]:
    """A context of n_ctx tokens, as the options ask for it."""
    params = type(llm.context_params).from_buffer_copy(llm.context_params)
    params.n_ctx = n_ctx
    params.n_batch = min(n_ctx, params.n_batch)
    params.n_ubatch = min(params.n_batch, params.n_ubatch)
    with _quiet() as errors:
        try:
            with native.next_context(llm._native_params()):
                context = LlamaContext(model=llm._model, params=params, verbose=False)
        except ValueError as error:
            why = native.last_error() or (errors[0] if errors else str(error))
            raise ValueError(f"{llm.model_path}: there is no context of {n_ctx} tokens: {why}") from error
        try:
            yield context.ctx
        finally:
            context.close()


def measure(llm: Unallocated, n_ctx: int, n_tokens: int | None = None) -> Needs:
    """What a context of n_ctx tokens needs.

    Args:
        n_ctx: 0: as many as the model was made for.
        n_tokens: of the longest prompt that is read into it. Default: n_ctx.

    Raises:
        ValueError: the model has no such context.
    """
    n_ctx_train = llm._model.n_ctx_train()
    with _context(llm, n_ctx or n_ctx_train) as ctx:
        devices = [_device(info) for info in native.devices(ctx)]
        stats = native.stats(ctx)
        groups = [native.group(ctx, i) for i in range(stats.n_group)]
        n_cells = int(llama_cpp.llama_n_ctx(ctx))
        row_bytes = sum(group.row_bytes for group in groups)
        row_numbers = sum(2 * group.n_head_kv * group.n_embd_head for group in groups)
    needs = Needs(
        devices=_with_weights(llm, devices),
        n_ctx=n_cells,
        n_tokens=n_cells if n_tokens is None else min(n_tokens, n_cells),
        n_ctx_train=n_ctx_train,
        n_layers=llama_cpp.llama_model_n_layer(llm.model) + 1,
        n_vocab=llm.n_vocab(),
        policy=llm.kv_policy,
        evicts=llm._evicts,
        prunable=row_bytes * n_cells,
        prunable_f16=row_numbers * 2 * n_cells,
        faults=stats.fault_mass > 0,
        cold={native.enum_value("COLD_MEMORY"): "memory", native.enum_value("COLD_FILE"): "file"}.get(stats.cold, ""),
        cold_dir=Path(llm._cold_options["cold_dir"]) if llm._cold_options.get("cold_dir") else None,
        cold_share=_cold_share(llm),
        cold_limit=llm.kv_cold_limit,
    )
    if needs.n_tokens < needs.n_ctx:
        needs = _with_prompt(llm, needs)
    if llm.kv_memory_limit is not None:
        needs = needs.with_cache(min(needs.prunable, llm.kv_memory_limit))
    return needs


def _device(info: Any) -> Device:
    return Device(
        name=ffi.string(info.name).decode(),
        description=ffi.string(info.description).decode(errors="replace"),
        is_host=info.is_host,
        free=host_free() if info.is_host else info.bytes_free,
        total=host_total() if info.is_host else info.bytes_total,
        weights=info.bytes_model - info.bytes_repacked,
        repacked=info.bytes_repacked,
        context=info.bytes_context,
        compute=info.bytes_compute,
        compute_used=info.bytes_compute_used,
        work=info.bytes_work,
    )


def _with_weights(llm: Unallocated, devices: list[Device]) -> tuple[Device, ...]:
    """A file that is mapped is in memory as it is, with those weights, too, that are there as a repacked copy."""
    *others, host = devices
    if (adapter := llm.asked.get("lora_path")) is not None:
        host = replace(host, weights=host.weights + os.path.getsize(adapter))
    elif llm.asked.get("use_mmap", True):
        in_file = llama_cpp.llama_model_size(llm.model) - sum(device.weights for device in others)
        host = replace(host, weights=max(host.weights, min(in_file, host.weights + host.repacked)))
    if llm._logits_all:
        host = replace(host, compute_used=host.compute)
    return (*others, host)


def _with_prompt(llm: Unallocated, needs: Needs) -> Needs:
    """Graphs are no larger than the prompt needs them, and neither is a cache that grows with it."""
    n_tokens = needs.n_tokens
    n_ubatch = llm.context_params.n_ubatch
    with _context(llm, max(n_tokens // n_ubatch, 1) * n_ubatch) as ctx:  # the last whole batch has the largest graph
        graphs = [_device(info) for info in native.devices(ctx)]
    if llm._logits_all:
        graphs = [replace(device, compute_used=device.compute) for device in graphs]
    pairs = zip(needs.devices, graphs, strict=True)
    devices = (replace(device, compute_used=graph.compute_used, work=graph.work) for device, graph in pairs)
    n_cells = -(-n_tokens // _CONTEXT_STEP) * _CONTEXT_STEP
    needs = replace(needs, devices=tuple(devices), prunable_f16=needs.prunable_f16 * n_cells // needs.n_ctx)
    return needs.with_cache(needs.prunable * n_cells // needs.n_ctx) if llm.kv_elastic else needs


def _cold_share(llm: Unallocated) -> float:
    """Of cold rows that are rounded to q8_0: 34 bytes for 32 numbers. Those of a quantised cache stay as they are."""
    if llm.kv_cold_type is None:
        return 1.0
    sizes = {CACHE_TYPES["f32"]: 4.0, CACHE_TYPES["f16"]: 2.0, CACHE_TYPES["bf16"]: 2.0}
    types = llm.context_params.type_k, llm.context_params.type_v
    here = [sizes.get(kind) for kind in types]
    return sum(1.0 if size is None else 34 / 32 / size for size in here) / len(here)


def host_total() -> int:
    """Bytes of memory that the machine has, or that the container gives to its processes."""
    limit = _container()
    total = int(psutil.virtual_memory().total)
    return total if limit is None else min(total, limit[0])


def host_free() -> int:
    """Bytes of memory that this process could still take without others having to give up theirs."""
    limit = _container()
    free = int(psutil.virtual_memory().available)
    return free if limit is None else min(free, limit[1])


def _container() -> tuple[int, int] | None:
    """The limit of a control group on memory and what is free of it; None: there is none."""
    for folder, limit_name, used_name in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            limit, used = (int(Path(folder, name).read_text()) for name in (limit_name, used_name))
            statistics = Path(folder, "memory.stat").read_text().split()
        except (OSError, ValueError):  # no control groups, or "max": no limit
            continue
        # pages of files can be given back
        cached = dict(zip(statistics[::2], statistics[1::2], strict=False)).get("inactive_file", "0")
        return limit, max(limit - used + int(cached), 0)
    return None


def _margin(free: int) -> int:
    """What stays free: room for what is not counted (a GPU backend's own memory, other programs)."""
    return min(2**30, free // 8)


def excess(device: Device) -> int:
    """Bytes that a device lacks, with some left free; 0 or less: it all fits."""
    return device.bytes + _margin(device.free) - device.free


def fits(needs: Needs) -> bool:
    return all(device.bytes == 0 or excess(device) <= 0 for device in needs.devices)


def largest_n_ctx(llm: Unallocated, most: int) -> int:
    """The longest context that fits now, a multiple of 256 tokens from 512 on, or `most`; 0: not even 512 fit.

    `most` may be less than 512.
    """
    if fits(measure(llm, most)):
        return most
    steps = range(_LEAST_CONTEXT // _CONTEXT_STEP, most // _CONTEXT_STEP)
    n = _last(steps, lambda step: fits(measure(llm, step * _CONTEXT_STEP)))
    return 0 if n is None else n * _CONTEXT_STEP


def _last(steps: range, holds: Callable[[int], bool]) -> int | None:
    """The last step for which it holds; it holds for none after one for which it does not. None: for none."""
    low, high = steps.start - 1, max(steps.start, steps.stop)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return None if low < steps.start else low


def n_ctx(model_path: str | os.PathLike[str], **options: Any) -> int:
    """The tokens of context that fit into memory now: a multiple of 256, at least 512, at most 32768 and what the model
    was made for.

    With a policy, the cache counts as full (or as `kv_memory_limit` allows it), which it is while a prompt is read.

    Args:
        model_path: a GGUF file.
        **options: those of `Llama`; n_ctx is ignored. Without n_gpu_layers, they are those of `gpu_layers`.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is no GGUF file.
        PolicyError, TypeError: an option is not valid.
        UnsupportedModelError: the model cannot have this policy.
    """
    check_model(model_path)
    options = {name: value for name, value in options.items() if name != "n_ctx"}
    most = MOST_CONTEXT
    try:
        if "n_gpu_layers" not in options:
            options["n_gpu_layers"] = gpu_layers(model_path, **options)
        with opened(model_path, **options) as llm:
            n_train = llm._model.n_ctx_train()
            most = max(min(n_train, most) // _CONTEXT_STEP * _CONTEXT_STEP, _CONTEXT_STEP)
            if found := largest_n_ctx(llm, most):
                return found
        least = min(_LEAST_CONTEXT, most)
        _logger.warning("%s: not even a context of %d tokens fits into free memory", model_path, least)
        return least
    except (PolicyError, TypeError, UnsupportedModelError):
        raise
    except Exception as error:
        _logger.warning("what fits into memory is not known, the context is %d tokens: %s", most, error)
        return most


def gpu_layers(model_path: str | os.PathLike[str], **options: Any) -> int:
    """As many layers as fit into the free memory of the GPUs, as `n_gpu_layers` counts them: -1 is all of them, 0 none.

    Args:
        model_path: a GGUF file.
        **options: those of `Llama`; n_gpu_layers is ignored. Without n_ctx, there is to be room for 8192 tokens beside
            the layers, or as many as the model was made for.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is no GGUF file.
        PolicyError, TypeError: an option is not valid.
        UnsupportedModelError: the model cannot have this policy.
    """
    check_model(model_path)
    if not llama_cpp.llama_supports_gpu_offload():
        return 0
    try:
        needs = _measured(model_path, -1, options)
        if _excess_of_gpus(needs) <= 0:
            return -1
        return _search_layers(needs, lambda n: _excess_of_gpus(_measured(model_path, n, options)))
    except (PolicyError, TypeError, UnsupportedModelError):
        raise
    except Exception as error:
        _logger.warning("what fits into the GPU's memory is not known, no layers go there: %s", error)
        return 0


def _measured(model_path: str | os.PathLike[str], n_gpu_layers: int, options: Mapping[str, Any]) -> Needs:
    with opened(model_path, **{**options, "n_gpu_layers": n_gpu_layers}) as llm:
        n_ctx = options.get("n_ctx")
        return measure(llm, min(llm._model.n_ctx_train(), _LAYERS_CONTEXT) if n_ctx is None else n_ctx)


def _excess_of_gpus(needs: Needs) -> int:
    """Bytes that the fullest of them lacks; 0 or less: all fits."""
    return max((excess(device) for device in needs.devices if not device.is_host), default=0)


def _search_layers(all_layers: Needs, excess_with: Callable[[int], int]) -> int:
    """The most layers with which `excess_with` is not above 0; with all of them it is.

    Each look loads the model's metadata anew, so the next number is where the line between two looks crosses 0.
    """
    low, high = 0, all_layers.n_layers
    slack, over = sum(d.free - _margin(d.free) for d in all_layers.devices[:-1]), _excess_of_gpus(all_layers)
    n_looks = 0
    while high - low > 1:
        share = slack / (slack + over) if n_looks < 4 and slack + over > 0 else 0.5
        n = min(max(low + int(share * (high - low)), low + 1), high - 1)
        found = excess_with(n)
        n_looks += 1
        if found <= 0:
            low, slack = n, -found
        else:
            high, over = n, found
    return low


def resident_bytes() -> int:
    """What this process has in memory now."""
    return int(psutil.Process().memory_info().rss)


def base_bytes(model_path: str | os.PathLike[str], n_ctx: int) -> int:
    """What a process takes that has the model but neither its weights nor a cache: Python, the libraries, the
    vocabulary. Measured in a process of its own.

    Raises:
        ValueError: it failed.
    """
    spec = json.dumps({"model_path": os.fspath(model_path), "n_ctx": n_ctx})
    done = subprocess.run([sys.executable, "-m", __name__, spec], capture_output=True, text=True)
    if done.returncode != 0:
        raise ValueError(f"{model_path}: {(done.stderr.strip() or 'the process failed').splitlines()[-1]}")
    return int(done.stdout)


def process_bytes(needs: Needs, base: int) -> int:
    """What the process has in memory (RSS) once its longest prompt has been read. `base`: what `base_bytes` says."""
    cold = needs.cold_bytes(0.0) if needs.cold == "memory" else 0
    return base + needs.host.bytes + cold + _FIRST_PROMPT_BYTES + _FIRST_PROMPT_BYTES_PER_WORD * needs.n_vocab


def _main(text: str) -> None:
    with _quiet(), closing(Unallocated(**json.loads(text), verbose=False)):
        print(resident_bytes())


if __name__ == "__main__":
    _main(sys.argv[1])
