"""A policy forced by the environment (native/api/environment.h), as upstream's tests run with it: in processes of
their own, since it is read once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest

# reads 100 tokens and one more in a context that nothing was asked for, through llama_cpp alone
PROGRAM = """
import json, sys
from refreekv_cpp import native
import llama_cpp
llm = llama_cpp.Llama(sys.argv[1], n_ctx=256, n_threads=1, n_threads_batch=1)
llm.eval(list(range(3, 103)))
llm.eval([5])
stats = native.stats(llm._ctx.ctx)
kept = [native.layer(llm._ctx.ctx, i).n_kept for i in range(stats.n_layer)]
print(json.dumps({"rings": stats.bytes_ring, "prunes": stats.n_prunes, "kept": kept}))
"""

# two turns through llama.h alone
CONVERSATION = """
import json, sys
from refreekv_cpp import native
import llama_cpp
params = llama_cpp.llama_context_default_params()
params.n_ctx, params.n_batch, params.n_threads, params.n_threads_batch = 2048, 512, 1, 1
model = llama_cpp.llama_model_load_from_file(sys.argv[1].encode(), llama_cpp.llama_model_default_params())
context = llama_cpp.llama_init_from_model(model, params)

def decode(*tokens):
    array = (llama_cpp.llama_token * len(tokens))(*(3 + token % 250 for token in tokens))
    assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(tokens))) == 0

steps = []
for tokens in [range(400), range(400), [5], [6], range(200), [7]]:
    decode(*tokens)
    stats = native.stats(context)
    steps.append([stats.n_prunes, stats.n_restores, stats.bytes_codes > 0])
llama_cpp.llama_free(context)
llama_cpp.llama_model_free(model)
print(json.dumps(steps))
"""


def run(path: Path, program: str = PROGRAM, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("REFREEKV_NATIVE_P")}
    return subprocess.run(
        [sys.executable, "-c", program, str(path)], env={**clean, **environment}, capture_output=True, text=True
    )


def report(path: Path, **environment: str) -> dict[str, Any]:
    done = run(path, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_context_that_asked_for_nothing_gets_the_policy(tiny_model: Path) -> None:
    assert report(tiny_model)["rings"] == 0
    forced = report(tiny_model, REFREEKV_NATIVE_POLICY="refreekv")
    assert forced["rings"] > 0
    assert forced["prunes"] == 0
    assert set(forced["kept"]) == {101}


@pytest.mark.parametrize("policy", ["streaming", "refreekv"])
def test_it_prunes_what_a_batch_has_read(tiny_model: Path, policy: str) -> None:
    pruned = report(tiny_model, REFREEKV_NATIVE_POLICY=policy, REFREEKV_NATIVE_PRUNE="tests")
    assert pruned["prunes"] == 1  # not after the single token
    assert min(pruned["kept"]) < 100


@pytest.mark.parametrize("policy", ["streaming", "refreekv"])
def test_a_program_that_knows_of_nothing_prunes_and_restores(tiny_model: Path, policy: str) -> None:
    done = run(tiny_model, CONVERSATION, REFREEKV_NATIVE_POLICY=policy, REFREEKV_NATIVE_PRUNE="auto")
    assert done.returncode == 0, done.stderr
    coded = policy == "refreekv"
    assert json.loads(done.stdout) == [
        [0, 0, False],
        [0, 0, False],
        [1, 0, coded],
        [1, 0, coded],
        [1, 1, False],
        [2, 1, coded],
    ]


def test_a_model_that_cannot_have_it_goes_without(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "not-causal.gguf"
    reader = gguf.GGUFReader(tiny_model)
    writer = gguf.GGUFWriter(path, "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind = field.types[0]
            writer.add_key_value(field.name, field.contents(), kind, field.types[1] if len(field.types) > 1 else None)
    writer.add_causal_attention(False)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    done = run(path, REFREEKV_NATIVE_POLICY="refreekv")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rings"] == 0
    assert "REFREEKV_NATIVE_POLICY does not apply to this context: llama: attention is not causal" in done.stderr


@pytest.mark.parametrize(
    ("environment", "valid"),
    [
        (
            {"REFREEKV_NATIVE_POLICY": "strict"},
            "REFREEKV_NATIVE_POLICY=strict: must be elastic, streaming or refreekv",
        ),
        (
            {"REFREEKV_NATIVE_POLICY": "elastic", "REFREEKV_NATIVE_PRUNE": "yes"},
            "REFREEKV_NATIVE_PRUNE=yes: must be auto or tests",
        ),
    ],
)
def test_what_is_valid_is_named(tiny_model: Path, environment: dict[str, str], valid: str) -> None:
    done = run(tiny_model, **environment)
    assert done.returncode != 0
    assert valid in done.stderr
