"""Something is done in a process that is forked off: it may crash, hang, or be killed."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

_N_SECONDS = 60.0


def forked(do: Callable[[], Any], *, kill_after: float | None = None) -> tuple[Any, str]:
    """What it returns, which is JSON, and how it ended otherwise: "" for not at all, a signal, an error, "it hangs".

    Nothing that forks badly may have been done before: no Llama, no computation in threads.

    Args:
        kill_after: seconds after which it is killed (SIGKILL), wherever it is.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        code = 1
        try:
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            data = json.dumps(do())
            code = 0
        except BaseException as error:
            data = json.dumps(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
        with suppress(BaseException), os.fdopen(writer, "w") as file:
            file.write(data)
        os._exit(code)
    os.close(writer)
    os.set_blocking(reader, False)
    data_read, status = b"", None
    end = time.monotonic() + (_N_SECONDS if kill_after is None else kill_after)
    while status is None and time.monotonic() < end:
        with suppress(BlockingIOError):
            data_read += os.read(reader, 1 << 20)
        done, its = os.waitpid(pid, os.WNOHANG)
        status = its if done else None
        if status is None:
            time.sleep(0.002)
    hangs = status is None and kill_after is None
    if status is None:
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    with suppress(BlockingIOError):
        while part := os.read(reader, 1 << 20):
            data_read += part
    os.close(reader)
    if hangs:
        return None, "it hangs"
    if os.WIFSIGNALED(status):
        return None, signal.Signals(os.WTERMSIG(status)).name
    if os.WEXITSTATUS(status):
        return None, str(json.loads(data_read)) if data_read else f"exit code {os.WEXITSTATUS(status)}"
    return json.loads(data_read), ""
