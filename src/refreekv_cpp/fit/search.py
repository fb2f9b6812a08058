"""The context and the layers on GPUs that fit into the memory that is free now."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import llama_cpp

from refreekv_cpp import _upstream
from refreekv_cpp.fit.needs import CONTEXT_STEP, Device, Needs, measure, process_bytes
from refreekv_cpp.fit.unallocated import Unallocated, check_model, opened

_logger = logging.getLogger(__name__)

MOST_CONTEXT = 32768
"""The longest context that is chosen without being asked for, in tokens."""

_LEAST_CONTEXT = 512
_LAYERS_CONTEXT = 8192  # that is to fit beside the layers on the GPU, where nobody says which context is wanted


def _margin(free: int) -> int:
    """What stays free: room for what is not counted (a GPU backend's own memory, other programs)."""
    return min(2**30, free // 8)


def needed_bytes(needs: Needs, device: Device, base: int = 0) -> int:
    """What is taken of a device's memory at most. A cold store in memory fills while the cache is still there.

    base: of the host's, what `base_bytes` says; 0 for the process that asks, which has taken that already.
    """
    if not device.is_host:
        return device.bytes
    cold = needs.settled(0.0).cold_bytes - needs.cold_bytes if needs.cold == "memory" else 0
    return process_bytes(needs, base) + cold


def missing_bytes(needs: Needs, device: Device, base: int = 0) -> int:
    """Bytes that a device lacks, with some left free; 0 or less: it all fits."""
    needed = needed_bytes(needs, device, base)
    return needed + _margin(device.free) - device.free if needed else 0


def fits(needs: Needs, base: int = 0) -> bool:
    """Whether all devices have enough memory free. base: as of `needed_bytes`."""
    return all(missing_bytes(needs, device, base) <= 0 for device in needs.devices)


def largest_n_ctx(llm: Unallocated, most: int, base: int = 0) -> int:
    """The longest context that fits now, a multiple of 256 tokens from 512 on, or `most`; 0: not even 512 fit.

    Args:
        most: may be less than 512.
        base: as of `needed_bytes`.
    """
    if fits(measure(llm, most), base):
        return most
    steps = range(_LEAST_CONTEXT // CONTEXT_STEP, most // CONTEXT_STEP)
    n = _last(steps, lambda step: fits(measure(llm, step * CONTEXT_STEP), base))
    return 0 if n is None else n * CONTEXT_STEP


def _last(steps: range, holds: Callable[[int], bool]) -> int | None:
    """The last step for which it holds; it holds for none after one for which it does not. None: for none."""
    low, high = steps.start - 1, max(steps.start, steps.stop)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return None if low < steps.start else low


def n_ctx(model_path: str | os.PathLike[str], **options: Any) -> int:
    """The longest context, in tokens, that fits into memory now: a multiple of 256, at least 512, at most 32768 and
    what the model was made for.

    With a policy, the cache is counted at full size (or at `kv_memory_limit`), which it has while a prompt is read.

    Args:
        model_path: a GGUF file.
        **options: those of `Llama`; n_ctx is ignored. The default of n_gpu_layers is what `gpu_layers` returns.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no GGUF file, or llama.cpp cannot load it.
        PolicyError, TypeError: an option is not valid.
        UnsupportedModelError: the model cannot have this policy.
    """
    options = {name: value for name, value in options.items() if name != "n_ctx"}
    if "n_gpu_layers" not in options:
        options["n_gpu_layers"] = gpu_layers(model_path, **options)
    with opened(model_path, **options) as llm:
        n_train = _upstream.n_ctx_train(llm)
        most = max(min(n_train, MOST_CONTEXT) // CONTEXT_STEP * CONTEXT_STEP, CONTEXT_STEP)
        try:
            chosen = largest_n_ctx(llm, most)
        except Exception as error:
            _logger.warning("what fits into memory is not known, the context is %d tokens: %s", most, error)
            return most
    if not chosen:
        chosen = min(_LEAST_CONTEXT, most)
        _logger.warning("%s: not even a context of %d tokens fits into free memory", model_path, chosen)
    if chosen < n_train:
        _logger.info("context: %d of the model's %d tokens (--n-ctx)", chosen, n_train)
    return chosen


def n_ctx_train(model_path: str | os.PathLike[str]) -> int:
    """Tokens of context that a model was made for.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no GGUF file, or llama.cpp cannot load it.
    """
    with opened(model_path) as llm:
        return _upstream.n_ctx_train(llm)


class _UnknownError(Exception):
    """The accounting failed."""


def gpu_layers(model_path: str | os.PathLike[str], **options: Any) -> int:
    """How many layers fit into the free memory of the GPUs, for the option `n_gpu_layers`: -1 is all layers, 0 is none.

    Args:
        model_path: a GGUF file.
        **options: those of `Llama`; n_gpu_layers is ignored. The default of n_ctx is 8192 tokens, or as many as the
            model was made for.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no GGUF file, or llama.cpp cannot load it.
        PolicyError, TypeError: an option is not valid.
        UnsupportedModelError: the model cannot have this policy.
    """
    check_model(model_path)
    if not llama_cpp.llama_supports_gpu_offload():
        return 0
    try:
        needs = _measured(model_path, -1, options)
        if _missing_on_gpus(needs) <= 0:
            return -1
        return _search_layers(needs, lambda n: _missing_on_gpus(_measured(model_path, n, options)))
    except _UnknownError as error:
        _logger.warning("what fits into the GPU's memory is not known, no layers go there: %s", error)
        return 0


def chosen_layers(asked: str | int, model_path: str | os.PathLike[str], **options: Any) -> int:
    """The `n_gpu_layers` that a user asks for: a number, "all", or "auto" (see `gpu_layers`). It is logged.

    Raises: as `gpu_layers`.
    """
    has_gpu = llama_cpp.llama_supports_gpu_offload()
    if asked == "auto":
        n_layers = gpu_layers(model_path, **options)
        why = "as many as fit" if has_gpu else "this build has no GPU backend"
        _logger.info("GPU layers: %s (%s)", "all" if n_layers < 0 else n_layers, why)
        return n_layers
    if asked not in (0, "0") and not has_gpu:
        _logger.info("--gpu-layers %s: this build has no GPU backend, the CPU computes all", asked)
    return layers_number(asked)


def layers_number(asked: str | int) -> int:
    """As `n_gpu_layers` has it: of a number or "all"."""
    return -1 if asked == "all" else int(asked)


def _measured(model_path: str | os.PathLike[str], n_gpu_layers: int, options: Mapping[str, Any]) -> Needs:
    with opened(model_path, **{**options, "n_gpu_layers": n_gpu_layers}) as llm:
        n_ctx = options.get("n_ctx")
        try:
            return measure(llm, min(_upstream.n_ctx_train(llm), _LAYERS_CONTEXT) if n_ctx is None else n_ctx)
        except Exception as error:
            raise _UnknownError(error) from error


def _missing_on_gpus(needs: Needs) -> int:
    """Bytes that the fullest of them lacks; 0 or less: all fits."""
    return max((missing_bytes(needs, device) for device in needs.devices if not device.is_host), default=0)


def _search_layers(all_layers: Needs, missing_with: Callable[[int], int]) -> int:
    """The most layers with which `missing_with` is not above 0; with all of them it is.

    Each look loads the model's metadata anew, so the next number is where the line between two looks crosses 0.
    """
    low, high = 0, all_layers.n_layers
    slack, over = sum(d.free - _margin(d.free) for d in all_layers.devices[:-1]), _missing_on_gpus(all_layers)
    n_looks = 0
    while high - low > 1:
        share = slack / (slack + over) if n_looks < 4 and slack + over > 0 else 0.5
        n = min(max(low + int(share * (high - low)), low + 1), high - 1)
        found = missing_with(n)
        n_looks += 1
        if found <= 0:
            low, slack = n, -found
        else:
            high, over = n, found
    return low
