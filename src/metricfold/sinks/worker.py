"""One thread per sink, so that none can hold up the training or another sink."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from metricfold.sinks.record import Record, Sink

__all__ = ["SinkWorker", "error_of", "wait_for"]

_log = logging.getLogger("metricfold")

FLUSH_SECONDS = 1.0
_PAUSES = (0.0, 0.1, 0.5)  # seconds before each attempt


class SinkWorker:
    """Hands records to one sink, in order, on a thread of its own.

    The queue is bounded: while it is full, records are refused, counted and reported, because the
    alternatives are to stall the training or to fill its memory. That is decided once, by
    `reserve`, before a record is even made: what was accepted is written, and flushed within
    `FLUSH_SECONDS`. A call that raises is made three times in all; after that the sink is set
    aside, with one warning, and nothing more is asked of it.

    Args:
        sink: the sink; called from this thread only.
        queue_size: how many records may wait.
    """

    def __init__(self, sink: Sink, queue_size: int) -> None:
        self._sink = sink
        self._queue_size = queue_size
        # A SimpleQueue may be used in a signal handler that interrupts a `put` to the same queue.
        self._inbox: queue.SimpleQueue[Record | _Rewind | _Flush | _Close] = queue.SimpleQueue()
        # Of `_reserved` and `_refused`; reentrant, since a signal handler may log.
        self._lock = threading.RLock()
        self._reserved = 0
        self._refused = 0
        self._released = 0  # belongs to the thread that makes records
        self._written = 0  # this and the rest belong to this worker's thread
        self._handled = 0
        self._set_aside = False
        self._closed = threading.Event()
        self._flush_due: float | None = None  # on the monotonic clock; None: all is flushed
        self._thread = threading.Thread(target=self._run, name=f"metricfold {sink!r}", daemon=True)
        self._thread.start()

    def reserve(self, step: int) -> bool:
        """Accept the record of `step`, which is to follow, or refuse it if too many wait."""
        if self._set_aside:
            return False
        with self._lock:
            if self._reserved - self._written - self._released < self._queue_size:
                self._reserved += 1
                return True
            self._refused += 1
            if self._refused > 1:
                return False
        _log.warning(
            "%r is slower than the training: %d records wait for it, and that of step %d is the "
            "first to be left out. Log less often, or give MetricsLogger a larger queue_size; how "
            "many were left out is reported in the end",
            self._sink,
            self._queue_size,
            step,
        )
        return False

    def put(self, record: Record) -> None:
        """Take over a record that was accepted."""
        self._inbox.put(record)

    def release(self) -> None:
        """Take note that a record that was accepted will not come."""
        self._released += 1

    def rewind(self, step: int) -> None:
        """Rewind the sink to `step`, after everything accepted so far."""
        self._inbox.put(_Rewind(step))

    def flush(self) -> threading.Event:
        """Return an event that is set when everything accepted so far is flushed."""
        flush = _Flush(threading.Event())
        self._inbox.put(flush)
        return flush.done

    def close(self) -> threading.Event:
        """Return an event that is set when everything accepted is flushed and the sink is closed."""
        # A signal may ask for it again while it is under way: there is one answer for both.
        self._inbox.put(_Close(self._closed))
        return self._closed

    def wait(self, done: threading.Event, *, patience: float, deadline: float | None) -> bool:
        """Wait for `done` as `wait_for` does."""
        return wait_for(done, self._thread, lambda: self._handled, patience, deadline)

    def report_unwritten(self, *, closed: bool) -> None:
        """Log what was left out, and what still waits although nobody waits for it any more."""
        if self._refused:
            _log.warning(
                "%r was slower than the training: %d records were left out",
                self._sink,
                self._refused,
            )
        if not closed:
            _log.warning(
                "%r has not answered: what it holds and %d more records may be lost. Its thread is "
                "still in a call, such as a write to a file system that does not respond",
                self._sink,
                self._reserved - self._written - self._released,
            )

    def _run(self) -> None:
        while True:
            try:
                item = self._inbox.get(timeout=self._seconds_to_flush())
            except queue.Empty:
                self._flush()
                continue
            match item:
                case Record():
                    self._write(item)
                    self._written += 1
                case _Rewind(step):
                    self._attempt(partial(self._sink.rewind, step), f"rewind({step})")
                    self._flush_due = self._flush_due or time.monotonic()
                case _Flush(done):
                    self._flush()
                    done.set()
                case _Close(done):
                    self._flush()
                    self._attempt(self._sink.close, "close()")
                    done.set()
                    return
            self._handled += 1
            if self._seconds_to_flush() == 0:
                self._flush()

    def _write(self, record: Record) -> None:
        self._attempt(partial(self._sink.write, record), f"write() of step {record.step}")
        if self._flush_due is None:
            self._flush_due = time.monotonic() + FLUSH_SECONDS

    def _flush(self) -> None:
        if self._flush_due is not None:
            self._attempt(self._sink.flush, "flush()")
            self._flush_due = None

    def _seconds_to_flush(self) -> float | None:
        return None if self._flush_due is None else max(0.0, self._flush_due - time.monotonic())

    def _attempt(self, call: Callable[[], object], what: str) -> None:
        if self._set_aside:
            return
        error = None
        for pause in _PAUSES:
            time.sleep(pause)
            error = error_of(call)
            if error is None:
                return
        self._give_up(what, error)

    def _give_up(self, what: str, error: Exception | None) -> None:
        self._set_aside = True
        _log.warning(
            "%r is set aside: %s failed %d times, the last time with %s: %s. It gets no more "
            "records in this run; training and the other sinks go on. Remove the cause and start "
            "again to have it back",
            self._sink,
            what,
            len(_PAUSES),
            type(error).__name__,
            error,
        )
        # What it holds, such as the terminal, is given back if it can be.
        error_of(self._sink.close)


def wait_for(
    done: threading.Event,
    thread: threading.Thread,
    progress: Callable[[], int],
    patience: float,
    deadline: float | None,
) -> bool:
    """Wait until `thread` sets `done`, and return whether it did.

    Args:
        done: what to wait for.
        thread: what sets it; if it has ended, there is nothing to wait for.
        progress: a number that moves while the thread gets something done.
        patience: seconds without progress after which to give up.
        deadline: on the monotonic clock, when to give up in any case; None: never.
    """
    seen, give_up_at = progress(), time.monotonic() + patience
    while not done.wait(0.02):
        now = time.monotonic()
        if seen != progress():
            seen, give_up_at = progress(), now + patience
        if not thread.is_alive():
            return done.is_set()
        if now > give_up_at or (deadline is not None and now > deadline):
            return False
    return True


def error_of(call: Callable[[], object]) -> Exception | None:
    """Return what `call` raises: whatever goes wrong in a sink, training goes on."""
    try:
        call()
    except Exception as error:  # noqa: BLE001
        return error
    return None


class _Rewind(NamedTuple):
    step: int


class _Flush(NamedTuple):
    done: threading.Event


class _Close(NamedTuple):
    done: threading.Event
