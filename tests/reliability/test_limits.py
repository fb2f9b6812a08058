"""What happens where the system gives no more: memory, sizes of files, open files, folders, room on a disk."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from books import MORE, TEXT, files, reader, write
from support import feed, load
from tiny import TinyModel

from refreekv_cpp import Llama, PolicyError, ReFreeKV
from refreekv_cpp._cache_dir import VARIABLE

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limits")

BEGIN = """
import os, resource, sys
from pathlib import Path
from refreekv_cpp import CacheMemoryError, Llama, ReFreeKV
import numpy as np
model, folder = sys.argv[1], Path(sys.argv[2])
prompt = [1, *np.random.default_rng(0).integers(3, 259, 1299).tolist()]
ascii_only = {str(token): -1000.0 for token in (2, *range(131, 259))}  # others are not counted
def load(**options):
    options = {"n_ctx": 2048, "n_batch": 256, "n_threads": 2, "n_threads_batch": 2, **options}
    return Llama(model, kv_policy=ReFreeKV(), verbose=False, **options)
def limit(kind, n):
    resource.setrlimit(kind, (n, resource.getrlimit(kind)[1]))
def answer(llm, n_tokens=1300):
    llm.create_completion(prompt[:n_tokens], max_tokens=4, temperature=0.0, logit_bias=ascii_only)
    return llm._input_ids[n_tokens:].tolist()
"""


def run(script: str, model: Path, folder: Path) -> None:
    command = [sys.executable, "-c", BEGIN + script, str(model), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not keep to the limit")
def test_the_address_space(tmp_path: Path) -> None:
    TinyModel(n_layer=2, n_embd=64, n_head=16, n_head_kv=16, n_embd_head=64).write(tmp_path / "wide.gguf")
    script = """
llm = load(n_ctx=4096, kv_cold="memory")
answer(llm, 100)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
whole = resource.getrlimit(resource.RLIMIT_AS)[0]
limit(resource.RLIMIT_AS, used + 2**20)
try:
    answer(llm)
except MemoryError as error:  # CacheMemoryError is one
    print(repr(error))
else:
    raise SystemExit("it was to fail")
limit(resource.RLIMIT_AS, whole)
found = answer(llm)
assert found == answer(load(n_ctx=4096, kv_cold="memory")), found
"""
    run(script, tmp_path / "wide.gguf", tmp_path)


def test_the_size_of_a_file(tiny_model: Path, tmp_path: Path) -> None:
    """What does not fit into the cold store is lost, and the conversation is read again; the library stays."""
    script = """
expected = answer(load(kv_evicted="restore"))
limit(resource.RLIMIT_FSIZE, 2**16)
llm = load(kv_evicted="restore", kv_cold="file", kv_cold_dir=folder, kv_library=folder / "library")
answer(llm)
assert llm.kv_stats.cold == "file"
assert not list((folder / "library").glob("*.block")) and not list((folder / "library").glob(".*"))
assert answer(llm)[:1] == expected[:1]
limit(resource.RLIMIT_FSIZE, resource.RLIM_INFINITY)
llm.reset()
assert answer(llm) == expected
assert list((folder / "library").glob("*.block"))
"""
    run(script, tiny_model, tmp_path)


def test_the_number_of_open_files(tiny_model: Path, tmp_path: Path) -> None:
    """A file that cannot be opened for want of numbers is no damaged one."""
    write(tiny_model, tmp_path / "library", TEXT)
    before = files(tmp_path / "library")
    script = """
llm = load(kv_library=folder / "library")
for n_free in 1, 2, 3:
    limit(resource.RLIMIT_NOFILE, len(os.listdir("/dev/fd")) - 1 + n_free)
    answer(llm)
    assert llm.kv_stats.n_opened == 0
    limit(resource.RLIMIT_NOFILE, 256)
    llm.reset()
limit(resource.RLIMIT_NOFILE, len(os.listdir("/dev/fd")))
try:
    load(kv_library=folder / "library")
except (OSError, ValueError):  # not even its weights
    pass
limit(resource.RLIMIT_NOFILE, 256)
answer(llm)
"""
    run(script, tiny_model, tmp_path)
    assert set(before) <= set(files(tmp_path / "library"))
    llm = reader(tiny_model, tmp_path / "library")
    llm.create_completion([*TEXT, *MORE], max_tokens=1)
    assert llm.kv_stats.n_opened == len(TEXT)


def test_a_home_that_cannot_be_written(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, os.devnull + "/cache")
    llm = Llama(str(tiny_model), kv_policy="refreekv", kv_library=True, n_ctx=2048, verbose=False)
    llm.create_completion(TEXT, max_tokens=3)
    assert llm.kv_stats.cold == "file"  # in the folder of temporary files
    assert llm.keep_kv() == 0


def no_folder() -> str:
    raise FileNotFoundError("no usable temporary directory found")


def test_no_folder_for_temporary_files_either(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # once Llama() raised a FileNotFoundError
    expected = feed(load(tiny_model, ReFreeKV(), codes=True), TEXT[:3])
    monkeypatch.setenv(VARIABLE, os.devnull + "/cache")
    monkeypatch.setattr(tempfile, "gettempdir", no_folder)
    llm = load(tiny_model, ReFreeKV(), codes=True)
    assert llm.kv_stats.cold == "memory"
    np.testing.assert_array_equal(feed(llm, TEXT[:3]), expected)
    with pytest.raises(PolicyError, match="kv_cold='file': no folder can be written; kv_cold_dir must be one"):
        load(tiny_model, ReFreeKV(), codes=True, kv_cold="file")


def test_a_full_disk(tiny_model: Path, tmp_path: Path) -> None:
    script = """
expected = answer(load(kv_evicted="restore"))
for turn in range(2):
    llm = load(kv_evicted="restore", kv_cold="file", kv_cold_dir=folder, kv_library=folder / "library")
    assert answer(llm)[:1] == expected[:1]
    assert answer(llm)[:1] == expected[:1]
    assert not list((folder / "library").glob(".*"))
    llm.close()
"""
    (tmp_path / "run.py").write_text(BEGIN + script)
    disk = tmp_path / "disk"
    disk.mkdir()
    command = 'mount -t tmpfs -o size=256k,mode=700 none "$1" && exec "$2" "$3" "$4" "$1"'
    shell = ["unshare", "--map-root-user", "--mount", "sh", "-c", command, "sh", str(disk)]
    try:
        done = subprocess.run(
            [*shell, sys.executable, str(tmp_path / "run.py"), str(tiny_model)],
            capture_output=True,
            text=True,
            timeout=120,
        )
    except FileNotFoundError:
        pytest.skip("there is no unshare")
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip("no file system can be mounted here")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="it is Linux that has huge pages by request")
def test_without_huge_pages(tmp_path: Path) -> None:
    """Rows lie in huge pages where the system gives them, and in small ones elsewhere."""
    TinyModel(n_layer=2, n_embd=64, n_head=16, n_head_kv=16, n_embd_head=64).write(tmp_path / "wide.gguf")
    script = """
import ctypes
expected = answer(load(kv_evicted="restore"))
PR_SET_THP_DISABLE = 41
assert ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0
assert answer(load(kv_evicted="restore")) == expected
"""
    run(script, tmp_path / "wide.gguf", tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="it looks into /proc")
def test_it_needs_neither_shared_memory_nor_io_uring(tiny_model: Path, tmp_path: Path) -> None:
    """So a small /dev/shm (64 MiB in a container) and a system without io_uring (seccomp) are no limits."""
    script = """
llm = load(kv_evicted="restore", kv_cold="file", kv_cold_dir=folder, kv_library=folder / "library")
answer(llm)
assert llm.kv_stats.cold == "file"
used = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
used += Path("/proc/self/maps").read_text().splitlines()
used = [each for each in used if str(folder.parent) not in each]  # the tests' own files may lie there
assert not [each for each in used if "/dev/shm" in each or "io_uring" in each], used
"""
    run(script, tiny_model, tmp_path)
