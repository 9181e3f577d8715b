"""Threads that outlive a call, and what becomes of them when the process exits or forks."""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, wait
from types import FrameType
from typing import Any, Protocol, TypeAlias, TypeVar

__all__ = [
    "DeferredInterrupt",
    "TaskThread",
    "Worker",
    "at_exit",
    "release_at_exit",
    "start_thread",
    "watch_forks",
]

_GRACE = 10.0
_GRACE_AFTER_ERROR = 2.0
"""Seconds for which an exit waits for other ranks, which may never come: a launcher restarts a job
only once its processes are gone."""

T = TypeVar("T")
_Task: TypeAlias = tuple[Callable[[], Any], "Future[Any]"]


# -- Exit ----------------------------------------------------------------------------------------


def at_exit(callback: Callable[[float], None]) -> None:
    """Call `callback` when the interpreter exits.

    Its argument says, on the monotonic clock, until when it may wait for other ranks. All callbacks
    share that moment: 2 s after an error, else 10 s after the first of them, for Python does not
    tell an exit by `sys.exit(1)` in the main program from a clean one.
    """

    def call() -> None:
        callback(_deadline_of_exit())

    # Imported late because most of those who import metricfold have nothing to finish.
    try:
        import concurrent.futures.thread  # noqa: F401, PLC0415
    except RuntimeError:
        return  # the interpreter is exiting: who begins as late as that finishes, too
    from multiprocessing import parent_process, util  # noqa: PLC0415

    if parent_process() is not None:
        # Children of multiprocessing, such as spawned ranks, end without atexit.
        util.Finalize(None, call, exitpriority=100)
        return
    # Not atexit: by then a backend that has only just got its first record could start no threads,
    # and exit hooks that it registered itself would have run. concurrent.futures hooks in here
    # too, and is imported above so that its hook is the older one: the last in is the first out.
    hook = getattr(threading, "_register_atexit", atexit.register)
    with contextlib.suppress(RuntimeError):  # the same, where that is imported already
        hook(call)


_exits: dict[int, float] = {}  # the deadline of the process, by its id: forks inherit this


def _deadline_of_exit() -> float:
    error = sys.exc_info()[1] or getattr(sys, "last_value", None)
    if isinstance(error, SystemExit) and not error.code:
        error = None
    grace = _GRACE if error is None else _GRACE_AFTER_ERROR
    return _exits.setdefault(os.getpid(), time.monotonic() + grace)


class Releasable(Protocol):
    """Something whose C++ threads must be gone when the interpreter is torn down."""

    def release(self) -> None: ...


_releasable: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()  # in order


def release_at_exit(one: Releasable) -> None:
    """Tell `one` when the interpreter exits, after what `at_exit` calls and the user's own hooks.

    What was registered last is told first: it may use what was there before it.
    """
    _releasable[one] = None


def _release_all() -> None:
    for one in reversed(list(_releasable)):
        one.release()


# The last in is the first out: hooks that are registered from now on still find everything there.
# What ends without this hook, a forked child of multiprocessing, tears no interpreter down.
atexit.register(_release_all)


# -- Interrupts ----------------------------------------------------------------------------------


class DeferredInterrupt:
    """Holds the first interrupt back until the block ends; a second one comes at once.

        with DeferredInterrupt() as deferred:
            ...
            deferred.deliver()      # here it does no harm, either

    In threads but the main one, which gets no interrupts, it does nothing.
    """

    def __init__(self) -> None:
        self._came: list[FrameType | None] = []
        self._before: Any = None

    def __enter__(self) -> DeferredInterrupt:  # noqa: PYI034 - Self is of Python 3.11
        if threading.current_thread() is threading.main_thread():
            before = signal.getsignal(signal.SIGINT)
            if callable(before):
                self._before = before
                signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self.deliver()
            self._before = None

    def deliver(self) -> None:
        """Let an interrupt that has come do what it would have done."""
        if self._came:
            self._before(signal.SIGINT, self._came.pop())

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._came:
            self._came.clear()
            self._before(number, frame)
        else:
            self._came.append(frame)


# -- Threads -------------------------------------------------------------------------------------


# What a thread's own instructions raise must reach it: faulthandler tells where that was.
_OWN_FAULTS = {
    getattr(signal, name)
    for name in ("SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGABRT", "SIGTRAP", "SIGSYS", "SIGPROF")
    if hasattr(signal, name)
}


def start_thread(target: Callable[..., object], *args: object, name: str) -> threading.Thread:
    """Start a daemon thread to which no signal is delivered.

    A signal goes to any thread that does not block it. A program that blocks some, to wait for them
    by `signal.sigwait`, does so in its own threads: one of ours must not take them.
    """
    thread = threading.Thread(target=target, args=args, name=name, daemon=True)
    if not hasattr(signal, "pthread_sigmask"):
        thread.start()
        return thread
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - _OWN_FAULTS)
    try:
        thread.start()  # a thread begins with the mask of the one that starts it
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return thread


class TaskThread:
    """A daemon thread that runs one task after the other, as long as somebody can submit one."""

    def __init__(self, name: str) -> None:
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._thread = start_thread(_run, self._tasks, name=name)
        self._end = weakref.finalize(self, self._tasks.put, None)
        self._end.atexit = False

    def submit(self, task: Callable[[], T], future: Future[T] | None = None) -> Future[T]:
        """Return the future of `task`, which cannot be cancelled: the other ranks count on it."""
        future = Future() if future is None else future
        future.set_running_or_notify_cancel()
        self._tasks.put((task, future))
        return future

    def finish(self, timeout: float | None) -> bool:
        """Wait until all tasks, and what their futures call, are done; returns whether they are."""
        return not wait([self.submit(bool)], timeout).not_done

    def end(self, timeout: float) -> bool:
        """Run nothing more after what has been submitted, and wait for that; returns whether it is over."""
        self._end()
        self._thread.join(timeout)
        return not self._thread.is_alive()


def _run(tasks: queue.SimpleQueue[_Task | None]) -> None:
    while (item := tasks.get()) is not None:
        task, future = item
        try:
            result = task()
        except BaseException as error:  # noqa: BLE001 - the future's reader gets it
            future.set_exception(error)
        else:
            future.set_result(result)
            # Hold nothing while waiting for the next one.
            del result
        del item, task, future


class Worker(TaskThread):
    """A thread for tasks; an exit waits for what it has."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        global _hooked_in  # noqa: PLW0603 - exit hooks are global by nature
        if _hooked_in != os.getpid():
            _hooked_in = os.getpid()
            _workers.clear()
            at_exit(_finish_all)
        _workers.add(self)


_workers: weakref.WeakSet[Worker] = weakref.WeakSet()
_hooked_in = 0  # the process in which the exit hook is installed


def _finish_all(deadline: float) -> None:
    for worker in list(_workers):
        worker.finish(max(deadline - time.monotonic(), 0.0))


# -- Forks ---------------------------------------------------------------------------------------


class Forkable(Protocol):
    """Something that a forked child inherits without the threads that it needs."""

    def leave_parent_behind(self) -> None: ...  # in the child


_forkable: weakref.WeakSet[Any] = weakref.WeakSet()


def watch_forks(one: Forkable) -> None:
    """Tell `one` in every child that this process forks."""
    _forkable.add(one)


def _after_fork() -> None:
    # Their threads are the parent's: in the child there is nothing to wait for.
    _releasable.clear()
    for one in list(_forkable):
        one.leave_parent_behind()


os.register_at_fork(after_in_child=_after_fork)
