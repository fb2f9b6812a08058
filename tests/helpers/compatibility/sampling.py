"""Seeds, samplers, and what looks in while a model generates."""

from __future__ import annotations

import itertools
from typing import Any

import llama_cpp
import numpy as np

from compatibility.check import PROMPT, Run, check, printable

SAMPLERS: dict[str, dict[str, Any]] = {
    "temperature": {"temp": 1.3},
    "top_k": {"temp": 1.3, "top_k": 3},
    "top_p": {"temp": 1.3, "top_p": 0.4},
    "min_p": {"temp": 1.3, "min_p": 0.3},
    "typical_p": {"temp": 1.3, "typical_p": 0.5},
    "repeat, frequency and presence penalties": {
        "temp": 0.0,
        "repeat_penalty": 1.5,
        "frequency_penalty": 0.5,
        "presence_penalty": 0.5,
    },
    "mirostat 1": {"temp": 1.0, "mirostat_mode": 1, "mirostat_tau": 3.0},
    "mirostat 2": {"temp": 1.0, "mirostat_mode": 2, "mirostat_tau": 3.0, "mirostat_eta": 0.2},
}


def register(name: str, sampling: dict[str, Any]) -> None:
    @check(f"sampler: {name}")
    def sampler(run: Run) -> None:
        llm, by_hand = run.load(seed=3), run.load(seed=3)
        generator = llm.generate(PROMPT, **sampling)
        answer = list(itertools.islice(generator, 12))
        generator.close()
        assert answer == run.by_hand(by_hand, PROMPT, 12, logits_processor=None, **sampling)
        without = {"temp": sampling["temp"]} if len(sampling) > 1 else {}
        assert answer != run.by_hand(by_hand, PROMPT, 12, logits_processor=None, **without), "it has no effect"


for name, sampling in SAMPLERS.items():
    register(name, sampling)


@check("seeds (seed=, set_seed)")
def seeds(run: Run) -> None:
    llm = run.load()
    options: dict[str, Any] = {"temperature": 2.0, "max_tokens": 12, "logits_processor": printable()}

    def text(**more: Any) -> str:
        return str(llm.create_completion(PROMPT, **options, **more)["choices"][0]["text"])

    first, second, again = text(seed=1), text(seed=2), text(seed=1)
    assert first == again != second
    by_set_seed = []
    for _ in range(2):
        llm.set_seed(7)
        by_set_seed.append(text())
    assert by_set_seed[0] == by_set_seed[1]


@check("logit_bias")
def logit_bias(run: Run) -> None:
    token = llama_cpp.Llama.tokenize(run.load(), b"x", add_bos=False)[-1]
    answer = run.load().create_completion(PROMPT, logit_bias={token: 1000.0}, temperature=0.0, max_tokens=4)
    assert answer["choices"][0]["text"] == "xxxx"


@check("logits processors")
def logits_processors(run: Run) -> None:
    lengths: list[int] = []

    def forbid(tokens: Any, scores: Any) -> Any:
        lengths.append(len(tokens))
        res = scores.copy()
        res[forbidden] = -np.inf
        return res

    forbidden = run.by_hand(run.load(), PROMPT, 1)
    processors = llama_cpp.LogitsProcessorList([*printable(), forbid])
    answer = run.load().create_completion(PROMPT, logits_processor=processors, temperature=0.0, max_tokens=6)
    expected = run.by_hand(run.load(), PROMPT, 6, logits_processor=processors)
    assert answer["choices"][0]["text"].encode() == run.load().detokenize(expected)
    assert expected[0] not in forbidden
    assert set(lengths[:6]) == {len(PROMPT), *range(len(PROMPT) + 1, len(PROMPT) + 6)}


@check("stopping criteria")
def stopping_criteria(run: Run) -> None:
    tokens = run.by_hand(run.load(), PROMPT)
    seen: list[list[int]] = []

    def after_three(read: Any, _logits: Any) -> bool:
        seen.append([int(token) for token in read])
        return len(read) >= len(PROMPT) + 3

    criteria = llama_cpp.StoppingCriteriaList([after_three])
    llm = run.load()
    answer = llm.create_completion(
        PROMPT, stopping_criteria=criteria, logits_processor=printable(), temperature=0.0, max_tokens=8
    )["choices"][0]
    assert answer["text"].encode() == llm.detokenize(tokens[:3])
    assert answer["finish_reason"] == "stop"
    assert seen[:4] == [[*PROMPT, *tokens[:n]] for n in range(4)]
