"""Conversations that alternate on the server: each finds what was read of it in the library."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from serving import OPTIONS, QUICK, serving, user, write_config

from refreekv_cpp._cache_dir import VARIABLE
from refreekv_cpp.server.settings import ModelSettings


def test_conversations_do_not_destroy_each_other(tiny_model: Path, tmp_path: Path) -> None:
    models = [{"model": str(tiny_model), **QUICK}]
    env = {**os.environ, VARIABLE: str(tmp_path / "cache")}
    talks: list[list[Any]] = [
        user("x" * 900),
        user("y" * 700),
        user("A title for z z z z z z z z z z z z z z z z z z z z"),
    ]
    with serving("--python", "--config_file", write_config(tmp_path, models), env=env) as client:
        for turn in range(3):
            for talk in talks:
                answer = client.chat.completions.create(model="any", messages=talk, **OPTIONS)
                n_read = answer.usage.prompt_tokens - answer.usage.kv["n_opened"]
                talk += [{"role": "assistant", "content": answer.choices[0].message.content}, *user("And?")]
                assert turn == 0 or n_read < 60
    assert (tmp_path / "cache" / "library").is_dir()


@pytest.mark.parametrize(
    ("settings", "there"),
    [
        ({}, True),
        ({"kv_library": "false"}, False),
        ({"kv_library": False}, False),
        ({"kv_policy": "full"}, False),
        ({"kv_evicted": "recompute"}, False),
        ({"logits_all": True}, False),
        ({"kv_library": "true"}, True),
    ],
)
def test_it_is_on_where_that_is_possible(settings: dict[str, Any], there: bool) -> None:
    options = ModelSettings(model="x", **settings).llama_options()
    assert (options["kv_library"] in (True, "true")) == there


def test_it_is_refused_where_it_was_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kv_policy must be 'refreekv'"):
        ModelSettings(model="x", kv_policy="full", kv_library=str(tmp_path))
