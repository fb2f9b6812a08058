from __future__ import annotations

import contextlib
import difflib
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from refreekv_cpp.cli import common
from refreekv_cpp.cli.common import MaxTokensOption, ModelArgument, SystemOption, TemperatureOption
from refreekv_cpp.cli.documents import ask_about, check_room, read_document
from refreekv_cpp.cli.options import ChatOptions, takes_options
from refreekv_cpp.cli.sessions import Session
from refreekv_cpp.llama import Llama
from refreekv_cpp.models import resolve

with contextlib.suppress(ImportError):  # Windows has none
    import readline  # noqa: F401  (makes input() editable)

_COMMANDS = "/read FILE adds a document, /clear forgets the conversation, /exit ends it"


@common.user_errors()
@takes_options
def chat(
    model: ModelArgument,
    options: ChatOptions,
    file: Annotated[
        list[Path] | None, typer.Option(help="A document to talk about: text, Markdown or PDF. Can be repeated.")
    ] = None,
    session: Annotated[
        str | None, typer.Option(metavar="NAME", help="Go on with the conversation of this name, or begin it.")
    ] = None,
    system: SystemOption = None,
    max_tokens: MaxTokensOption = 512,
    temperature: TemperatureOption = 0.2,
) -> None:
    """Talk with the model. Ctrl-C stops an answer; /read FILE adds a document to the next question; /clear forgets the
    conversation; /exit or Ctrl-D ends it."""
    options = options.with_library()
    conversation = Conversation(system, session)
    for path in file or []:
        conversation.read(path)
    with contextlib.closing(options.load(resolve(model))) as llm:
        check_room(llm, conversation.documents)
        if sys.stdin is not None and sys.stdin.isatty():
            common.print_note(f"{_COMMANDS}; Ctrl-C stops an answer")
            if conversation.files:
                common.print_note(f"{', '.join(conversation.files)}: read with the first question")
        if conversation.history and session:
            common.print_note(f"session {session}: it has {len(conversation.history)} messages; /clear begins anew")
        while (line := _read_line()) not in (None, "/exit"):
            if line == "/clear":
                if conversation.files:
                    common.print_note(f"{', '.join(conversation.files)}: no longer part of the conversation")
                conversation.clear()
            elif line.partition(" ")[0] == "/read":
                _read_file(llm, conversation, line.partition(" ")[2].strip())
            elif _is_like_a_command(line):
                common.print_error(f"{line.partition(' ')[0]}: no such command; {_COMMANDS}")
            elif line:
                _turn(llm, conversation, line, max_tokens=max_tokens, temperature=temperature)


class Conversation:
    """
    Attributes:
        history: its messages.
        files: the names of all documents.
        documents: the name and the text of those that the next question is about, and that are not in it yet.
    """

    def __init__(self, system: str | None, session: str | None) -> None:
        self._session = Session(session) if session is not None else None
        self._system = system
        self.files: list[str] = []
        self.documents: list[tuple[str, str]] = []
        self.history: list[Any] = self._session.messages if self._session else []
        if not self.history:
            self.history = common.messages(system)
        elif system is not None and self.history[: len(begun := common.messages(system))] != begun:
            raise ValueError(f"--session {session} --system: the conversation has begun without this system message")

    @property
    def name(self) -> str:
        """In the library; "" for a conversation about no document."""
        if self._session is not None:
            return f"session {self._session.name}"
        return f"chat about {', '.join(self.files)}" if self.files else ""

    def read(self, path: Path) -> None:
        """Adds a document to the next question. Errors are those of `read_document`."""
        self.add_document(path.name, read_document(path))

    def add_document(self, name: str, text: str) -> None:
        self.documents.append((name, text))
        self.files.append(name)

    def add(self, *messages: Any) -> None:
        self.history += messages
        self.documents = []
        self._write()

    def clear(self) -> None:
        self.history = common.messages(self._system)
        self.documents, self.files = [], []
        self._write()

    def _write(self) -> None:
        if self._session is None:
            return
        try:
            self._session.write(self.history)
        except OSError as error:  # the next answer may find room
            common.print_error(f"the session could not be written: {error}")


def _read_line() -> str | None:
    """What the user typed; None: no more will come."""
    if sys.stdin is None:  # the program was started with it closed
        return None
    try:
        return common.whole_text(input("> ")).strip()
    except EOFError:
        print()
        return None
    except KeyboardInterrupt:
        print()
        return ""


def _is_like_a_command(line: str) -> bool:
    """A word with a slash, or the beginning of the line is nearly a command. Other questions can begin with a slash."""
    name = line.partition(" ")[0]
    nearly = difflib.get_close_matches(name, ["/read", "/clear", "/exit"], cutoff=0.75)
    return bool(nearly or re.fullmatch(r"/\w+", line))


def _read_file(llm: Llama, conversation: Conversation, name: str) -> None:
    try:
        if not name:
            raise ValueError("/read: must be /read FILE")
        path = Path(name).expanduser()
        document = read_document(path)
        check_room(llm, [*conversation.documents, (path.name, document)])
        conversation.add_document(path.name, document)
    except (ValueError, OSError, ImportError, RuntimeError) as error:  # RuntimeError: ~ of a user who is not there
        common.print_error(error)
        return
    common.print_note(f"{name}: the next question is about it")


def _turn(llm: Llama, conversation: Conversation, line: str, *, max_tokens: int, temperature: float) -> None:
    """One question and its answer, which are added to the history."""
    question = {"role": "user", "content": ask_about([text for _, text in conversation.documents], line)}
    answer = ""
    try:
        asked = [*conversation.history, question]
        for piece in common.stream_chat(llm, asked, max_tokens=max_tokens, temperature=temperature):
            answer += piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pass
    except ValueError as error:
        if "exceed context window" not in str(error):
            raise
        common.print_error(f"{error}; /clear starts anew")
        return
    print()
    if answer:
        conversation.add(question, {"role": "assistant", "content": answer})
        llm.keep_kv(conversation.name)
    common.print_receipt(llm)
