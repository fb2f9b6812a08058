"""Ctrl-C anywhere: the Llama can be used afterwards, by any thread, and answers right."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import llama_cpp
import numpy as np
import pytest
from books import reader
from support import feed, load, logits
from tiny import random_tokens

import refreekv_cpp
from refreekv_cpp import Llama, ReFreeKV, _upstream

PROMPT = random_tokens(700)
TURN = [*PROMPT, *random_tokens(40, seed=1)[1:]]
FED = random_tokens(4, seed=2)[1:]
N_MOST = int(os.environ.get("REFREEKV_INTERRUPTS", "12"))  # of a step

_FOLDERS = tuple(str(Path(module.__file__).parent) for module in (refreekv_cpp, llama_cpp))


def is_ignored_in(frame: FrameType | None) -> bool:
    """Whether Python prints an exception there and goes on: in finalizers, in what C calls, in generators that end."""
    if isinstance(sys.exc_info()[1], GeneratorExit):
        return True
    while frame is not None:
        if frame.f_code.co_name == "__del__" or frame.f_code.co_filename.endswith("_logger.py"):
            return True
        frame = frame.f_back
    return False


class Interrupt:
    """Raises KeyboardInterrupt at the n-th moment at which Python looks for signals in our code or llama-cpp-python's.

    Those are the beginnings of functions and the returns from functions written in C. (One is left out: behind the
    `acquire` of a lock Python itself has no way to keep it from staying locked.)
    """

    def __init__(self, n: int) -> None:
        self.n, self.count, self.raised = n, 0, False

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        if event not in ("call", "c_return") or not frame.f_code.co_filename.startswith(_FOLDERS):
            return
        if getattr(arg, "__name__", "") == "acquire" or is_ignored_in(frame):
            return
        self.count += 1
        if self.count == self.n:
            self.raised = True
            sys.setprofile(None)
            raise KeyboardInterrupt

    def during(self, do: Callable[[], Any]) -> None:
        sys.setprofile(self)
        try:
            do()
        except KeyboardInterrupt:
            pass
        finally:
            sys.setprofile(None)


def answer(llm: Llama, prompt: list[int]) -> np.ndarray[Any, Any]:
    generator = llm.generate(prompt, temp=0.0)
    next(generator)
    res = logits(llm)
    generator.close()
    return np.concatenate([res, *feed(llm, FED)])


def in_another_thread(do: Callable[[], Any]) -> Any:
    res: list[Any] = []
    thread = threading.Thread(target=lambda: res.append(do()), daemon=True)
    thread.start()
    thread.join(30)
    assert res, "it waits for a lock that nobody gives back"
    return res[0]


STEPS: dict[str, Callable[[Llama], Any]] = {
    "completion": lambda llm: llm.create_completion(PROMPT, max_tokens=3, temperature=0.0),
    "next turn": lambda llm: answer(llm, TURN),
    "prune_kv": lambda llm: (llm.eval(PROMPT), llm.prune_kv()),
    "state": lambda llm: (llm.eval(PROMPT), llm.load_state(llm.save_state())),
    "stream": lambda llm: list(llm.create_completion(PROMPT, max_tokens=3, temperature=0.0, stream=True)),
}


@pytest.mark.parametrize("library", [False, True], ids=["", "library"])
@pytest.mark.parametrize("step", STEPS)
def test_it_can_be_used_afterwards(tiny_model: Path, tmp_path: Path, step: str, library: bool) -> None:
    def new(folder: str) -> Llama:
        llm = reader(tiny_model, tmp_path / folder if library else None, kv_evicted="restore")
        if step == "next turn":
            answer(llm, PROMPT)
        return llm

    whole = Interrupt(0)
    reference = new("whole")
    whole.during(lambda: STEPS[step](reference))
    expected = answer(reference, TURN)
    for n in sorted({int(n) for n in np.linspace(1, whole.count, N_MOST)}):
        llm = new(str(n))
        interrupt = Interrupt(n)
        interrupt.during(lambda: STEPS[step](llm))  # noqa: B023
        found = in_another_thread(lambda: answer(llm, TURN))  # noqa: B023
        # what was read in other batches is rounded in other places, and codes are of rounded numbers
        np.testing.assert_allclose(found, expected, atol=2e-2 * float(np.abs(expected).max()), err_msg=f"{step}, {n}")
        in_another_thread(llm.close)


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Ctrl-C is a KeyboardInterrupt, also in a process that was started in the background and ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("at", [1, 3, 4, 6], ids=["prefill", "the prompt's last batch", "decode", "later"])
def test_a_signal_between_batches(tiny_model: Path, at: int) -> None:
    """The signal itself, at a batch of the prompt and of the answer. The prompt is pruned before the fourth batch."""
    llm = load(tiny_model, ReFreeKV(), codes=True, n_batch=256, kv_evicted="restore")
    expected = answer(llm, TURN)
    llm.reset()
    n = 0

    def count(_: int) -> None:
        nonlocal n
        n += 1
        if n == at:
            signal.raise_signal(signal.SIGINT)

    with _upstream.after_batches(llm, count), pytest.raises(KeyboardInterrupt):
        llm.create_completion(PROMPT, max_tokens=8, temperature=0.0, logit_bias={"100": 50.0})
    np.testing.assert_allclose(answer(llm, TURN), expected, atol=2e-2 * float(np.abs(expected).max()))
