"""`refreekv_cpp.Llama`: what llama-cpp-python's surface does with a cache that is pruned."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path
from typing import Any

import llama_cpp
import llama_cpp.llama_speculative
import numpy as np
import pytest
from policies import POLICIES, PRESETS
from support import ctx_of, feed, generate, kept, load
from tiny import N_SPECIAL, random_tokens

from refreekv_cpp import (
    H2O,
    CacheStateError,
    Full,
    Llama,
    Policy,
    PolicyError,
    PyramidKV,
    ReFreeKV,
    SnapKV,
    Streaming,
    TopP,
    native,
)
from refreekv_cpp.policies import REGISTRY, as_policy

POLICY = ReFreeKV(n_min=0)
N_PROMPT = 1060
PROMPT = random_tokens(N_PROMPT)
QUESTION = random_tokens(301, seed=2)[1:]


# -- what cannot be asked for ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"kv_policy": "refrekv"}, PolicyError, "did you mean 'refreekv'"),
        ({"kv_policy": "released_code"}, PolicyError, "did you mean 'released-code'"),
        ({"kv_policy": "h3o"}, PolicyError, "did you mean 'h2o'"),
        ({"kv_policy": "xyzzy"}, PolicyError, "must be one of 'full', 'refreekv'"),
        ({"kv_policy": 5}, PolicyError, "kv_policy=5: unknown"),
        (
            {"kv_evicted": "dorp"},
            PolicyError,
            "kv_evicted='dorp': must be one of 'keep', 'restore', 'recompute'",
        ),
        ({"kv_polcy": "refreekv"}, TypeError, "'kv_polcy', did you mean 'kv_policy'"),
        ({"kv_evict": "drop"}, TypeError, "did you mean 'kv_evicted'"),
        ({"n_ctxt": 5}, TypeError, "did you mean 'n_ctx'"),
        ({"xyzzy": 5}, TypeError, "unexpected keyword argument 'xyzzy'; see llama_cpp.Llama"),
        ({"n_ctx": -1}, ValueError, "n_ctx=-1"),
        ({"n_ctx": "4k"}, ValueError, "n_ctx='4k'"),
    ],
    ids=str,
)
def test_unknown_options_name_the_nearest_valid(
    tiny_model: Path, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind) as raised:
        Llama(str(tiny_model), verbose=False, **options)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        (ReFreeKV, {"treshold": 0.5}, "ReFreeKV has no option 'treshold', did you mean 'threshold'"),
        (ReFreeKV, {"xyzzy": 0.5}, "its options are: threshold, ranking"),
        (ReFreeKV.paper, {"n_windw": 3}, "did you mean 'n_window'"),
        (Streaming, {"bugdet": 3}, "did you mean 'budget'"),
        (Full, {"budget": 3}, "Full has no option 'budget'; its options are: none"),
        (ReFreeKV, {"ranking": "scores"}, "ranking='scores': must be one of 'position', 'score'"),
        (ReFreeKV, {"rows": "first"}, "must be one of 'last', 'mean', 'worst'"),
        (ReFreeKV, {"measure": "l1"}, "must be one of 'norm', 'mass'"),
        (ReFreeKV, {"threshold": 1.5}, "threshold=1.5: must be from 0 to 1"),
        (ReFreeKV, {"threshold": float("nan")}, "threshold=nan: must be from 0 to 1"),
        (ReFreeKV, {"mass_floor": -0.1}, "mass_floor=-0.1: must be from 0 to 1"),
        (ReFreeKV, {"n_window": 0}, "n_window=0: must be from 1 to 256"),
        (ReFreeKV, {"n_window": 257}, "n_window=257: must be from 1 to 256"),
        (ReFreeKV, {"n_pool": 30}, "n_pool=30: must be odd"),
        (ReFreeKV, {"n_sink": -1}, "n_sink=-1: must not be negative"),
        (ReFreeKV, {"n_min": -1}, "n_min=-1: must not be negative"),
        (Streaming, {"budget": 0}, "budget=0"),
        (Streaming, {"n_sink": -1}, "n_sink=-1"),
        (SnapKV, {"budget": -0.5}, "budget=-0.5: must be a fraction"),
        (SnapKV, {"budget": float("nan")}, "budget=nan: must be a fraction"),
        (SnapKV, {"budget": "0.5"}, "budget='0.5': must be a number"),
        (SnapKV, {"n_window": 0}, "n_window=0: must be from 1 to 256"),
        (SnapKV, {"n_pool": 6}, "n_pool=6: must be odd"),
        (SnapKV, {"pooling": "avg"}, "pooling='avg': must be one of 'mean', 'max'"),
        (SnapKV, {"n_min": -1}, "n_min=-1: must not be negative"),
        (SnapKV, {"beta": 5}, "SnapKV has no option 'beta'"),
        (PyramidKV, {"beta": 0}, "beta=0: must be 1 or more"),
        (PyramidKV, {"beta": 1.5}, "beta=1.5: must be a number of type int"),
        (ReFreeKV, {"n_hot": 1.5}, "n_hot=1.5: must be a number of type int"),
        (ReFreeKV, {"n_hot": True}, "n_hot=True: must be a number of type int"),
        (ReFreeKV, {"n_hot": -1}, "n_hot=-1: must not be negative"),
        (PyramidKV, {"budget": 0}, "budget=0: must be a fraction"),
        (H2O, {"budget": 0}, "budget=0: must be a fraction"),
        (H2O, {"n_window": 257}, "n_window=257: must be from 1 to 256"),
        (TopP, {"p": 0}, "p=0: must be above 0"),
        (TopP, {"p": 1.01}, "p=1.01: must be above 0"),
        (TopP, {"budget": 0.5}, "TopP has no option 'budget'; its options are: p, n_window, n_min"),
    ],
    ids=lambda value: getattr(value, "__qualname__", None) or str(value),
)
def test_policies_refuse_what_they_cannot_do(policy: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError) as raised:
        policy(**options)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("policy", 9),
        ("ranking", 2),
        ("rows", -1),
        ("measure", 2),
        ("n_window", 257),
        ("n_block", 0),
        ("threshold", 1.1),
        ("pooling", 2),
        ("beta", 0),
        ("top_p", 0),
    ],
)
def test_the_native_side_checks_too(field: str, value: float) -> None:
    params = native.make_params(**{field: value})
    with pytest.raises(PolicyError, match=f"^{field}: "), native.next_context(params):
        pass
    with pytest.raises(PolicyError, match=f"^{field}: "):
        native.select(params, np.ones((1, 1, 8), dtype=np.float32))


@pytest.mark.parametrize("policy", [Streaming(), SnapKV(), H2O(), PyramidKV()], ids=lambda policy: policy.name)
def test_the_native_side_checks_budgets_too(policy: Policy) -> None:
    params = native.make_params(**{**policy.native_options(), "budget": 0})
    with pytest.raises(PolicyError, match=r"^budget: "), native.next_context(params):
        pass


def test_the_native_side_checks_layers() -> None:
    params = native.make_params(**PyramidKV().native_options())
    with pytest.raises(PolicyError, match="i_layer: must be 0 to"):
        native.select(params, np.ones((1, 1, 8), dtype=np.float32), layer=2, n_layer=2)


def test_the_defaults_of_both_sides_agree() -> None:
    defaults = native.make_params()  # where nobody asks for codes
    for field, value in ReFreeKV(theta=0).native_options().items():
        assert getattr(defaults, field) == pytest.approx(value), field


def test_every_name_is_a_policy_and_says_so() -> None:
    for name in REGISTRY:
        assert as_policy(name).name == name
    for name, preset in PRESETS.items():
        assert as_policy(name) == preset
    assert as_policy(POLICY) is POLICY
    assert POLICY.name == "refreekv (own parameters)"


# -- kv_policy="full" --------------------------------------------------------------------------------------------------


def test_full_is_upstreams_cache(tiny_model: Path) -> None:
    llm = load(tiny_model, "full")
    at_load = llm.kv_stats
    assert at_load.bytes == 2048 * 4 * native.layer(ctx_of(llm), 0).row_bytes
    assert (at_load.n_tokens, at_load.budget) == (0, 1)

    llm.eval(PROMPT)
    assert llm.prune_kv() == 0
    stats = llm.kv_stats
    assert stats.policy == "full"
    assert stats.n_tokens == N_PROMPT
    assert stats.cells_kept == (N_PROMPT,) * 4
    assert stats.cells_capacity == (2048,) * 4
    assert stats.budget == 1
    assert stats.bytes == at_load.bytes
    assert stats.bytes_full == stats.bytes * N_PROMPT // 2048
    assert stats.bytes_ring == stats.bytes_freed == stats.n_prunes == stats.prune_ms == 0
    assert stats.n_layouts == 1

    # what only a policy's cache can do
    for call in (
        lambda: native.prune(ctx_of(llm), 0),
        lambda: native.kept(ctx_of(llm), 0, 0),
        lambda: native.keep(ctx_of(llm), 0, 0, np.array([1])),
    ):
        with pytest.raises(CacheStateError, match="this context has no KV policy"):
            call()


def test_embedding_keeps_upstreams_cache(tiny_model: Path) -> None:
    llm = load(tiny_model, POLICY, embedding=True)
    assert llm.kv_policy == Full()
    assert len(llm.embed("a")) > 0


# -- generations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
def test_a_generation_prunes_once_after_its_first_token(tiny_model: Path, name: str) -> None:
    by_hand, llm = (load(tiny_model, POLICIES[name], n_batch=256) for _ in range(2))
    by_hand.eval(PROMPT)
    by_hand.prune_kv()

    generator = llm.generate(PROMPT, temp=0.0)
    first = next(generator)
    assert llm.kv_stats.n_prunes == 0  # once looking at the figures pruned
    second = next(generator)
    assert [[pos for pos in layer if pos < N_PROMPT] for layer in kept(llm)] == kept(by_hand)
    assert [first, second, *itertools.islice(generator, 4)] == generate(by_hand, PROMPT)
    assert llm.kv_stats.n_prunes == 1
    generator.close()


def test_a_generation_that_is_not_run_prunes_nothing(tiny_model: Path) -> None:
    llm = load(tiny_model, POLICY)
    llm.generate(PROMPT)
    llm.eval(PROMPT)
    assert llm.kv_stats.n_prunes == 0


def conversation(llm: Llama) -> list[int]:
    """A first turn, and the prompt of the second that goes on from it."""
    return [*PROMPT, *generate(llm, PROMPT), *QUESTION]


@pytest.mark.parametrize("name", ["refreekv", "paper", "streaming"])
def test_recompute_lets_the_new_question_decide(tiny_model: Path, name: str) -> None:
    llm, fresh = (load(tiny_model, POLICIES[name], kv_evicted="recompute") for _ in range(2))
    tokens = conversation(llm)
    assert generate(llm, tokens) == generate(fresh, tokens)
    assert kept(llm) == kept(fresh)
    assert llm.kv_stats.n_prunes == 2


def test_drop_goes_on_from_what_is_left(tiny_model: Path) -> None:
    llm, by_hand = load(tiny_model, POLICY, kv_evicted="drop"), load(tiny_model, POLICY)
    tokens = conversation(llm)
    after_one_turn = [set(layer) for layer in kept(llm)]
    answer = generate(llm, tokens)
    assert llm.kv_stats.n_prunes == 2
    for before, after in zip(after_one_turn, kept(llm), strict=True):
        assert {pos for pos in after if pos < N_PROMPT} <= before

    # the same by hand; the question is read in one batch, as there
    by_hand.eval(PROMPT)
    by_hand.prune_kv()
    feed(by_hand, tokens[N_PROMPT : N_PROMPT + 5])
    by_hand.eval(tokens[N_PROMPT + 5 :])
    by_hand.prune_kv()
    n_tokens = len(tokens)
    assert kept(by_hand) == [[pos for pos in layer if pos < n_tokens] for layer in kept(llm)]
    assert generate(by_hand, tokens, n=6) == answer


@pytest.mark.parametrize("kv_evicted", ["recompute", "drop"])
def test_a_prompt_that_parts_within_the_pruned_range_is_read_whole(tiny_model: Path, kv_evicted: Any) -> None:
    llm, fresh = load(tiny_model, POLICY, kv_evicted=kv_evicted), load(tiny_model, POLICY)
    conversation(llm)
    tokens = [*PROMPT[:600], *QUESTION]
    assert generate(llm, tokens) == generate(fresh, tokens)
    assert kept(llm) == kept(fresh)


@pytest.mark.parametrize("kv_evicted", ["recompute", "drop"])
def test_a_prompt_that_was_just_read_is_sampled_from_at_once(tiny_model: Path, kv_evicted: Any) -> None:
    # once a second pruning followed here, after the first token
    prompt = PROMPT[:1000]
    llm, fresh = load(tiny_model, POLICY, kv_evicted=kv_evicted), load(tiny_model, POLICY)
    generate(llm, prompt, n=1)
    assert llm.n_tokens == len(prompt)
    assert generate(llm, prompt) == generate(fresh, prompt)
    assert llm.kv_stats.n_prunes == 1
    assert kept(llm) == kept(fresh)


def test_a_prompt_that_was_read_by_hand_is_pruned_before_its_first_token(tiny_model: Path) -> None:
    llm, fresh = load(tiny_model, POLICY), load(tiny_model, POLICY)
    llm.eval(PROMPT)
    assert generate(llm, PROMPT) == generate(fresh, PROMPT)
    assert kept(llm) == kept(fresh)


def test_a_generation_that_is_given_up_late_leaves_the_next_prompt_to_be_pruned(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as in a server, whose clients leave: the old one may be closed while the next one reads its prompt
    llm, fresh = load(tiny_model, POLICY), load(tiny_model, POLICY)
    given_up = llm.generate(QUESTION, temp=0.0)
    next(given_up)
    decode = llm._ctx.decode

    def decode_and_close(batch: Any) -> None:
        given_up.close()
        decode(batch)

    monkeypatch.setattr(llm._ctx, "decode", decode_and_close)
    assert generate(llm, PROMPT) == generate(fresh, PROMPT)
    assert kept(llm) == kept(fresh)


@pytest.mark.parametrize("kv_evicted", ["recompute", "drop"])
def test_a_generation_without_reset_goes_on(tiny_model: Path, kv_evicted: Any) -> None:
    # its tokens are not the whole conversation, but follow what is there
    llm = load(tiny_model, POLICY, kv_evicted=kv_evicted)
    generate(llm, PROMPT, n=1)
    generate(llm, QUESTION, n=1, reset=False)
    assert llm.n_tokens == native.stats(ctx_of(llm)).n_tokens == N_PROMPT + len(QUESTION)


def test_completions_go_through_upstreams_state_cache(tiny_model: Path) -> None:
    # LlamaRAMCache saves and loads states of pruned contexts between the prompts
    llm, fresh = load(tiny_model, POLICY), load(tiny_model, POLICY)
    llm.set_cache(llama_cpp.LlamaRAMCache())
    # ASCII only: llama-cpp-python does not count tokens that leave a character unfinished
    no_others = {N_SPECIAL + byte: -1000.0 for byte in range(128, 256)}
    options = {"max_tokens": 4, "temperature": 0.0, "logit_bias": no_others}
    for seed in (1, 2, 1):
        prompt = random_tokens(700, seed=seed)
        assert llm(prompt, **options)["choices"] == fresh(prompt, **options)["choices"]


@pytest.mark.parametrize("n_more", [0, 10, 100])
@pytest.mark.parametrize("name", ["refreekv", "paper", "streaming"])
def test_a_prompt_that_goes_on_from_a_whole_state_is_pruned_as_a_fresh_one(
    tiny_model: Path, name: str, n_more: int
) -> None:
    # once the queries since the state were all that the policy judged by. With flash attention, what a token computes
    # depends a little on the batch that it is read in
    source, llm, fresh = (load(tiny_model, POLICIES[name], flash_attn=False) for _ in range(3))
    source.eval(PROMPT)
    llm.load_state(source.save_state())
    tokens = [*PROMPT, *QUESTION[:n_more]]
    assert generate(llm, tokens) == generate(fresh, tokens)
    assert kept(llm) == kept(fresh)


@pytest.mark.parametrize("policies", [("full", POLICY), (POLICY, "full")], ids=["from full", "to full"])
def test_a_state_that_does_not_fit_leaves_an_empty_cache(tiny_model: Path, policies: tuple[Any, Any]) -> None:
    # once n_tokens was the state's then, of which the cache held nothing
    source, target = (load(tiny_model, policy) for policy in policies)
    for llm in (source, target):
        llm.eval(PROMPT)
    with pytest.raises(PolicyError, match="index=99: must be 0 to 3"):  # an error of before is not the reason
        native.layer(ctx_of(target), 99)
    with pytest.raises(CacheStateError, match=r"^Failed to set llama state data: it was not written by a context"):
        target.load_state(source.save_state())
    assert target.n_tokens == target.kv_stats.n_tokens == 0
    assert generate(target, PROMPT) == generate(load(tiny_model, policies[1]), PROMPT)


def test_speculative_decoding_rewinds_what_it_drafted(tiny_model: Path) -> None:
    # rejected drafts lie behind the pruning. A prompt with repetitions, so that there are drafts at all.
    prompt = PROMPT[:250] * 4
    drafting = load(
        tiny_model, POLICY, draft_model=llama_cpp.llama_speculative.LlamaPromptLookupDecoding(), logits_all=True
    )
    plain = load(tiny_model, POLICY, logits_all=True)
    assert generate(drafting, prompt, n=30) == generate(plain, prompt, n=30)
    assert drafting.kv_stats.n_prunes == 1


# -- n_tokens ----------------------------------------------------------------------------------------------------------


def test_going_back_into_the_pruned_range_is_an_error(tiny_model: Path) -> None:
    llm = load(tiny_model, POLICY, kv_evicted="recompute")
    llm.eval(PROMPT)
    llm.prune_kv()
    after = kept(llm)
    for n_tokens in (100, 500, N_PROMPT - 1):
        llm.n_tokens = n_tokens
        with pytest.raises(CacheStateError, match=f"go on from {N_PROMPT} or later, or reset"):
            llm.eval([5])
    assert kept(llm) == after

    llm.n_tokens = N_PROMPT
    llm.eval([5])
    llm.reset()
    llm.eval(PROMPT)
    assert llm.prune_kv() > 0
    assert kept(llm) == after


def test_going_back_to_what_was_generated_works(tiny_model: Path) -> None:
    llm = load(tiny_model, POLICY)
    llm.eval(PROMPT)
    llm.prune_kv()
    first = feed(llm, QUESTION[:20])
    llm.n_tokens = N_PROMPT + 7
    np.testing.assert_array_equal(feed(llm, QUESTION[7:20]), first[7:])


def test_pruning_looks_at_n_tokens(tiny_model: Path) -> None:
    # what lies behind n_tokens is as good as gone: the next eval removes it
    llm, other = load(tiny_model, POLICY), load(tiny_model, POLICY)
    llm.eval(PROMPT)
    llm.n_tokens = N_PROMPT - 20
    llm.prune_kv()
    assert native.pruned_pos(ctx_of(llm), 0) == N_PROMPT - 21
    llm.eval([5])

    # 44 of the window's 64 queries are left to judge by
    other.eval(PROMPT)
    llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(ctx_of(other)), 0, N_PROMPT - 20, -1)
    native.prune(ctx_of(other), 0)
    assert [layer[:-1] for layer in kept(llm)] == kept(other)


# -- the rest ----------------------------------------------------------------------------------------------------------


def test_a_pickled_llama_keeps_its_policy(tiny_model: Path) -> None:
    llm = load(tiny_model, ReFreeKV(threshold=0.4), kv_evicted="drop")
    again = pickle.loads(pickle.dumps(llm))
    assert again.kv_policy == llm.kv_policy
    assert again.kv_evicted == "drop"
    again.eval(PROMPT)
    assert again.prune_kv() > 0


def test_more_tokens_than_the_context_has(tiny_model: Path) -> None:
    llm = load(tiny_model, POLICY, n_ctx=1280)
    llm.eval(PROMPT)
    llm.prune_kv()
    with pytest.raises(RuntimeError, match="the context has room for 1280 in all"):
        llm.eval(QUESTION)
    llm.eval(QUESTION[:10])


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_of_one_token_leaves_a_pruned_cache(tiny_model: Path, stream: bool) -> None:
    """The pruning waits for the first token, and must not wait for a second one that never comes."""
    llm = load(tiny_model, POLICY)
    answer = llm.create_completion(PROMPT, max_tokens=1, temperature=0.0, stream=stream)
    if stream:
        assert native.pruned_pos(ctx_of(llm), 0) == -1  # nothing was read yet
        list(answer)
    assert native.pruned_pos(ctx_of(llm), 0) == N_PROMPT - 1


def test_the_first_token_does_not_wait_for_the_pruning(tiny_model: Path) -> None:
    llm = load(tiny_model, POLICY)
    tokens = llm.generate(PROMPT, temp=0.0)
    next(tokens)
    assert native.pruned_pos(ctx_of(llm), 0) == -1
    next(tokens)
    assert native.pruned_pos(ctx_of(llm), 0) == N_PROMPT - 1


def test_an_adapter_that_is_not_there_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no adapter")
    for path, reason in ((tmp_path / "nowhere", "No such file"), (tmp_path / "text", "must be a GGUF file")):
        with pytest.raises(ValueError, match=reason):
            Llama(str(tiny_model), verbose=False, lora_path=str(path))


@pytest.mark.parametrize("option", ["type_k", "type_v"])
def test_a_cache_type_that_llama_cpp_does_not_know_is_refused(tiny_model: Path, option: str) -> None:
    with pytest.raises(ValueError, match=rf"{option}=10000: must be None or one of"):
        Llama(str(tiny_model), verbose=False, **{option: 10000})
