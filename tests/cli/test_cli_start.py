"""How the command line tool starts, in processes of its own: without extras, its versions, its text in any encoding."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from native_build import ROOT

import refreekv_cpp

LABORATORY = ["bench", "memory", "turns", "eval", "eval-report"]
COMMANDS = ["run", "chat", "demo", "plan", "info", *LABORATORY]

# the modules that pyproject.toml's extras bring (pydantic and PyYAML come with dependencies, too)
WITHOUT_EXTRAS = """
import importlib.machinery
import sys

ABSENT = (
    "fastapi", "gguf", "matplotlib", "pydantic_settings", "sse_starlette", "starlette", "starlette_context", "uvicorn",
)

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in ABSENT else super().find_spec(name, path, target)

sys.meta_path = [Finder if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
from refreekv_cpp.cli import main
main()
"""

# answers with what it was asked, as ASCII, and an emoji
ECHO = """
from refreekv_cpp.cli import common, main

def stream_chat(llm, history, **options):
    yield ascii([message["content"] for message in history])
    yield " \\N{GRINNING FACE} done"

common.stream_chat = stream_chat
main()
"""


def python(*args: str | bytes | Path, stdin: bytes = b"", **variables: str) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "TERM": "dumb", **variables}
    return subprocess.run([sys.executable, *args], input=stdin, capture_output=True, env=environment)


# -- without extras ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_command_starts_without_extras(command: str) -> None:
    done = python("-c", WITHOUT_EXTRAS, *command.split(), "--help")
    assert done.returncode == 0, done.stderr.decode()
    assert b"Usage: refreekv" in done.stdout
    assert done.stderr == b""


@pytest.mark.parametrize(
    ("args", "extra"),
    [(["bench", "none.gguf"], b"[lab]"), (["serve", "--python", "--help"], b"[server]")],
    ids=str,
)
def test_a_command_that_needs_an_extra_names_it(args: list[str], extra: bytes) -> None:
    done = python("-c", WITHOUT_EXTRAS, *args)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert b"pip install" in line
    assert b"refreekv-cpp" + extra in line


# says which modules of the laboratory, and which of its packages, a command has imported
IMPORTED = """
import sys
from refreekv_cpp.cli import main
try:
    main()
finally:
    names = {name for name in sys.modules if name.startswith("refreekv_cpp.lab.") or name in ("gguf", "matplotlib")}
    print(sorted(names), file=sys.stderr)
"""


@pytest.mark.parametrize("command", ["", "run", "chat", "demo", "plan", "info"])
def test_the_runtime_does_not_import_the_laboratory(command: str) -> None:
    done = python("-c", IMPORTED, *command.split(), "--help")
    assert done.returncode == 0, done.stderr.decode()
    assert done.stderr.decode() == "[]\n"


def test_the_laboratory_is_imported_when_it_is_called() -> None:
    done = python("-c", IMPORTED, "bench", "none.gguf", "--tokens", "0")
    assert b"--tokens 0: must be different positive numbers" in done.stderr
    assert b"refreekv_cpp.lab.commands.bench" in done.stderr


def test_its_commands_are_listed_in_a_panel_of_their_own() -> None:
    commands, laboratory = python("-m", "refreekv_cpp", "--help").stdout.decode().split("Laboratory")
    for command in COMMANDS:
        where = laboratory if command in LABORATORY else commands
        assert re.search(rf"^\W+{command} ", where, re.MULTILINE), command


def test_pictures_need_matplotlib_and_a_report_does_not(tmp_path: Path) -> None:
    picture = python("-c", f"{WITHOUT_EXTRAS.partition('from refreekv_cpp')[0]}\nfrom refreekv_cpp.lab import figure\n"
                     "assert not figure.have_matplotlib()\nfigure.new_figure()")  # fmt: skip
    assert (
        b'MissingExtraError: a picture needs matplotlib, which is not installed: run `pip install "refreekv-cpp[lab'
        in (picture.stderr.splitlines()[-1])
    )
    report = python("-c", WITHOUT_EXTRAS, "eval-report", tmp_path)
    assert b"no run of refreekv eval" in report.stderr


# -- versions and completion -------------------------------------------------------------------------------------------


def test_versions() -> None:
    assert refreekv_cpp.__version__ == importlib.metadata.version("refreekv-cpp")
    done = python("-m", "refreekv_cpp", "--version")
    assert done.returncode == 0, done.stderr.decode()
    package, upstream, backends = done.stdout.decode().splitlines()
    assert package == f"refreekv-cpp {refreekv_cpp.__version__}"
    assert upstream.startswith("llama-cpp-python 0.")
    assert "CPU" in backends.removeprefix("backends of llama.cpp: ").split(", ")


def test_the_module_is_the_command() -> None:
    done = python("-m", "refreekv_cpp", "info", "none.gguf")
    assert (done.returncode, done.stderr.decode().strip()) == (2, "none.gguf: no such file")


@pytest.mark.parametrize(
    ("words", "expected"), [("ru", "run"), ("run --gp", "--gpu-layers"), ("ben", "bench"), ("bench --ag", "--against")]
)
def test_completion(words: str, expected: str) -> None:
    variables = {"COMP_WORDS": f"refreekv {words}", "COMP_CWORD": str(len(words.split()))}
    done = python("-m", "refreekv_cpp", _REFREEKV_COMPLETE="complete_bash", **variables)
    assert expected in done.stdout.decode().split()


def test_completion_can_be_installed() -> None:
    done = python("-m", "refreekv_cpp", "--help")
    assert b"--install-completion" in done.stdout


# -- closed streams, Ctrl-C --------------------------------------------------------------------------------------------

# Ctrl-C while this module is imported
INTERRUPTED = """
import runpy
import sys

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == sys.argv[1]:
            raise KeyboardInterrupt

sys.meta_path.insert(0, Finder)
runpy.run_path(sys.argv[2])["main"]()
"""
COMMAND = ROOT / "cmake" / "refreekv_command.py"


@pytest.mark.parametrize("module", ["numpy", "psutil", "refreekv_cpp.llama", "rich", "typer"])
def test_interrupted_while_it_imports(module: str) -> None:
    done = python("-c", INTERRUPTED, module, COMMAND)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_the_program_ignores_the_policy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFREEKV_POLICY", "nonsense")
    done = python("-c", INTERRUPTED, "none", COMMAND)
    assert b"Usage: refreekv" in done.stdout + done.stderr


def test_the_program_starts() -> None:
    done = python("-c", INTERRUPTED, "none", COMMAND)
    assert b"Usage: refreekv" in done.stdout + done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="a shell closes it")
def test_stdin_that_is_closed(tiny_model: Path) -> None:
    def without_stdin(command: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "refreekv_cpp", command, str(tiny_model), "--n-ctx", "512", "--threads", "1"]
        return subprocess.run(["sh", "-c", f"{shlex.join(words)} <&-"], capture_output=True, text=True)

    done = without_stdin("run")
    assert (done.returncode, done.stderr) == (2, "no prompt: use --prompt or --file, or pipe it in\n")
    done = without_stdin("chat")
    assert (done.returncode, done.stdout) == (0, "")
    assert "Traceback" not in done.stderr


# -- any text ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def options(tiny_model: Path) -> list[str | Path]:
    return [tiny_model, "--n-ctx", "512", "--threads", "1"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_stdout_cannot_encode_is_replaced(options: list[str | Path], encoding: str) -> None:
    expected = {"utf-8": "😀"}.get(encoding, "?")
    done = python("-c", ECHO, "run", *options, "--prompt", "Hi", PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode(encoding) == f"['Hi'] {expected} done\n"
    done = python("-c", ECHO, "chat", *options, stdin=b"Hi\n", PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr.decode()
    assert f"['Hi'] {expected} done\n" in done.stdout.decode(encoding)


def test_a_table_goes_to_any_stdout(tiny_model: Path) -> None:
    done = python("-m", "refreekv_cpp", "info", tiny_model, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr.decode()
    assert b"KV cache per token" in done.stdout


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_input_that_is_no_text_is_read_as_far_as_it_is(options: list[str | Path], encoding: str) -> None:
    text, read = "caf\u00e9 ".encode() + b"\xff!", ascii(["caf\u00e9 \N{REPLACEMENT CHARACTER}!"])
    done = python("-c", ECHO, "run", *options, stdin=text, PYTHONIOENCODING=encoding)
    assert done.stdout.decode(encoding).startswith(read), done.stderr.decode()
    done = python("-c", ECHO, "chat", *options, stdin=text + b"\n", PYTHONIOENCODING=encoding)
    assert read in done.stdout.decode(encoding), done.stderr.decode()


@pytest.mark.skipif(sys.platform == "win32", reason="arguments are no bytes there")
def test_arguments_that_are_no_text(options: list[str | Path]) -> None:
    done = python("-c", ECHO, "run", *options, "--prompt", b"a\xffb", "--system", b"\xff", PYTHONUTF8="1")
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().startswith(ascii(["\N{REPLACEMENT CHARACTER}", "a\N{REPLACEMENT CHARACTER}b"]))
