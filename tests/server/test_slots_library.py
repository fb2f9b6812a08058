"""The library of llama.cpp's server: what a slot has read is opened by any slot, of this process or of a later one."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from compatibility.images import N_EMBD
from serving import send, serving, user
from tiny import N_SPECIAL
from tiny_lora import write_lora
from tiny_projector import random_png, write_projector

from refreekv_cpp import Llama
from refreekv_cpp._cache_dir import VARIABLE

QUICK = ["--n-ctx", "2048", "--threads", "1", "--log-verbosity", "1"]
PRINTABLE = [[N_SPECIAL + byte, False] for byte in (*range(32), *range(127, 256))] + [[2, False]]
LONG = "".join(chr(97 + i * i % 26) for i in range(1500))
TEXTS = [LONG, LONG[::-1], LONG[700:] + LONG[:700]]


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """With a cache folder that has no library yet."""
    return {**os.environ, VARIABLE: str(tmp_path / "cache")}


def ask(client: openai.OpenAI, prompt: str, **options: Any) -> tuple[str, int]:
    """The answer, and how many tokens of the prompt were not read."""
    body = {"prompt": prompt, "n_predict": 8, "temperature": 0, "logit_bias": PRINTABLE, **options}
    status, text = send(client, "/completion", body)
    assert status == 200, text
    result = json.loads(text)
    return result["content"], result["timings"]["cache_n"]


def test_conversations_do_not_destroy_each_other(tiny_model: Path, env: dict[str, str]) -> None:
    with (
        serving(tiny_model, *QUICK, "--parallel", "1", env=env) as client,
        serving(tiny_model, *QUICK, "--parallel", "3", "--no-library", env=env) as other,
    ):
        talks = TEXTS[:]
        for turn in range(3):
            for i, talk in enumerate(talks):
                text, n_there = ask(client, talk)
                alone, _ = ask(other, talk, id_slot=i)
                assert text == alone
                if turn > 0:
                    assert len(talk) - n_there < 30
                talks[i] += text + "and then?"


@pytest.mark.parametrize("slots", ["1", "4"])
def test_titles_of_a_chat_read_only_what_follows_their_instructions(
    tiny_model: Path, env: dict[str, str], slots: str
) -> None:
    """As chat apps ask for them: the same instructions, and then what was said last."""
    instructions, talk = LONG[:800], TEXTS[1]
    with serving(tiny_model, *QUICK, "--parallel", slots, env=env) as client:
        for turn in range(4):
            text, n_there = ask(client, talk)
            assert turn == 0 or len(talk) - n_there < 30
            talk += text + "and then?"
            _, n_there = ask(client, f"{instructions} {turn} {talk[-300:]}")
            assert turn == 0 or n_there > len(instructions)


def test_it_is_opened_after_a_restart(tiny_model: Path, env: dict[str, str]) -> None:
    with serving(tiny_model, *QUICK, env=env) as client:
        answer, _ = ask(client, LONG)
        assert ask(client, LONG, cache_prompt=False) == (answer, 0)
    with serving(tiny_model, *QUICK, env=env) as client:
        again, n_there = ask(client, LONG)
        assert n_there >= len(LONG) - 1
        assert again == answer
        assert ask(client, TEXTS[1])[1] == 0
    with serving(tiny_model, *QUICK, "--no-library", env=env) as client:
        assert ask(client, LONG) == (answer, 0)


def test_a_llama_and_the_server_share_it(tiny_model: Path, env: dict[str, str], tmp_path: Path) -> None:
    with serving(tiny_model, *QUICK, env=env) as client:
        ask(client, LONG)
        tokens = json.loads(send(client, "/tokenize", {"content": LONG, "add_special": True})[1])["tokens"]
    folder = tmp_path / "cache" / "library"
    llm = Llama(str(tiny_model), n_ctx=2048, n_threads=1, verbose=False, kv_policy="refreekv", kv_library=folder)
    generation = llm.generate([*tokens, 5, 6, 7], temp=0.0)
    next(generation)
    generation.close()
    assert llm.kv_stats.n_opened >= len(LONG)


def test_what_was_damaged_is_read(tiny_model: Path, env: dict[str, str], tmp_path: Path) -> None:
    with serving(tiny_model, *QUICK, env=env) as client:
        answer, _ = ask(client, LONG)
        # the server writes after it has answered, and answers this after that
        url = str(client.base_url).removesuffix("/v1/") + "/slots"
        assert not any(slot["is_processing"] for slot in client._client.get(url).json())
        for path in (tmp_path / "cache" / "library").glob("*.block"):
            path.write_bytes(path.read_bytes()[:-1])
        ask(client, TEXTS[1], id_slot=0)
        again, n_there = ask(client, LONG, id_slot=0)
        assert again == answer
        assert n_there < 10


@pytest.mark.parametrize("policy", ["full", "refreekv"])
def test_images_are_read(tiny: Callable[[str], Path], env: dict[str, str], tmp_path: Path, policy: str) -> None:
    """A prompt with an image is not in the library; one without is, also where there is a projector."""
    write_projector(projector := tmp_path / "projector.gguf", "mlp", N_EMBD)
    options = ["--mmproj", str(projector), "--kv-policy", policy, "--no-jinja", "--parallel", "1"]
    url = "data:image/png;base64," + base64.b64encode(random_png(64, 64)).decode()
    image = user([{"type": "text", "text": LONG}, {"type": "image_url", "image_url": {"url": url}}])
    text = user(LONG)
    with serving(tiny("gqa"), *QUICK, *options, env=env) as client:
        counts = []
        for messages in (image, text, image, text):
            answer = client.chat.completions.create(model="x", messages=messages, max_tokens=4, temperature=0)
            counts.append(answer.timings["cache_n"])
    assert counts[0] == 0
    assert counts[3] > 1000
    assert bool(list((tmp_path / "cache").rglob("*.block"))) == (policy == "refreekv")


def test_with_windows_there_is_none(tiny: Callable[[str], Path], env: dict[str, str], tmp_path: Path) -> None:
    for options in ([], ["--swa-full"]):
        with serving(tiny("gemma3 (sliding window)"), *QUICK, *options, env=env) as client:
            ask(client, LONG)
        assert list((tmp_path / "cache").rglob("*.block")) == []


def test_what_came_from_a_slot_file_is_not_kept(
    tiny: Callable[[str], Path], env: dict[str, str], tmp_path: Path
) -> None:
    """It may be of another model of the same shape."""
    slots = [*QUICK, "--slot-save-path", str(tmp_path), "--parallel", "1"]
    with serving(tiny("gqa"), *slots, "--no-library", env=env) as client:
        ask(client, LONG)
        assert send(client, "/slots/0?action=save", {"filename": "a"})[0] == 200
    with serving(tiny("gqa"), *slots, env=env) as client:
        assert send(client, "/slots/0?action=restore", {"filename": "a"})[0] == 200
        assert ask(client, LONG)[1] > 1000
    assert list((tmp_path / "cache").rglob("*.block")) == []


def test_with_adapters_there_is_none(tiny_model: Path, env: dict[str, str], tmp_path: Path) -> None:
    """They can be changed with each request."""
    write_lora(adapter := tmp_path / "adapter.gguf", tiny_model)
    with serving(tiny_model, *QUICK, "--lora", str(adapter), env=env) as client:
        ask(client, LONG)
    assert list((tmp_path / "cache").rglob("*.block")) == []
