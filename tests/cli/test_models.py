"""What MODEL may be, and the files of a hub, from a server of the tests' own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub import Hub, serving

from refreekv_cpp import models
from refreekv_cpp.default_model import ModelDownloadError
from refreekv_cpp.models import choose, resolve

FILES = ["README.md", "m-Q4_K_M.gguf", "m-Q8_0.gguf", "mmproj-m-Q8_0.gguf"]
SHARDS = [f"q8_0/big-q8_0-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
TOKEN = "hf_secret"


# -- which file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "wanted", "chosen"),
    [
        (FILES, None, ["m-Q4_K_M.gguf"]),
        (FILES, "q8_0", ["m-Q8_0.gguf"]),
        (FILES, "M-q8_0.gguf", ["m-Q8_0.gguf"]),
        (FILES, "mmproj-m-Q8_0.gguf", ["mmproj-m-Q8_0.gguf"]),
        (["model.gguf", "notes.txt"], None, ["model.gguf"]),
        (["m.Q4_K.gguf", "m.Q4_K_M.gguf"], "Q4_K", ["m.Q4_K.gguf"]),
        (["m_q4_k_m.gguf", "m_iq4_xs.gguf"], None, ["m_q4_k_m.gguf"]),
        ([*reversed(SHARDS), "x.gguf"], "Q8_0", SHARDS),
        (SHARDS, SHARDS[1], SHARDS),
        (SHARDS, "big-q8_0.gguf", SHARDS),
        (["Q4_K_M/m-00001-of-00001.gguf", "BF16/m-00001-of-00001.gguf"], "bf16", ["BF16/m-00001-of-00001.gguf"]),
    ],
)
def test_the_model_in_a_repository(names: list[str], wanted: str | None, chosen: list[str]) -> None:
    assert choose("hf:a/b", names, wanted) == chosen


@pytest.mark.parametrize(
    ("names", "wanted", "message"),
    [
        (["README.md", "mmproj.gguf"], None, "hf:a/b: there is no GGUF file of a model in the repository"),
        (["a-Q8_0.gguf", "a-Q5_0.gguf"], None, "no model is Q4_K_M, the default; .*: a-Q5_0.gguf, a-Q8_0.gguf"),
        (FILES, "Q5_0", "no model is Q5_0; name one of these files: m-Q4_K_M.gguf, m-Q8_0.gguf"),
        (FILES, "n.gguf", "no model is n.gguf; name one of these"),
        (["7b-Q8_0.gguf", "1b-Q8_0.gguf", "x.gguf"], "Q8_0", "several models are Q8_0; .*: 1b-Q8_0.gguf, 7b-Q8_0.gguf"),
        (SHARDS[:2], "Q8_0", "only 2 of the 3 files of q8_0/big-q8_0.gguf are there"),
        ([f"{i}-Q8_0.gguf" for i in range(40)], None, ", and 10 more"),
    ],
)
def test_no_model_to_choose(names: list[str], wanted: str | None, message: str) -> None:
    with pytest.raises(ModelDownloadError, match=message):
        choose("hf:a/b", names, wanted)


def test_a_file_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "default_model", lambda: Path("of the package"))
    assert resolve("smollm2") == resolve("SmolLM2") == Path("of the package")
    Path("smollm2").write_text("a file of this name comes first")
    assert resolve("smollm2") == Path("smollm2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("none.gguf", r"^none.gguf: no such file$"),
        ("smolm2", r"smolm2: no such file; MODEL must be a GGUF file, hf:owner/repo\[:file-or-quant\], or smollm2"),
        (".", "a folder, not a file"),
        ("/dev/null", "a pipe or a device, not a file"),
        ("~nobody-has-this-name/x.gguf", "no such file"),
        ("hf:", "must be hf:owner/repo"),
        ("hf:owner", "must be hf:owner/repo"),
        ("hf:a/b/c", "must be hf:owner/repo"),
        ("hf:a/-b", "hf:a/-b: .*-"),  # of huggingface_hub
    ],
)
def test_what_is_no_model(text: str, message: str) -> None:
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        resolve(text)


# -- the hub: in processes of their own, since huggingface_hub reads its settings when it is imported ------------------


@pytest.fixture
def hub() -> Iterator[Hub]:
    content = {name: f"content of {name}".encode() for name in [*FILES, *SHARDS]}
    repos = {
        "a/one": {name: content[name] for name in FILES},
        "a/split": {name: content[name] for name in SHARDS},
        "a/none": {"README.md": b"x"},
        "a/gated": {"m-Q4_K_M.gguf": b"gated"},
    }
    with serving(Hub(repos, gated={"a/gated": TOKEN})) as served:
        yield served


@pytest.fixture
def fetch(hub: Hub, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`resolve` in another process; it prints the path, or the error in one line."""
    program = """
import sys
from refreekv_cpp.models import resolve
try:
    print(resolve(sys.argv[1]))
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""

    def run(text: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1", **variables}
        return subprocess.run([sys.executable, "-c", program, text], capture_output=True, text=True, env=environment)

    return run


def test_a_file_of_the_hub_is_fetched_once_and_found_without_it(hub: Hub, fetch: Callable[..., object]) -> None:
    first = fetch("hf:a/one", TQDM_POSITION="-1")  # bars, although stderr is no terminal
    assert first.returncode == 0, first.stderr
    path = Path(first.stdout.strip())
    assert path.name == "m-Q4_K_M.gguf"
    assert path.read_text() == "content of m-Q4_K_M.gguf"
    assert "m-Q4_K_M.gguf" in first.stderr  # a bar for it

    def n_fetched() -> int:
        return sum(request.startswith("GET") and "/resolve/" in request for request in hub.requests)

    assert n_fetched() == 1
    for variables in ({}, {"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        again = fetch("hf:a/one:q4_k_m", **variables)
        assert again.stdout == first.stdout, again.stderr
    assert n_fetched() == 1

    other = fetch("hf:a/one:Q8_0", HF_HUB_OFFLINE="1")
    assert other.returncode == 1
    assert "hf:a/one:Q8_0: no model is Q8_0; name one of these files: m-Q4_K_M.gguf (in the cache; " in other.stderr


def test_all_files_of_a_split_model_are_fetched(fetch: Callable[..., object]) -> None:
    done = fetch("hf:a/split:Q8_0")
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    assert path.parts[-2:] == tuple(SHARDS[0].split("/"))
    assert sorted(each.name for each in path.parent.iterdir()) == [name.rpartition("/")[2] for name in SHARDS]
    assert fetch("hf:a/split:q8_0", HF_HUB_OFFLINE="1").stdout == done.stdout


def test_a_gated_repository_wants_a_token(fetch: Callable[..., object]) -> None:
    refused = fetch("hf:a/gated")
    assert refused.stderr.splitlines()[-1].startswith("ModelDownloadError: hf:a/gated: the repository is gated")
    assert fetch("hf:a/gated", HF_TOKEN=TOKEN).stdout.endswith("m-Q4_K_M.gguf\n")


@pytest.mark.parametrize(
    ("text", "variables", "message"),
    [
        ("hf:a/missing", {}, "ModelDownloadError: hf:a/missing: there is no such repository, or it is private"),
        ("hf:a/none", {}, "ModelDownloadError: hf:a/none: there is no GGUF file of a model in the repository"),
        ("hf:a/one", {"HF_HUB_OFFLINE": "1"}, "hf:a/one: it is not in the cache, and the hub cannot be reached ("),
        ("hf:a/one", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "not in the cache, and the hub cannot be reached ("),
    ],
)
def test_what_cannot_be_fetched_is_one_sentence(
    fetch: Callable[..., object], text: str, variables: dict[str, str], message: str
) -> None:
    done = fetch(text, **variables)
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]
