"""One thread per sink, so that none can hold up the training or another sink.

What a sink raises says what becomes of the record that it was given:

    OSError                     not now: the record is held and offered again, and those after it
                                wait as long as the queue has room
    RecordRefused, ValueError,  this record never: it is skipped, counted, and said once per cause
    TypeError, LookupError, ...
    KeysRefused                 all but these keys have been written
    anything else               not now, unless the record after it is taken: then it was at fault

The operating system and networks raise OSError, whatever else their errors are; what a package of
its own raises (`wandb.Error`, MLflow's, gRPC's) tells nothing. No sink is given up for good.
"""

from __future__ import annotations

import contextvars
import math
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, NamedTuple, TypeAlias

from metricfold._core.runtime.processes import start_thread
from metricfold.sinks.loud import mention, say
from metricfold.sinks.record import KeysRefused, Record, Sink

__all__ = ["THIS_RECORD", "Consumer", "Patience", "Rewind", "SinkWorker", "error_of", "name_of"]

FLUSH_SECONDS = 1.0
_PAUSES = (0.1, 0.4, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Seconds from each attempt to the one after it; the last one from then on."""
_SHORT_PAUSE = 0.5  # while somebody waits
_ASK_NEXT = 0.5  # seconds of failing after which the record behind is offered: who is at fault?
_LOUD_AT_FIRST = 0.5  # seconds of failing after which it is said that nothing has been written yet
_LOUD_LATER = 60.0
_FAILING_SECONDS = 5.0
"""How long a sink that fails is waited for in the end; one that is slow has the caller's patience."""
_MOST_KEYS = 10  # are named one by one
_IN_A_ROW = 3  # so many records must fail in the last pass for the rest to be given up

THIS_RECORD = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError)
_CANNOT_BE = (
    *(ImportError, PermissionError, FileNotFoundError, FileExistsError),
    *(NotADirectoryError, IsADirectoryError),
)
"""What will hardly go by itself: said at once where a sink has not written anything yet."""


class Patience(NamedTuple):
    """How long a thread is waited for."""

    seconds: float  # without progress
    deadline: float = math.inf  # in any case; on the monotonic clock


class Consumer:
    """A thread that works through an inbox, until it finds None there."""

    def __init__(self) -> None:
        # A SimpleQueue may be used in a signal handler that interrupts a `put` to the same queue.
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._handled = 0  # moves while the thread gets something done
        self._thread: threading.Thread

    def is_here(self) -> bool:
        return self._thread is threading.current_thread()

    def wait(self, done: threading.Event, patience: Patience) -> bool:
        """Wait until the thread sets `done`, and return whether it did."""
        if self.is_here():  # a sink asks for what only itself can do
            return done.is_set()
        seen, give_up_at = self._handled, time.monotonic() + patience.seconds
        while not done.wait(0.02):
            now = time.monotonic()
            if seen != self._handled:
                seen, give_up_at = self._handled, now + patience.seconds
            if not self._thread.is_alive():
                return done.is_set()
            if now > min(give_up_at, patience.deadline):
                return False
        return True


class SinkWorker(Consumer):
    """Hands records to one sink, in order, on a thread of its own.

    The queue is bounded: while it is full, records are refused and counted, because the
    alternatives are to stall the training or to fill its memory. That is decided once, by
    `reserve`, before a record is even made: what was accepted is written, and flushed within
    `FLUSH_SECONDS`, unless the sink fails until the end.
    """

    def __init__(self, sink: Sink, queue_size: int) -> None:
        super().__init__()
        self._sink = sink
        self._name = name_of(sink)
        self._queue_size = queue_size
        # Of `_reserved` and `_refused`; reentrant, since a signal handler may log.
        self._lock = threading.RLock()
        self._reserved = 0
        self._refused = 0
        self._released = 0  # this and the next belong to the thread that makes records
        self._unmade = 0
        self._written = 0  # this and the rest belong to this worker's thread
        self._skipped = 0
        self._lost = 0
        self._partly = 0  # how many of the written ones lack keys
        self._missed = 0  # how many were missing at the flush before
        self._causes: dict[tuple[str, type], _Cause] = {}
        self._keys: dict[str, _Cause] = {}  # that are left out of records
        self._said: set[str] = set()
        self._pending: deque[_Item] = deque()
        self._flushes: list[Flush] = []  # those of `_pending` that have no answer yet
        self._trouble: _Trouble | None = None  # with the first of `_pending`
        self._due = 0.0  # on the monotonic clock, when the first of `_pending` is to be tried
        self._flush_due = math.inf  # if all is flushed
        self._process = os.getpid()  # a sink may fork, and leave the child in here
        self._bears = _FAILING_SECONDS  # once it is closing
        self._closing_since = math.inf
        self._last_pass = False
        self._closed = threading.Event()
        # In a copy of the maker's context, where packages such as trackio keep their run.
        context = contextvars.copy_context()
        self._thread = start_thread(context.run, self._run, name=f"metricfold {self._name}")

    def reserve(self, step: int, accepting: list[SinkWorker]) -> None:
        """Join those that are `accepting` the record of `step`, or refuse it if too many wait."""
        with self._lock:
            if self._waiting() < self._queue_size:
                self._reserved += 1
                accepting.append(self)
                return
            self._refused += 1
            if self._refused > 1:
                return
        why = (
            "it is slower than the training. Log less often, or give MetricsLogger a larger "
            "queue_size"
        )
        if (trouble := self._trouble) is not None:
            why = f"it has failed for {trouble.seconds():.0f} s, with {trouble.error!r}"
        say(
            f"{self._name}: {self._queue_size} records wait, and that of step {step} is the first "
            f"to be left out: {why}. How many were left out is said in the end"
        )

    def put(self, item: Record | Rewind) -> None:
        """Take over a record that was accepted, or rewind the sink after all those before."""
        self._inbox.put(item)

    def release(self, *, unmade: bool) -> None:
        """Take note that a record that was accepted will not come; if `unmade`, it counts as missing."""
        self._released += 1
        self._unmade += unmade

    def flush(self) -> Flush:
        flush = Flush(time.monotonic() + _FAILING_SECONDS)
        self._inbox.put(flush)
        return flush

    def close(self, patience: Patience) -> threading.Event:
        """Return an event that is set when everything accepted is flushed and the sink is closed."""
        self._bears = min(0.8 * patience.seconds, _FAILING_SECONDS)
        self._closing_since = time.monotonic()
        # A signal may ask for it again while it is under way: there is one answer for both.
        self._inbox.put(None)
        return self._closed

    def failures(self) -> int:
        return self._missing() + self._partly + len(self._said)

    def failure(self) -> str:
        """Return what is missing, or why nothing is written; nothing as long as all is well."""
        trouble = self._trouble
        if trouble is not None and trouble.said:
            return f"{self._name} fails with {trouble.error!r}"
        return ", ".join(line.strip() for line in self.report(closed=True))

    def report(self, *, closed: bool) -> list[str]:
        """Return lines about what this sink, which is `closed` or hangs, has not got; none if all."""
        lost = self._missing() - self._skipped + self._waiting()
        if not self._skipped and not lost and not self._causes and not self._keys:
            return []
        keys = [*self._keys.values()]
        lines = [
            f"{self._name}: {self._written} written, {self._skipped} skipped, {lost} lost",
            *(f"    {cause}" for cause in (*self._causes.values(), *keys[:_MOST_KEYS])),
        ]
        if keys[_MOST_KEYS:]:
            lines.append(f"    and {len(keys) - _MOST_KEYS} more keys")
        if self._refused:
            lines.append(f"    {self._refused} x left out, for too many waited already")
        if self._unmade:
            lines.append(f"    {self._unmade} x not made, as was said at the time")
        if not closed:
            lines.append(
                "    it has not answered: its thread is in a call that does not return, such as a "
                "write to a file system that does not respond"
            )
        return lines

    def _waiting(self) -> int:
        return self._reserved - self._written - self._skipped - self._lost - self._released

    def _missing(self) -> int:
        return self._skipped + self._lost + self._refused + self._unmade

    # -- On the thread

    def _run(self) -> None:
        while not self._closed.is_set() and os.getpid() == self._process:
            self._receive()
            if self._pending and time.monotonic() >= self._due:
                self._try_first()
            self._give_up_flushes()
            if time.monotonic() >= self._flush_due:
                self._flushed()

    def _receive(self) -> None:
        """Move what has come in to `_pending`; sleep until something is due."""
        due = [self._flush_due, *(flush.give_up_at for flush in self._flushes)]
        if self._pending:
            due.append(self._due)
        wait_seconds = max(0.0, min(due) - time.monotonic()) if min(due) < math.inf else None
        try:
            item = self._inbox.get(timeout=wait_seconds)
        except queue.Empty:
            return
        self._pending.append(item)
        if isinstance(item, Flush):
            self._flushes.append(item)
        if self._is_awaited():
            self._due = min(self._due, time.monotonic() + _SHORT_PAUSE)

    def _is_awaited(self) -> bool:
        return self._closing_since < math.inf or bool(self._flushes)

    def _try_first(self) -> None:
        item = self._pending[0]
        if item is None:
            self._end()
            self._closed.set()
        elif self._answered(item) if isinstance(item, Flush) else self._settled(item):
            self._pending.popleft()
            self._handled += 1
            self._due = 0.0

    def _settled(self, item: Record | Rewind) -> bool:
        """Offer the first that waits, and return whether that is settled, for good or ill."""
        trouble = self._trouble
        error: BaseException | None
        if trouble is not None and trouble.lost >= _IN_A_ROW and isinstance(item, Record):
            error = trouble.error
        else:
            error = self._offer(item)
        if error is None:
            self._trouble = None
            return True
        trouble = self._trouble = trouble or _Trouble(error)
        trouble.error = error
        if self._last_pass:
            self._note(_method(item), error, item.step)
            self._lost += isinstance(item, Record)
            trouble.lost += isinstance(item, Record)
            return True
        self._hold(item, trouble)
        if not isinstance(error, OSError) and trouble.seconds() >= _ASK_NEXT:
            self._ask_next(trouble)
        since = max(self._closing_since, trouble.since)
        if self._trouble is trouble and time.monotonic() > since + self._bears:
            # Each that waits is offered once more: one that is at fault must not cost the rest.
            self._last_pass, self._due = True, 0.0
        return False

    def _offer(self, item: Record | Rewind) -> BaseException | None:
        """Let the sink write a record, or rewind; return what it raises, unless that settles it."""
        is_record = isinstance(item, Record)
        call: Any = self._sink.write if is_record else self._sink.rewind
        error = error_of(call, item if is_record else item.step)
        # Asked for first: a network's errors may be ValueErrors, too.
        if isinstance(error, OSError):
            return error
        if isinstance(error, KeysRefused):
            self._leave_out(error, item.step)
            error = None
        if isinstance(error, THIS_RECORD):
            self._skip(item, error)
        elif error is None:
            trouble, first = self._trouble, item is self._pending[0]
            if trouble is not None and trouble.said and first and not self._last_pass:
                mention(f"{self._name} is back after {trouble.seconds():.1f} s")
            self._written += is_record
            if self._flush_due == math.inf:
                self._flush_due = time.monotonic() + FLUSH_SECONDS * is_record
        return None if isinstance(error, THIS_RECORD) else error

    def _ask_next(self, trouble: _Trouble) -> None:
        """Offer the record behind those that fail: if it is taken, they were at fault."""
        # What comes after a rewind is to be written after it.
        before = takewhile(lambda item: not isinstance(item, Rewind | None), self._pending)
        records = [item for item in before if isinstance(item, Record)]
        if len(records) <= trouble.suspects:
            return
        suspects, next_one = records[: trouble.suspects], records[trouble.suspects]
        written = self._written
        error = self._offer(next_one)
        if error is not None:
            # An OSError tells nothing about the others.
            trouble.suspects += not isinstance(error, OSError)
            return
        settled = [next_one]
        if self._written > written:
            self._trouble, self._due = None, 0.0
            for record in suspects:
                # Once more, for the sink may just have come back: late in the row, but not lost.
                error = self._offer(record)
                if isinstance(error, OSError):
                    continue
                if error is not None:
                    self._skip(record, error)
                settled.append(record)
        self._handled += len(settled)
        gone = set(map(id, settled))
        self._pending = deque(item for item in self._pending if id(item) not in gone)

    def _answered(self, flush: Flush) -> bool:
        """Answer a flush, once it is done or the sink has failed for long enough."""
        if flush in self._flushes:
            wait = time.monotonic() < flush.give_up_at and not self._last_pass
            if not self._flushed() and wait:
                self._due = time.monotonic() + _PAUSES[0]
                return False
            self._answer(flush, well=self._flush_due == math.inf)
        return True

    def _answer(self, flush: Flush, *, well: bool) -> None:
        missing = self._missing() + self._partly
        flush.well = well and missing == self._missed
        self._missed = missing
        self._flushes.remove(flush)
        flush.done.set()

    def _give_up_flushes(self) -> None:
        """Answer those who have waited long enough for what a failing sink holds up."""
        if self._trouble is not None:
            now = time.monotonic()
            for flush in [one for one in self._flushes if now >= one.give_up_at]:
                self._answer(flush, well=False)

    def _flushed(self) -> bool:
        """Flush what has been written since the last time; return whether all is flushed."""
        error = None if self._flush_due == math.inf else error_of(self._sink.flush)
        self._flush_due = math.inf
        if error is not None:
            self._flush_due = time.monotonic() + FLUSH_SECONDS
            self._note("flush()", error)
        return error is None

    def _end(self) -> None:
        if self._flushed():
            self._causes = {key: one for key, one in self._causes.items() if key[0] != "flush()"}
        # Whatever came before: what it holds, such as the terminal, is given back.
        error = error_of(self._sink.close)
        if error is not None:
            self._note("close()", error)

    # -- What is counted, and what is said

    def _skip(self, item: Record | Rewind, error: BaseException) -> None:
        self._note(_method(item), error, item.step)
        self._skipped += isinstance(item, Record)

    def _leave_out(self, error: KeysRefused, step: int) -> None:
        """Count the keys that are left out of a record, and say it the first time."""
        self._partly += 1
        new = [repr(key) for key in error.refused if key not in self._keys]
        for key, why in error.refused.items():
            self._keys.setdefault(key, _Cause(f"without {key!r}", why, step)).add(why, step)
        if new and self._closing_since == math.inf:
            more = f" and {len(new) - _MOST_KEYS} more" if new[_MOST_KEYS:] else ""
            why = next(iter(error.refused.values()))
            mention(
                f"{self._name} does not take {', '.join(new[:_MOST_KEYS])}{more}: {why!r}. Other keys "
                "are written, and how often these are left out is said in the end"
            )

    def _note(self, method: str, error: BaseException, step: int | None = None) -> None:
        """Count what is left out for `error`, and say it the first time."""
        cause = self._causes.setdefault((method, type(error)), _Cause(method, error, step))
        cause.add(error, step)
        if cause.count > 1 or self._closing_since < math.inf:  # the table in the end says it
            return
        where = "" if step is None else f" of step {step}"
        if method == "write()" and not self._written and self._first("at first"):
            say(
                f"{self._name} has not written anything: {method}{where} fails with {error!r}. "
                "Training goes on, and what is missing is counted in the end"
            )
        else:
            mention(
                f"{self._name}: {method}{where} failed and is left out: {error!r}. What follows is "
                "not affected, and how often that happens is said in the end"
            )

    def _hold(self, item: Record | Rewind, trouble: _Trouble) -> None:
        """Try again later, and say so where it does not pass quickly."""
        pause = _PAUSES[min(trouble.attempts, len(_PAUSES) - 1)]
        trouble.attempts += 1
        if self._is_awaited():
            pause = min(pause, _SHORT_PAUSE)
        self._due = time.monotonic() + pause
        seconds = trouble.seconds()
        fails = f"{_method(item)} of step {item.step} fails with {trouble.error!r}"
        goes_on = (
            f"Training goes on; it is tried again, and up to {self._queue_size} records wait "
            "meanwhile. What is missing is counted in the end"
        )
        surely = seconds >= _LOUD_AT_FIRST or isinstance(trouble.error, _CANNOT_BE)
        if surely and not self._written and self._first("at first"):
            say(f"{self._name} has not written anything yet: {fails}. {goes_on}")
        elif seconds >= _LOUD_LATER and self._first("later"):
            say(f"{self._name} has not written anything for {seconds:.0f} s: {fails}. {goes_on}")
        elif seconds >= _LOUD_AT_FIRST and not trouble.said:
            mention(f"{self._name}: {fails}. It is tried again")
        else:
            return
        trouble.said = True

    def _first(self, occasion: str) -> bool:
        """Return whether this has not been said yet, and take note that it is."""
        new = occasion not in self._said
        self._said.add(occasion)
        return new


def error_of(call: Callable[..., object], *args: object) -> BaseException | None:
    """Return what `call` raises: whatever goes wrong in a sink, its thread and training go on.

    In a child that `call` has forked, it is raised: that one is to end, as by ``sys.exit()``.
    """
    process = os.getpid()
    try:
        call(*args)
    except BaseException as error:  # SystemExit would end the thread without a word
        if os.getpid() != process:
            raise
        return error
    return None


def name_of(sink: Sink) -> str:
    """Return how a sink is named in messages."""
    try:
        return repr(sink)
    except Exception:  # noqa: BLE001 - the user's, which must not cost the sink its thread
        return type(sink).__name__


class Rewind(NamedTuple):
    """What takes back the steps after `step`."""

    step: int


@dataclass(slots=True, eq=False)
class Flush:
    """A flush that was asked for."""

    give_up_at: float  # when a sink that fails is waited for no longer
    done: threading.Event = field(default_factory=threading.Event)  # set by the answer:
    well: bool = False  # whether all that was logged since the flush before is where it should be


_Item: TypeAlias = Record | Rewind | Flush | None


def _method(item: Record | Rewind) -> str:
    return "write()" if isinstance(item, Record) else "rewind()"


@dataclass(slots=True)
class _Trouble:
    """What holds up the first of those that wait."""

    error: BaseException  # the newest
    since: float = field(default_factory=time.monotonic)
    attempts: int = 0
    suspects: int = 1  # how many records, from the first, have failed since
    lost: int = 0  # one after the other, in the last pass
    said: bool = False

    def seconds(self) -> float:
        return time.monotonic() - self.since


@dataclass(slots=True)
class _Cause:
    """Why something was left out, how often, and at which steps."""

    method: str
    error: BaseException
    first: int | None
    last: int | None = None
    count: int = 0

    def add(self, error: BaseException, step: int | None) -> None:
        self.error, self.last = error, step
        self.count += 1

    def __str__(self) -> str:
        steps = f", steps {self.first} to {self.last}"
        if self.first == self.last:
            steps = "" if self.first is None else f", step {self.first}"
        return f"{self.count} x {self.method}{steps}: {self.error!r:.200}"
