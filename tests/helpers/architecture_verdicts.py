"""What each of many models can have: the full cache, the one that grows, and the default policy.

    architecture_verdicts.py OUT.json CASES.json

CASES.json has, by a name of each case, an object of these members:

    model       the path of a model.
    fields      of llama_context_params.
    draft       the path of a model; a context of it is created beside, and drafts for the one that is checked. That of
                the model itself is a context of its draft heads (MTP).

A case gets a process of its own, so that a crash ends its checks only. OUT.json has, by the case's name, a list of
three: "" where it is right, else why not. What is checked:

    full        a prompt and some tokens can be read, and what comes out are numbers: logits, or an encoder's vectors.
    elastic     the same comes out, bit for bit; `CLOSE`: within rounding.
    refreekv    after an eviction what comes out is what the whole cache gives with the evicted cells masked; and with
                the default policy, and a theta at which all exact rows are read, it is what the full cache gives.

With several sequences all of them are read and evicted from, and what comes out is of the first.
"""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from dataclasses import dataclass, field
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

# Without flash attention, and the cache in f32: sums of the same rows in another order. A model that chooses experts
# may make another choice; then a few tokens differ, and most do not.
TOLERANCE = 1e-2

CLOSE = "streams share the rows of a layer, so sums are taken in another order"

Outputs = npt.NDArray[np.float32]


class Wrong(Exception):
    """What comes out is not what should."""


class NoLogits(Exception):
    """It has other outputs."""


@dataclass(frozen=True)
class Case:
    model: str
    fields: dict[str, int] = field(default_factory=dict)
    draft: str = ""


def verdicts(case: Case) -> list[str]:
    model, reason = load(case.model)
    if not model:
        return [reason] * 3
    refusal = native.model_refusal(model)
    try:
        whole = read(model, case, None)
    except Wrong as why:
        return [refusal or str(why)] * 3
    res = [""]
    for check in (elastic, refreekv):
        try:
            res.append(refusal or check(model, case, whole))
        except (Wrong, RefreeKVError) as why:
            res.append(str(why))
    return res


def load(path: str, **fields: bool) -> tuple[Any, str]:
    """A model; else None, and what llama.cpp says about it."""
    said = []

    @llama_cpp.llama_log_callback
    def note(_level: int, text: bytes, _data: Any) -> None:
        if found := re.search(rb"error loading model: (?:error loading model architecture: )?(.*)", text):
            said.append(found[1].decode())

    params = llama_cpp.llama_model_default_params()
    for name, value in fields.items():
        setattr(params, name, value)
    llama_cpp.llama_log_set(note, None)
    model = llama_cpp.llama_model_load_from_file(path.encode(), params)
    llama_cpp.llama_log_set(silence, None)
    return model, f"llama.cpp does not load it: {said[0] if said else ''}"


@llama_cpp.llama_log_callback
def silence(*_: Any) -> None:
    pass


def elastic(model: Any, case: Case, whole: Outputs) -> str:
    got = read(model, case, {"policy": native.ELASTIC})
    if got.tobytes() == whole.tobytes():
        return ""
    has_streams = case.fields.get("kv_unified") == 0
    return CLOSE if has_streams and distance(got, whole) < TOLERANCE else "other numbers than upstream's"


def refreekv(model: Any, case: Case, whole: Outputs) -> str:
    default = ReFreeKV(n_min=0).native_options() or {}
    streaming = {**(Streaming(budget=0.3, n_min=0).native_options() or {}), "n_block": N_CODED}
    moved = read(model, case, streaming, evicts=True)
    masked = read(model, case, {**streaming, "mask_only": True}, evicts=True)
    if distance(moved, masked) > TOLERANCE:
        return "what comes out after an eviction is not what the whole cache gives with the evicted cells masked"
    exact = read(model, case, {**default, "theta": 1e-9, "cold": native.enum_value("COLD_MEMORY")})
    # not exact where heads do not fit our kernel, whose codes are not exact either
    if distance(exact, whole) > 0.3:
        return "what comes out after an eviction is not what the full cache gives"
    return ""


def distance(a: Outputs, b: Outputs) -> float:
    """In standard deviations of the logits, of the median token."""
    return float(np.median(np.abs(a - b).max(axis=1)) / b.std())


def read(model: Any, case: Case, options: dict[str, Any] | None, *, evicts: bool = False) -> Outputs:
    """What comes out after each of the tokens behind the prompt."""
    try:
        return outputs(model, case, options, evicts=evicts)
    except NoLogits:
        return outputs(model, case, options, evicts=evicts, embeddings=True)


def outputs(
    model: Any, case: Case, options: dict[str, Any] | None, *, evicts: bool, embeddings: bool = False
) -> Outputs:
    params = llama_cpp.llama_context_default_params()
    fields = {
        "n_ctx": 512,
        "n_batch": N_BATCH,
        "n_ubatch": N_BATCH,
        "n_threads": 1,
        "n_threads_batch": 1,
        "type_k": 0,  # f32
        "type_v": 0,
        "flash_attn_type": llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED,
        "embeddings": embeddings,
        "pooling_type": llama_cpp.LLAMA_POOLING_TYPE_NONE,
        **case.fields,
    }
    for name, value in fields.items():
        setattr(params, name, value)
    native.clear_error()
    draft = None
    with native.next_context(options and native.make_params(**options)):
        ctx = new_context(model, params)
        try:
            if case.draft:
                draft = open_draft(model, case, ctx, params)
            rows = read_all(model, ctx, params.n_seq_max, options, evicts=evicts, embeddings=embeddings)
        finally:
            if draft:
                llama_cpp.llama_free(draft)
            llama_cpp.llama_free(ctx)
    res = np.array(rows)
    res = res[:, (res > -1e30).all(axis=0)]  # some logits say that a token is never chosen
    if not np.isfinite(res).all():
        raise Wrong("what comes out are no numbers (random weights)")
    if not res.std():
        raise Wrong("nothing comes out of it") if embeddings else NoLogits
    return res


def new_context(model: Any, params: Any) -> Any:
    if ctx := llama_cpp.llama_init_from_model(model, params):
        return ctx
    raise Wrong(native.last_error() or "llama.cpp makes no context of it")


def open_draft(model: Any, case: Case, ctx: Any, params: Any) -> Any:
    """A context that drafts for another one. Its cache has no policy."""
    if case.draft == case.model:
        params.ctx_type = llama_cpp.LLAMA_CONTEXT_TYPE_MTP
        with_heads, reason = load(case.model, load_mtp=True)
    else:
        with_heads, reason = load(case.draft)
    if not with_heads:
        raise Wrong(reason)
    params.ctx_other = ctx
    draft = new_context(with_heads, params)
    if native.pruned_pos(draft, 0) >= -1:  # an error where there is no policy
        raise Wrong("the draft has a policy")
    return draft


def read_all(
    model: Any, ctx: Any, n_seq: int, options: dict[str, Any] | None, *, evicts: bool, embeddings: bool
) -> list[Outputs]:
    n = N_PROMPT + N_DECODED
    encodes = llama_cpp.llama_model_has_encoder(model)
    if encodes:
        decode(ctx, tokens(0)[:N_BATCH], 0, 0, read=llama_cpp.llama_encode)
    for seq_id in range(n_seq):
        for first in range(0, N_PROMPT, N_BATCH):
            decode(ctx, tokens(seq_id)[first : first + N_BATCH], first, seq_id)
    if options and options["policy"] != native.ELASTIC:
        n_evicted = [native.prune(ctx, seq_id) for seq_id in range(n_seq)]
        if evicts and min(n_evicted) <= 0:
            raise Wrong("nothing is evicted")
    if embeddings:
        width, row = llama_cpp.llama_model_n_embd_out(model), llama_cpp.llama_get_embeddings_ith
    else:
        width = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        row = llama_cpp.llama_get_logits_ith
    rows = []
    for i in range(N_PROMPT, n):
        decode(ctx, [tokens(0)[i]], i, 0)
        if not (found := row(ctx, -1)):
            raise Wrong("nothing comes out of it") if embeddings else NoLogits
        rows.append(np.ctypeslib.as_array(found, shape=(width,)).copy())
    return rows


def tokens(seq_id: int) -> list[int]:
    return [(7 * i + i * i // 5 + 11 * seq_id) % 100 + 1 for i in range(N_PROMPT + N_DECODED)]


def decode(ctx: Any, tokens: list[int], first: int, seq_id: int, *, read: Any = llama_cpp.llama_decode) -> None:
    n = len(tokens)
    batch = llama_cpp.llama_batch_init(n, 0, 1)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i] = token, first + i
        batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, seq_id, i == n - 1
    batch.n_tokens = n
    status = read(ctx, batch)
    llama_cpp.llama_batch_free(batch)
    if status:
        raise Wrong(native.last_error() or f"llama_decode returns {status}")


def in_a_process(case: Case, note: Path) -> list[str]:
    if not (child := os.fork()):
        try:
            note.write_text(json.dumps(verdicts(case)))
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
    llama_cpp.llama_log_set(silence, None)
    llama_cpp.llama_backend_init()
    note = out.with_suffix(".note")
    cases = json.loads(Path(sys.argv[2]).read_text())
    res = {name: in_a_process(Case(**case), note) for name, case in cases.items()}
    note.unlink(missing_ok=True)
    out.write_text(json.dumps(res, indent=1))


if __name__ == "__main__":
    main()
