"""Every allocation of native/, and every call on a file, fails once: docs/development/reliability.md.

    python tests/tools/faults.py [--each] [--most 1000000] [--kind memory --kind EIO ...]

A script of a chat, on a tiny model, runs in a process of its own for each of them. Most calls come many times from the
same callers (rows are read one by one, for example): of those the first and the last one fails, and with --each every
one. The script reads, prunes, saves and loads a state, restores, cuts, and opens what it has read from its library. A
call that fails has to raise one of the documented errors or none, the same call has to work then, and what comes out
has to be right. Linux, with a C++ compiler.
"""

from __future__ import annotations

import errno
import gc
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import _helpers  # noqa: F401  (first: it makes the other imports possible)
import faults
import numpy as np
import typer
from faults import Fault, Outcome
from support import ctx_of, feed, load, logits
from tiny import TinyModel, random_tokens

from refreekv_cpp import CacheStateError, Llama, ReFreeKV, RefreeKVError, native
from refreekv_cpp._llama_cpp import library_dir

KINDS = ["memory", "memory...", "EIO", "EIO...", "ENOSPC", "ENOSPC...", "EMFILE", "EINTR", "short"]

TEXT = random_tokens(900)
TURN = [*TEXT, *random_tokens(40, seed=1)[1:]]
NEXT = [*TURN, *random_tokens(60, seed=2)[1:]]
OTHER = random_tokens(500, seed=3)
FRESH = random_tokens(400, seed=4)
FED = random_tokens(5, seed=5)[1:]

# of logits, relative to the largest one: the same numbers; read in other batches, after an error; by codes
_EXACT, _READ_AGAIN, _DEGRADED = 1e-3, 1e-2, 0.5


class Chat:
    """Its steps. Each is done a second time where it fails.

    Args:
        heal: ends the faults.
    """

    def __init__(self, model: Path, folder: Path, evicted: str, heal: Callable[[], None]) -> None:
        self.model, self.folder, self.evicted, self.heal = model, folder, evicted, heal
        self.errors: list[str] = []
        self.answers: dict[str, list[list[float]]] = {}
        self.llm: Llama

    def step(self, name: str, do: Callable[[], Any]) -> Any:
        try:
            return do()
        except (RefreeKVError, OSError, MemoryError) as error:
            said = error
        except ValueError as error:
            if not name.startswith("load"):
                raise
            said = error  # as llama-cpp-python's
        self.errors.append(f"{name}: {type(said).__name__}: {said}")
        self.heal()
        return do()

    def load(self) -> None:
        self.llm = load(
            self.model,
            ReFreeKV(),
            codes=True,
            n_ctx=1536,
            n_batch=256,
            n_threads=2,
            n_threads_batch=2,
            kv_evicted=self.evicted,
            kv_cold="file",
            kv_cold_dir=self.folder / "cold",
            kv_library=self.folder / "library",
        )

    def answer(self, name: str, prompt: list[int]) -> None:
        def do() -> list[list[float]]:
            generator = self.llm.generate(prompt, temp=0.0)
            next(generator)
            res = [logits(self.llm)]
            generator.close()  # it prunes, and writes to the library
            return [each.tolist() for each in [*res, *feed(self.llm, FED)]]

        self.answers[name] = self.step(name, do)

    def restore(self) -> None:
        with self.lost():
            native.restore(ctx_of(self.llm), 0)

    def cut(self) -> None:
        with self.lost():
            self.llm.n_tokens = 450
            self.llm.eval(FED)

    @contextmanager
    def lost(self) -> Iterator[None]:
        """Inside, what was evicted may be wanted back, and may have been lost before."""
        try:
            yield
        except CacheStateError as error:
            self.errors.append(str(error))
            self.llm.reset()

    def run(self) -> dict[str, Any]:
        self.step("load", self.load)
        self.answer("first", TEXT)
        self.answer("turn", TURN)
        state = self.step("save", lambda: self.llm.save_state())
        self.answer("other", OTHER)
        self.step("load_state", lambda: self.llm.load_state(state))
        self.answer("next", NEXT)
        self.step("restore", self.restore)
        self.step("cut", self.cut)
        self.answer("again", TURN)
        self.llm.close()
        self.step("load again", self.load)
        self.answer("opened", TURN)
        self.heal()
        n_opened = self.llm.kv_stats.n_opened
        self.llm.reset()
        self.answer("fresh", FRESH)
        self.llm.close()
        del self.llm
        gc.collect()
        left = [str(path) for path in self.folder.rglob("*") if path.suffix == ".tmp" or path.parent.name == "cold"]
        return {
            "errors": self.errors,
            "answers": self.answers,
            "n_opened": n_opened,
            "left": left,
            "n_fds": len(os.listdir("/proc/self/fd")),
        }


def difference(a: list[float], b: list[float]) -> float:
    return float(np.abs(np.subtract(a, b)).max() / np.abs(b).max())


def is_exact(evicted: str, errors: list[str], name: str, i: int) -> bool:
    """Whether nothing that was evicted takes part in the i-th logits of an answer.

    The second try of a text may go on from the cache of the first one, which was pruned.
    """
    is_first = name in ("first", "other") and not any(error.startswith(name) for error in errors)
    return name == "fresh" or (i == 0 and (evicted == "restore" or is_first))


def verdict(outcome: Outcome, reference: Any, evicted: str) -> tuple[str, bool]:
    """What is wrong ("": nothing), and whether its answers are less exact than without a fault, as is documented."""
    if outcome.result is None:
        return outcome.ended, False
    result, _ = outcome.result
    harmless = outcome.fault.how in (-1, errno.EINTR) and outcome.fault.of_files
    if harmless and result["errors"]:
        return f"it was not tried again: {result['errors']}", False
    if result["left"]:
        return f"files are left: {result['left']}", False
    if result["n_fds"] != reference["n_fds"]:
        return f"{result['n_fds']} files are open, {reference['n_fds']} without a fault", False
    degraded = False
    for name, rows in result["answers"].items():
        for i, row in enumerate(rows):
            off = difference(row, reference["answers"][name][i])
            degraded = degraded or off > _EXACT
            most = _DEGRADED
            if harmless or is_exact(evicted, result["errors"], name, i):
                most = _READ_AGAIN if result["errors"] and name != "fresh" else _EXACT
            if not off <= most:
                return f"{name}[{i}] is off by {off:.3g}; {result['errors']}", degraded
    return "", degraded


def spread(calls: list[str], most: int, each: bool) -> list[int]:
    """The first and the last call of each place (or each call), but no more than so many of them, spread evenly."""
    its: dict[str, list[int]] = {}
    for n, place in enumerate(calls, start=1):
        its.setdefault(place, []).append(n)
    chosen = sorted(set().union(*(numbers if each else (numbers[0], numbers[-1]) for numbers in its.values())))
    return [chosen[int(i)] for i in np.linspace(0, len(chosen) - 1, min(most, len(chosen)))]


def fault_of(kind: str, n: int) -> Fault:
    name, all_after = kind.removesuffix("..."), kind.endswith("...")
    if name == "memory":
        return Fault(n, all_after=all_after)
    return Fault(n, of_files=True, how=-1 if name == "short" else getattr(errno, name), all_after=all_after)


def main(
    most: Annotated[int, typer.Option(help="Faults of a kind at most, spread evenly over its places.")] = 1_000_000,
    each: Annotated[bool, typer.Option("--each", help="Each call, not the first and the last of each place.")] = False,
    kind: Annotated[list[str] | None, typer.Option(help=f"Some of: {', '.join(KINDS)}.")] = None,
    evicted: Annotated[list[str] | None, typer.Option(help="keep, restore, or both.")] = None,
    only: Annotated[int, typer.Option(help="The one fault of this number.")] = 0,
) -> None:
    if "libfaults" not in os.environ.get("LD_PRELOAD", ""):
        with tempfile.TemporaryDirectory() as folder:
            shim = faults.compile_shim(Path(folder))
            environment = {**os.environ, "LD_PRELOAD": str(shim), "OPENBLAS_NUM_THREADS": "1", "GGML_NO_BACKTRACE": "1"}
            raise SystemExit(faults.subprocess.run([sys.executable, *sys.argv], env=environment).returncode)
    n_bad = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        TinyModel(n_layer=2).write(folder / "tiny.gguf")
        work = folder / "work"
        libraries = [*library_dir().glob("libllama.so"), *library_dir().glob("libggml-cpu*.so")]
        shim = faults.Shim(libraries, work)

        for how in evicted or ["keep", "restore"]:

            def run(fault: Fault, how: str = how) -> Outcome:
                faults.shutil.rmtree(work, ignore_errors=True)
                (work / "cold").mkdir(parents=True)
                return faults.run(
                    shim, fault, lambda heal: Chat(folder / "tiny.gguf", work, how, heal).run(), folder / "log"
                )

            for which in kind or KINDS:
                first = run(fault_of(which, 0))
                if first.result is None:
                    raise SystemExit(first.ended)
                reference, calls = first.result
                assert reference["errors"] == []
                assert reference["n_opened"] > 0
                if not calls:  # its memory is known by the addresses of its functions
                    print(f"{how}, {which}: not tried, because the library is stripped of its symbols", flush=True)
                    continue
                tried = [only] if only else spread(calls, most, each)
                n_errors = n_degraded = 0
                for n in tried:
                    outcome = run(fault_of(which, n))
                    wrong, degraded = verdict(outcome, reference, how)
                    n_degraded += degraded
                    n_errors += outcome.result is not None and bool(outcome.result[0]["errors"])
                    if wrong:
                        n_bad += 1
                        callers = [name for name in outcome.where if not name.startswith("libfaults")]
                        print(f"BAD {how} {outcome.fault}: {wrong}\n    {' < '.join(callers[:10])}", flush=True)
                print(
                    f"{how}, {which}: {len(calls)} calls of {len(set(calls))} places, {len(tried)} of them failed: "
                    f"{n_errors} raised an error, "
                    f"{n_degraded} made answers less exact",
                    flush=True,
                )
    print(f"{n_bad} are wrong")
    raise SystemExit(n_bad > 0)


if __name__ == "__main__":
    typer.run(main)
