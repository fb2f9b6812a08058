"""What was read lies in files that nobody else can read, and nobody else's files are read."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from books import MORE, TEXT, files, opened, read, reader, write
from command import assert_one_error_line, refreekv
from support import feed

from refreekv_cpp import CacheStateError, Llama, PolicyError, native

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has other permissions")


@pytest.fixture(autouse=True)
def generous() -> Iterator[None]:
    """The process would let everybody read and write what it makes."""
    before = os.umask(0)
    yield
    os.umask(before)


def test_the_library_is_its_owners_alone(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "library"
    llm = read(reader(tiny_model, folder))
    llm.keep_kv("a text")
    for path in [folder, *folder.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert files(folder)
    # no name of a file says what was read
    assert not any("text" in path.name for path in folder.rglob("*"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="it has to know which files are open")
def test_the_cold_store_has_no_name(tiny_model: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)  # as /tmp is, and another user's folder may be
    llm = read(reader(tiny_model, None, kv_cold="file", kv_cold_dir=tmp_path))
    assert llm.kv_stats.cold == "file"
    assert llm.kv_stats.bytes_cold > 0
    assert list(tmp_path.iterdir()) == []
    there = {}
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the one that this list was read with
            there[int(fd)] = os.readlink(f"/proc/self/fd/{fd}")
    own = [fd for fd, name in there.items() if name.startswith(str(tmp_path))]
    assert len(own) == 1
    assert there[own[0]].endswith(" (deleted)")
    assert stat.S_IMODE(os.fstat(own[0]).st_mode) == 0o600


def give_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is another user's from now on, who is not root."""
    other = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)


@pytest.mark.parametrize("how", ["another user's", "0777", "1777", "a link to one of 0777"])
def test_a_folder_that_others_can_write_to_is_refused(
    tiny_model: Path, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # whoever writes a block there has the model go on from what they have made up
    folder = tmp_path / "library"
    folder.mkdir(mode=0o700)
    if how == "another user's":
        if os.geteuid() == 0:
            os.chown(folder, 12345, -1)
        give_away(monkeypatch)
    else:
        folder.chmod(0o1777 if how == "1777" else 0o777)
    if how.startswith("a link"):
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PolicyError, match="must be a folder of yours that nobody else can write to"):
        Llama(str(tiny_model), kv_policy="refreekv", kv_library=folder, verbose=False)
    assert_one_error_line(refreekv("library", "--folder", folder), str(folder), "nobody else can write to")
    assert not list((tmp_path / "elsewhere" if how.startswith("a link") else folder).iterdir())


def test_a_link_to_a_folder_of_ones_own_is_followed(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir(mode=0o700)
    (tmp_path / "library").symlink_to(tmp_path / "disk")
    write(tiny_model, tmp_path / "library")
    assert files(tmp_path / "disk")
    assert opened(tiny_model, tmp_path / "library").kv_stats.n_opened == len(TEXT)


def replace_by_link(path: Path, target: Path) -> None:
    path.rename(target)
    path.symlink_to(target)


def replace_by_hard_link(path: Path, target: Path) -> None:
    path.rename(target)
    os.link(target, path)


def replace_by_pipe(path: Path, target: Path) -> None:
    path.rename(target)
    os.mkfifo(path)


@pytest.mark.parametrize("replace", [replace_by_link, replace_by_hard_link, replace_by_pipe])
def test_a_block_is_a_plain_file(tiny_model: Path, tmp_path: Path, replace: object) -> None:
    write(tiny_model, tmp_path / "library")
    path = files(tmp_path / "library")[0]
    native.library_check(path)
    replace(path, tmp_path / "target")  # type: ignore[operator]
    with pytest.raises(CacheStateError, match=str(path)):
        native.library_check(path)


@pytest.mark.parametrize("replace", [replace_by_link, replace_by_hard_link])
def test_a_link_in_the_place_of_a_block_is_a_miss(tiny_model: Path, tmp_path: Path, replace: object) -> None:
    write(tiny_model, tmp_path / "library")
    for i, path in enumerate(files(tmp_path / "library")):
        replace(path, tmp_path / f"target{i}")  # type: ignore[operator]
    targets = {path: path.read_bytes() for path in tmp_path.glob("target*")}
    llm = opened(tiny_model, tmp_path / "library")
    assert llm.kv_stats.n_opened == 0
    llm = read(llm)
    feed(llm, MORE)
    assert all(path.read_bytes() == data for path, data in targets.items())


def test_no_file_of_a_name_that_can_be_foreseen_is_written(tiny_model: Path, tmp_path: Path) -> None:
    """What is written has a random name before it has its own, and is never written through a link."""
    write(tiny_model, tmp_path / "library")
    (tmp_path / "target").write_text("mine")
    for path in files(tmp_path / "library"):
        path.unlink()
        path.symlink_to(tmp_path / "target")
    write(tiny_model, tmp_path / "other")
    llm = read(reader(tiny_model, tmp_path / "library"))
    llm.keep_kv()
    assert (tmp_path / "target").read_text() == "mine"
