"""A process in a control group with little memory reads a long prompt: it ends it, it raises an error, or the kernel
ends the process. What it has saved before is there in each case. Needs the right to make such a group."""

from __future__ import annotations

import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from books import TEXT, files, opened, write
from tiny import TinyModel

from refreekv_cpp.native import library_check

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")

# where groups are made, and their files: the limit on memory, that on swap (in version 1: on both), what is in use
HIERARCHIES = [
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.usage_in_bytes"),
    (Path("/sys/fs/cgroup"), "memory.max", "memory.swap.max", "memory.current"),
]

SCRIPT = """
import os, sys
from pathlib import Path
import numpy as np
from refreekv_cpp import CacheMemoryError, Llama, ReFreeKV
model, folder, group, limit, swap, used = *sys.argv[1:3], *map(Path, sys.argv[3:7])
room, n_tokens, options = int(sys.argv[7]), int(sys.argv[8]), eval(sys.argv[9])
(group / "cgroup.procs").write_text(str(os.getpid()))
llm = Llama(model, n_ctx=8192, n_batch=256, n_threads=1, n_threads_batch=1, verbose=False, kv_policy=ReFreeKV(),
            kv_library=Path(folder, "library"), kv_cold_dir=Path(folder, "cold"), **options)
llm.eval([1, 5, 7])
llm.reset()
most = int((group / used).read_text()) + room
(group / limit).write_text(str(most))
if (group / swap).exists():
    (group / swap).write_text("0" if swap.name == "memory.swap.max" else str(most))
prompt = [1, *np.random.default_rng(1).integers(3, 259, n_tokens - 1).tolist()]
try:
    llm.create_completion(prompt, max_tokens=2, temperature=0.0)
except CacheMemoryError as error:
    print("refused:", error)
else:
    print("read:", llm.kv_stats.n_limit_prunes, "prunings at the limit")
"""
MIB = 1 << 20


@pytest.fixture
def group() -> Iterator[list[Path]]:
    """A new one, and the names of its files."""
    for root, *names in HIERARCHIES:
        folder = root / f"refreekv-{uuid.uuid4().hex}"
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            if (folder / names[0]).exists():
                yield [folder, *map(Path, names)]
                return
        finally:
            folder.rmdir()
    pytest.skip("no control group with a limit on memory can be made here")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kv_memory_limit": 16 * MIB, "kv_cold": "file"}, "read: "),
        ({"kv_memory_limit": 2 * MIB, "kv_cold": "file"}, "refused: the KV cache would grow to "),
        ({"kv_cold": "memory"}, "killed"),
    ],
    ids=["limit", "limit too small", "no limit"],
)
def test_a_group_with_little_memory(tmp_path: Path, group: list[Path], options: dict[str, object], said: str) -> None:
    model = tmp_path / "wide.gguf"
    TinyModel(n_layer=2, n_embd=64, n_head=16, n_head_kv=16, n_embd_head=64).write(model)
    (tmp_path / "cold").mkdir()
    write(model, tmp_path / "library")
    saved = [path.name for path in files(tmp_path / "library")]
    assert saved

    command = [sys.executable, "-c", SCRIPT, model, tmp_path, *group, 32 * MIB, 6000, options]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600)
    if said == "killed":
        assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    else:
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.startswith(said), done.stdout
    assert done.stdout != "read: 0 prunings at the limit\n"

    assert {path.name for path in files(tmp_path / "library")} >= set(saved)
    for path in files(tmp_path / "library"):
        library_check(path)
    llm = opened(model, tmp_path / "library")
    assert llm.kv_stats.n_opened == len(TEXT)
    llm.close()
    assert not list((tmp_path / "cold").iterdir())
