"""The package's logger, "refreekv_cpp". Nothing is attached to it, nor to any other logger."""

from __future__ import annotations

import logging
import sys

logger = logging.getLogger("refreekv_cpp")


def inform(message: str, *, verbose: bool) -> None:
    """Log a message with level INFO. With `verbose`, it goes to stderr if no handler of the program would show it."""
    if verbose and not (logger.isEnabledFor(logging.INFO) and logger.hasHandlers()):
        print(f"refreekv: {message}", file=sys.stderr)
    logger.info("%s", message)
