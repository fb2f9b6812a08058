"""A model of llama-3-8B's shape at long prompts: stock llama-cpp-python beside the policies. For a GPU.

    python tests/tools/gpu/large.py [--tokens 16384,32768] [--against DIR] [--only NAME,...] [--layers N] [--tiny]

Writes the model (4 GiB) to a temporary folder, gives every contestant a process of its own at every length, and prints
a Markdown table. `--against` names the folder of a stock libllama; without it, upstream's cache in our library is what
the others are compared with (`full`). `--tiny` is a small model, to try this on a CPU, with `--tokens 1024`.

The weights are random but for what a cache needs: a prompt is of four kinds of tokens, in runs of 64, and each layer
attends to one kind, strongly or less so. So there is something to evict, and layers keep different numbers of cells.
What the model says means nothing, nor does what a policy loses by it: logits are compared to see that they are sane.
"""

from __future__ import annotations

import functools
import math
import os
import pickle
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import gguf
import numpy as np
import numpy.typing as npt
import typer

from refreekv_cpp._llama_cpp import python_dir

D = 128  # numbers of a head, n_embd / n_head
SHARES = (0.42, 0.08, 0.15, 0.35)  # of a prompt's runs that are of each kind; kind 0 is never attended to
STRENGTHS = (4.0, 5.0, 6.0)  # of the attention logit, cycled over the layers
Q4_0 = gguf.GGMLQuantizationType.Q4_0

N_DECODE = 64  # tokens after the first whose median is reported
N_MORE = 300  # tokens after those: the cache has to grow

# options of `Llama`; stock has none of ours
CONTESTANTS: dict[str, dict[str, Any]] = {
    "stock": {},
    "full": {"kv_policy": "full", "kv_elastic": False},
    "elastic": {"kv_policy": "full", "kv_elastic": True},
    "streaming:0.3": {"kv_policy": "streaming"},  # `load` gives it the budget
    "refreekv": {"kv_policy": "refreekv"},
    "snapkv": {"kv_policy": "snapkv"},
    "refreekv-drop": {"kv_policy": "refreekv", "kv_evicted": "drop"},
    "kernels": {"kv_policy": "refreekv"},  # by our kernels, where the device has them (docs/lab/backends.md)
}
ENVIRONMENT = {"kernels": {"REFREEKV_DEVICE_KERNELS": "1"}}
FIRST_LENGTH_ONLY = {"refreekv-drop"}

COLUMNS = ("prefill t/s", "KV MiB", "codes MiB", "cold MiB", "kept", "VRAM MiB, loaded", "prompt", "pruned", "decoded")
COLUMNS += (
    "closed",
    "prune ms",
    "decode ms",
    "ratio",
    "growth ms",
    "restore ms",
    "rows read",
    "bounced bytes",
    "distance",
)
Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Result = tuple[dict[str, float], Floats]  # what is in COLUMNS; logits after the first decoded token


@dataclass(frozen=True)
class Shape:
    n_layer: int = 32
    n_embd: int = 4096
    n_head: int = 32
    n_head_kv: int = 8
    n_ff: int = 14336
    n_vocab: int = 16000  # fewer than llama-3's, which take time, and are nothing to the cache

    def write(self, path: Path) -> None:
        out = gguf.GGUFWriter(path, "llama")
        out.add_context_length(65536)
        out.add_embedding_length(self.n_embd)
        out.add_block_count(self.n_layer)
        out.add_feed_forward_length(self.n_ff)
        out.add_head_count(self.n_head)
        out.add_head_count_kv(self.n_head_kv)
        out.add_rope_freq_base(500000.0)
        out.add_layer_norm_rms_eps(1e-5)
        out.add_vocab_size(self.n_vocab)
        out.add_tokenizer_model("no_vocab")
        self._add_tensors(out)
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
        out.close()

    def _add_tensors(self, out: gguf.GGUFWriter) -> None:
        rng = np.random.default_rng(0)
        # numbers of Q4_0, -7 to 7; their standard deviation is 4.32
        n_blocks = max(self.n_ff, self.n_vocab) * self.n_embd // 32 + 1000
        low, high = rng.integers(1, 16, (2, n_blocks, 16), dtype=np.uint8)

        @functools.cache
        def pool(sigma: float) -> Bytes:
            return _blocks(sigma / 4.32, low, high)

        def random(sigma: float, n_out: int, n_in: int) -> Bytes:
            """Rows of one pool of numbers: those of all matrices would take as much memory as the model."""
            n = n_out * n_in // 32
            start = int(rng.integers(0, n_blocks - n + 1))
            return pool(sigma * n_in**-0.5)[start : start + n].reshape(n_out, -1)

        # a direction for each kind, of signs, so that Q4_0 has it exactly ...
        signs = rng.choice((-1, 1), (4, self.n_embd))
        embeddings = rng.standard_normal((self.n_vocab, self.n_embd), dtype=np.float32)
        for kind, of_kind in enumerate(np.split(embeddings, 4)):
            of_kind += 0.5 * signs[kind] * (kind > 0)
        # ... which a key has in its slowest pair, as 4 when it is of the layer's kind
        scale = 4 / (0.5 * self.n_embd / 1.25**0.5) / 7
        nibbles = (8 + 7 * signs).astype(np.uint8).reshape(4, -1, 2, 16)
        directions = [_blocks(scale, of_kind[:, 0], of_kind[:, 1]).reshape(-1) for of_kind in nibbles]

        n_q, n_kv = self.n_head * D, self.n_head_kv * D
        ones = np.ones(self.n_embd, np.float32)
        out.add_tensor("token_embd.weight", embeddings.astype(np.float16))
        out.add_tensor("output_norm.weight", ones)
        out.add_tensor("output.weight", random(1, self.n_vocab, self.n_embd), raw_dtype=Q4_0)
        for layer in range(self.n_layer):
            matrices = {
                "attn_q": random(1, n_q, self.n_embd),
                "attn_k": random(1, n_kv, self.n_embd).copy(),
                "attn_v": random(1, n_kv, self.n_embd),
                "attn_output": random(0.1, self.n_embd, n_q),
                "ffn_gate": random(1, self.n_ff, self.n_embd),
                "ffn_up": random(1, self.n_ff, self.n_embd),
                "ffn_down": random(0.15, self.n_embd, self.n_ff),
            }
            matrices["attn_k"][D - 2 :: D] = directions[1 + layer % 3]
            bias = np.zeros(n_q, np.float32)
            bias[D - 2 :: D] = STRENGTHS[layer // 3 % len(STRENGTHS)] * D**0.5 / 4
            for name, matrix in matrices.items():
                out.add_tensor(f"blk.{layer}.{name}.weight", matrix, raw_dtype=Q4_0)
            out.add_tensor(f"blk.{layer}.attn_q.bias", bias)
            out.add_tensor(f"blk.{layer}.attn_norm.weight", ones)
            out.add_tensor(f"blk.{layer}.ffn_norm.weight", ones)


TINY = Shape(n_layer=3, n_embd=512, n_head=4, n_head_kv=2, n_ff=1024, n_vocab=1000)


def _blocks(scale: float, low: Bytes, high: Bytes) -> Bytes:
    """Of Q4_0, in bytes: an f16 scale, and 32 numbers of 4 bits."""
    res = np.empty((len(low), 18), np.uint8)
    res[:, :2] = np.array([scale], np.float16).view(np.uint8)
    res[:, 2:] = low | high << 4
    return res


def prompt(n: int, n_vocab: int, *, seed: int = 0) -> list[int]:
    rng = np.random.default_rng(seed)
    kinds = np.repeat(rng.choice(4, -(-n // 64), p=SHARES), 64)[:n]
    tokens: list[int] = (kinds * (n_vocab // 4) + rng.integers(n_vocab // 4, size=n)).tolist()
    return tokens


def load(name: str, model: Path, n_ctx: int) -> Any:
    options = {"n_ctx": n_ctx, "n_gpu_layers": -1, "flash_attn": True, "verbose": False, **CONTESTANTS[name]}
    if name == "stock":
        import llama_cpp

        return llama_cpp.Llama(str(model), **options)

    import refreekv_cpp

    if name == "streaming:0.3":
        options["kv_policy"] = refreekv_cpp.Streaming(budget=0.3)
    return refreekv_cpp.Llama(str(model), **options)


def vram() -> float:
    """MiB in use on all cards together; NaN: there is no nvidia-smi."""
    if not shutil.which("nvidia-smi"):
        return math.nan
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return sum(map(float, subprocess.check_output(command, text=True).split()))


def measure(name: str, model: Path, n_tokens: int) -> Result:
    """Read a prompt, prune, go on, restore, in this process."""
    vram_before = vram()
    llm = load(name, model, n_tokens + 1024)
    vram_loaded = vram() - vram_before
    import llama_cpp  # the library that `load` took

    ours = name != "stock"
    elastic = ours and name != "full"
    evicts = CONTESTANTS[name].get("kv_policy", "full") != "full"
    if ours:
        from refreekv_cpp import native

    def ms(do: Callable[..., Any], *arguments: Any) -> float:
        start = time.perf_counter()
        do(*arguments)
        llama_cpp.llama_synchronize(llm.ctx)
        return (time.perf_counter() - start) * 1000

    def capacity() -> int:
        return sum(llm.kv_stats.cells_capacity) if ours else 0

    tokens = prompt(n_tokens, llm.n_vocab())
    llm.eval(tokens[:600])  # what is done once
    llm.eval([5])
    llm.reset()

    res = {"prefill t/s": n_tokens * 1000 / ms(llm.eval, tokens), "VRAM MiB, loaded": vram_loaded}
    res["prompt"] = vram() - vram_before
    if evicts:
        res |= {"prune ms": ms(llm.prune_kv), "pruned": vram() - vram_before}
    if ours:
        stats = llm.kv_stats
        res |= {"KV MiB": stats.bytes / 2**20, "codes MiB": stats.bytes_codes / 2**20}
        res |= {"cold MiB": stats.bytes_cold / 2**20, "kept": stats.budget}

    steps, growing, logits = [], [], None
    for token in prompt(1 + N_DECODE + N_MORE, llm.n_vocab(), seed=1):
        before = capacity()
        steps.append(ms(llm.eval, [token]))
        if capacity() > before if elastic else llm.n_tokens % 256 == 1:
            growing.append(steps[-1])
        if logits is None:
            pointer = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
            logits = np.ctypeslib.as_array(pointer, shape=(llm.n_vocab(),)).copy()
    res |= {"decode ms": statistics.median(steps[1 : 1 + N_DECODE]), "growth ms": max(growing, default=math.nan)}
    res["decoded"] = vram() - vram_before
    if evicts and llm.kv_evicted == "restore":
        res["restore ms"] = ms(native.restore, llm.ctx, 0)
    if ours:
        res |= {"bounced bytes": llm.kv_stats.bytes_bounced, "rows read": llm.kv_stats.n_rows_read}
    llm.close()
    res["closed"] = vram() - vram_before
    return res, logits


def in_a_process(name: str, model: Path, n_tokens: int, against: Path | None) -> Result | None:
    """None: it failed, and has said why."""
    out = model.with_suffix(".result")
    environment = {**os.environ, **ENVIRONMENT.get(name, {})}
    if name == "stock":
        library = str(against)
        environment |= {"PYTHONPATH": str(python_dir()), "LLAMA_CPP_LIB_PATH": library, "MTMD_CPP_LIB": library}
    command = [sys.executable, __file__, "--only", name, "--tokens", str(n_tokens), "--model", str(model)]
    if subprocess.run([*command, "--out", str(out)], env=environment).returncode:
        return None
    res: Result = pickle.loads(out.read_bytes())
    return res


def show(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def main(
    tokens: Annotated[str, typer.Option(help="Lengths of the prompt.")] = "16384,32768",
    against: Annotated[Path | None, typer.Option(help="Folder of a stock libllama.", resolve_path=True)] = None,
    only: Annotated[str, typer.Option(help="Contestants, beside the one compared with.")] = ",".join(CONTESTANTS),
    layers: Annotated[int | None, typer.Option(help="Other than the shape's.")] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="A small model.")] = False,
    model: Annotated[Path | None, typer.Option(hidden=True)] = None,
    out: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    lengths = list(map(int, tokens.split(",")))
    if model and out:
        out.write_bytes(pickle.dumps(measure(only, model, lengths[0])))
        return

    base = "stock" if against else "full"
    names = [base, *(name for name in only.split(",") if name not in ("stock", "full"))]
    runs = [(n, name) for n in lengths for name in names if n == lengths[0] or name not in FIRST_LENGTH_ONLY]
    shape = TINY if tiny else Shape()
    shape = replace(shape, n_layer=layers or shape.n_layer)
    ram = "/dev/shm"  # where the model is read fastest
    has_room = os.path.isdir(ram) and shutil.disk_usage(ram).free > 8 * 2**30

    failed = False
    print(f"| tokens | cache | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 2)}")
    with tempfile.TemporaryDirectory(prefix="refreekv-large-", dir=ram if has_room else None) as folder:
        path = Path(folder) / "model.gguf"
        shape.write(path)
        results: dict[tuple[int, str], Result] = {}
        for n_tokens, name in runs:
            res = in_a_process(name, path, n_tokens, against)
            if res is None or not np.isfinite(res[1]).all():
                print(f"| {n_tokens} | {name} | failed |", flush=True)
                failed = True
                continue
            results[n_tokens, name] = res
            numbers, logits = res
            if (n_tokens, base) in results:
                base_numbers, base_logits = results[n_tokens, base]
                numbers["ratio"] = numbers["decode ms"] / base_numbers["decode ms"]
                numbers["distance"] = float(np.abs(logits - base_logits).max())
            cells = " | ".join(show(numbers.get(column, math.nan)) for column in COLUMNS)
            print(f"| {n_tokens} | {name} | {cells} |", flush=True)
    print(
        f"\n{shape}, f16, flash attention. KV, codes, cold (in host memory) and kept: after pruning. VRAM: what the "
        f"driver says is in use more than before the process, with the model loaded, the prompt read, pruned, after "
        f"all tokens, and with the model closed. Rows read: as far as the library has counted them. Decode: the median "
        f"of {N_DECODE} tokens after pruning; its ratio to {base}'s. Growth: the slowest of {1 + N_DECODE + N_MORE} "
        f"tokens at which the cache grew, or, without that, upstream builds the graph anew. Distance: the largest "
        f"between two logits of the first decoded token and {base}'s."
    )
    raise SystemExit(int(failed))


if __name__ == "__main__":
    typer.run(main)
