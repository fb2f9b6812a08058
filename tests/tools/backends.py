"""The policies on another backend, beside the CPU: docs/lab/backends.md.

    python tests/tools/backends.py [--env NAME=VALUE ...] [--rpc HOST:PORT,HOST:PORT] [--policy NAME ...] [--n-ctx N]

Runs the table policies x scenarios twice, in a process of its own each: on the CPU, with every other device hidden,
and with its layers on what llama.cpp finds (or on RPC servers). On CUDA a cache of these small models grows in place
from `--n-ctx 262144` on (native/cache/region-cuda.cpp). Prints a Markdown table. A cell says whether the same
tokens came out, or which was the first that differs; how far the logits are apart up to there; and in how many cells
the layers differ. The exit code is 1 when tokens differ that were further apart than the logits are, when logits differ
by more than 0.05, or keys and values came to the host.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import _helpers  # noqa: F401  (first: it makes the imports of functions possible)
import numpy as np
import numpy.typing as npt
import typer

# no device but the CPU: hidden, or where it cannot be (Metal), with nothing put on it. Hiding is better: n_gpu_layers=0
# alone gives weights other kernels on the CPU
NO_DEVICES = {"CUDA_VISIBLE_DEVICES": "", "GGML_VK_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
ON_CPU: dict[str, Any] = {"n_gpu_layers": 0, "op_offload": False} if sys.platform == "darwin" else {}

MOST_DISTANCE = 0.05  # of two logits; other kernels for the weights are 1e-2 apart

N_PROMPT = 1060
N_ANSWER = 12
Q8_0 = 8  # ggml's number


@dataclass(frozen=True)
class Scenario:
    """One way to use the cache. `options` are `Llama`'s; `model` is of `tiny.TINY_MODELS`."""

    model: str = "gqa64"
    options: dict[str, Any] = field(default_factory=dict)
    second_turn: bool = False
    state: bool = False


SCENARIOS = {
    "all layers": Scenario(),
    "flash attention": Scenario(options={"flash_attn": True}),
    "q8_0 cache": Scenario(options={"flash_attn": True, "type_k": Q8_0, "type_v": Q8_0}),
    "half of the layers": Scenario(options={"n_gpu_layers": 3}),  # two, and the output
    "offload_kqv=False": Scenario(options={"offload_kqv": False}),
    "second turn, restored": Scenario(second_turn=True),
    "saved and loaded": Scenario(state=True),
}

TABLE_POLICIES = ["full", "refreekv", "paper", "released-code", "streaming", "snapkv", "h2o", "pyramidkv", "top-p"]
CODES = "refreekv, codes"
KERNELS = "refreekv, kernels"
"""The codes of our kernels: on the CPU, and on a device that has them (--env REFREEKV_DEVICE_KERNELS=1)."""
CODES_OF_KERNELS = "refreekv, kernels without rows"
"""The same on a device that reads no exact rows, as Metal: no cell draws so much."""


@dataclass(frozen=True)
class Answer:
    """What came of one run. logits: [n_tokens, n_vocab], those that each token was chosen by."""

    tokens: list[int]
    logits: npt.NDArray[np.float32]
    kept: list[list[int]]
    bytes_read: int
    bytes_bounced: int
    bytes_most: int
    places: frozenset[str]  # names of the buffer types that the cache lies in


def answer(model: Path, policy: str, scenario: Scenario, **options: Any) -> Answer:
    """Read a prompt, prune, go on greedily."""
    from policies import POLICIES, Debug
    from support import ctx_of, kept, load, logits
    from tiny import random_tokens

    from refreekv_cpp import ReFreeKV, native

    # as on a device on the CPU, too: there our kernel has codes of its own
    by_codes = Debug(policy=ReFreeKV(), by_graph=True, theta=0.003)
    named = {**POLICIES, CODES: by_codes, KERNELS: ReFreeKV(theta=0.003), CODES_OF_KERNELS: ReFreeKV(theta=0.999)}
    chosen = named.get(policy, policy)
    defaults = {"kv_elastic": True, "n_gpu_layers": -1}
    llm = load(
        model, chosen, codes=policy in (CODES, KERNELS, CODES_OF_KERNELS), **{**defaults, **scenario.options, **options}
    )
    evicts = policy != "full"
    llm.eval(random_tokens(N_PROMPT))
    rows = [logits(llm)]
    if evicts:
        llm.prune_kv()
    if scenario.second_turn:
        llm.eval(random_tokens(20, seed=1)[1:])
        if evicts:
            native.restore(ctx_of(llm), 0)
        llm.eval(random_tokens(300, seed=2)[1:])
        rows = [logits(llm)]
        if evicts:
            llm.prune_kv()
    cells = kept(llm)
    bytes_most = llm.kv_stats.bytes
    if scenario.state:
        state = llm.save_state()
        llm.reset()
        llm.eval(random_tokens(5))
        llm.load_state(state)
    for _ in range(N_ANSWER - 1):
        llm.eval([int(rows[-1].argmax())])
        rows.append(logits(llm))
    stats = llm.kv_stats
    llm.close()
    places = frozenset(buffer.name for buffer in stats.buffers if buffer.context > 0)
    tokens = [int(row.argmax()) for row in rows]
    return Answer(tokens, np.array(rows), cells, stats.bytes_read, stats.bytes_bounced, bytes_most, places)


@dataclass(frozen=True)
class Difference:
    """Of an answer from the CPU's.

    Attributes:
        first: the first token that differs; None: none does.
        distance: the largest between two logits, up to that token.
        gap: between the two logits of the CPU's that the two tokens have there.
        kept: cells, over all layers, that only one of them kept.
    """

    first: int | None
    distance: float
    gap: float
    kept: int

    @classmethod
    def of(cls, ours: Answer, cpus: Answer) -> Difference:
        pairs = enumerate(zip(ours.tokens, cpus.tokens, strict=True))
        first = next((i for i, (a, b) in pairs if a != b), None)
        end = N_ANSWER if first is None else first + 1
        row = cpus.logits[first or 0]
        return cls(
            first,
            float(np.abs(ours.logits[:end] - cpus.logits[:end]).max()),
            0.0 if first is None else float(row[cpus.tokens[first]] - row[ours.tokens[first]]),
            sum(len(set(a) ^ set(b)) for a, b in zip(ours.kept, cpus.kept, strict=True)),
        )

    @property
    def is_a_tie(self) -> bool:
        """The tokens differ by no more than the logits do anyway."""
        return self.gap <= 2 * self.distance

    def __str__(self) -> str:
        tokens = "=" if self.first is None else f"token {self.first + 1} (gap {self.gap:.1g})"
        return f"{tokens} {self.distance:.0e}" + (f", {self.kept} cells" if self.kept else "")


def run_all(policies: list[str], rpc: str, options: dict[str, Any]) -> dict[tuple[str, str], Answer]:
    """Every policy in every scenario, in this process."""
    from tiny_architectures import tiny_models

    if rpc:
        from rpc import add_servers

        add_servers(rpc.split(","))
    models = tiny_models(Path(tempfile.mkdtemp(prefix="refreekv-backends-")))
    res = {}
    for name, scenario in SCENARIOS.items():
        for policy in policies:
            res[policy, name] = answer(models(scenario.model), policy, scenario, **options)
            print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return res


def in_a_process(
    policies: list[str], environment: dict[str, str], n_ctx: int, rpc: str = "", *, on_cpu: bool = False
) -> dict[tuple[str, str], Answer]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "answers"
        command = [sys.executable, __file__, "--out", str(out), "--rpc", rpc, "--n-ctx", str(n_ctx)]
        command += ["--on-cpu"] if on_cpu else []
        subprocess.run(
            [*command, *(f"--policy={policy}" for policy in policies)], check=True, env={**os.environ, **environment}
        )
        answers: dict[tuple[str, str], Answer] = pickle.loads(out.read_bytes())
        return answers


def main(
    env: Annotated[list[str] | None, typer.Option(help="Of the process with the devices, NAME=VALUE.")] = None,
    policy: Annotated[list[str] | None, typer.Option(help="Rows of the table.")] = None,
    rpc: Annotated[str, typer.Option(help="llama.cpp's RPC servers, HOST:PORT,...: the layers go there.")] = "",
    n_ctx: Annotated[int, typer.Option(help="Of all contexts.")] = 2048,
    out: Annotated[Path | None, typer.Option(hidden=True)] = None,
    on_cpu: Annotated[bool, typer.Option("--on-cpu", hidden=True)] = False,
) -> None:
    policies = policy or [*TABLE_POLICIES, CODES]
    if out is not None:
        out.write_bytes(pickle.dumps(run_all(policies, rpc, {"n_ctx": n_ctx, **(ON_CPU if on_cpu else {})})))
        return

    cpus = in_a_process(policies, NO_DEVICES, n_ctx, on_cpu=True)
    ours = in_a_process(policies, dict(pair.split("=", 1) for pair in env or []), n_ctx, rpc)

    failed = False
    print(f"| | {' | '.join(SCENARIOS)} |\n|{'---|' * (len(SCENARIOS) + 1)}")
    for name in policies:
        differences = [Difference.of(ours[name, scenario], cpus[name, scenario]) for scenario in SCENARIOS]
        failed |= any(difference.first is not None and not difference.is_a_tie for difference in differences)
        failed |= any(difference.distance > MOST_DISTANCE for difference in differences)
        print(f"| {name} | {' | '.join(map(str, differences))} |")
    read = max(answer.bytes_read for answer in ours.values())
    bounced = sum(answer.bytes_bounced for answer in ours.values())
    n_on_cpu = sum(answer.places == {"CPU"} for answer in ours.values())
    places = sorted(set().union(*(answer.places for answer in ours.values())))
    print(f"\nThe cache lay in {', '.join(places)}; in {n_on_cpu} of {len(ours)} runs in CPU alone.")
    most = max(answer.bytes_most for answer in ours.values())
    print(f"K and V took at most {most / 2**20:.3g} MiB. Contexts of {n_ctx} cells.")
    print(f"Read back by prunings: at most {read} bytes a run. Keys and values that came to the host: {bounced} bytes.")
    raise SystemExit(int(failed or bounced > 0))


if __name__ == "__main__":
    typer.run(main)
