"""Completions and chats, against a generation that is made by hand: read, prune, sample."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp.llama_speculative import LlamaDraftModel, LlamaPromptLookupDecoding
from support import feed, logits
from tiny import random_tokens
from tiny_lora import merge_lora, write_lora

from compatibility.check import PROMPT, TEXT, Refused, Run, check, printable
from refreekv_cpp import Llama

GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 8}
MESSAGES: list[Any] = [
    {"role": "system", "content": "You count ships."},
    {"role": "user", "content": f"{TEXT} How many?"},
]
SCHEMA = {
    "type": "object",
    "properties": {"port": {"enum": ["Ostermoor", "Velling"]}, "open": {"type": "boolean"}},
    "required": ["port", "open"],
}


def text_by_hand(run: Run, tokens: list[int], n: int = 8, **options: Any) -> str:
    llm = run.load(**options)
    return llm.detokenize(run.by_hand(llm, tokens, n)).decode()


def spied(llm: Llama) -> list[list[int]]:
    """The prompts that its completions will read, as tokens."""
    prompts: list[list[int]] = []
    generate = llm.generate

    def spy(tokens: list[int], *args: Any, **kwargs: Any) -> Any:
        prompts.append(list(tokens))
        return generate(tokens, *args, **kwargs)

    llm.generate = spy  # type: ignore[method-assign]
    return prompts


def assert_schema(text: str) -> None:
    answer = json.loads(text)
    assert list(answer) == ["port", "open"]
    assert answer["port"] in SCHEMA["properties"]["port"]["enum"]  # type: ignore[index]
    assert isinstance(answer["open"], bool)


@check("completion (text and tokens)")
def completion(run: Run) -> None:
    for prompt in (TEXT, PROMPT):
        llm = run.load()
        prompts = spied(llm)
        answer = llm.create_completion(prompt, logits_processor=printable(), **GREEDY)
        assert answer["choices"][0]["text"] == text_by_hand(run, prompts[0])
        assert answer["usage"] == {
            "prompt_tokens": len(prompts[0]),
            "completion_tokens": 8,
            "total_tokens": len(prompts[0]) + 8,
        }


@check("chat completion")
def chat(run: Run) -> None:
    llm = run.load(chat_format="chatml")
    prompts = spied(llm)
    answer = llm.create_chat_completion(MESSAGES, logits_processor=printable(), **GREEDY)
    assert answer["choices"][0]["message"]["content"] == text_by_hand(run, prompts[0])
    assert b"<|im_start|>user\n" in llm.detokenize(prompts[0], special=True)


@check("chat, second turn")
def second_turn(run: Run) -> None:
    llm, fresh = run.load(chat_format="chatml"), run.load(chat_format="chatml")
    options = {**GREEDY, "logits_processor": printable()}
    first = llm.create_chat_completion(MESSAGES, **options)["choices"][0]["message"]
    history = [*MESSAGES, first, {"role": "user", "content": "And then?"}]
    assert (
        llm.create_chat_completion(history, **options)["choices"]
        == (fresh.create_chat_completion(history, **options)["choices"])
    )


def register_going_back(what: str, model: str) -> None:
    @check(f"an answer once more, another end of the prompt ({what})")
    def going_back(run: Run) -> None:
        options = {**GREEDY, "logits_processor": printable()}
        llm = run.load(model, kv_evicted="restore")
        for prompt in (PROMPT, PROMPT, [*PROMPT[:650], *random_tokens(90, seed=1)[1:]]):
            fresh = run.load(model, kv_evicted="restore")
            assert llm(prompt, **options)["choices"] == fresh(prompt, **options)["choices"]


for what, model in (("hybrid", "jamba (hybrid)"), ("sliding window", "gemma3 (sliding window)")):
    register_going_back(what, model)


@check("streaming, completion and chat")
def streaming(run: Run) -> None:
    calls: list[tuple[Callable[..., Any], Any, Callable[[Any], str]]] = [
        (Llama.create_completion, PROMPT, lambda choice: choice["text"]),
        (Llama.create_chat_completion, MESSAGES, lambda choice: choice["delta"].get("content") or ""),
    ]
    for create, prompt, piece in calls:
        llm = run.load(chat_format="chatml")
        prompts = spied(llm)
        chunks = list(create(llm, prompt, stream=True, logits_processor=printable(), **GREEDY))
        pieces = [piece(chunk["choices"][0]) for chunk in chunks]
        assert "".join(pieces) == text_by_hand(run, prompts[0])
        assert sum(map(bool, pieces)) == 8
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"


@check("stop sequences")
def stop(run: Run) -> None:
    text = text_by_hand(run, PROMPT)
    stop = text[4:6]
    options = {**GREEDY, "logits_processor": printable(), "stop": [stop, "never this"]}
    answer = run.load().create_completion(PROMPT, **options)["choices"][0]
    assert answer["text"] == text[: text.index(stop)]
    assert answer["finish_reason"] == "stop"
    pieces = [chunk["choices"][0]["text"] for chunk in run.load().create_completion(PROMPT, stream=True, **options)]
    assert "".join(pieces) == answer["text"]


@check("logprobs (logits_all=True)")
def logprobs(run: Run) -> None:
    by_hand, llm = run.load(), run.load(logits_all=True)
    answer = llm.create_completion(PROMPT, logprobs=3, logits_processor=printable(), **GREEDY)["choices"][0]
    tokens = run.by_hand(by_hand, PROMPT)
    by_hand.reset()
    by_hand.eval(PROMPT)
    rows = [logits(by_hand)]
    by_hand.prune_kv()
    rows += list(feed(by_hand, tokens[:-1]))
    expected = [Llama.logits_to_logprobs(row)[token] for row, token in zip(rows, tokens, strict=True)]
    np.testing.assert_allclose(answer["logprobs"]["token_logprobs"], expected, atol=1e-4)
    columns = (answer["logprobs"][name] for name in ("tokens", "token_logprobs", "top_logprobs"))
    for token, own, best in zip(*columns, strict=True):
        assert best[token] == own


@check("logprobs with logits_all=False", prunes=False)
def logprobs_refused(run: Run) -> None:
    try:
        run.load().create_completion(PROMPT, logprobs=3)
    except ValueError as error:
        raise Refused(f"ValueError: {error}") from error


@check("echo")
def echo(run: Run) -> None:
    llm = run.load()
    text = llm.create_completion(TEXT, echo=True, logits_processor=printable(), **GREEDY)["choices"][0]["text"]
    plain = run.load().create_completion(TEXT, logits_processor=printable(), **GREEDY)["choices"][0]["text"]
    assert text == TEXT + plain


@check("grammar (GBNF)")
def grammar(run: Run) -> None:
    rule = llama_cpp.LlamaGrammar.from_string('root ::= "ships: " [0-9] [0-9] "."', verbose=False)
    text = run.load().create_completion(PROMPT, grammar=rule, temperature=0.0, max_tokens=40)["choices"][0]["text"]
    assert text.startswith("ships: ")
    assert text[7:9].isdigit()
    assert text[9:] == "."


@check("JSON schema (response_format)")
def json_schema(run: Run) -> None:
    llm = run.load(chat_format="chatml")
    for _ in range(2):
        answer = llm.create_chat_completion(
            MESSAGES, response_format={"type": "json_object", "schema": SCHEMA}, temperature=0.0, max_tokens=80
        )
        assert_schema(answer["choices"][0]["message"]["content"])


@check("function calling (chatml-function-calling)")
def function_calling(run: Run) -> None:
    llm = run.load(chat_format="chatml-function-calling")
    tool: Any = {"type": "function", "function": {"name": "harbour", "parameters": SCHEMA}}
    choice: Any = {"type": "function", "function": {"name": "harbour"}}
    answer = llm.create_chat_completion(MESSAGES, tools=[tool], tool_choice=choice, temperature=0.0, max_tokens=80)
    call = answer["choices"][0]["message"]["tool_calls"][0]["function"]
    assert call["name"] == "harbour"
    assert_schema(call["arguments"])


@check("infill (suffix=)")
def infill(run: Run) -> None:
    for spm_infill in (False, True):
        llm = run.load(spm_infill=spm_infill)
        prompts = spied(llm)
        answer = llm.create_completion(TEXT, suffix=" The end.", logits_processor=printable(), **GREEDY)
        assert answer["choices"][0]["text"] == text_by_hand(run, prompts[0])
        before, after = (llm.detokenize(prompts[0]).index(part) for part in (b"1000", b"end."))
        assert (after < before) == spm_infill


@check("draft model (LlamaPromptLookupDecoding)")
def draft_model(run: Run) -> None:
    prompt = PROMPT[:200] * 4  # repeats itself, so that there is something to draft
    drafted: list[int] = []

    class Counted(LlamaPromptLookupDecoding):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            tokens = super().__call__(*args, **kwargs)
            drafted.append(len(tokens))
            return tokens

    llm = run.load(draft_model=Counted(), logits_all=True)
    generator = llm.generate(prompt, temp=0.0)
    answer = [next(generator) for _ in range(24)]
    generator.close()
    assert sum(drafted) > 0
    assert answer == run.by_hand(run.load(logits_all=True), prompt, 24, logits_processor=None)


@check("draft model (another Llama)")
def draft_by_another(run: Run) -> None:
    class Another(LlamaDraftModel):
        def __init__(self) -> None:
            self.llm = run.load()
            self.n_read: list[int] = []

        def __call__(self, input_ids: Any, /, **_: Any) -> Any:
            generator = self.llm.generate(input_ids.tolist(), temp=0.0)
            tokens = [next(generator) for _ in range(4)]
            generator.close()
            self.n_read.append(len(input_ids))
            return np.array(tokens, np.intc)

    draft = Another()
    generator = run.load(draft_model=draft, logits_all=True).generate(PROMPT, temp=0.0)
    answer = [next(generator) for _ in range(24)]
    generator.close()
    assert max(np.diff(draft.n_read)) > 1  # some were taken
    assert answer == run.by_hand(run.load(logits_all=True), PROMPT, 24, logits_processor=None)


@check("LoRA (lora_path, lora_scale)")
def lora(run: Run) -> None:
    adapter, merged = run.folder / "lora.gguf", run.folder / "merged.gguf"
    write_lora(adapter, run.model("gqa"))
    merge_lora(merged, run.model("gqa"), adapter, scale=0.5)
    f32 = {"type_k": 0, "type_v": 0}
    res = {}
    for name, llm in {
        "adapter": run.load(lora_path=str(adapter), lora_scale=0.5, **f32),
        "merged": run.load(merged, **f32),
        "other scale": run.load(lora_path=str(adapter), lora_scale=1.0, **f32),
        "none": run.load(**f32),
    }.items():
        llm.eval(PROMPT)
        llm.prune_kv()
        res[name] = feed(llm, PROMPT[1:9])
    scale = res["merged"].std()
    assert np.abs(res["adapter"] - res["merged"]).max() < 1e-3 * scale
    assert np.abs(res["adapter"] - res["other scale"]).max() > 0.1 * scale
    assert np.abs(res["adapter"] - res["none"]).max() > 0.1 * scale
