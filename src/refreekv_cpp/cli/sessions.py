"""Conversations with a name: their messages, in files of the cache folder.

What the model has read of them is in the library.
"""

from __future__ import annotations

import json
import re
from typing import Any

from refreekv_cpp._cache_dir import cache_dir
from refreekv_cpp._files import remove_left_behind, write_file
from refreekv_cpp.cli.common import whole_text

_N_BYTES = 200  # of a name: those of files have 255 at most, and .json is added


class Session:
    """One of them.

    Attributes:
        messages: as `create_chat_completion` takes them; none where the conversation is new.

    Raises:
        ValueError: the name cannot be that of a file, or the file is damaged.
        OSError: the file cannot be read.
    """

    def __init__(self, name: str) -> None:
        if not re.fullmatch(r"\w[\w.-]*", name) or len(name.encode()) > _N_BYTES:
            raise ValueError(
                f"--session {name}: must be letters, digits, _, - and dots, at most {_N_BYTES} bytes in UTF-8"
            )
        self.name = name
        self.path = cache_dir() / "sessions" / f"{name}.json"
        remove_left_behind(self.path.parent)
        self.messages = self._read()

    def _read(self) -> list[Any]:
        if not self.path.exists():
            return []
        try:
            if not self.path.is_file():  # a pipe would wait for its writer
                raise ValueError
            messages = json.loads(self.path.read_text(encoding="utf-8"))
            if all(_is_text(message["content"]) and _is_text(message["role"] or None) for message in messages):
                return list(messages)
        except (ValueError, TypeError, KeyError, RecursionError):
            pass
        raise ValueError(f"--session {self.name}: {self.path} is damaged; remove it, or take another name")

    def write(self, messages: list[Any]) -> None:
        """
        Raises:
            OSError: it cannot be written. What was there stays.
        """
        write_file(self.path, json.dumps(messages, ensure_ascii=False))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value == whole_text(value)
