"""Say what must not go unseen, however the program has set up its logging.

Of ten usual set-ups (a level, a file, `logging.disable`, a framework's handlers) two show a warning
of the ``metricfold`` logger. An error goes there too, and where no handler brings it to a terminal,
one more line goes to stderr.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from typing import Any

__all__ = ["mention", "say"]

_log = logging.getLogger("metricfold")


def say(text: str) -> None:
    """Log `text` as an error, and print it on stderr unless that ends on a terminal."""
    heard = _heard()
    with contextlib.suppress(Exception):
        _log.error("%s", text)
    stderr: Any = sys.stderr  # None where a program has no terminal at all
    if not heard and stderr is not None:
        with contextlib.suppress(Exception):
            print(f"metricfold: {text}", file=stderr, flush=True)


def mention(text: str) -> None:
    """Log `text` as a warning, and never fail at it: handlers and streams may be closed."""
    with contextlib.suppress(Exception):
        _log.warning("%s", text)


def _heard() -> bool:
    """Return whether an error that is logged reaches stderr or stdout."""
    if not _log.isEnabledFor(logging.ERROR) or _log.disabled:
        return False
    if not _log.hasHandlers():
        last: logging.Handler | None = logging.lastResort
        return last is not None and last.level <= logging.ERROR
    at: logging.Logger | None = _log
    while at is not None:
        if any(handler.level <= logging.ERROR and _prints(handler) for handler in at.handlers):
            return True
        at = at.parent if at.propagate else None
    return False


def _prints(handler: logging.Handler) -> bool:
    if hasattr(handler, "console"):  # of rich
        return True
    stream: Any = getattr(handler, "stream", None)
    if stream in (sys.stderr, sys.stdout, sys.__stderr__, sys.__stdout__):
        return stream is not None
    try:
        return stream.fileno() in (1, 2)
    except Exception:  # noqa: BLE001 - somebody else's object, or one without a descriptor
        return False
