"""Run as a program by test_every_architecture.py, in a process of its own: two libllama do not go into one.

    architecture_outputs.py OUT MODELS stock|elastic

Reads the same tokens into each model (*.gguf) of the folder MODELS, in each of `WAYS`, and writes two JSON files and
one .npy file per model and way to the folder OUT:

    NAME.WAY.npy    what came out, [n, n_vocab or n_embd] f32
    reasons.json    why nothing did: NAME.WAY and a text
    refusals.json   elastic: why a model cannot have our cache, which grows: NAME and a text. It has upstream's then.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

WAYS = ("causal", "not causal", "embeddings", "flash attention", "M-RoPE")

N_UBATCH = 64
REMOVE = -1

# A sequence, and how many tokens are read into it. Upstream's attention looks at a multiple of 256 cells, in which our
# cache grows: the second prompt exceeds the first 256, and removing it gives that room back. It has the last cells, so
# no hole is left: upstream's cache would keep it and ours would not, and sums would be rounded in another way. No
# position is above 255.
STEPS = ((0, 150), (1, 150), (1, 1), (1, REMOVE), (0, 40), (0, 1), (0, 1))
IMAGE = (8, 5)  # of embeddings, in place of as many tokens of the first sequence, where positions have more dimensions


class NoOutputs(Exception):
    """Nothing comes out of this model in this way."""


def outputs(way: str, model: Any, elastic: bool) -> npt.NDArray[np.float32]:
    import llama_cpp

    kinds = (llama_cpp.LLAMA_ROPE_TYPE_MROPE, llama_cpp.LLAMA_ROPE_TYPE_IMROPE)
    if way == "M-RoPE" and llama_cpp.llama_model_rope_type(model) not in kinds:
        raise NoOutputs("its positions have one dimension")
    ctx = new_context(way, model, elastic)
    if way == "not causal":
        llama_cpp.llama_set_causal_attn(ctx, False)

    rows = []
    n_past = [0, 0]
    for sequence, n in STEPS:
        if n == REMOVE:
            llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(ctx), sequence, -1, -1)
        elif way == "M-RoPE" and n == IMAGE[0] * IMAGE[1]:
            rows += image(ctx, model, n_past[sequence])
            n_past[sequence] += max(IMAGE)  # of an image the time stands still
        else:
            # attention that is not causal needs all tokens of a batch at once
            size = N_UBATCH if way in ("not causal", "embeddings") else n
            for start in range(0, n, size):
                rows += tokens(ctx, model, way, sequence, n_past[sequence], min(size, n - start))
                n_past[sequence] += min(size, n - start)
    if elastic:
        from refreekv_cpp import native

        native.stats(ctx)  # raises where our cache is not what was measured
    return np.array(rows)


def new_context(way: str, model: Any, elastic: bool) -> Any:
    import llama_cpp

    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_threads, params.n_threads_batch = 512, 256, N_UBATCH, 1, 1
    params.n_seq_max, params.kv_unified = 2, True
    params.embeddings = way == "embeddings"
    params.pooling_type = llama_cpp.LLAMA_POOLING_TYPE_NONE
    params.flash_attn_type = int(way == "flash attention")
    if elastic:
        from refreekv_cpp import native

        with native.next_context(native.make_params(policy=native.ELASTIC)):
            ctx = llama_cpp.llama_init_from_model(model, params)
    else:
        ctx = llama_cpp.llama_init_from_model(model, params)
    if not ctx:
        raise NoOutputs("llama_init_from_model fails")
    return ctx


def tokens(ctx: Any, model: Any, way: str, sequence: int, n_past: int, n: int) -> list[npt.NDArray[np.float32]]:
    import llama_cpp

    batch = llama_cpp.llama_batch_init(n, 0, 1)
    for i in range(n):
        batch.token[i] = (7 + 4 * sequence) * (n_past + i) % 100 + 1
        batch.pos[i] = n_past + i
    if way == "embeddings":
        return decode(ctx, batch, sequence, n, llama_cpp.llama_model_n_embd_out(model), embeddings=True)
    return decode(ctx, batch, sequence, n, n_vocab(model))


def image(ctx: Any, model: Any, n_past: int) -> list[npt.NDArray[np.float32]]:
    import llama_cpp

    width, height = IMAGE
    n, n_embd = width * height, llama_cpp.llama_model_n_embd_inp(model)
    batch = llama_cpp.llama_batch_init(n, n_embd, 1)
    numbers = np.random.default_rng(0).normal(size=(n, n_embd)).astype(np.float32)
    ctypes.memmove(batch.embd, numbers.ctypes.data, numbers.nbytes)
    positions = (ctypes.c_int32 * (4 * n))()  # time, row, column, and one that is not used
    for i in range(n):
        positions[i], positions[n + i], positions[2 * n + i] = n_past, n_past + i // width, n_past + i % width
    batch.pos = ctypes.cast(positions, type(batch.pos))
    return decode(ctx, batch, 0, n, n_vocab(model))


def decode(
    ctx: Any, batch: Any, sequence: int, n: int, width: int, *, embeddings: bool = False
) -> list[npt.NDArray[np.float32]]:
    import llama_cpp

    for i in range(n):
        batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, sequence, True
    batch.n_tokens = n
    if status := llama_cpp.llama_decode(ctx, batch):
        raise NoOutputs(f"llama_decode returns {status}")
    read = llama_cpp.llama_get_embeddings_ith if embeddings else llama_cpp.llama_get_logits_ith
    found = [read(ctx, i) for i in range(n)]
    if not all(found):
        raise NoOutputs("no output for a token")
    return [np.ctypeslib.as_array(row, shape=(width,)).copy() for row in found]


def n_vocab(model: Any) -> int:
    import llama_cpp

    return int(llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model)))


def in_a_process(path: Path, way: str, model: Any, elastic: bool) -> str:
    """Write what comes out to this file. Returns why nothing does: a crash ends this way of this model only."""
    reason = path.with_suffix(".reason")
    if not (child := os.fork()):
        status = 1
        try:
            np.save(path, outputs(way, model, elastic))
            status = 0
        except NoOutputs as why:
            reason.write_text(str(why))
        except BaseException:
            reason.write_text(traceback.format_exc())
        finally:
            os._exit(status)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code < 0:
        return f"ended by signal {-code}"
    return reason.read_text() if code else ""


def main() -> None:
    out, models, who = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    if who == "elastic":
        from refreekv_cpp import native
    import llama_cpp

    llama_cpp._logger.set_verbose(False)
    llama_cpp.llama_backend_init()
    reasons: dict[str, str] = {}
    refusals: dict[str, str] = {}
    for path in sorted(models.glob("*.gguf")):
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if who == "elastic" and (refusal := native.model_refusal(model)):
            refusals[path.stem] = refusal
        for way in WAYS:
            name = f"{path.stem}.{way}"
            elastic = who == "elastic" and path.stem not in refusals
            if reason := in_a_process(out / f"{name}.npy", way, model, elastic):
                reasons[name] = reason
        llama_cpp.llama_model_free(model)
    (out / "reasons.json").write_text(json.dumps(reasons))
    (out / "refusals.json").write_text(json.dumps(refusals))


if __name__ == "__main__":
    main()
