"""A grammar that llama.cpp cannot use is a ValueError. Once it ended the process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from support import load
from tiny import random_tokens

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
