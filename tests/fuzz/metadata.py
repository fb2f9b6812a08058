"""Models with made-up metadata: docs/development/reliability.md.

    python tests/fuzz/metadata.py [--inputs 1000000] [--first 0]

GGUF files are read by llama.cpp, which trusts them. What is tried here is what our code makes of numbers that
llama.cpp accepts: heads, sizes of rows, layers, windows, scales. Inputs are numbered: the n-th is the same in every
run. Each is a tiny model of a random architecture with a few numbers changed, and the tensors that llama.cpp wants with
them. Where a process without a policy can load it and decode, one with a policy has to do so, too, or to refuse it with
an error.
"""

from __future__ import annotations

import os
import random
import resource
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import typer
from forked import forked
from support import feed, load
from tiny import random_tokens
from tiny_architectures import _COMMON, ARCHITECTURES, Architecture

from refreekv_cpp import ReFreeKV, RefreeKVError

_INTS = [0, 1, 2, 3, 4, 5, 6, 8, 12, 16, 20, 24, 32, 33, 48, 63, 64, 65, 80, 96, 128, 160, 256, 2**16, 2**31, 2**32 - 1]
_FLOATS = [0.0, -1.0, 1e-30, 0.5, 1.0, 30.0, 1e30, float("inf"), float("nan")]
_MORE: dict[str, Any] = {
    "attention.key_length": 16,
    "attention.value_length": 16,
    "attention.sliding_window": 64,
    "attention.causal": True,
    "attention.max_alibi_bias": 8.0,
    "attention.scale": 0.25,
    "attention.shared_kv_layers": 1,
    "attn_logit_softcapping": 30.0,
    "rope.dimension_count": 16,
    "rope.freq_base": 10000.0,
    "rope.scaling.factor": 2.0,
}
# numbers that say how large a model is: with more of them it takes long to write
_MOST = {"block_count": 8, "embedding_length": 256, "feed_forward_length": 256, "expert_count": 16}
_MOST_MEMORY = 8 << 30


def made_up(n: int) -> Architecture:
    """The n-th."""
    rng = random.Random(n)
    architecture = rng.choice(list(ARCHITECTURES.values()))
    keys = {**_COMMON, **architecture.keys}
    for _ in range(rng.choice((1, 1, 2, 3))):
        key = rng.choice([*keys, *_MORE])
        keys[key] = _changed(rng, key, keys.get(key, _MORE.get(key)))
    return replace(architecture, keys=keys, shapes=None)


def _changed(rng: random.Random, key: str, value: Any) -> Any:
    if isinstance(value, list):
        at = rng.randrange(len(value))
        return [*value[:at], _changed(rng, key, value[at]), *value[at + 1 :]]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice([each for each in _INTS if each <= _MOST.get(key, 2**32)])
    return rng.choice(_FLOATS)


def decode(path: Path, policy: Any) -> None:
    """Read a prompt, prune it, and go on."""
    llm = load(path, policy, codes=True, n_ctx=512)
    llm.eval(random_tokens(300))
    if policy != "full":
        llm.prune_kv()
    feed(llm, [5, 6, 7])
    llm.close()


def stock(architecture: Architecture, path: Path) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_MEMORY, _MOST_MEMORY))
    architecture.write(path)
    decode(path, "full")


def ours(path: Path) -> str:
    """ "pruned", or why it was refused."""
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_MEMORY, _MOST_MEMORY))
    try:
        decode(path, ReFreeKV(n_min=0))
    except RefreeKVError as error:
        return f"{type(error).__name__}: {error}"
    return "pruned"


def main(
    inputs: Annotated[int, typer.Option(help="How many.")] = 1_000_000,
    first: Annotated[int, typer.Option(help="The number of the first.")] = 0,
) -> None:
    os.environ |= {"OPENBLAS_NUM_THREADS": "1", "GGML_NO_BACKTRACE": "1"}
    count: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        for n in range(first, first + inputs):
            architecture = made_up(n)
            _, ended = forked(lambda: stock(architecture, path))  # noqa: B023
            if ended:
                count["llama.cpp does not take it"] += 1
                continue
            said, ended = forked(lambda: ours(path))
            count["bad" if ended else "pruned" if said == "pruned" else "refused with an error"] += 1
            if ended:
                print(f"BAD {n}: {architecture.title}: {ended}\n    {dict(architecture.keys)}", flush=True)
    print(f"{inputs} models: {dict(count)}")
    raise SystemExit(count["bad"] > 0)


if __name__ == "__main__":
    typer.run(main)
