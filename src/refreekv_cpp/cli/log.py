"""What the package logs, on stderr."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

_logger = logging.getLogger("refreekv_cpp")


class Log(logging.Handler):
    """Prints what the loggers of this package say: warnings, and all else when it is verbose."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self._held: list[logging.LogRecord] | None = None

    def install(self, *, verbose: bool) -> None:
        """From now on; once or more often."""
        _logger.addHandler(self)
        _logger.setLevel(logging.DEBUG if verbose else logging.WARNING)

    def is_verbose(self) -> bool:
        return _logger.isEnabledFor(logging.DEBUG)

    def emit(self, record: logging.LogRecord) -> None:
        if self._held is not None:
            self._held.append(record)
            return
        style = "yellow" if record.levelno >= logging.WARNING else "dim"
        self._console.print(self.format(record), style=style, markup=False, highlight=False, soft_wrap=True)

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
