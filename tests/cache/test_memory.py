"""Memory follows what the cache holds, and running out of it costs nothing but the call."""

from __future__ import annotations

from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from support import Sequences, ctx_of, feed, kept, load
from tiny import TinyModel, random_tokens

from refreekv_cpp import CacheMemoryError, Llama, PolicyError, ReFreeKV, Streaming, native
from refreekv_cpp._units import parse_bytes

N_PROMPT = 1500
BLOCK = 256


@pytest.fixture
def prompt() -> list[int]:
    return np.random.default_rng(3).integers(3, 259, N_PROMPT).tolist()


def blocks(n_tokens: int) -> int:
    return -(-n_tokens // BLOCK)


@pytest.mark.parametrize("flash_attn", [False, True])
def test_an_elastic_full_cache_answers_as_upstreams(tiny_model: Path, prompt: list[int], flash_attn: bool) -> None:
    logits = []
    for elastic in (False, True):
        llm = load(tiny_model, "full", kv_elastic=elastic, flash_attn=flash_attn)
        llm.eval(prompt)
        logits.append(feed(llm, prompt[:40]))
    np.testing.assert_array_equal(*logits)


def test_bytes_follow_the_contents(tiny_model: Path, prompt: list[int]) -> None:
    llm = load(tiny_model, "full", kv_elastic=True)
    assert llm.kv_stats.bytes == 0
    for n in (1, 255, 256, 257, 1000):
        llm.reset()
        llm.eval(prompt[:n])
        stats = llm.kv_stats
        assert blocks(n) * BLOCK <= stats.cells_capacity[0] < 2 * blocks(n) * BLOCK
        assert stats.bytes >= sum(stats.cells_capacity) * stats.bytes_per_token // len(stats.cells_capacity)


def test_expected_tokens_get_their_room_at_once(tiny_model: Path, prompt: list[int]) -> None:
    sequences = Sequences(tiny_model, Streaming())
    native.expect(sequences.ctx, len(prompt))
    sequences.read_together({0: prompt[:512]})
    first = native.stats(sequences.ctx).bytes
    sequences.read_together({0: prompt[512:1024]})
    sequences.read_together({0: prompt[1024:]})
    assert first == native.stats(sequences.ctx).bytes
    assert native.layer(sequences.ctx, 0).n_capacity == blocks(N_PROMPT) * BLOCK

    # they have come: what is read now grows by what it needs
    sequences.read_together({0: prompt[:500]})
    assert native.layer(sequences.ctx, 0).n_capacity == blocks(N_PROMPT + 500) * BLOCK


def test_what_was_expected_and_did_not_come_is_given_back(tiny_model: Path, prompt: list[int]) -> None:
    sequences = Sequences(tiny_model, Streaming())
    native.expect(sequences.ctx, 4000)
    sequences.read_together({0: prompt[:100]})
    assert native.layer(sequences.ctx, 0).n_capacity == 4096
    native.expect(sequences.ctx, 0)
    sequences.read_together({0: prompt[:1]})
    assert native.layer(sequences.ctx, 0).n_capacity == BLOCK

    native.expect(sequences.ctx, 4000)
    llama_cpp.llama_memory_clear(sequences.memory, True)
    sequences.read_together({0: prompt[:1]})
    assert native.layer(sequences.ctx, 0).n_capacity == BLOCK


def test_a_pruned_cache_has_no_more_than_a_block_to_spare(tiny_model: Path, prompt: list[int]) -> None:
    llm = load(tiny_model, "refreekv")
    llm.eval(prompt)
    before = llm.kv_stats
    assert llm.prune_kv() > 0
    after = llm.kv_stats
    assert after.cells_capacity == tuple(blocks(n) * BLOCK for n in after.cells_kept)
    assert after.bytes_freed == before.bytes - after.bytes > 0


@pytest.mark.parametrize("kv_policy", ["full", "refreekv"])
def test_bytes_are_the_allocators(tiny_model: Path, prompt: list[int], kv_policy: str) -> None:
    """... and upstream's memory breakdown has the same: K, V and the query rings."""
    llm = load(tiny_model, kv_policy)
    for _ in range(2):
        stats = llm.kv_stats
        assert sum(buffer.context for buffer in stats.buffers) == stats.bytes + stats.bytes_ring + stats.bytes_other
        assert sum(buffer.model for buffer in stats.buffers) > 0
        assert sum(buffer.compute for buffer in stats.buffers) > 0
        llm.eval(prompt[:1000])
        llm.prune_kv()


def test_buffers_stay_what_they_were(tiny_model: Path) -> None:
    """They were views of an array that was freed by then."""
    llm = load(tiny_model, "refreekv")
    found = native.buffers(ctx_of(llm))
    others = [native.ffi.new("struct refreekv_buffer_info[]", 64) for _ in range(16)]  # in the same place, zero
    assert sum(info.bytes_model for _, info in found) > 0
    del others


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's peak of the resident memory")
def test_the_scratch_memory_of_a_pruning_is_bounded(tmp_path: Path) -> None:
    """It was the peak of a process: the weights of a layer's whole attention to the window took 62 MiB here."""
    TinyModel(n_layer=2, n_head=16).write(tmp_path / "model.gguf")
    llm = load(tmp_path / "model.gguf", ReFreeKV(n_window=256), n_ctx=4096)
    llm.eval(random_tokens(4000))

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    before = status("VmRSS")
    assert llm.prune_kv() > 0
    assert status("VmHWM") - before < 32 * 2**20


def test_a_shorter_conversation_gives_memory_back(tiny_model: Path, prompt: list[int]) -> None:
    llm = load(tiny_model, "refreekv")
    llm.eval(prompt)
    long = llm.kv_stats.bytes
    llm.reset()
    llm.eval(prompt[:100])
    assert llm.kv_stats.bytes < long / 4


@pytest.mark.parametrize("kv_policy", ["full", "refreekv"])
def test_an_allocation_that_fails_costs_nothing_but_the_call(
    tiny_model: Path, prompt: list[int], kv_policy: str
) -> None:
    """... at every allocation of a run, one after the other."""
    expected = None
    for n in range(200):
        llm = load(tiny_model, kv_policy, kv_elastic=True)
        native.fail_allocation(n)
        try:
            failed = False
            for i in range(0, len(prompt), 500):
                try:
                    llm.eval(prompt[i : i + 500])
                except CacheMemoryError:
                    failed = True
                    native.fail_allocation(0)
                    assert llm.n_tokens == i
                    llm.eval(prompt[i : i + 500])
            try:
                llm.prune_kv()
            except CacheMemoryError:
                failed = True
                native.fail_allocation(0)
                llm.prune_kv()
        finally:
            native.fail_allocation(0)
        logits = feed(llm, prompt[:4])
        if expected is None:
            expected, expected_kept = logits, kept(llm)
        elif not failed:
            return
        # a layer that was pruned before the failure is judged once more, on what is left of it
        if kept(llm) == expected_kept:
            np.testing.assert_allclose(logits, expected, atol=1e-4)
    pytest.fail("an allocation fails in every run")


def test_a_limit_refuses_what_cannot_fit_before_any_work(tiny_model: Path, prompt: list[int]) -> None:
    llm = load(tiny_model, "full", kv_elastic=True, kv_memory_limit="200KiB")
    with pytest.raises(CacheMemoryError, match="kv_memory_limit is 204800"):
        llm.eval(prompt)
    assert llm.n_tokens == 0
    llm.eval(prompt[:50])


def test_a_limit_prunes_while_the_prompt_is_read(tiny_model: Path, prompt: list[int]) -> None:
    unlimited = load(tiny_model, "refreekv", n_batch=256)
    unlimited.eval(prompt)
    limit = unlimited.kv_stats.bytes * 7 // 10

    llm = load(tiny_model, "refreekv", n_batch=256, kv_memory_limit=limit)
    llm.eval(prompt)
    assert llm.n_tokens == len(prompt)
    assert llm.kv_stats.n_limit_prunes > 0
    assert llm.kv_stats.bytes <= limit


def test_a_limit_too_small_for_the_policy_is_an_error(tiny_model: Path, prompt: list[int]) -> None:
    llm = load(tiny_model, ReFreeKV(threshold=0), n_batch=256, kv_memory_limit="300KiB")
    with pytest.raises(CacheMemoryError, match="the limit is 307200"):
        llm.eval(prompt)
    assert 0 < llm.n_tokens < len(prompt)
    assert native.stats(ctx_of(llm)).n_tokens == llm.n_tokens


def test_what_does_not_go_together_is_refused(tiny_model: Path) -> None:
    with pytest.raises(PolicyError, match="kv_elastic=True"):
        Llama(str(tiny_model), kv_memory_limit="1GiB")
    with pytest.raises(PolicyError, match="kv_elastic=False"):
        Llama(str(tiny_model), kv_policy="refreekv", kv_elastic=False)


@pytest.mark.parametrize(("text", "n_bytes"), [("512MiB", 2**29), ("1.5 GB", 1_500_000_000), (4096, 4096), ("7", 7)])
def test_sizes(text: int | str, n_bytes: int) -> None:
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize("text", ["", "much", "-1", 0, "5 TiB", "1.2.3 MB"])
def test_what_is_no_size(text: int | str) -> None:
    with pytest.raises(PolicyError, match="512MiB"):
        parse_bytes(text)
