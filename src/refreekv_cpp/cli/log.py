"""What the package logs, on stderr."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

_logger = logging.getLogger("refreekv_cpp")
_choices = logging.getLogger("refreekv_cpp.fit")


class Log(logging.Handler):
    """Prints what the loggers of this package say: warnings, and what was chosen; all of it when verbose."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self._held: list[logging.LogRecord] | None = None

    def install(self, *, verbose: bool) -> None:
        """From now on; once or more often."""
        _logger.addHandler(self)
        _logger.setLevel(logging.DEBUG if verbose else logging.WARNING)
        _choices.setLevel(logging.DEBUG if verbose else logging.INFO)

    def is_verbose(self) -> bool:
        return _logger.isEnabledFor(logging.DEBUG)

    def emit(self, record: logging.LogRecord) -> None:
        if self._held is not None:
            self._held.append(record)
            return
        style = "yellow" if record.levelno >= logging.WARNING else "dim"
        self._console.print(self.format(record), style=style, soft_wrap=True)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Messages wait until the end of it: inside, stderr leads nowhere."""
        self._held = []
        try:
            yield
        finally:
            records, self._held = self._held, None
            for record in records:
                self.emit(record)
