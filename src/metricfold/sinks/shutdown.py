"""What happens to unwritten records when the process ends: on exit, and on SIGTERM.

Schedulers end jobs with SIGTERM, and Python's default for it is to die on the spot. While a logger
is open, its records are written first, and then whatever was there before has its turn: the user's
own handler is called, and the default action still ends the process as killed by SIGTERM.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Protocol

from metricfold.processes import at_exit

__all__ = ["Endable", "unwatch", "watch"]


class Endable(Protocol):
    """Something that must be told when the process ends."""

    def end_on_exit(self, *, after_error: bool) -> None:
        """Finish: the interpreter is about to go, perhaps because of an exception."""

    def end_on_signal(self, *, dying: bool) -> None:
        """Finish in a few seconds if `dying`; otherwise make sure, as quickly, of what there is."""


_watched: list[Endable] = []
_pid = 0  # the process that `_watched` belongs to: a fork inherits the list, but no threads
_chained: signal._HANDLER = None  # what SIGTERM did before
_in_handler = False


def watch(one: Endable) -> None:
    """Tell `one` when the process ends, until `unwatch`."""
    global _pid  # noqa: PLW0603 - signal handlers are global by nature
    if _pid != os.getpid():
        _pid = os.getpid()
        _watched.clear()
        at_exit(_at_exit)
    _watched.append(one)
    _install()


def unwatch(one: Endable) -> None:
    """Forget `one`; with the last one goes the signal handler."""
    if one in _watched:
        _watched.remove(one)
    if not _watched and _in_main_thread() and signal.getsignal(signal.SIGTERM) is _on_sigterm:
        signal.signal(signal.SIGTERM, _chained)


def _install() -> None:
    global _chained  # noqa: PLW0603
    if not _in_main_thread():
        return  # Python allows it nowhere else
    present = signal.getsignal(signal.SIGTERM)
    # None: a handler that was not installed from Python, and that could not be called from here.
    if present is None or present is _on_sigterm:
        return
    _chained = present
    signal.signal(signal.SIGTERM, _on_sigterm)


def _on_sigterm(signum: int, frame: FrameType | None) -> None:
    global _in_handler  # noqa: PLW0603
    chained = _chained
    # A second SIGTERM while the first is being handled means: now.
    if not _in_handler and _pid == os.getpid():
        _in_handler = True
        try:
            for one in _watched.copy():
                one.end_on_signal(dying=chained == signal.SIG_DFL)
        finally:
            _in_handler = False
    if callable(chained):
        chained(signum, frame)
    elif chained == signal.SIG_DFL:
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)


def _at_exit(after_error: bool) -> None:
    if _pid == os.getpid():
        for one in _watched.copy():
            one.end_on_exit(after_error=after_error)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
