"""Random requests, valid and not, of several clients at once to `refreekv serve`.

    python tests/tools/server_fuzz.py [--seconds 600] [--clients 8] [--seed 0]

A tiny model. Valid prompts are asked alone first. Then clients send damaged requests, leave in the middle of answers
and ask for long texts; each valid request between them has to be given the answer that it was given alone. The server
must not end, must answer each request within two minutes, must not answer with the status 500, which would blame the
server for what the client has sent, and may not grow after the first third of the time.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import socket
import tempfile
import threading
import time
from collections import Counter
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import _helpers  # noqa: F401  (first: it makes the other imports possible)
import psutil
import typer
from serving import serving
from tiny import N_SPECIAL, TinyModel

from refreekv_cpp._cache_dir import VARIABLE

_N_PROMPTS = 24
_SECONDS_PER_ANSWER = 120.0
_MOST_GROWTH = 32 << 20
# no end of the text, and no bytes that are no characters by themselves
_PRINTABLE = [[N_SPECIAL + byte, False] for byte in (*range(32), *range(127, 256))] + [[2, False]]

_PATHS = [
    *["/completion"] * 6,
    *["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/apply-template", "/embedding"],
    *["/infill", "/slots/0?action=erase", "/slots/99?action=save", "/props", "/lora-adapters", "/v1/messages"],
    "/nothing",
]
_NAMES = [
    *["prompt", "n_predict", "temperature", "top_k", "top_p", "min_p", "n_probs", "stop", "logit_bias", "stream"],
    "seed",
    *["grammar", "json_schema", "samplers", "id_slot", "cache_prompt", "n_keep", "n_discard", "min_keep", "mirostat"],
    *["dry_multiplier", "dry_sequence_breakers", "repeat_last_n", "typical_p", "t_max_predict_ms", "n_indent", "lora"],
    *["response_fields", "post_sampling_probs", "return_tokens", "timings_per_token", "ignore_eos", "n", "messages"],
    *["tools", "tool_choice", "response_format", "max_tokens", "content", "tokens", "input", "echo", "logprobs"],
    "with_pieces",
]
_VALUES: list[Any] = [
    *[None, True, False, 0, -1, 1, 7, 1.5, -1e308, 1e308, 2**31, 2**63, 2**64, -(2**63), "", "x", "x" * 5000, "\ud800"],
    *[[], {}, [[]], [{}], {"a": None}, ["x"], [1, 2, 3], [[1, -100]], [[10**9, 1.0]], [[-1, "x"]], ["\x00", ""]],
    *[[10**9], [-1]],
    *[{"type": "object", "properties": {"a": {"type": "integer"}}}, {"type": "json_object"}, {"$ref": "#"}],
    *['root ::= "a"', "root ::= root", 'root ::= "a"{1,99999}', "root ::= (", {"role": "user", "content": "x"}],
    *[[{"role": "user", "content": "x"}], [{"role": "nobody"}], [{"role": "user", "content": [{"type": "image_url"}]}]],
]


class Server:
    """What a client sends to, and what comes back."""

    def __init__(self, port: int) -> None:
        self.port = port

    def send(self, method: str, path: str, data: bytes | None, most: int | None = None) -> tuple[int, bytes]:
        """Status and body. most: bytes of the body to read before the connection is closed."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=_SECONDS_PER_ANSWER)) as connection:
            connection.request(method, path, data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read() if most is None else response.read(most)

    def raw(self, data: bytes) -> None:
        """Bytes that need be no HTTP; the connection is closed after the first answer, if there is one soon."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection, suppress(OSError):
            connection.sendall(data)
            connection.recv(1 << 16)

    def answer(self, body: dict[str, Any]) -> str:
        status, data = self.send("POST", "/completion", json.dumps(body).encode())
        assert status == 200, data
        if not body.get("stream"):
            content: str = json.loads(data)["content"]
            return content
        events = [line.removeprefix("data: ") for line in data.decode().splitlines() if line.startswith("data: ")]
        return "".join(json.loads(event)["content"] for event in events)


def valid_bodies(rng: random.Random) -> list[dict[str, Any]]:
    res = []
    for i in range(_N_PROMPTS):
        prompt = f"{i} " + "".join(chr(rng.randrange(32, 127)) for _ in range(rng.choice((5, 80, 400, 900, 1500))))
        body = {"prompt": prompt, "n_predict": rng.choice((1, 4, 16)), "temperature": 0, "logit_bias": _PRINTABLE}
        res.append({**body, "cache_prompt": False})
    return res


def damaged(rng: random.Random, bodies: list[dict[str, Any]]) -> bytes:
    """The body of a request that need not be valid. It asks for few tokens, so that others get most of the time."""
    body: Any = {**rng.choice(bodies), "n_predict": 4, "cache_prompt": rng.random() < 0.5}
    del body["logit_bias"]  # it is long, and says nothing about an error
    for _ in range(rng.choice((1, 1, 2, 4))):
        body[rng.choice(_NAMES)] = rng.choice(_VALUES)
    for name in ("n_predict", "max_tokens"):  # a valid long answer takes its time
        if isinstance(body.get(name), (int, float)) and not 0 <= body[name] <= 16:
            body[name] = 4
    if rng.random() < 0.1:
        body.pop("prompt", None)
    if rng.random() < 0.05:
        body = rng.choice(_VALUES)
    data = bytearray(json.dumps(body).encode())
    if rng.random() < 0.2:
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    if rng.random() < 0.05:
        data = bytearray(b"[" * rng.choice((10, 10_000)))
    return bytes(data)


def raw(rng: random.Random) -> bytes:
    head = b"POST /completion HTTP/1.1\r\nHost: x\r\n"
    return rng.choice(
        (
            rng.randbytes(rng.randrange(1, 300)),
            head + b"Content-Length: 100000000000\r\n\r\n{",
            head + b"Content-Length: -1\r\n\r\n{}",
            head + b"Transfer-Encoding: chunked\r\n\r\nffffffff\r\n{}",
            head + b"X: " + b"x" * 100_000 + b"\r\n\r\n",
            b"GET /" + b"%" * 2000 + b" HTTP/1.1\r\n\r\n",
            b"GET /slots/-1 HTTP/9.9\r\n\r\n",
            head,
        )
    )


class Client(threading.Thread):
    """One that goes on until the time is over, or something is wrong."""

    def __init__(self, server: Server, seed: str, bodies: list[dict[str, Any]], alone: list[str], end: float) -> None:
        super().__init__()
        self.server, self.bodies, self.alone, self.end_of_time = server, bodies, alone, end
        self.rng = random.Random(seed)
        self.count: Counter[str] = Counter()
        self.blamed: dict[str, str] = {}  # by what the server said with the status 500: a request
        self.wrong: list[str] = []
        self.last: Any = None

    def run(self) -> None:
        while time.monotonic() < self.end_of_time and not self.wrong:
            try:
                self.one()
            except Exception as error:
                self.wrong.append(f"{type(error).__name__}: {error}; it had sent {str(self.last)[-2000:]}")

    def one(self) -> None:
        rng, what = self.rng, self.rng.random()
        i = rng.randrange(len(self.bodies))
        if what < 0.4:
            body = {**self.bodies[i], "stream": rng.random() < 0.5}
            self.last = body
            found = self.server.answer(body)
            self.count["compared"] += 1
            if found != self.alone[i]:
                self.wrong.append(f"prompt {i}: {found!r}, alone {self.alone[i]!r}")
        elif what < 0.5:  # a client that leaves in the middle of a long answer
            body = {**self.bodies[i], "n_predict": 400, "stream": True}
            self.last = body
            self.server.send("POST", "/completion", json.dumps(body).encode(), rng.randrange(1, 2000))
            self.count["left"] += 1
        elif what < 0.55:
            self.last = raw(rng)
            self.server.raw(self.last)
            self.count["no HTTP"] += 1
        else:
            path = rng.choice(_PATHS)
            method = rng.choice(("POST", "POST", "POST", "GET", "DELETE"))
            data = damaged(rng, self.bodies)
            self.last = f"{method} {path} {data!r}"
            status, said = self.server.send(method, path, data)
            self.count[f"status {status}"] += 1
            if status == 500:
                self.blamed[said.decode()] = self.last


def server_process() -> psutil.Process:
    """The llama-server below this process."""
    [found] = [each for each in psutil.Process().children(recursive=True) if each.name() == "llama-server"]
    return found


def main(seconds: float = 600, clients: int = 8, seed: int = 0) -> None:
    rng = random.Random(seed)
    bodies = valid_bodies(rng)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[VARIABLE] = folder
        model = Path(folder) / "tiny.gguf"
        TinyModel(n_layer=2).write(model)
        options = ["--n-ctx", "2048", "--threads", "1", "--log-verbosity", "0", "--no-library"]
        with serving(model, *options, "--kv-policy", "refreekv", "--parallel", "4") as client:
            server = Server(int(client.base_url.port or 0))
            alone = [server.answer(body) for body in bodies]
            assert [server.answer(body) for body in bodies] == alone, "answers differ when asked again, alone"
            process = server_process()
            begin = time.monotonic()
            threads = [Client(server, f"{seed} {i}", bodies, alone, begin + seconds) for i in range(clients)]
            for thread in threads:
                thread.start()
            resident: list[tuple[float, int]] = []
            while any(thread.is_alive() for thread in threads):
                with suppress(psutil.NoSuchProcess):
                    resident.append(((time.monotonic() - begin) / seconds, process.memory_info().rss))
                time.sleep(min(1.0, seconds / 50))
            wrong = [each for thread in threads for each in thread.wrong]
            blamed = {said: request for thread in threads for said, request in thread.blamed.items()}
            wrong += [f"status 500: {said} for {request[:2000]}" for said, request in blamed.items()]
            if not wrong and [server.answer(body) for body in bodies] != alone:
                wrong.append("afterwards, answers are not what they were")
            count = sum((thread.count for thread in threads), Counter[str]())
    first = max((rss for at, rss in resident if at < 1 / 3), default=0)
    last = max((rss for at, rss in resident if at >= 1 / 3), default=0)
    print(f"{sum(count.values())} requests: {dict(sorted(count.items()))}")
    print(f"resident: {first / 2**20:.0f} MiB at most in the first third, {last / 2**20:.0f} MiB afterwards")
    if last > first + _MOST_GROWTH:
        wrong.append("the server has grown")
    print("\n".join(wrong) if wrong else "each answer was the one that is given alone")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    typer.run(main)
