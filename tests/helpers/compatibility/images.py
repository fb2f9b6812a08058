"""Images in a chat, read by libmtmd through llama-cpp-python's handlers."""

from __future__ import annotations

import base64
from dataclasses import dataclass, replace
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp import llama_chat_format
from policies import Debug
from support import logits
from tiny_projector import Kind, random_png, write_projector

from compatibility.check import TEXT, Run, check, printable
from compatibility.options import RULE, error
from refreekv_cpp import Policy

N_EMBD = 64  # of the models below


def ask(png: bytes) -> list[Any]:
    """The messages of a chat whose question is about an image."""
    url = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    question = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "How many?"}]
    return [{"role": "system", "content": TEXT}, {"role": "user", "content": question}]


@dataclass(frozen=True)
class Vision:
    """A model that takes images: its name, and the projector and the handler that go with it."""

    model: str
    kind: Kind
    handler: type[llama_chat_format.Llava15ChatHandler]

    def load(self, run: Run, kind: type[llama_cpp.Llama] | None = None, **options: Any) -> Any:
        """kind: a `Llama` without policies, in place of ours."""
        projector = run.folder / f"{self.kind}.gguf"
        if not projector.exists():
            write_projector(projector, self.kind, N_EMBD)
        options["chat_handler"] = self.handler(str(projector), verbose=False)
        if kind is None:
            return run.load(self.model, **options)
        defaults = {"n_ctx": 2048, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
        return kind(str(run.model(self.model)), **{**defaults, **options})


@dataclass(frozen=True)
class Answer:
    text: str
    usage: dict[str, int]
    logits: npt.NDArray[np.float32]  # after its last token but one


def answer(llm: Any, messages: list[Any]) -> Answer:
    res = llm.create_chat_completion(messages, temperature=0.0, max_tokens=8, logits_processor=printable())
    return Answer(res["choices"][0]["message"]["content"], res["usage"], logits(llm))


def register(feature: str, vision: Vision) -> None:
    @check(feature)
    def image(run: Run) -> None:
        messages = ask(random_png(160, 96))
        stock = answer(vision.load(run, llama_cpp.Llama), messages)
        actual = answer(vision.load(run), messages)
        assert actual.usage == stock.usage
        if not run.evicts:
            assert actual.text == stock.text
            np.testing.assert_array_equal(actual.logits, stock.logits)
            other = answer(vision.load(run), ask(random_png(160, 96, seed=1)))
            assert error(other.logits, stock.logits) > 5e-3, "the image is not looked at"
            return

        def with_policy(policy: Policy) -> Answer:
            return answer(vision.load(run, policy=policy), messages)

        whole = with_policy(replace(RULE, n_min=10_000))
        assert whole.text == stock.text
        assert error(whole.logits, stock.logits) < 2e-3
        pruned, masked = with_policy(RULE), with_policy(Debug(policy=RULE, mask_only=True))
        assert pruned.text == masked.text
        assert error(pruned.logits, masked.logits) < 2e-3
        assert error(pruned.logits, stock.logits) > 1e-2
        coded = with_policy(replace(RULE, theta=0.003))
        assert error(coded.logits, stock.logits) < error(pruned.logits, stock.logits) / 2


LLAVA = Vision("gqa", "mlp", llama_chat_format.Llava15ChatHandler)
QWEN = Vision("qwen2vl (M-RoPE)", "qwen2vl_merger", llama_chat_format.Qwen25VLChatHandler)

register("image in a chat (Llava15ChatHandler)", LLAVA)
register("image in a chat, M-RoPE (Qwen25VLChatHandler)", QWEN)
