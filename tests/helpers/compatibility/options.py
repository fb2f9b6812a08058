"""Options of the context: types of the cache, flash attention, batches, where things are computed."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
from policies import Debug
from support import CACHE_TYPES, feed
from tiny import random_tokens

from compatibility.check import PROMPT, Refused, Run, check
from refreekv_cpp import Full, Policy, ReFreeKV, UnsupportedModelError

MORE = random_tokens(17, seed=1)[1:]
RULE = ReFreeKV(n_min=0, threshold=0.5, n_pool=31, theta=0)


def decoded(run: Run, model: str, policy: Policy, **options: Any) -> npt.NDArray[np.float32]:
    """Logits after each of MORE, which follow the prompt and its pruning: [n, n_vocab]."""
    llm = run.load(model, policy=policy, **options)
    llm.eval(PROMPT)
    llm.prune_kv()
    res = feed(llm, MORE)
    llm.close()
    return res


def assert_right(run: Run, model: str = "gqa", *, tolerance: float = 3e-3, **options: Any) -> None:
    """The logits after a prompt, against other ways to the same.

    full: in whatever batches the prompt was read; and a cache that grows with its contents has the same bits.
    Evicting: with nothing to evict, the logits of full but for the rounding of our kernel; else the logits of
    a cache in which what was evicted is masked in place, and not those of full; so this has no codes of it.

    Raises:
        Refused: the model or the context could not be made.
    """
    try:
        run.load(model, **options).close()
    except ValueError as refusal:
        raise Refused(f"{type(refusal).__name__}: {refusal}") from refusal
    # without flash attention, where upstream's sums are the more exact ones, unless a check is about it
    options = {"flash_attn": False, **options}
    upstream = decoded(run, model, Full(), **options)
    if run.evicts:
        whole = ReFreeKV(n_min=len(PROMPT) + 1, theta=0)
        assert error(decoded(run, model, whole, **options), upstream) < 5 * tolerance
        pruned = decoded(run, model, RULE, **options)
        masked = decoded(run, model, Debug(policy=RULE, mask_only=True), **options)
        assert error(pruned, masked) < tolerance
        assert error(pruned, upstream) > 5 * tolerance
    else:
        in_batches = decoded(run, model, Full(), **{**options, "n_batch": 90, "n_ubatch": 30})
        assert error(in_batches, upstream) < 5 * tolerance
        with suppress(UnsupportedModelError):
            np.testing.assert_array_equal(decoded(run, model, Full(), kv_elastic=True, **options), upstream)


def error(actual: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    return float(np.abs(actual - expected).max() / expected.std())


def register(feature: str, model: str = "mha64", **options: Any) -> None:
    @check(feature)
    def context_option(run: Run) -> None:
        assert_right(run, model, **options)


for flash_attn in (False, True):
    attention = "flash attention" if flash_attn else "no flash attention"
    for name, kind in CACHE_TYPES.items():
        register(f"type_k = type_v = {name}, {attention}", type_k=kind, type_v=kind, flash_attn=flash_attn)
for k, v, flash_attn in (("q8_0", "f16", False), ("q8_0", "q4_0", True), ("f16", "q8_0", True), ("f32", "f16", False)):
    attention = "flash attention" if flash_attn else "no flash attention"
    register(
        f"type_k = {k}, type_v = {v}, {attention}",
        type_k=CACHE_TYPES[k],
        type_v=CACHE_TYPES[v],
        flash_attn=flash_attn,
    )
for value in (False, True):
    register(f"offload_kqv={value}", offload_kqv=value)
    register(f"op_offload={value}", op_offload=value)
    register(f"swa_full={value} (sliding window)", "gemma3 (sliding window)", swa_full=value)
for n_batch, n_ubatch in ((1, 1), (7, 3), (512, 64), (512, 512), (2048, 512), (2048, 2048)):
    register(f"n_batch={n_batch}, n_ubatch={n_ubatch}", n_batch=n_batch, n_ubatch=n_ubatch)
register("rope_freq_base, rope_freq_scale", rope_freq_base=50000.0, rope_freq_scale=0.5)
register("use_mmap=False", use_mmap=False)
register("n_threads=2", n_threads=2, n_threads_batch=2)
register("no_perf=True", no_perf=True)
