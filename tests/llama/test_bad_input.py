"""What a user can get wrong is an exception. Each of these once ended or hung the process, or was accepted."""

from __future__ import annotations

import inspect
import itertools
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from support import load
from tiny import N_SPECIAL, N_VOCAB, random_tokens

from refreekv_cpp import CacheStateError, ClosedError, Llama, PythonPolicy
from refreekv_cpp._grammar import MAX_ALTERNATIVES, MAX_OPTIONAL
from refreekv_cpp.errors import ContextFullError

PROMPT = random_tokens(100)

OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"n_batch": -1}, "n_batch=-1: must be a whole number from 1"),
    ({"n_batch": 0}, "n_batch=0: must be"),
    ({"n_batch": 2**32}, "n_batch=4294967296: must be"),
    ({"n_ubatch": -1}, "n_ubatch=-1: must be"),
    ({"n_ctx": True}, "n_ctx=True: must be"),
    ({"n_ctx": 2**32}, "n_ctx=4294967296: must be"),
    ({"n_threads": 100_000}, "n_threads=100000: must be a whole number from -1 to 512, or None"),
    ({"n_threads_batch": -2}, "n_threads_batch=-2: must be"),
    ({"rope_scaling_type": 9}, "rope_scaling_type=9: must be"),
    ({"pooling_type": 9}, "pooling_type=9: must be"),
    ({"rope_freq_base": "x"}, "rope_freq_base='x': must be a number"),
    ({"rope_freq_base": float("nan")}, "rope_freq_base=nan: must be a finite number"),
    ({"yarn_ext_factor": float("inf")}, "yarn_ext_factor=inf: must be a finite number"),
    ({"lora_scale": 1e39}, "lora_scale=1e+39: must be a finite number"),
    ({"tensor_split": 1}, "tensor_split=1: must be a list of numbers"),
    ({"tensor_split": "1,2"}, "tensor_split='1,2': must be a list of numbers"),
    ({"tensor_split": [0.0] * 2000}, "must be a list of numbers"),
    ({"tensor_split": [1, "a"]}, "tensor_split='a': must be a number"),
    ({"tensor_split": [1, float("nan")]}, "tensor_split=nan: must be a finite number"),
    ({"tensor_split": [-1.0]}, "tensor_split=[-1.0]: no number may be negative"),
    ({"last_n_tokens_size": 2**31}, "last_n_tokens_size=2147483648: must be"),
    ({"lora_path": 5}, "lora_path=5: must be a path"),
    ({"kv_overrides": 5}, "kv_overrides=5: must be a dict"),
    ({"kv_overrides": {"llama.block_count": 1000}}, "llama.block_count must be left as it is"),
    ({"kv_overrides": {"llama.attention.head_count_kv": 3}}, "llama.attention.head_count_kv must be left as it is"),
    ({"kv_overrides": {"llama.expert_group_count": 3}}, "llama.expert_group_count must be left as it is"),
    ({"kv_overrides": {"gemma2.rope.dimension_count_swa": 3}}, "gemma2.rope.dimension_count_swa must be left as it is"),
    ({"kv_overrides": {"llama.attention.key_length_mla": 3}}, "llama.attention.key_length_mla must be left as it is"),
    ({"kv_overrides": {"llama.rope.scaling.type": "x"}}, "must be one of none, linear, yarn, longrope"),
    ({"kv_overrides": {"llama.pooling_type": 9}}, "llama.pooling_type=9 must be one of -1, 0, 1, 2, 3, 4"),
    ({"kv_overrides": {"llama.expert_gating_func": 9}}, "llama.expert_gating_func=9 must be one of"),
    ({"kv_overrides": {"llama.attention.layer_norm_rms_epsilon": -1.0}}, "rms_epsilon=-1.0 must not be negative"),
    ({"kv_overrides": {"llama.expert_used_count": 2}}, "llama.expert_used_count=2: must be a whole number from 0 to 0"),
    ({"n_ctx": 2**31 - 1}, "n_ctx=2147483647: must be at most"),
    ({"kv_overrides": {"a": float("nan")}}, "kv_overrides: a=nan: must be a finite number"),
    ({"kv_overrides": {"a": None}}, "a=None must be a bool, a number or text"),
    ({"kv_overrides": {"a" * 128: 1}}, "must be text of 1 to 127 bytes"),
    ({"kv_elastic": "x"}, "kv_elastic='x': must be one of None, True, False"),
    ({"kv_cold_dir": ""}, "kv_cold_dir='': must be a path"),
    ({"kv_cold_dir": 5}, "kv_cold_dir=5: must be a path"),
    ({"kv_library": "\ud800"}, "kv_library='\\ud800': a path cannot have '\\ud800' in it"),
    ({"kv_library": __file__}, "must be a folder, or a name that nothing has yet"),
    ({"kv_memory_limit": 0}, "kv_memory_limit=0: must be a positive number of bytes"),
    ({"kv_protect": np.array([[5, 0]])}, 'must be "system", or a list of (start, end)'),
    *(({"kv_protect": value}, 'must be "system"') for value in ([(0.5, 5)], ["05"], "", {}, b"", [("0", "5")])),
    *(
        ({name: value}, f"{name}={value!r}: must be True or False")
        for name in ("use_mmap", "logits_all", "verbose")
        for value in ("false", 2, 0.0, [])
    ),
    ({"kv_cold_limit": 0}, "kv_cold_limit=0: must be a positive number of bytes"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=str)
def test_an_option_that_is_not_valid(tiny_model: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Llama(str(tiny_model), **{"verbose": False, "kv_policy": "refreekv", **options})


@pytest.mark.parametrize("n_experts", [-1, 0, 5, 2**32 + 2, 1.0, True])
def test_more_experts_than_there_are(tiny: Callable[[str], Path], n_experts: Any) -> None:
    model = tiny("llama (Mixtral: experts)")
    key = "llama.expert_used_count"
    with pytest.raises(ValueError, match="must be a whole number from 1 to 4"):
        load(model, "full", kv_overrides={key: n_experts})
    for fitting in (1, 4):
        assert load(model, "refreekv", kv_overrides={key: fitting}).create_completion(PROMPT, max_tokens=1)


def test_options_that_stock_takes(tiny_model: Path) -> None:
    overrides: dict[str, Any] = {
        "general.name": "x",
        "llama.context_length": 100,
        "llama.rope.scaling.type": "yarn",
        "llama.rope.freq_base": 1e6,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.token_type_count": 1,
    }
    llm = load(tiny_model, "full", n_threads=None, n_gpu_layers=-1, n_ubatch=0, kv_overrides=overrides)
    assert llm.create_completion(PROMPT, max_tokens=1)
    assert load(tiny_model, "full", n_ctx=np.int64(256), n_batch=np.int32(64)).n_batch == 64
    assert load(tiny_model, "full", tensor_split=np.ones(2), rope_freq_base=np.float32(1e4), lora_scale=1)
    assert load(tiny_model, "full", n_ctx=256, n_batch=2**31 - 1).n_batch == 256
    assert load(tiny_model, "full", use_mmap=0, use_mlock=np.False_, embedding=None, verbose=False)


def test_a_path_object_and_what_is_none(tiny_model: Path) -> None:
    assert Llama(tiny_model, kv_policy="full", verbose=False).n_ctx()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model_path=5: must be a path"):
        Llama(5, kv_policy="full", verbose=False)  # type: ignore[arg-type]


def test_a_model_is_no_adapter(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="must be a LoRA adapter for this model"):
        Llama(str(tiny_model), kv_policy="full", verbose=False, lora_path=str(tiny_model))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"root ::= {' '.join(['a'] * (MAX_OPTIONAL + 1))}\n" + 'a ::= "x"?', "optional parts in a row"),
        (f"root ::= {' '.join(['a?'] * (MAX_OPTIONAL + 1))}\n" + 'a ::= "x"', "optional parts in a row"),
        ("root ::= a0\n" + "".join(f'a{i} ::= a{i + 1} "y" | a{i + 1} "z"\n' for i in range(40)) + 'a40 ::= "x"',
         "alternatives at one place"),
        ("root ::= " + " | ".join(f'"{i}" [a]' for i in range(MAX_ALTERNATIVES + 1)), "alternatives at one place"),
        ("root ::= " + " | ".join(f'"{chr(0x4E00 + i)}"' for i in range(MAX_ALTERNATIVES + 3)), "alternatives at one"),
    ],
    ids=["rules", "optional", "doubling", "alternatives", "words"],
)  # fmt: skip
def test_a_grammar_with_too_many_branches(tiny_model: Path, text: str, message: str) -> None:
    llm = load(tiny_model, "full")
    with pytest.raises(ValueError, match=message):
        llm.create_completion("a", grammar=llama_cpp.LlamaGrammar.from_string(text, verbose=False))


@pytest.mark.parametrize("sign", ["[", '"\\', "<", "a{", "("])
def test_a_grammar_of_one_open_sign_is_refused_at_once(tiny_model: Path, sign: str) -> None:
    llm = load(tiny_model, "full")
    grammar = llama_cpp.LlamaGrammar(_grammar="root ::= " + sign * 40_000)
    with pytest.raises(ValueError, match="the grammar"):
        llm.create_completion("abc", max_tokens=1, grammar=grammar)


def test_a_schema_with_many_optional_properties_is_taken(tiny_model: Path) -> None:
    schema: dict[str, Any] = {"type": "object", "properties": {f"property{i}": {"type": "string"} for i in range(99)}}
    schema["properties"]["one of many"] = {"enum": [*map(str, range(500))]}
    answer: Any = load(tiny_model, "full").create_chat_completion(
        [{"role": "user", "content": "a"}], response_format={"type": "json_object", "schema": schema}, max_tokens=2
    )
    assert answer["choices"][0]["message"]["content"].startswith("{")


@pytest.mark.parametrize("texts", [[], ["a", ""], "", 5, None, b"a", [b"a"], [1], ["a", None]], ids=str)
def test_nothing_to_embed(tiny_model: Path, texts: Any) -> None:
    llm = load(tiny_model, "full", embedding=True)
    llm.tokenizer_.tokenize = lambda text, *_: list(text)  # type: ignore[method-assign]  # one that adds no token
    for embed in (llm.embed, llm.create_embedding):
        with pytest.raises(ValueError, match="with one token at least"):
            embed(texts)
    assert len(llm.embed(["a", "bc"])) == len(llm.embed(iter(["a", "bc"]))) == len(llm.embed(("a", "bc"))) == 2


@pytest.mark.parametrize("policy", ["refreekv", "full"])
def test_sampling_what_has_no_logits(tiny_model: Path, policy: str) -> None:
    llm = load(tiny_model, policy)
    defaults = [parameter.default for parameter in inspect.signature(llama_cpp.Llama.sample).parameters.values()][1:]
    for arguments in ([], [*defaults[:-1], 7]):
        with pytest.raises(CacheStateError, match="no logits to sample from"):
            llm.sample(*arguments)
    generator = llm.generate(PROMPT)
    next(generator)
    with pytest.raises(ValueError, match="logits_all=True"):
        generator.send([1, 2])
    generator = load(tiny_model, policy, logits_all=True).generate(PROMPT)
    next(generator)
    assert isinstance(generator.send([1, 2]), int)


def test_an_empty_state(tiny_model: Path) -> None:
    llm = load(tiny_model, "refreekv")
    llm.eval(PROMPT)
    state = llm.save_state()
    state.llama_state, state.llama_state_size = b"", 0
    with pytest.raises(CacheStateError, match="it is empty"):
        llm.load_state(state)


@pytest.mark.parametrize("policy", ["refreekv", "full"])
def test_closing_while_another_thread_generates(tiny_model: Path, policy: str) -> None:
    llm = load(tiny_model, policy)
    begun, raised = threading.Event(), []

    def generate() -> None:
        try:
            while True:  # `close` must not wait until an answer ends
                for _ in itertools.islice(llm.generate(PROMPT), 20):
                    begun.set()
        except ClosedError as error:
            raised.append(error)

    thread = threading.Thread(target=generate)
    thread.start()
    begun.wait(60)
    llm.close()
    thread.join(60)
    assert raised


@pytest.mark.parametrize("policy", ["refreekv", "full"])
def test_closing_lets_no_further_step_begin(tiny_model: Path, policy: str) -> None:
    llm = load(tiny_model, policy)
    generation = llm.generate(PROMPT)
    next(generation)
    with llm._using:  # `close` waits for it, as for a step that is being computed
        closing = threading.Thread(target=llm.close)
        closing.start()
        with pytest.raises(ClosedError):
            for _ in itertools.islice(generation, 1500):
                pass
    closing.join(60)
    assert not closing.is_alive()


def test_a_chat_that_is_none_keeps_no_other_thread_waiting(tiny_model: Path) -> None:
    llm = load(tiny_model, "refreekv")
    for messages in (5, [5]):
        with pytest.raises(Exception, match="int"):
            llm.create_chat_completion(messages)  # type: ignore[arg-type]
    thread = threading.Thread(target=lambda: llm.create_completion(PROMPT, max_tokens=1), daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()


def test_two_threads_complete_one_after_the_other(tiny_model: Path) -> None:
    llm = load(tiny_model, "refreekv")
    prompts = [random_tokens(200, seed=i) for i in range(4)]
    expected = [llm.create_completion(prompt, max_tokens=8, temperature=0)["choices"][0]["text"] for prompt in prompts]
    got: dict[int, str] = {}

    def complete(i: int) -> None:
        got[i] = llm.create_completion(prompts[i], max_tokens=8, temperature=0)["choices"][0]["text"]

    threads = [threading.Thread(target=complete, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [got[i] for i in range(4)] == expected


def test_a_generation_that_another_one_has_replaced(tiny_model: Path) -> None:
    llm = load(tiny_model, "refreekv")
    first, second = llm.generate(PROMPT), llm.generate(PROMPT[:50])
    next(first)
    next(second)
    with pytest.raises(CacheStateError, match="this generation cannot go on"):
        next(first)
    next(second)


@pytest.mark.parametrize("change", ["reset", "load_state"])
def test_a_generation_whose_cache_was_changed(tiny_model: Path, change: str) -> None:
    llm = load(tiny_model, "refreekv")
    generation = llm.generate(PROMPT)
    next(generation)
    state = llm.save_state()
    next(generation)
    llm.reset() if change == "reset" else llm.load_state(state)
    with pytest.raises(CacheStateError, match="this generation cannot go on"):
        next(generation)
    next(llm.generate(PROMPT))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.parametrize("use", ["llm.eval([1])", "llm.create_completion('a')", "llm.kv_stats", "llm.tokenize(b'a')"])
def test_a_forked_process_says_so_and_ends(tiny_model: Path, use: str) -> None:
    script = f"""
import os, sys
from refreekv_cpp import ClosedError, Llama
llm = Llama(sys.argv[1], kv_policy="refreekv", n_threads=2, n_threads_batch=2, verbose=False)
llm.create_completion("abc", max_tokens=2)
if os.fork() == 0:
    try:
        {use}
    except ClosedError as error:
        llm.close()
        del llm
        sys.exit(0 if "before os.fork()" in str(error) else 1)
    sys.exit(2)
assert os.wait()[1] == 0
llm.create_completion("abc", max_tokens=2)
"""
    subprocess.run([sys.executable, "-c", script, str(tiny_model)], check=True, timeout=60)


@pytest.mark.parametrize("token", [-1, N_VOCAB, 2**31 - 1, 2**40])
def test_a_token_that_is_not_there(tiny_model: Path, token: int) -> None:
    llm = load(tiny_model, "full")
    for detokenize in (
        llm.detokenize,
        llm.tokenizer().decode,
        llama_cpp.Llama(str(tiny_model), verbose=False).detokenize,
    ):
        with pytest.raises(ValueError, match=f"token {token}: must be from 0 to {N_VOCAB - 1}"):
            detokenize([100, token])
        assert detokenize(np.array([100])) in (b"a", "a")  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", ["refreekv", "full"])
def test_tokens_that_cannot_be_read(tiny_model: Path, policy: str) -> None:
    llm = load(tiny_model, policy, n_ctx=512, n_batch=64)
    llm.eval(PROMPT)
    for tokens, message in [
        ([*PROMPT, N_VOCAB], f"token {N_VOCAB}: must be from 0 to {N_VOCAB - 1}"),
        ([*PROMPT, -1], "token -1: must be"),
        ([2**40], "token 1099511627776: must be"),
        (random_tokens(500), "500 tokens after 100: the context has room for 512 in all"),
    ]:
        with pytest.raises(ValueError, match=message):
            llm.eval(tokens)
        assert llm.n_tokens == len(PROMPT)  # nothing of them was read
        assert isinstance(llm.sample(), int)
    with pytest.raises(ContextFullError, match="tokens after 100: the context has room for 512"):
        next(llm.generate(random_tokens(600)))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("policy", ["refreekv", "full"])
def test_a_context_that_ends_in_the_middle_of_a_character(tiny_model: Path, policy: str, stream: bool) -> None:
    llm = load(tiny_model, policy, n_ctx=256)
    first_bytes = {N_SPECIAL + byte: 100.0 for byte in range(0xF0, 0xF5)}  # each is that of a character of four bytes
    answer: Any = llm.create_completion(
        PROMPT, max_tokens=None, temperature=0, stream=stream, logits_processor=_only_after(200, first_bytes)
    )
    choices = [chunk["choices"][0] for chunk in answer] if stream else answer["choices"]
    assert "".join(choice["text"] for choice in choices).startswith("a" * 90)
    assert choices[-1]["finish_reason"] == "length"
    assert llm.n_tokens == llm.n_ctx()
    assert llm.create_completion(PROMPT, max_tokens=1, temperature=0)["choices"][0]["finish_reason"] == "length"


def test_recurrent_layers_have_no_end(tiny: Callable[[str], Path]) -> None:
    llm = load(tiny("mamba (recurrent)"), "full", n_ctx=256)
    generation = llm.generate(PROMPT, logits_processor=_only_after(1000, {}))
    assert len(list(itertools.islice(generation, 200))) == 200
    assert llm.n_tokens > llm.n_ctx()


def test_a_context_of_another_llama_that_is_full(tiny_model: Path) -> None:
    llm, other = load(tiny_model, "full"), load(tiny_model, "full", n_ctx=256)

    def fill(read: Any, scores: Any) -> Any:
        other.eval(random_tokens(257))

    with pytest.raises(ContextFullError):
        llm.create_completion(PROMPT, max_tokens=9, logits_processor=llama_cpp.LogitsProcessorList([fill]))


def test_tokens_that_are_sent_to_a_context_without_room(tiny_model: Path) -> None:
    generation = load(tiny_model, "full", n_ctx=256, logits_all=True).generate(PROMPT)
    next(generation)
    with pytest.raises(ContextFullError):
        generation.send(random_tokens(400))


def _only_after(n_tokens: int, biases: dict[int, float]) -> llama_cpp.LogitsProcessorList:
    """Before, all tokens are "a"."""

    def biased(read: Any, scores: Any) -> Any:
        for token, bias in biases.items() if len(read) >= n_tokens else [(N_SPECIAL + ord("a"), 100.0)]:
            scores[token] += bias
        return scores

    return llama_cpp.LogitsProcessorList([biased])


@pytest.mark.parametrize("policy", ["refreekv", "full"])
@pytest.mark.parametrize("kind", [KeyError, KeyboardInterrupt, StopIteration])
def test_what_a_logits_processor_raises(tiny_model: Path, policy: str, kind: type[BaseException]) -> None:
    llm = load(tiny_model, policy)

    def fail(read: Any, scores: Any) -> Any:
        raise kind

    processor = llama_cpp.LogitsProcessorList([fail])
    with pytest.raises(RuntimeError if kind is StopIteration else kind):
        llm.create_completion(PROMPT, max_tokens=3, logits_processor=processor)
    another = load(tiny_model, policy)
    another.eval(PROMPT)
    with pytest.raises(kind):
        another.sample(logits_processor=processor)
    assert isinstance(another.sample(), int)
    wrong = llama_cpp.LogitsProcessorList([lambda _, scores: scores[:3]])
    with pytest.raises(ValueError, match="broadcast"):
        llm.create_completion(PROMPT, max_tokens=3, logits_processor=wrong)
    assert llm.create_completion(PROMPT, max_tokens=3)


def test_closing_from_inside(tiny_model: Path) -> None:
    class Closes(PythonPolicy):
        def select(self, attention: Any, positions: Any, layer: int) -> Any:
            llm.close()

    def closes(read: Any, scores: Any) -> Any:
        return llm.close()

    llm = load(tiny_model, Closes())
    with pytest.raises(CacheStateError, match="close it afterwards"):
        llm.create_completion(random_tokens(600), max_tokens=3)
    for option in ("logits_processor", "stopping_criteria"):
        calls: Any = {
            "logits_processor": llama_cpp.LogitsProcessorList,
            "stopping_criteria": llama_cpp.StoppingCriteriaList,
        }
        with pytest.raises(CacheStateError, match="close it afterwards"):
            llm.create_completion(PROMPT, max_tokens=3, **{option: calls[option]([closes])})
    assert llm.create_completion(PROMPT, max_tokens=3)
    llm.close()
    with pytest.raises(ClosedError):
        llm.eval(PROMPT)


@pytest.mark.parametrize("state", [None, 5, b"x"], ids=str)
def test_what_is_no_state(tiny_model: Path, state: Any) -> None:
    with pytest.raises(TypeError, match="must be a state that save_state"):
        load(tiny_model, "refreekv").load_state(state)


def test_a_state_of_less_than_nothing(tiny_model: Path) -> None:
    llm = load(tiny_model, "refreekv")
    llm.eval(PROMPT)
    state = llm.save_state()
    state.n_tokens = -1
    with pytest.raises(CacheStateError, match="it holds -1 tokens"):
        llm.load_state(state)
