"""What a user names as MODEL: a GGUF file, `hf:owner/repo[:file-or-quant]`, or `smollm2`.

Files of the Hugging Face Hub are fetched by `huggingface_hub`, into its own cache and with its own settings (HF_HOME,
HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE, ...).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path

from refreekv_cpp._files import check_file
from refreekv_cpp.default_model import ModelDownloadError, default_model

DEFAULT = "smollm2"
VALID = f"a GGUF file, hf:owner/repo[:file-or-quant], or {DEFAULT}"

_DEFAULT_QUANT = "Q4_K_M"
_HUB = re.compile(r"hf:(?P<repo>[^/:\s]+/[^/:\s]+)(?::(?P<wanted>.+))?")
_SHARD = re.compile(r"(?P<model>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.gguf", re.IGNORECASE)
_N_LISTED = 30


def resolve(text: str) -> Path:
    """The GGUF file of a model, fetched when it is not here yet; of a model in several files, the first.

    Args:
        text: the path of a file; `smollm2` (`default_model`); or `hf:owner/repo`, after which `:name.gguf` or a
            quantisation such as `:Q8_0` says which of the repository's models it is. Without, it is Q4_K_M, or the only
            one that there is.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: `hf:` is not followed by a repository.
        ModelDownloadError: the model cannot be fetched, or the repository has no such model.
    """
    if text.startswith("hf:"):
        return _from_hub(text)
    path = Path(text)
    with contextlib.suppress(RuntimeError):  # ~ of a user who is not there: there is no such file
        path = path.expanduser()
    if text.lower() == DEFAULT and not path.is_file():
        return default_model()
    try:
        return Path(check_file(path))
    except FileNotFoundError as error:
        hint = "" if path.suffix.lower() == ".gguf" else f"; MODEL must be {VALID}"
        raise FileNotFoundError(f"{error}{hint}") from None


def _from_hub(text: str) -> Path:
    # imported here, because most commands run a file and need none of it
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    match = _HUB.fullmatch(text)
    if not match:
        raise ValueError(f"{text}: must be hf:owner/repo, hf:owner/repo:name.gguf or hf:owner/repo:QUANT")
    repo = match["repo"]
    try:
        try:
            siblings = HfApi().model_info(repo).siblings or []
        except (HfHubHTTPError, HFValidationError):
            raise
        except Exception as error:  # no network: of requests or httpx, by the version of huggingface_hub
            return _from_hub_cache(text, repo, match["wanted"], error)
        names = choose(text, [file.rfilename for file in siblings], match["wanted"])
        paths = [Path(hf_hub_download(repo, name)) for name in names]
        return paths[0]
    except GatedRepoError:
        raise ModelDownloadError(
            f"{text}: the repository is gated: ask for access on its page, and set HF_TOKEN or run `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise ModelDownloadError(
            f"{text}: there is no such repository, or it is private and HF_TOKEN gives no access to it"
        ) from None
    except HFValidationError as error:
        raise ValueError(f"{text}: {_first_line(error)}") from None
    except LocalEntryNotFoundError as error:
        raise ModelDownloadError(
            f"{text}: the download failed, the hub cannot be reached ({_first_line(error.__cause__ or error)})"
        ) from None
    except HfHubHTTPError as error:
        raise ModelDownloadError(f"{text}: the hub refused the download ({_first_line(error)})") from None


def _from_hub_cache(text: str, repo: str, wanted: str | None, error: Exception) -> Path:
    """The model as it was fetched before, where the hub cannot be reached."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repos = [each for each in scan_cache_dir().repos if (each.repo_type, each.repo_id) == ("model", repo)]
    except CacheNotFound:
        repos = []
    revisions = [revision for each in repos for revision in each.revisions]
    if not revisions:
        raise ModelDownloadError(
            f"{text}: it is not in the cache, and the hub cannot be reached ({_first_line(error)})"
        ) from None
    newest = max(revisions, key=lambda revision: ("main" in revision.refs, revision.last_modified))
    names = [file.file_path.relative_to(newest.snapshot_path).as_posix() for file in newest.files]
    try:
        return newest.snapshot_path / choose(text, names, wanted)[0]
    except ModelDownloadError as other:
        raise ModelDownloadError(f"{other} (in the cache; the hub cannot be reached: {_first_line(error)})") from None


def choose(text: str, names: Sequence[str], wanted: str | None) -> list[str]:
    """The files, in order, of one model among those of a repository.

    Args:
        text: what the user wrote, for messages.
        names: files of the repository.
        wanted: a file's name, or a quantisation in it; None: Q4_K_M, or the only model.

    Raises:
        ModelDownloadError: there is none, or more than one.
    """
    models: dict[str, list[str]] = {}  # by the name that it would have in one file
    for name in sorted(names):
        if name.lower().endswith(".gguf"):
            shard = _SHARD.fullmatch(name)
            models.setdefault(f"{shard['model']}.gguf" if shard else name, []).append(name)
    if wanted is not None and wanted.lower().endswith(".gguf"):
        found = [name for name, files in models.items() if any(_is_file(wanted, file) for file in [name, *files])]
    else:
        # projectors of images stand beside models
        models = {name: files for name, files in models.items() if "mmproj" not in name.lower()}
        found = [name for name in models if _has_quant(name, wanted or _DEFAULT_QUANT)]
        if not found and wanted is None and len(models) == 1:
            found = list(models)
    if not models:
        raise ModelDownloadError(f"{text}: there is no GGUF file of a model in the repository")
    if len(found) != 1:
        what = wanted or f"{_DEFAULT_QUANT}, the default"
        how_many = "several models are" if found else "no model is"
        raise ModelDownloadError(f"{text}: {how_many} {what}; name one of these files: {_listed(found or models)}")
    files = models[found[0]]
    if (last := _SHARD.fullmatch(files[-1])) and len(files) != int(last["total"]):
        raise ModelDownloadError(f"{text}: only {len(files)} of the {int(last['total'])} files of {found[0]} are there")
    return files


def shards(model: Path) -> list[Path]:
    """The files of a model, of which this is the first or the only one."""
    shard = _SHARD.fullmatch(model.name)
    if not shard:
        return [model]
    names = (f"{shard['model']}-{i:05}-of-{shard['total']}.gguf" for i in range(1, int(shard["total"]) + 1))
    return [path for name in names if (path := model.with_name(name)).is_file()] or [model]


def _is_file(wanted: str, name: str) -> bool:
    return wanted.lower() in (name.lower(), name.rpartition("/")[2].lower())


def _has_quant(name: str, quant: str) -> bool:
    """Whether a file's name or folder has this quantisation; Q4_K is not in the name of a Q4_K_M."""
    return re.search(rf"(?:^|[-._/]){re.escape(quant)}(?=[-./])", name, re.IGNORECASE) is not None


def _listed(names: Sequence[str] | dict[str, list[str]]) -> str:
    shown = sorted(names)[:_N_LISTED]
    return ", ".join(shown) + (f", and {len(names) - len(shown)} more" if len(names) > len(shown) else "")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".:") if lines else type(error).__name__
