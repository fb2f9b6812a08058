"""`refreekv serve`: llama.cpp's server with a cache that each of its slots prunes and restores by itself."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from command import assert_one_error_line, refreekv
from serving import free_port, send, serving, user
from tiny import N_SPECIAL

from refreekv_cpp import Llama, PythonPolicy, llama_server
from refreekv_cpp.errors import PolicyError
from refreekv_cpp.options import KVOptions

QUICK = ["--n-ctx", "2048", "--threads", "1", "--log-verbosity", "1"]
STREAMING = ["--kv-policy", "streaming"]
PRINTABLE = [[N_SPECIAL + byte, False] for byte in (*range(32), *range(127, 256))] + [[2, False]]
LONG = "".join(chr(97 + i * i % 26) for i in range(1500))
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


@pytest.fixture(scope="module")
def client(tiny_model: Path) -> Iterator[openai.OpenAI]:
    with serving(tiny_model, *QUICK, *STREAMING, "--api-key", "secret") as client:
        yield client


def answer(client: openai.OpenAI, prompt: str, *, n: int = 8, **options: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "n_predict": n, "temperature": 0, "logit_bias": PRINTABLE, **options}
    status, text = send(client, "/completion", body)
    assert status == 200, text
    result: dict[str, Any] = json.loads(text)
    return result


def get(client: openai.OpenAI, path: str) -> str:
    url = str(client.base_url).removesuffix("/v1/") + path
    response = client._client.get(url, headers={"Authorization": "Bearer secret"})
    return response.text


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# -- the cache ---------------------------------------------------------------------------------------------------------


def test_a_slot_prunes_its_prompt_and_says_so(client: openai.OpenAI) -> None:
    said = answer(client, LONG)
    receipt = said["timings"]
    names = {"kv_n_tokens", "kv_cells_kept", "kv_bytes_kept", "kv_bytes_full", "kv_prune_ms"}
    assert {name for name in receipt if name.startswith("kv_")} == names
    assert all(isinstance(value, (int, float)) for value in receipt.values())  # clients take them for numbers
    assert receipt["kv_n_tokens"] == said["tokens_evaluated"] + 8 - 1  # the last one is not read
    assert 0.3 < receipt["kv_cells_kept"] / receipt["kv_n_tokens"] < 0.6
    assert receipt["kv_bytes_kept"] / receipt["kv_bytes_full"] == pytest.approx(
        receipt["kv_cells_kept"] / receipt["kv_n_tokens"], rel=0.01
    )
    assert receipt["kv_prune_ms"] > 0

    figures = dict(line.split() for line in get(client, "/metrics").splitlines() if line.startswith("llamacpp:kv_"))
    assert float(figures["llamacpp:kv_prunes_total"]) >= 1
    assert 0 < float(figures["llamacpp:kv_bytes"]) < float(figures["llamacpp:kv_bytes_full"])
    assert float(figures["llamacpp:kv_turns_failed_total"]) == 0

    slots = json.loads(get(client, "/slots"))
    assert len(slots) == 4
    [pruned] = [slot["kv"] for slot in slots if slot["kv"]["n_tokens"] > len(LONG)]
    assert len(pruned["layers"]) == 4
    for layer in pruned["layers"]:
        assert layer["cells_kept"] + layer["cells_evicted"] == pruned["n_tokens"]

    # short prompts are left whole: what was pruned before is none of this request's
    receipt = answer(client, "x")["timings"]
    assert receipt["kv_cells_kept"] == receipt["kv_n_tokens"] < 20
    assert receipt["kv_prune_ms"] == 0


def test_a_request_that_ends_with_its_first_token_is_pruned_too(tiny_model: Path) -> None:
    with serving(tiny_model, *QUICK, *STREAMING) as client:
        answer(client, LONG, n=1)
        wait_until(lambda: not any(slot["is_processing"] for slot in json.loads(get(client, "/slots"))))
        kept = [slot["kv"]["cells_kept"] for slot in json.loads(get(client, "/slots"))]
        assert 0 < max(kept) < 1000


@pytest.mark.parametrize("policy", ["full", "streaming", "refreekv", "refreekv:theta=0"])
def test_it_answers_as_llama_does(tiny_model: Path, policy: str) -> None:
    llm = Llama(str(tiny_model), kv_policy=policy, n_ctx=2048, n_threads=1, verbose=False)
    bias = {token: -100.0 for token, _ in PRINTABLE}
    expected = llm.create_completion(LONG, max_tokens=32, temperature=0, logit_bias=bias)["choices"][0]["text"]
    with serving(
        tiny_model, *QUICK, "--kv-policy", policy, "--no-flash-attn" if policy == "full" else "--flash-attn"
    ) as client:
        assert answer(client, LONG, n=32)["content"] == expected


def test_protected_positions_stay(tiny_model: Path) -> None:
    protect = ["--option", "kv_protect=[[0, 900]]"]
    with serving(tiny_model, *QUICK, "--kv-policy", "streaming:budget=0.1", *protect) as client:
        assert answer(client, LONG)["timings"]["kv_cells_kept"] >= 900
        # another prompt in the same slot
        assert answer(client, "z" * 1500)["timings"]["kv_cells_kept"] >= 900


def test_several_at_once_get_what_they_get_alone(client: openai.OpenAI) -> None:
    prompts = [char + LONG[i:] for i, char in enumerate("abcdefgh")]
    alone = [answer(client, prompt, n=32, cache_prompt=False)["content"] for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(lambda prompt: answer(client, prompt, n=32, cache_prompt=False)["content"], prompts))
    assert together == alone


@pytest.mark.parametrize("policy", ["streaming", "refreekv"])
@pytest.mark.parametrize(
    ("evicted", "reads_again"), [("keep", False), ("restore", False), ("recompute", True), ("drop", False)]
)
def test_the_next_turn_goes_on(tiny_model: Path, policy: str, evicted: str, reads_again: bool) -> None:
    with serving(tiny_model, *QUICK, "--kv-policy", policy, "--kv-evicted", evicted) as client:
        first = answer(client, LONG)
        second = answer(client, LONG + first["content"] + "and?")
        cached = second["timings"]["cache_n"]
        assert cached == (0 if evicted == "recompute" else first["tokens_evaluated"] + 8 - 1)
        assert second["timings"]["kv_cells_kept"] < 1200
        # another end of the same conversation: what a pruning has looked at is cut
        other = answer(client, LONG[:1000] + "quite another end")
        assert len(other["content"]) == 8
        # the same prompt again
        again = answer(client, LONG[:1000] + "quite another end")
        assert len(again["content"]) == 8


@pytest.mark.parametrize("policy", ["streaming", "refreekv:theta=0"])
def test_what_comes_back_is_what_was_there(tiny_model: Path, policy: str) -> None:
    """The second answer is that of a server that has read all of it at once."""
    with serving(tiny_model, *QUICK, "--kv-policy", policy, "--kv-evicted", "restore") as client:
        first = answer(client, LONG)
        prompt = LONG + first["content"] + "and?"
        second = answer(client, prompt)
        assert second["timings"]["cache_n"] > 1000
        assert second["content"] == answer(client, prompt, cache_prompt=False)["content"]


def test_conversations_keep_their_slots(client: openai.OpenAI) -> None:
    talks = ["x" * 900, "y" * 700, "A title for z z z z z z"]
    for turn in range(3):
        for i, talk in enumerate(talks):
            said = answer(client, talk)
            assert turn == 0 or said["timings"]["prompt_n"] < 60
            talks[i] = talk + said["content"] + "And?"


@pytest.mark.parametrize("evicted", ["keep", "drop"])
def test_a_conversation_whose_slot_was_taken_comes_back_from_memory(tiny_model: Path, evicted: str) -> None:
    options = ["--parallel", "1", "--kv-policy", "refreekv", "--kv-evicted", evicted, "--no-library"]
    with serving(tiny_model, *QUICK, *options) as client:
        first = answer(client, LONG)
        answer(client, "z" * 1000)
        second = answer(client, LONG + first["content"] + "and?")
        assert second["timings"]["cache_n"] == first["tokens_evaluated"] + 8 - 1
        assert second["timings"]["kv_cells_kept"] < 1200


def test_a_longer_prompt_than_the_limit_is_pruned_while_it_is_read(tiny_model: Path) -> None:
    limit = ["--kv-memory-limit", "400KiB", "--parallel", "2"]
    with serving(tiny_model, *QUICK, *STREAMING, *limit, "--batch-size", "256") as client:
        said = answer(client, LONG)
        assert said["timings"]["prompt_n"] == said["tokens_evaluated"]
        assert len(said["content"]) == 8
        assert float(get(client, "/metrics").split("kv_prunes_total ")[-1].split()[0]) > 1


def test_the_model_has_the_name_of_its_file(client: openai.OpenAI, tiny_model: Path) -> None:
    assert [model.id for model in client.models.list()] == [tiny_model.stem]


# -- requests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "part"),
    [
        ("/v1/completions", {"prompt": "x" * 3000}, "exceeds the available context size"),
        ("/v1/completions", {"prompt": "x", "grammar": "root ::= ("}, "grammar"),
        ("/v1/completions", b"{", "parse error"),
        ("/v1/chat/completions", {"messages": "x"}, "messages"),
        ("/v1/chat/completions", {"messages": user([IMAGE])}, "image input is not supported"),
        ("/apply-template", {"messages": user("x"), "grammar": 'root ::= "a"', "json_schema": {}}, "both json_schema"),
        ("/v1/messages", {"max_tokens": 4}, "'messages' is required"),
        ("/detokenize", {"tokens": [5, 10**9]}, "1000000000 is not a token of this model"),
        ("/tokenize", {"content": [5, -1], "with_pieces": True}, "-1 is not a token of this model"),
    ],
    ids=["too long", "grammar", "no json", "messages", "image", "two grammars", "no messages", "token", "piece"],
)
def test_a_request_that_is_not_valid_is_400(client: openai.OpenAI, path: str, body: Any, part: str) -> None:
    status, text = send(client, path, body)
    assert status == 400, text
    assert part in json.loads(text)["error"]["message"]
    assert len(answer(client, "x")["content"]) == 8


def test_messages_that_the_template_refuses_are_400(tiny_model: Path) -> None:
    template = (
        "{% if messages[0].content == 'bad' %}{{ raise_exception('not that') }}{% endif %}{{ messages[0].content }}"
    )
    with serving(tiny_model, *QUICK, "--chat-template", template) as client:
        assert send(client, "/v1/chat/completions", {"messages": user("good"), "max_tokens": 1})[0] == 200
        status, text = send(client, "/v1/chat/completions", {"messages": user("bad")})
        assert status == 400, text
        assert "not that" in text


def test_a_wrong_key_is_refused(client: openai.OpenAI) -> None:
    status, _ = send(client, "/v1/completions", {"prompt": "x"}, key="wrong")
    assert status == 401


# tens of thousands of tokens, although the model has 4096
ROOMY = ["--n-ctx", "32768", "--override-kv", "llama.context_length=int:32768", "--no-library"]
ROOMY += ["--parallel", "1", "--threads", "1", "--log-verbosity", "1"]


@contextlib.contextmanager
def asking(client: openai.OpenAI, prompt: str) -> Iterator[socket.socket]:
    """A client that asks for a stream without an end, and leaves."""
    body = {"prompt": prompt, "n_predict": 100000, "ignore_eos": True, "stream": True, "temperature": 0}
    request = json.dumps(body).encode()
    with socket.create_connection((client.base_url.host, client.base_url.port or 80)) as connection:
        head = "POST /completion HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(request)}\r\n\r\n"
        connection.sendall(head.encode() + request)
        yield connection


def metric(client: openai.OpenAI, name: str) -> float:
    return float(re.findall(rf"^llamacpp:{name} (\S+)", get(client, "/metrics"), re.MULTILINE)[0])


@pytest.mark.parametrize("policy", ["full", "streaming"])
def test_clients_that_leave_free_their_slot_and_their_place(tiny_model: Path, policy: str) -> None:
    """One leaves in the middle of its answer, one while its long prompt waits for the slot."""
    with serving(tiny_model, *ROOMY, "--kv-policy", policy) as client:
        with asking(client, "x") as first:
            first.recv(1000)
            with asking(client, "y" * 30000):
                pass
        assert len(answer(client, "z")["content"]) == 8
        assert metric(client, "tokens_predicted_total") < 30000
        assert metric(client, "prompt_tokens_total") < 30000


def test_who_leaves_the_queue_together_with_the_one_before_is_given_no_slot(tiny_model: Path) -> None:
    """Otherwise a batch of its prompt would be read."""
    with serving(tiny_model, *ROOMY, *STREAMING) as client:
        for _ in range(5):
            with asking(client, "x") as first, asking(client, "y" * 30000):
                first.recv(1000)
                wait_until(lambda: metric(client, "requests_deferred") == 1)
            assert len(answer(client, "z")["content"]) == 8
        assert metric(client, "prompt_tokens_total") < 512


def test_a_client_that_leaves_while_its_prompt_is_read(tiny_model: Path) -> None:
    with serving(tiny_model, *ROOMY, *STREAMING, "--batch-size", "32") as client:
        with asking(client, "y" * 30000):
            pass
        assert len(answer(client, "z")["content"]) == 8
        assert metric(client, "prompt_tokens_total") < 30000


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["full", "streaming", "refreekv"])
def test_a_draft_changes_no_answer(tiny_model: Path, policy: str) -> None:
    draft = ["--model-draft", str(tiny_model), "--spec-type", "draft-simple", "--spec-draft-n-max", "4"]
    said = []
    for options in ([], draft):
        with serving(tiny_model, *QUICK, "--kv-policy", policy, "--parallel", "1", *options) as client:
            first = answer(client, LONG, n=32)
            second = answer(client, LONG + first["content"] + "and?", n=32)
            assert second["timings"]["cache_n"] > 1500
            said.append((first["content"], second["content"]))
    assert second["timings"]["draft_n"] > 0
    assert said[0] == said[1]


@pytest.mark.parametrize("name", ["falcon-h1 (hybrid)", "gemma3 (sliding window)"])
@pytest.mark.parametrize("policy", ["streaming", "refreekv"])
def test_models_with_other_layers_answer_as_in_llama(tiny: Callable[[str], Path], name: str, policy: str) -> None:
    llm = Llama(str(tiny(name)), kv_policy=policy, n_ctx=2048, n_threads=1, verbose=False)
    bias = {token: -100.0 for token, _ in PRINTABLE}
    expected = llm.create_completion(LONG, max_tokens=8, temperature=0, logit_bias=bias)["choices"][0]["text"]
    with serving(tiny(name), *QUICK, "--kv-policy", policy, "--parallel", "1") as client:
        said = answer(client, LONG)
        assert said["content"] == expected
        assert said["timings"]["kv_cells_kept"] < 1000
        assert answer(client, LONG + expected + "and?")["timings"]["cache_n"] > 1400


def test_a_model_that_can_have_no_policy_is_refused(tiny: Callable[[str], Path]) -> None:
    assert_one_error_line(refreekv("serve", tiny("mamba (recurrent)")), 'kv_policy="full" runs it')


def test_without_a_policy_nothing_is_logged_about_it(tiny_model: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with serving(tiny_model, *QUICK, "--kv-policy", "full", "--log-file", str(log)) as client:
        answer(client, "x")
    assert "refreekv" not in log.read_text().replace(str(tiny_model), "")


# -- the command -------------------------------------------------------------------------------------------------------


def test_it_ends_with_ctrl_c(tiny_model: Path) -> None:
    port = str(free_port())
    code = "from refreekv_cpp.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", str(tiny_model), *QUICK, "--port", port, "--gpu-layers", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert f"http://127.0.0.1:{port}/v1" in process.stderr.readline()
    with contextlib.suppress(openai.APIConnectionError):
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=8).models.list()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    process.stderr.close()


def test_a_model_that_cannot_be_loaded_is_its_exit_code(tmp_path: Path) -> None:
    (tmp_path / "no.gguf").write_text("no")
    assert refreekv("serve", tmp_path / "no.gguf", "--gpu-layers", "0", "--n-ctx", "512").exit_code == 2


def test_what_cannot_be_served_is_one_line(tiny_model: Path) -> None:
    assert_one_error_line(refreekv("serve", tiny_model, "--config_file", "x.yaml"), "which --python runs")
    assert_one_error_line(refreekv("serve", tiny_model, "--ssl_keyfile", "x"), "--python")
    assert_one_error_line(refreekv("serve", tiny_model, "--models-dir", "x"), "a `refreekv serve` of its own")
    assert_one_error_line(refreekv("serve", tiny_model, "--kv-policy", "refrekv"), "did you mean 'refreekv'")
    quiet = ["--gpu-layers", "0", "--n-ctx", "512"]
    assert_one_error_line(refreekv("serve", tiny_model, *quiet, "--option", "logits_all=true"), "--usage")


class OnlyLast(PythonPolicy):
    def select(self, attention: Any, positions: Any, layer: int) -> Any:
        return positions == positions[-1]


def test_the_options_of_llama_are_those_of_the_server(tiny_model: Path) -> None:
    options = {
        "n_ctx": 512,
        "n_threads": 2,
        "n_gpu_layers": 0,
        "type_k": 8,
        "kv_policy": "refreekv:theta=0.01",
        "kv_protect": [[0, 8]],
        "kv_cold": "memory",
    }
    line = llama_server.arguments(tiny_model, options, slots=3, host="h", port=1)
    pairs = dict(itertools.pairwise(line))
    assert pairs["--ctx-size"] == "1536"
    assert pairs["--kv-unified-per-slot"] == "512"
    assert pairs["--cache-type-k"] == "q8_0"
    assert pairs["--flash-attn"] == "on"
    policy = json.loads(pairs["--kv-policy"])
    assert policy["theta"] == pytest.approx(0.01)
    assert (policy["evicted"], policy["protect"], "cold_dir" in policy) == ("keep", [[0, 8]], False)

    assert llama_server.policy_text(KVOptions.of(kv_policy="full")) is None
    with pytest.raises(PolicyError, match="--python"):
        llama_server.policy_text(KVOptions.of(kv_policy="streaming", kv_protect="system"))
    with pytest.raises(PolicyError, match="OnlyLast"):
        llama_server.policy_text(KVOptions.of(kv_policy=OnlyLast()))


def test_what_the_server_would_move_in_a_pruned_cache(client: openai.OpenAI) -> None:
    answer(client, LONG)
    assert answer(client, LONG[:20] + LONG[100:], n_cache_reuse=1)["timings"]["kv_n_tokens"] > 0
    answer(client, LONG)  # it is still there


def test_a_grammar_of_many_groups_is_refused(client: openai.OpenAI) -> None:
    grammar = "root ::= " + "(" * 16000 + '"a"' + ")" * 16000
    status, text = send(client, "/completion", {"prompt": "x", "n_predict": 1, "grammar": grammar})
    assert status == 400, text
    answer(client, "x")
