from __future__ import annotations

import contextlib
import sys
from typing import Any

from refreekv_cpp.cli import common
from refreekv_cpp.cli.common import MaxTokensOption, ModelArgument, SystemOption, TemperatureOption
from refreekv_cpp.cli.options import LoadOptions, takes_options
from refreekv_cpp.llama import Llama
from refreekv_cpp.models import resolve

with contextlib.suppress(ImportError):  # Windows has none
    import readline  # noqa: F401  (makes input() editable)


@common.user_errors()
@takes_options
def chat(
    model: ModelArgument,
    options: LoadOptions,
    system: SystemOption = None,
    max_tokens: MaxTokensOption = 512,
    temperature: TemperatureOption = 0.2,
) -> None:
    """Talk with the model. Ctrl-C stops an answer; /clear forgets the conversation; /exit or Ctrl-D ends it."""
    with contextlib.closing(options.load(resolve(model))) as llm:
        history = common.messages(system)
        while (line := _read_line()) not in (None, "/exit"):
            if line == "/clear":
                history = common.messages(system)
            elif line:
                _turn(llm, history, line, max_tokens=max_tokens, temperature=temperature)


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


def _turn(llm: Llama, history: list[Any], line: str, *, max_tokens: int, temperature: float) -> None:
    """One question and its answer, which are added to the history."""
    question = {"role": "user", "content": line}
    answer = ""
    try:
        for piece in common.stream_chat(llm, [*history, question], max_tokens=max_tokens, temperature=temperature):
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
        history += [question, {"role": "assistant", "content": answer}]
    common.print_receipt(llm)
