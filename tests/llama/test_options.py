"""The kv_ options, which API, command line, server and environment share, and the text form of a policy."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest

from refreekv_cpp import Full, Llama, PolicyError, ReFreeKV, SnapKV, Streaming
from refreekv_cpp._sequence import PrunedSequence
from refreekv_cpp.cli.options import LoadOptions
from refreekv_cpp.options import HELP, OPTIONS, VARIABLES, KVOptions
from refreekv_cpp.policies import REGISTRY, as_policy
from refreekv_cpp.server.settings import ModelSettings

# -- policies as text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("full", Full()),
        ("refreekv:theta=0.01", ReFreeKV(theta=0.01)),
        ("refreekv:theta=1e-3:n_hot=128", ReFreeKV(theta=0.001, n_hot=128)),
        ("refreekv:rows=mean:sinks_in_measure=true", ReFreeKV(rows="mean", sinks_in_measure=True)),
        ("refreekv:n_hot=none", ReFreeKV()),
        ("paper:threshold=0.02", ReFreeKV.paper(threshold=0.02)),
        ("streaming:0.3", Streaming(budget=0.3)),
        ("streaming:300:n_sink=8", Streaming(budget=300, n_sink=8)),
        ("snapkv:pooling=mean", SnapKV(pooling="mean")),
    ],
)
def test_a_policy_as_text(text: str, policy: Any) -> None:
    assert as_policy(text) == policy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("refrekv:theta=1", "unknown, did you mean 'refreekv'? must be one of 'full', 'refreekv'"),
        ("refreekv:tetha=1", "ReFreeKV has no option 'tetha', did you mean 'theta'? its options are: threshold,"),
        ("refreekv:theta=2", "theta=2: must be from 0 to less than 1"),
        ("refreekv:max_error=1", "max_error=1: must be from 0 to less than 1"),
        ("refreekv:theta=0:max_error=0.1", "max_error=0.1: needs theta"),
        ("refreekv:rows=first", "rows='first': must be one of 'last', 'mean', 'worst'"),
        ("refreekv:sinks_in_measure=2", "sinks_in_measure=2: must be one of True, False"),
        ("refreekv:theta=0.1:theta=0.2", "'theta=0.2': theta has a value already, 0.1"),
        ("refreekv:", "'': must be PARAMETER=VALUE; the parameters are: threshold, ranking"),
        ("streaming:n_sink=2:0.4", "'0.4': must be PARAMETER=VALUE; the parameters are: budget, n_sink, n_min"),
        ("streaming:lots", "budget='lots': must be a number"),
        ("full:0.4", "'0.4': must be PARAMETER=VALUE; the parameters are: none"),
        ("full:budget=0.4", "Full has no option 'budget'"),
    ],
)
def test_a_text_that_is_no_policy(text: str, message: str) -> None:
    with pytest.raises(PolicyError) as raised:
        as_policy(text)
    assert str(raised.value).startswith(f"kv_policy={text!r}: ")
    assert message in str(raised.value)


def test_a_name_by_itself_is_what_the_registry_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Streaming(budget=0.3)
    monkeypatch.setitem(REGISTRY, "mine", lambda: mine)
    assert as_policy("mine") is mine
    assert as_policy("mine:0.4") == Streaming(budget=0.4)


def test_the_same_text_everywhere(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, policy = "streaming:0.3:n_sink=8", Streaming(budget=0.3, n_sink=8)
    assert Llama(str(tiny_model), kv_policy=text, verbose=False).kv_policy == policy
    assert LoadOptions(n_ctx="512", gpu_layers="0", kv_policy=text).load(tiny_model).kv_policy == policy
    settings = ModelSettings(model="a.gguf", kv_policy=text).llama_options()
    assert KVOptions.of(**settings).kv_policy == policy
    monkeypatch.setenv("REFREEKV_POLICY", text)
    assert KVOptions.of().kv_policy == policy


# -- written once ------------------------------------------------------------------------------------------------------


def test_llama_takes_and_has_each_option(tiny_model: Path) -> None:
    names = [name for name in inspect.signature(Llama.__init__).parameters if name.startswith("kv_")]
    assert names == list(OPTIONS) == [field.name for field in dataclasses.fields(KVOptions) if field.metadata]
    assert names == [name for name in PrunedSequence.__annotations__ if name.startswith("kv_")]
    llm = Llama(str(tiny_model), kv_policy="streaming", kv_protect=[[0, 4]], kv_cold_limit="1MiB", verbose=False)
    assert {name: getattr(llm, name) for name in names} == {
        "kv_policy": Streaming(),
        "kv_evicted": "keep",
        "kv_elastic": True,
        "kv_memory_limit": None,
        "kv_protect": ((0, 4),),
        "kv_cold": "auto",
        "kv_cold_dir": None,
        "kv_cold_limit": 2**20,
        "kv_cold_type": None,
        "kv_cold_state": True,
        "kv_library": None,
        "kv_library_limit": 4 * 2**30,
    }


def test_the_server_has_a_setting_for_each_that_is_one_text() -> None:
    fields = ModelSettings.model_fields
    assert {name: field.description for name, field in fields.items() if name in OPTIONS} == {
        name: text for name, text in HELP.items() if name != "kv_protect"
    }
    defaults = {name: OPTIONS[name].default for name in fields if name in OPTIONS}
    assert {name: fields[name].default for name in defaults} == {**defaults, "kv_policy": "refreekv"}


def test_the_environment_says_some() -> None:
    assert VARIABLES == {
        "kv_policy": "REFREEKV_POLICY",
        "kv_evicted": "REFREEKV_EVICTED",
        "kv_memory_limit": "REFREEKV_MEMORY_LIMIT",
        "kv_library": "REFREEKV_LIBRARY",
    }


@pytest.mark.parametrize("evicted", ["drop", "recompute"])
def test_max_error_needs_rows_to_read(evicted: str) -> None:
    with pytest.raises(PolicyError, match=r"max_error .* must be one of 'keep', 'restore'"):
        KVOptions.of(kv_policy="refreekv:max_error=0.1", kv_evicted=evicted)
    KVOptions.of(kv_policy="refreekv:max_error=0.1")
