"""A model of llama-3-8B's shape at long prompts: stock llama-cpp-python beside the policies. For a GPU.

    python tests/gpu/large.py [--tokens 16384,32768] [--against DIR] [--only NAME,...] [--layers N] [--tiny]

Writes the model (4 GiB) to a temporary folder, gives every contestant a process of its own at every length, and prints
a Markdown table. `--against` names the folder of a stock libllama; without it, upstream's cache in our library is what
the others are compared with (`full`). `--tiny` is a small model, to try this on a CPU: with `--tokens 1024`.

The weights are random but for what a cache needs: a prompt is of four kinds of tokens, in runs of 64, and each layer
attends to one kind, strongly or less so. So there is something to evict, and layers keep different numbers of cells.
What the model says means nothing, nor does what a policy loses by it: logits are compared to see that they are sane.
"""

from __future__ import annotations

import math
import os
import pickle
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import gguf
import numpy as np
import numpy.typing as npt
import typer

D = 128  # numbers of a head
N_SPECIAL = 259  # <unk>, <s>, </s>, bytes; the rest of the vocabulary is a quarter of each kind
N_RUN = 64
SHARES = (0.42, 0.08, 0.15, 0.35)  # of a prompt's runs that are of each kind; kind 0 is never attended to
STRENGTHS = (4.0, 5.0, 6.0)  # of the attention logit, cycled over the layers
Q4_0 = gguf.GGMLQuantizationType.Q4_0

N_DECODE = 64  # steps after the first whose median is reported
N_MORE = 300  # steps after those: the cache has to grow
MIB = 2**20


@dataclass(frozen=True)
class Shape:
    n_layer: int = 32
    n_embd: int = 4096
    n_head: int = 32
    n_head_kv: int = 8
    n_ff: int = 14336
    n_vocab: int = 16000  # fewer than llama-3's: they cost time, and no cache

    def write(self, path: Path) -> None:
        out = gguf.GGUFWriter(path, "llama")
        out.add_context_length(65536)
        out.add_embedding_length(self.n_embd)
        out.add_block_count(self.n_layer)
        out.add_feed_forward_length(self.n_ff)
        out.add_head_count(self.n_head)
        out.add_head_count_kv(self.n_head_kv)
        out.add_key_length(D)
        out.add_value_length(D)
        out.add_rope_dimension_count(D)
        out.add_rope_freq_base(500000.0)
        out.add_layer_norm_rms_eps(1e-5)
        special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        n_ordinary = self.n_vocab - N_SPECIAL
        out.add_tokenizer_model("llama")
        out.add_token_list([*special, *(f"t{i}" for i in range(n_ordinary))])
        out.add_token_scores([0.0] * self.n_vocab)
        out.add_token_types([2, 3, 3, *[6] * 256, *[1] * n_ordinary])
        out.add_unk_token_id(0)
        out.add_bos_token_id(1)
        out.add_eos_token_id(2)
        self._add_tensors(out)
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
        out.close()

    def _add_tensors(self, out: gguf.GGUFWriter) -> None:
        rng = np.random.default_rng(0)
        # Q4_0: an f16 scale, and 32 numbers -7 to 7 of 4 bits, whose standard deviation is 4.32
        n_blocks = max(self.n_ff, self.n_vocab) * self.n_embd // 32 + 1000
        low, high = rng.integers(1, 16, (2, n_blocks, 16), dtype=np.uint8)

        def random(scale: float, n_out: int, n_in: int) -> npt.NDArray[np.uint8]:
            """Some of the blocks: all of the matrices together would take as much memory as the model."""
            if scale not in scaled:
                scaled[scale] = _blocks(scale * n_in**-0.5 / 4.32, low | high << 4)
            n = n_out * n_in // 32
            start = int(rng.integers(0, n_blocks - n + 1))
            return scaled[scale][start : start + n].reshape(n_out, -1)

        scaled: dict[float, npt.NDArray[np.uint8]] = {}

        # a direction for each kind, of signs, so that Q4_0 has it exactly ...
        signs = rng.choice((-1, 1), (4, self.n_embd))
        embeddings = rng.standard_normal((self.n_vocab, self.n_embd), dtype=np.float32)
        for kind in (1, 2, 3):
            embeddings[first_token(kind, self.n_vocab) : first_token(kind + 1, self.n_vocab)] += 0.5 * signs[kind]
        # ... which a key has in its slowest pair, as 4 when it is of the layer's kind
        nibbles = (8 + 7 * signs).astype(np.uint8).reshape(4, -1, 2, 16)
        scale = 4 / (0.5 * self.n_embd / 1.25**0.5) / 7
        directions = [_blocks(scale, pairs[:, 0] | pairs[:, 1] << 4).reshape(-1) for pairs in nibbles]

        n_q, n_kv = self.n_head * D, self.n_head_kv * D
        ones = np.ones(self.n_embd, np.float32)
        out.add_tensor("token_embd.weight", embeddings.astype(np.float16))
        out.add_tensor("output_norm.weight", ones)
        out.add_tensor("output.weight", random(1, self.n_vocab, self.n_embd), raw_dtype=Q4_0)
        for layer in range(self.n_layer):
            block = f"blk.{layer}."
            for name, scale, n_out, n_in in (
                ("attn_q", 1, n_q, self.n_embd),
                ("attn_v", 1, n_kv, self.n_embd),
                ("attn_output", 0.1, self.n_embd, n_q),
                ("ffn_gate", 1, self.n_ff, self.n_embd),
                ("ffn_up", 1, self.n_ff, self.n_embd),
                ("ffn_down", 0.15, self.n_embd, self.n_ff),
            ):
                out.add_tensor(f"{block}{name}.weight", random(scale, n_out, n_in), raw_dtype=Q4_0)
            keys = random(1, n_kv, self.n_embd).copy()
            keys[D - 2 :: D] = directions[1 + layer % 3]
            bias = np.zeros(n_q, np.float32)
            bias[D - 2 :: D] = STRENGTHS[layer // 3 % len(STRENGTHS)] * D**0.5 / 4
            out.add_tensor(f"{block}attn_k.weight", keys, raw_dtype=Q4_0)
            out.add_tensor(f"{block}attn_q.bias", bias)
            out.add_tensor(f"{block}attn_norm.weight", ones)
            out.add_tensor(f"{block}ffn_norm.weight", ones)


TINY = Shape(n_layer=3, n_embd=512, n_head=4, n_head_kv=2, n_ff=1024, n_vocab=1000)


def _blocks(scale: float, nibbles: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    res = np.empty((len(nibbles), 18), np.uint8)
    res[:, :2] = np.array([scale], np.float16).view(np.uint8)
    res[:, 2:] = nibbles
    return res


def first_token(kind: Any, n_vocab: int) -> Any:
    return N_SPECIAL + kind * ((n_vocab - N_SPECIAL) // 4)


def prompt(n: int, n_vocab: int, *, seed: int = 0) -> list[int]:
    rng = np.random.default_rng(seed)
    kinds = np.repeat(rng.choice(4, -(-n // N_RUN), p=SHARES), N_RUN)[:n]
    tokens = rng.integers(first_token(kinds, n_vocab), first_token(kinds + 1, n_vocab))
    return [1, *tokens[1:].tolist()]


@dataclass(frozen=True)
class Contestant:
    """kv_policy None: stock's library. `budget` is Streaming's, `options` are `Llama`'s."""

    kv_policy: str | None
    budget: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    first_length_only: bool = False

    def load(self, model: Path, n_ctx: int) -> Any:
        options = {"n_ctx": n_ctx, "n_gpu_layers": -1, "flash_attn": True, "verbose": False, **self.options}
        if self.kv_policy is None:
            import llama_cpp

            return llama_cpp.Llama(str(model), **options)

        import refreekv_cpp

        policy = self.kv_policy if self.budget is None else refreekv_cpp.Streaming(budget=self.budget)
        return refreekv_cpp.Llama(str(model), kv_policy=policy, **options)


CONTESTANTS = {
    "stock": Contestant(None),
    "full": Contestant("full", options={"kv_elastic": False}),
    "elastic": Contestant("full", options={"kv_elastic": True}),
    "streaming:0.3": Contestant("streaming", budget=0.3),
    "refreekv": Contestant("refreekv"),
    "snapkv": Contestant("snapkv"),
    "refreekv-drop": Contestant("refreekv", options={"kv_evicted": "drop"}, first_length_only=True),
}


@dataclass
class Result:
    """Of one process; None: it has no such thing. MiB of VRAM are more than before the process.

    Attributes:
        speed: of the prompt, tokens a second.
        decode_ms: median of N_DECODE tokens.
        growth_ms: the slowest token at which the cache grew.
        logits: after the first decoded token.
    """

    speed: float
    decode_ms: float
    logits: npt.NDArray[np.float32]
    vram_prompt: float | None
    kv_mib: float | None = None
    kept: float | None = None
    vram_pruned: float | None = None
    prune_ms: float | None = None
    growth_ms: float | None = None
    restore_ms: float | None = None
    bounced: int | None = None


def vram() -> float | None:
    """MiB in use on all cards together; None: there is no nvidia-smi."""
    try:
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return sum(map(float, done.stdout.split()))
    except (OSError, subprocess.CalledProcessError, ValueError):
        return None


def measure(model: Path, contestant: Contestant, n_tokens: int) -> Result:
    """Read a prompt, prune, go on, restore; in this process."""
    vram_before = vram()
    llm = contestant.load(model, n_tokens + 1024)
    import llama_cpp  # the library that `load` took

    ours = contestant.kv_policy is not None
    evicts = contestant.kv_policy not in (None, "full")
    if ours:
        from refreekv_cpp import native

    def ms(do: Callable[..., Any], *arguments: Any) -> float:
        start = time.perf_counter()
        do(*arguments)
        llama_cpp.llama_synchronize(llm.ctx)
        return (time.perf_counter() - start) * 1000

    def vram_more() -> float | None:
        now = vram()
        return None if now is None or vram_before is None else now - vram_before

    tokens = prompt(n_tokens, llm.n_vocab())
    llm.eval(tokens[:600])  # what is done once
    llm.eval([N_SPECIAL])
    llm.reset()

    speed = n_tokens / ms(llm.eval, tokens) * 1000
    vram_prompt = vram_more()
    prune_ms = ms(llm.prune_kv) if evicts else None
    vram_pruned = vram_more() if evicts else None
    stats = llm.kv_stats if ours else None

    steps, growing, sizes = [], [], [stats.bytes if stats else 0]
    for token in prompt(1 + 1 + N_DECODE + N_MORE, llm.n_vocab(), seed=1)[1:]:
        steps.append(ms(llm.eval, [token]))
        if len(steps) == 1:
            pointer = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
            logits = np.ctypeslib.as_array(pointer, shape=(llm.n_vocab(),)).copy()
        sizes.append(native.stats(llm.ctx).bytes if ours else 0)
        if sizes[-1] > sizes[-2]:
            growing.append(steps[-1])
    res = Result(speed, statistics.median(steps[1 : 1 + N_DECODE]), logits, vram_prompt)
    if stats:
        restores = evicts and llm.kv_evicted == "restore"
        res = replace(
            res,
            kv_mib=stats.bytes / MIB,
            kept=stats.budget,
            vram_pruned=vram_pruned,
            prune_ms=prune_ms,
            growth_ms=max(growing, default=None),
            restore_ms=ms(native.restore, llm.ctx, 0) if restores else None,
            bounced=llm.kv_stats.bytes_bounced,
        )
    llm.close()
    return res


def in_a_process(model: Path, name: str, n_tokens: int, against: Path | None) -> Result | None:
    """None: it failed, and has said why."""
    out = model.with_suffix(".result")
    stocks = {"LLAMA_CPP_LIB_PATH": str(against), "MTMD_CPP_LIB": str(against)} if name == "stock" else {}
    command = [sys.executable, __file__, "--model", str(model), "--out", str(out), "--only", name]
    if subprocess.run([*command, "--tokens", str(n_tokens)], env={**os.environ, **stocks}).returncode:
        return None
    res: Result = pickle.loads(out.read_bytes())
    return res


HEADER = (
    "| tokens | cache | prefill t/s | KV MiB | kept | VRAM MiB, prompt | pruned | prune ms | decode ms | over {} "
    "| slowest growth, ms | restore ms | bounced bytes | distance |"
)


def row(n_tokens: int, name: str, own: Result | None, base: Result | None) -> str:
    if own is None:
        return f"| {n_tokens} | {name} | failed |"
    cells = [own.speed, own.kv_mib, own.kept, own.vram_prompt, own.vram_pruned, own.prune_ms, own.decode_ms]
    cells += [own.decode_ms / base.decode_ms if base else None, own.growth_ms, own.restore_ms, own.bounced]
    cells += [distance(own, base) if base else None]
    return f"| {n_tokens} | {name} | {' | '.join(map(show, cells))} |"


def distance(own: Result, base: Result) -> float:
    return float(np.abs(own.logits - base.logits).max())


def show(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if isinstance(value, int) or value >= 1000 else f"{value:.3g}"


def ram_folder() -> str | None:
    """Where the real model is read fastest, if it has room; None: the system's temporary folder."""
    folder = "/dev/shm"
    return folder if os.path.isdir(folder) and shutil.disk_usage(folder).free > 8 * 2**30 else None


def runs(lengths: Iterable[int], names: Iterable[str]) -> Iterable[tuple[int, str]]:
    for i, n_tokens in enumerate(lengths):
        yield from ((n_tokens, name) for name in names if i == 0 or not CONTESTANTS[name].first_length_only)


def main(
    tokens: Annotated[str, typer.Option(help="Lengths of the prompt.")] = "16384,32768",
    against: Annotated[Path | None, typer.Option(help="Folder of a stock libllama.")] = None,
    only: Annotated[str, typer.Option(help=f"Of {', '.join(CONTESTANTS)}.")] = "",
    layers: Annotated[int | None, typer.Option(help="Other than the shape's.")] = None,
    tiny: Annotated[bool, typer.Option("--tiny")] = False,
    model: Annotated[Path | None, typer.Option(hidden=True)] = None,
    out: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    lengths = list(map(int, tokens.split(",")))
    if model is not None and out is not None:
        out.write_bytes(pickle.dumps(measure(model, CONTESTANTS[only], lengths[0])))
        return

    base = "stock" if against else "full"
    names = [name for name in CONTESTANTS if name == base or name not in ("stock", "full")]
    if unknown := set(only.split(",") if only else ()) - set(names):
        raise typer.BadParameter(f"no {', '.join(sorted(unknown))} here; there are {', '.join(names)}")
    names = [name for name in names if not only or name in only.split(",")]
    shape = TINY if tiny else Shape()
    shape = replace(shape, n_layer=layers or shape.n_layer)

    failed = False
    bases: dict[int, Result | None] = {}
    with tempfile.TemporaryDirectory(prefix="refreekv-large-", dir=ram_folder()) as folder:
        path = Path(folder) / "model.gguf"
        shape.write(path)
        print(HEADER.format(base), f"|{'---|' * (HEADER.count('|') - 1)}", sep="\n")
        for n_tokens, name in runs(lengths, names):
            res = in_a_process(path, name, n_tokens, against)
            if name == base:
                bases[n_tokens] = res
            print(row(n_tokens, name, res, bases.get(n_tokens)), flush=True)
            failed |= res is None or not np.isfinite(res.logits).all()
    print(
        f"\n{shape}; flash attention. KV and the second VRAM are after pruning, VRAM is more than before the process; "
        f"decode: the median of {N_DECODE} tokens after pruning; slowest growth: of {1 + N_DECODE + N_MORE}; distance: "
        f"the largest between two logits of the first decoded token and those of {base}."
    )
    raise SystemExit(int(failed))


if __name__ == "__main__":
    typer.run(main)
