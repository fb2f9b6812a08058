"""What each of many models can have: the full cache, the one that grows, and the default policy.

    architecture_verdicts.py OUT.json MODEL.gguf...

A model gets a process of its own, so that a crash ends its checks only. OUT.json has, by the name of the model's file,
a list of three: "" where it is right, else why not. What is checked:

    full        a prompt and some tokens can be read, and what comes out are numbers.
    elastic     the same comes out, bit for bit.
    refreekv    after an eviction what comes out is what the whole cache gives with the evicted cells masked; and with
                the default policy, and a theta at which all exact rows are read, it is what the full cache gives.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from refreekv_cpp import ReFreeKV, Streaming, native
from refreekv_cpp.errors import RefreeKVError

# no position is above 255, for which some of the models are made
N_PROMPT, N_DECODED, N_BATCH = 240, 8, 60
N_CODED = 64  # cells of a block of codes
COLUMNS = ("full", "elastic", "refreekv")

# Without flash attention, and the cache in f32: sums of the same rows in another order. A model that chooses experts
# may make another choice; then a few tokens differ, and most do not.
TOLERANCE = 1e-2

Logits = npt.NDArray[np.float32]


class Wrong(Exception):
    """What comes out is not what should."""


def verdicts(path: str) -> list[str]:
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    if not model:
        return ["llama.cpp does not load it"] * 3
    try:
        whole = read(model, None)
    except Wrong as why:
        return [str(why)] * 3
    res = [""]
    refusal = native.model_refusal(model)
    for check in (elastic, refreekv):
        try:
            res.append(refusal or check(model, whole))
        except (Wrong, RefreeKVError) as why:
            res.append(str(why))
    return res


def elastic(model: Any, whole: Logits) -> str:
    same = read(model, {"policy": native.ELASTIC}).tobytes() == whole.tobytes()
    return "" if same else "other numbers than upstream's"


def refreekv(model: Any, whole: Logits) -> str:
    default = ReFreeKV(n_min=0).native_options() or {}
    streaming = {**(Streaming(budget=0.3, n_min=0).native_options() or {}), "n_block": N_CODED}
    moved = read(model, streaming, evicts=True)
    masked = read(model, {**streaming, "mask_only": True}, evicts=True)
    if distance(moved, masked) > TOLERANCE:
        return "what comes out after an eviction is not what the whole cache gives with the evicted cells masked"
    exact = read(model, {**default, "theta": 1e-9, "cold": native.enum_value("COLD_MEMORY")})
    # not exact where heads do not fit our kernel, whose codes are not exact either
    if distance(exact, whole) > 0.3:
        return "what comes out after an eviction is not what the full cache gives"
    return ""


def distance(a: Logits, b: Logits) -> float:
    """In standard deviations of the logits, of the median token."""
    return float(np.median(np.abs(a - b).max(axis=1)) / b.std())


def read(model: Any, options: dict[str, Any] | None, *, evicts: bool = False) -> Logits:
    """The logits after each of the tokens behind the prompt."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_threads, params.n_threads_batch = (
        512,
        N_BATCH,
        N_BATCH,
        1,
        1,
    )
    params.type_k = params.type_v = 0  # f32
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    native.clear_error()
    with native.next_context(options and native.make_params(**options)):
        ctx = llama_cpp.llama_init_from_model(model, params)
    if not ctx:
        raise Wrong(native.last_error() or "llama.cpp makes no context of it")
    try:
        n = N_PROMPT + N_DECODED
        tokens = [(7 * i + i * i // 5) % 100 + 1 for i in range(n)]
        for first in range(0, N_PROMPT, N_BATCH):
            decode(ctx, tokens, first, N_BATCH)
        if options and options["policy"] != native.ELASTIC and native.prune(ctx, 0) <= 0 and evicts:
            raise Wrong("nothing is evicted")
        n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        rows = []
        for i in range(N_PROMPT, n):
            decode(ctx, tokens, i, 1)
            rows.append(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(ctx, -1), shape=(n_vocab,)).copy())
    finally:
        llama_cpp.llama_free(ctx)
    res = np.array(rows)
    if not np.isfinite(res).all():
        raise Wrong("what comes out are no numbers (random weights)")
    return res


def decode(ctx: Any, tokens: list[int], first: int, n: int) -> None:
    batch = llama_cpp.llama_batch_init(n, 0, 1)
    for i in range(n):
        batch.token[i], batch.pos[i] = tokens[first + i], first + i
        batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, i == n - 1
    batch.n_tokens = n
    status = llama_cpp.llama_decode(ctx, batch)
    llama_cpp.llama_batch_free(batch)
    if status:
        raise Wrong(native.last_error() or f"llama_decode returns {status}")


def in_a_process(path: str, note: Path) -> list[str]:
    if not (child := os.fork()):
        try:
            note.write_text(json.dumps(verdicts(path)))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        return [f"ends the process: {code}"] * 3
    res: list[str] = json.loads(note.read_text())
    return res


def main() -> None:
    out = Path(sys.argv[1])
    os.environ["GGML_NO_BACKTRACE"] = "1"
    llama_cpp._logger.set_verbose(False)
    llama_cpp.llama_backend_init()
    note = out.with_suffix(".note")
    res = {Path(path).stem: in_a_process(path, note) for path in sys.argv[2:]}
    note.unlink(missing_ok=True)
    out.write_text(json.dumps(res, indent=1))


if __name__ == "__main__":
    main()
