"""How a process ends while a logger is open: as without one, but for a few seconds of writing.

Schedulers end jobs with SIGTERM, terminals with SIGHUP, and Python's default for both is to die on
the spot. Python runs a handler in the main thread between two instructions, so never while that
thread waits in a collective. What C code does at once is to write the signal's number to a file
descriptor (`signal.set_wakeup_fd`). A *watcher* thread reads it, and it alone does the work:

    signal -> C code of Python -> wakeup descriptor -> watcher: write everything, then
                               |                         die of the signal, if nobody else wants it
                               -> our handler, in the main thread, once it has a turn:
                                    wait for the watcher, then let the handler before ours have it

The watcher ends the process only if, at that moment, our handler is in place and stands for the
default action. In all other cases it writes, closes nothing, and the process does with the signal
what it would have done without us.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
import time
from functools import partial
from types import FrameType
from typing import Any, Protocol

from metricfold._core.runtime.processes import at_exit, start_thread
from metricfold.sinks.worker import error_of

__all__ = ["SECONDS", "Endable", "look_after", "unwatch", "watch"]

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
SECONDS = 10.0  # in which all must have ended; schedulers send SIGKILL after 30 or so
_TURN = 12.0  # seconds for which the main thread, in our handler, waits for the watcher
_ASKED = 128  # with a signal's number: our handler asks, and waits
_INIT = 1  # the process whose signals the kernel drops where their action is the default


class Endable(Protocol):
    """Something that must be told when the process ends; deadlines are on the monotonic clock."""

    def end_on_exit(self, *, deadline: float) -> None:
        """Finish: the interpreter is about to go. Other ranks may be waited for until `deadline`."""

    def end_on_signal(self, *, dying: bool, deadline: float) -> None:
        """Finish by `deadline` if `dying`; otherwise make sure, by then, of what there is."""


class _Watch:
    """What watches over one process; a forked child begins with a new one."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.watched: list[Endable] = []
        self.before: dict[int, Any] = {}  # what each signal did before our handler
        self.pipe: tuple[int, int] | None = None  # of signals; None as long as none is handled
        self.hooked = False
        self._installed: dict[int, int] = {}  # the address of Python's C code, per signal
        self._turns: dict[int, threading.Event] = {}  # what our handler waits for
        self._answering: set[int] = set()
        self._lock = threading.Lock()  # guards `_answering`; never taken in a handler

    # -- Taking over signals, and giving them back; in the main thread

    def look_after(self) -> None:
        """Put our handler in front of what is there, wherever that can still be called."""
        if not self.before:
            for signum in SIGNALS:
                self._install(signum)
        if self.before and self.pipe is None:
            self.pipe = os.pipe()
            os.set_blocking(self.pipe[1], False)
            start_thread(self._listen, name="metricfold signals")
        self.set_wakeup(ours=True)

    def forget_lost(self) -> None:
        """Forget handlers of ours that went when one that was set after them was taken away."""
        for signum in list(self.before):
            if signal.getsignal(signum) == signal.SIG_DFL:
                del self.before[signum]

    def _install(self, signum: int) -> None:
        present, action = signal.getsignal(signum), _action(signum)
        # An ignored signal, as under nohup, stays ignored. A handler of C code, such as that of
        # faulthandler or of JAX's preemption notifier, cannot be called from here: who set it
        # counts on it. Python knows of no handler then, or takes it for the default.
        in_c = present == signal.SIG_DFL and _address(action)
        if in_c or present in (None, signal.SIG_IGN):
            return
        signal.signal(signum, _on_signal)
        address = _address(_action(signum))
        if callable(present) and _address(action) != address:
            signal.signal(signum, present)  # Python's, but C code has taken its place since
            _libc.sigaction(signum, action, None)
            return
        self.before[signum], self._installed[signum] = present, address

    def set_wakeup(self, *, ours: bool) -> None:
        """Take or give back the wakeup descriptor, unless it is another's, such as asyncio's."""
        if self.pipe is None:
            return
        new = self.pipe[1] if ours else -1
        before = signal.set_wakeup_fd(new, warn_on_full_buffer=False)
        if before not in (-1, self.pipe[1]):
            signal.set_wakeup_fd(before, warn_on_full_buffer=False)

    def uninstall(self) -> None:
        """Put back what was there before, where our handler is still in place and answers nothing."""
        if self._turns or self._answering:
            return
        for signum, before in list(self.before.items()):
            ours = signal.getsignal(signum) is _on_signal
            # Where another handler holds ours and may put it back later, ours goes on to work.
            if ours and _address(_action(signum)) == self._installed[signum]:
                signal.signal(signum, before)
                del self.before[signum]
        if not self.before:
            self.set_wakeup(ours=False)

    # -- Answering a signal

    def turn(self, signum: int, frame: FrameType | None) -> None:
        """Answer in the main thread: let the watcher write first."""
        before = self.before.get(signum, signal.SIG_DFL)
        # Else another handler, which was set after ours, calls ours as a part of its own.
        in_place = signal.getsignal(signum) is _on_signal
        if self.pipe is not None and signum not in self._turns:  # a second one means: now
            written = self._turns[signum] = threading.Event()
            try:
                with contextlib.suppress(OSError):
                    os.write(self.pipe[1], bytes([signum | _ASKED]))
                written.wait(_TURN)
            finally:
                del self._turns[signum]
        if callable(before):
            before(signum, frame)
        elif before == signal.SIG_DFL and in_place:
            _die(signum)

    def _listen(self) -> None:
        assert self.pipe is not None
        while self.pid == os.getpid():
            # Python writes the number of every signal that has a handler.
            for byte in os.read(self.pipe[0], 64):
                signum, asked = byte & ~_ASKED, bool(byte & _ASKED)
                if signum not in self.before:
                    continue
                with self._lock:
                    begun = signum in self._answering
                    self._answering.add(signum)
                if not begun:
                    start_thread(self._answer, signum, name="metricfold end")
                elif not asked and self._mortal(signum):  # a second one means: now
                    _die(signum)

    def _answer(self, signum: int) -> None:
        """Write everything, and die of the signal if nobody else wants it."""
        dying, deadline = self._mortal(signum), time.monotonic() + SECONDS
        # Side by side, so that one that hangs takes no time from the others.
        ends = [partial(one.end_on_signal, dying=dying, deadline=deadline) for one in self.watched]
        for thread in [start_thread(error_of, end, name="metricfold end") for end in ends]:
            thread.join(max(deadline - time.monotonic(), 0.1))
        if dying and self._mortal(signum):
            _die(signum)
        with self._lock:
            self._answering.discard(signum)
        if (turn := self._turns.get(signum)) is not None:
            turn.set()

    def _mortal(self, signum: int) -> bool:
        """Whether this process, but for us, would have died of the signal."""
        default = self.before.get(signum) == signal.SIG_DFL and os.getpid() != _INIT
        return default and signal.getsignal(signum) is _on_signal


_watch = _Watch()


def watch(one: Endable) -> None:
    """Tell `one` when the process ends, until `unwatch`."""
    if not _watch.hooked:
        _watch.hooked = True
        at_exit(_at_exit)
    if not _watch.watched and _may_handle():
        _watch.forget_lost()
    _watch.watched.append(one)
    look_after()


def look_after() -> None:
    """Make sure that signals are heard; cheap enough for every log.

    A logger that was made in another thread takes over signals at its first log in the main one,
    which alone may.
    """
    if _may_handle():
        _watch.look_after()


def unwatch(one: Endable) -> None:
    """Forget `one`; with the last one go the handlers."""
    if one in _watch.watched:
        _watch.watched.remove(one)
    if not _watch.watched and _may_handle():
        _watch.uninstall()


def _on_signal(signum: int, frame: FrameType | None) -> None:
    _watch.turn(signum, frame)


def _at_exit(deadline: float) -> None:
    for one in _watch.watched.copy():
        one.end_on_exit(deadline=deadline)


def _may_handle() -> bool:
    return _libc is not None and threading.current_thread() is threading.main_thread()


# -- What only C can do ----------------------------------------------------------------------------

try:
    _libc: Any = ctypes.CDLL(None)
    _libc.signal.argtypes, _libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
except (OSError, TypeError, AttributeError):  # no POSIX: signals are left alone
    _libc = None


def _action(signum: int) -> Any:
    """Return the `struct sigaction` of a signal, of which Python may not know."""
    action = ctypes.create_string_buffer(512)
    _libc.sigaction(signum, None, action)
    return action


def _address(action: Any) -> int:
    """Return the handler's address, with which the struct begins; 0 is the default action."""
    return ctypes.c_void_p.from_buffer(action).value or 0


def _die(signum: int) -> None:
    """End the process by the default action of a signal, from any thread."""
    _libc.signal(signum, None)  # `signal.signal` is refused outside the main thread
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signum])
    os.kill(os.getpid(), signum)
    if os.getpid() != _INIT:
        time.sleep(1.0)
        os._exit(128 + signum)


# -- Forks: no child may write into its parent's pipe, or keep a handler without its thread --------

_mask: list[Any] = []


def _before_fork() -> None:
    if _watch.pipe is not None:
        _mask.append(signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS))


def _after_in_parent() -> None:
    if _mask:
        signal.pthread_sigmask(signal.SIG_SETMASK, _mask.pop())


def _after_in_child() -> None:
    global _watch
    parents, _watch = _watch, _Watch()
    for signum, before in parents.before.items():
        if signal.getsignal(signum) is _on_signal:
            signal.signal(signum, before)
    if parents.pipe is not None:
        parents.set_wakeup(ours=False)
        for end in parents.pipe:
            os.close(end)
    _after_in_parent()


os.register_at_fork(
    before=_before_fork, after_in_parent=_after_in_parent, after_in_child=_after_in_child
)
