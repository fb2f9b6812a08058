"""A grammar that llama.cpp cannot use is a ValueError. Once it ended the process."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from support import load
from tiny import random_tokens

from refreekv_cpp._literals import factored

PROMPT = random_tokens(100)

BROKEN = {
    "root ::= [": "unexpected end of input",
    'root ::= "a" b': "Undefined rule identifier 'b'",
    'start ::= "a"': "needs a rule 'root'",
    'root ::= root "a"': "no rule may begin with itself",
    "no grammar at all": "expecting ::=",
    'root ::= "a"{5000}': "number of repetitions",
    'root ::= "a"{5,2}': "fewer than the least: {5,2}",
    "root ::= " + "(" * 50 + '"a"': "expecting ')'",
}


@pytest.mark.parametrize("policy", ["refreekv", "full"])
@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_a_grammar_that_cannot_be_used(tiny_model: Path, text: str, policy: str) -> None:
    llm = load(tiny_model, policy)
    grammar = llama_cpp.LlamaGrammar.from_string(text, verbose=False)
    message = [{"role": "user", "content": "a"}]
    llm.eval(PROMPT)
    for ask in (
        lambda: llm.create_completion("a", grammar=grammar),
        lambda: llm.create_completion("a", grammar=grammar, stream=True),  # before the stream begins
        lambda: llm.create_chat_completion(message, grammar=grammar),
        lambda: llm.create_chat_completion(message, grammar=grammar, stream=True),
        lambda: next(llm.generate(PROMPT, grammar=grammar)),
        lambda: llm.sample(grammar=grammar),
    ):
        with pytest.raises(ValueError, match="the grammar cannot be used: ") as raised:
            ask()
        assert BROKEN[text] in str(raised.value)
        assert len(str(raised.value)) < 300
    assert llm.n_tokens == len(PROMPT)  # nothing was read


def test_a_schema_whose_grammar_cannot_be_used(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = load(tiny_model, "refreekv")
    monkeypatch.setattr(llama_cpp.llama_grammar, "json_schema_to_gbnf", lambda *_, **__: "root ::= [")
    with pytest.raises(ValueError, match="the grammar cannot be used"):
        llm.create_chat_completion(
            [{"role": "user", "content": "a"}],
            response_format={"type": "json_object", "schema": {"type": "object"}},
        )


def test_a_grammar_that_can_be_used(tiny_model: Path) -> None:
    llm = load(tiny_model, "refreekv")
    grammar = llama_cpp.LlamaGrammar.from_string('root ::= "yes" | "no"', verbose=False)
    response: Any = llm.create_completion("a", grammar=grammar, max_tokens=8)
    assert response["choices"][0]["text"] in ("yes", "no")
    schema = json.dumps({"type": "boolean"})
    grammar = llama_cpp.LlamaGrammar.from_json_schema(schema, verbose=False)
    response = llm.create_completion("a", grammar=grammar, max_tokens=8)
    assert response["choices"][0]["text"].strip() in ("true", "false")


def words(n: int) -> list[str]:
    """Many with the same beginning, one that another one begins with, and some with signs that a grammar escapes."""
    rng = np.random.default_rng(0)
    res = {"".join(rng.choice(["ba", "ko", '"', "\\", "\n", "é", "|", "("], rng.integers(1, 5))) for _ in range(30 * n)}
    return sorted(res)[:n]


def test_an_enum_of_ten_thousand_words(tiny_model: Path) -> None:
    # once a ValueError, as llama.cpp takes seconds for a token of such a grammar
    values = [f"{i} words" for i in range(10_000)]
    schema = json.dumps({"type": "object", "properties": {"a": {"enum": values}}, "required": ["a"]})
    grammar = llama_cpp.LlamaGrammar.from_json_schema(schema, verbose=False)
    response: Any = load(tiny_model, "full").create_completion("a", grammar=grammar, max_tokens=64)
    assert json.loads(response["choices"][0]["text"])["a"] in values


@pytest.mark.parametrize("word", ['a"b', "a\\b", "a\nb", "é", "😀", 'a"] | .', "\x01"])
def test_a_schema_with_words_of_any_signs(tiny_model: Path, word: str) -> None:
    # once the grammar did not parse, or allowed no token, or what was not JSON
    schema = {"type": "object", "properties": {word: {"enum": [word]}}, "required": [word]}
    grammar = llama_cpp.LlamaGrammar.from_json_schema(json.dumps(schema), verbose=False)
    response: Any = load(tiny_model, "full").create_completion("a", grammar=grammar, max_tokens=64)
    assert json.loads(response["choices"][0]["text"]) == {word: word}


@pytest.mark.parametrize(
    "frame",
    ["root ::= {}", 'root ::= ({}) {{2}} # "{}" | \n', 'root ::= [|"] ({}) ({} | b)?\nb ::= "b" {} | [x] | {}'],
    ids=range(3),
)
def test_words_that_share_their_beginnings_are_the_same_words(tiny_model: Path, frame: str) -> None:
    llm = load(tiny_model, "full")
    model = llm._model
    text = frame.replace("{}", " | ".join(map(json.dumps, words(40)))).replace("{{2}}", "{2}")
    assert factored(text) != text
    assert factored(factored(text)) == factored(text)
    samplers = [
        llama_cpp.llama_sampler_init_grammar(model.vocab, each.encode(), b"root") for each in (text, factored(text))
    ]
    assert all(samplers)
    rng = np.random.default_rng(0)
    for _ in range(300):
        allowed = [allowed_tokens(sampler, model.n_vocab()) for sampler in samplers]
        assert allowed[0] == allowed[1]
        token = int(rng.choice(allowed[0]))
        for sampler in samplers:
            if llama_cpp.llama_vocab_is_eog(model.vocab, token):
                llama_cpp.llama_sampler_reset(sampler)
            else:
                llama_cpp.llama_sampler_accept(sampler, token)
    for sampler in samplers:
        llama_cpp.llama_sampler_free(sampler)


def allowed_tokens(sampler: Any, n_vocab: int) -> list[int]:
    """The tokens that go on with a grammar."""
    array = llama_cpp._internals.LlamaTokenDataArray(n_vocab=n_vocab)
    array.copy_logits(np.zeros(n_vocab, dtype=np.single))
    llama_cpp.llama_sampler_apply(sampler, ctypes.byref(array.candidates))
    data = array.candidates_data[: array.candidates.size]
    return sorted(data["id"][data["logit"] > -np.inf].tolist())
