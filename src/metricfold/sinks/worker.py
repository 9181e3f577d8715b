"""One thread per sink, so that none can hold up the training or another sink.

What a sink raises says what becomes of the record that it was given:

    OSError                     not now: the record is held and offered again, and those after it
                                wait as long as the queue has room
    RecordRefused, ValueError,  this record never: it is skipped, counted, and said once per cause
    TypeError, LookupError, ...
    anything else               not now, unless the record after it is taken: then it was at fault

The operating system and networks raise OSError, whatever else their errors are; what a package of
its own raises (`wandb.Error`, MLflow's, gRPC's) tells nothing. No sink is given up for good.
"""

from __future__ import annotations

import contextvars
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeAlias

from metricfold._core.runtime.processes import start_thread
from metricfold.sinks.loud import mention, say
from metricfold.sinks.record import Record, Sink

__all__ = ["SinkWorker", "error_of", "wait_for"]

FLUSH_SECONDS = 1.0
_PAUSES = (0.1, 0.4, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Seconds from each attempt to the one after it; the last one from then on."""
_ASK_NEXT = (
    0.5  # seconds of failing after which the record behind is offered, to learn who is at fault
)
_LOUD_AT_FIRST = 0.5  # seconds of failing after which it is said that nothing has been written yet
_LOUD_LATER = 60.0
_FAILING_SECONDS = 5.0
"""How long a sink that fails is waited for in the end; one that is slow has the caller's patience."""
_SHORT_PAUSE = 0.5
_IN_A_ROW = 3  # so many records must fail in the last pass for the rest to be given up

_THIS_RECORD = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError)
_CANNOT_BE = (
    *(ImportError, PermissionError, FileNotFoundError, FileExistsError),
    *(NotADirectoryError, IsADirectoryError),
)
"""What will hardly go by itself: said at once where a sink has not written anything yet."""


class SinkWorker:
    """Hands records to one sink, in order, on a thread of its own.

    The queue is bounded: while it is full, records are refused and counted, because the
    alternatives are to stall the training or to fill its memory. That is decided once, by
    `reserve`, before a record is even made: what was accepted is written, and flushed within
    `FLUSH_SECONDS`, unless the sink fails until the end.

    Args:
        sink: the sink; called from this thread only.
        queue_size: how many records may wait.
    """

    def __init__(self, sink: Sink, queue_size: int) -> None:
        self._sink = sink
        self._name = _name_of(sink)
        self._queue_size = queue_size
        # A SimpleQueue may be used in a signal handler that interrupts a `put` to the same queue.
        self._inbox: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        # Of `_reserved` and `_refused`; reentrant, since a signal handler may log.
        self._lock = threading.RLock()
        self._reserved = 0
        self._refused = 0
        self._released = 0  # this and the next belong to the thread that makes records
        self._unmade = 0
        self._written = 0  # this and the rest belong to this worker's thread
        self._skipped = 0
        self._lost = 0
        self._missed = 0  # how many were missing at the flush before
        self._causes: dict[tuple[str, type], _Cause] = {}
        self._said: set[str] = set()
        self._handled = 0
        self._pending: deque[_Item] = deque()
        self._flushes: list[Flush] = []  # those of `_pending`
        self._trouble: _Trouble | None = None
        self._due = 0.0  # on the monotonic clock, when the first of `_pending` is to be tried
        self._flush_due: float | None = None  # None: all is flushed
        self._process = os.getpid()  # a sink may fork, and leave the child in here
        self._closing: _Closing | None = None
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
        trouble = self._trouble
        why = (
            "it is slower than the training. Log less often, or give MetricsLogger a larger "
            "queue_size"
            if trouble is None
            else f"it has failed for {trouble.seconds():.0f} s, with {trouble.error!r}"
        )
        say(
            f"{self._name}: {self._queue_size} records wait, and that of step {step} is the first "
            f"to be left out: {why}. How many were left out is said in the end"
        )

    def put(self, record: Record) -> None:
        """Take over a record that was accepted."""
        self._inbox.put(record)

    def release(self, *, unmade: bool) -> None:
        """Take note that a record that was accepted will not come.

        Args:
            unmade: nobody else says so.
        """
        self._released += 1
        self._unmade += unmade

    def rewind(self, step: int) -> None:
        """Rewind the sink to `step`, after everything accepted so far."""
        self._inbox.put(_Rewind(step))

    def flush(self) -> Flush:
        """Ask for everything accepted so far to be written and flushed."""
        flush = Flush(threading.Event(), time.monotonic() + _FAILING_SECONDS)
        self._inbox.put(flush)
        return flush

    def close(self, patience: float) -> threading.Event:
        """Return an event that is set when everything accepted is flushed and the sink is closed.

        Args:
            patience: seconds that the caller waits while nothing gets done.
        """
        self._closing = _Closing(time.monotonic(), min(0.8 * patience, _FAILING_SECONDS))
        # A signal may ask for it again while it is under way: there is one answer for both.
        self._inbox.put(_Close(self._closed))
        return self._closed

    def wait(self, done: threading.Event, *, patience: float, deadline: float | None) -> bool:
        """Wait for `done` as `wait_for` does."""
        return wait_for(done, self._thread, lambda: self._handled, patience, deadline)

    def is_here(self) -> bool:
        """Return whether it is the sink that asks."""
        return self._thread is threading.current_thread()

    def failures(self) -> int:
        """Return a number that grows with each record that is missing, and each loud failure."""
        return self._missing() + len(self._said)

    def failure(self) -> str:
        """Return what is missing, or why nothing is written; nothing as long as all is well."""
        trouble = self._trouble
        if trouble is not None and trouble.said:
            return f"{self._name} fails with {trouble.error!r}"
        return ", ".join(line.strip() for line in self.report(closed=True))

    def report(self, *, closed: bool) -> list[str]:
        """Return lines about what this sink has not got; none if it has got all.

        Args:
            closed: whether the sink has come to its end.
        """
        lost = self._missing() - self._skipped + self._waiting()
        if not self._skipped and not lost and not self._causes:
            return []
        lines = [
            f"{self._name}: {self._written} written, {self._skipped} skipped, {lost} lost",
            *(f"    {cause}" for cause in self._causes.values()),
        ]
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
        done = self._written + self._skipped + self._lost + self._released
        return self._reserved - done

    def _missing(self) -> int:
        return self._skipped + self._lost + self._refused + self._unmade

    # -- On the thread

    def _run(self) -> None:
        while not self._closed.is_set() and os.getpid() == self._process:
            self._receive()
            if self._pending and time.monotonic() >= self._due:
                self._try_first()
            self._give_up_flushes()
            if self._flush_due is not None and time.monotonic() >= self._flush_due:
                self._flushed()

    def _receive(self) -> None:
        """Move what has come in to `_pending`; sleep until something is due."""
        due = [flush.give_up_at for flush in self._flushes]
        if self._pending:
            due.append(self._due)
        if self._flush_due is not None:
            due.append(self._flush_due)
        wait_seconds = max(0.0, min(due) - time.monotonic()) if due else None
        try:
            item = self._inbox.get(timeout=wait_seconds)
        except queue.Empty:
            return
        self._pending.append(item)
        if isinstance(item, Flush):
            self._flushes.append(item)
        if self._in_a_hurry():
            self._due = min(self._due, time.monotonic() + _SHORT_PAUSE)

    def _in_a_hurry(self) -> bool:
        """Return whether somebody waits."""
        return self._closing is not None or bool(self._flushes)

    def _try_first(self) -> None:
        item = self._pending[0]
        match item:
            case Record():
                settled = self._offer(item)
            case _Rewind(step):
                settled = self._rewound(step)
            case Flush():
                settled = self._answered(item)
            case _Close(done):
                self._end()
                done.set()
                return
        if settled:
            self._settle([item])
        elif self._trouble and self._closing and self._closing.over(self._trouble):
            self._last_pass()

    def _settle(self, items: Sequence[_Item]) -> None:
        """Be done with `items`, and with the trouble that they made."""
        self._drop(items)
        self._trouble, self._due = None, 0.0

    def _drop(self, items: Sequence[_Item]) -> None:
        self._handled += len(items)
        if len(items) == 1 and self._pending[0] is items[0]:  # nearly always
            self._pending.popleft()
            return
        gone = set(map(id, items))
        self._pending = deque(item for item in self._pending if id(item) not in gone)

    def _offer(self, record: Record) -> bool:
        """Write a record, and return whether that is settled, for good or ill."""
        error = error_of(partial(self._sink.write, record))
        if error is None:
            self._recovered()
            self._took()
            return True
        if _blames_record(error):
            self._skip(record, error)
            return True
        self._hold("write()", error, record.step)
        trouble = self._trouble
        assert trouble is not None
        if not isinstance(error, OSError) and trouble.seconds() >= _ASK_NEXT:
            self._ask_next(trouble)
        return False

    def _ask_next(self, trouble: _Trouble) -> None:
        """Offer the record behind those that fail: if it is taken, they were at fault."""
        behind: list[Record] = []
        for item in self._pending:
            if isinstance(item, _Rewind | _Close):
                break  # what comes then is to be written after it
            if isinstance(item, Record):
                behind.append(item)
        if len(behind) <= trouble.suspects:
            return
        suspects, next_one = behind[: trouble.suspects], behind[trouble.suspects]
        error = error_of(partial(self._sink.write, next_one))
        if isinstance(error, OSError):
            return  # which tells nothing about the others
        if error is not None and not _blames_record(error):
            trouble.suspects += 1
            return
        if error is not None:
            self._skip(next_one, error)
            self._drop([next_one])
            return
        self._took()
        settled: list[_Item] = [next_one]
        for record in suspects:
            # Once more, for the sink may just have come back: late in the row, but not lost.
            error = error_of(partial(self._sink.write, record))
            if isinstance(error, OSError):
                continue
            settled.append(record)
            if error is None:
                self._took()
            else:
                self._skip(record, error)
        self._settle(settled)

    def _rewound(self, step: int) -> bool:
        error = error_of(partial(self._sink.rewind, step))
        if error is None:
            self._recovered()
            self._flush_due = self._flush_due or time.monotonic()
            return True
        if _blames_record(error):
            self._note("rewind()", error, step)
            return True
        self._hold("rewind()", error, step)
        return False

    def _answered(self, flush: Flush) -> bool:
        """Answer a flush, once it is done or the sink has failed for long enough."""
        if not self._flushed() and time.monotonic() < flush.give_up_at:
            self._due = time.monotonic() + _PAUSES[0]
            return False
        self._answer(flush, well=self._flush_due is None)
        return True

    def _answer(self, flush: Flush, *, well: bool) -> None:
        missing = self._missing()
        flush.well = well and missing == self._missed
        self._missed = missing
        self._flushes.remove(flush)
        flush.done.set()

    def _give_up_flushes(self) -> None:
        """Answer those who have waited long enough for what a failing sink holds up."""
        now = time.monotonic()
        late = [flush for flush in self._flushes if now >= flush.give_up_at]
        if self._trouble is not None and late:
            for flush in late:
                self._answer(flush, well=False)
            self._drop(late)

    def _flushed(self) -> bool:
        """Flush what has been written since the last time; return whether all is flushed."""
        if self._flush_due is None:
            return True
        error = error_of(self._sink.flush)
        if error is None:
            self._flush_due = None
            return True
        self._flush_due = time.monotonic() + FLUSH_SECONDS
        self._note("flush()", error)
        return False

    def _last_pass(self) -> None:
        """Offer each record that waits once more: one that is at fault must not cost the rest."""
        in_a_row, error = 0, None if self._trouble is None else self._trouble.error
        while self._pending and not isinstance(self._pending[0], _Close):
            item = self._pending.popleft()
            self._handled += 1
            match item:
                case Flush():
                    self._answer(item, well=False)
                case _Rewind(step):
                    refused = error_of(partial(self._sink.rewind, step))
                    if refused is not None:
                        self._note("rewind()", refused, step)
            if not isinstance(item, Record):
                continue
            if in_a_row < _IN_A_ROW or error is None:
                error = error_of(partial(self._sink.write, item))
            if error is None:
                in_a_row = 0
                self._took()
            elif _blames_record(error):
                self._skip(item, error)
                error = None
            else:
                in_a_row += 1
                self._lost += 1
                self._note("write()", error, item.step)
        self._trouble, self._due = None, 0.0

    def _end(self) -> None:
        if self._flushed():
            self._causes = {key: one for key, one in self._causes.items() if key[0] != "flush()"}
        # Whatever came before: what it holds, such as the terminal, is given back.
        error = error_of(self._sink.close)
        if error is not None:
            self._note("close()", error)

    # -- What is counted, and what is said

    def _took(self) -> None:
        self._written += 1
        self._flush_due = self._flush_due or time.monotonic() + FLUSH_SECONDS

    def _skip(self, record: Record, error: BaseException) -> None:
        self._note("write()", error, record.step)
        self._skipped += 1

    def _note(self, what: str, error: BaseException, step: int | None = None) -> None:
        """Count what is left out for `error`, and say it the first time."""
        cause = self._causes.get((what, type(error)))
        if cause is not None:
            cause.again(error, step)
            return
        self._causes[what, type(error)] = _Cause(what, error, step)
        if self._closing is not None:
            return  # the table that is about to come says it
        where = "" if step is None else f" of step {step}"
        if what == "write()" and not self._written and self._first("at first"):
            say(
                f"{self._name} has not written anything: {what}{where} fails with {error!r}. "
                "Training goes on, and what is missing is counted in the end"
            )
        else:
            mention(
                f"{self._name}: {what}{where} failed and is left out: {error!r}. What follows is "
                "not affected, and how often that happens is said in the end"
            )

    def _hold(self, what: str, error: BaseException, step: int) -> None:
        """Try again later, and say so where it does not pass quickly."""
        now = time.monotonic()
        trouble = self._trouble = self._trouble or _Trouble(error, now)
        trouble.error = error
        pause = _PAUSES[min(trouble.attempts, len(_PAUSES) - 1)]
        trouble.attempts += 1
        if self._in_a_hurry():
            pause = min(pause, _SHORT_PAUSE)
        self._due = now + pause
        seconds = trouble.seconds()
        fails = f"{what} of step {step} fails with {error!r}"
        goes_on = (
            f"Training goes on; it is tried again, and up to {self._queue_size} records wait "
            "meanwhile. What is missing is counted in the end"
        )
        nothing_yet = not self._written and (
            seconds >= _LOUD_AT_FIRST or isinstance(error, _CANNOT_BE)
        )
        if nothing_yet and self._first("at first"):
            say(f"{self._name} has not written anything yet: {fails}. {goes_on}")
        elif seconds >= _LOUD_LATER and self._first("later"):
            say(f"{self._name} has not written anything for {seconds:.0f} s: {fails}. {goes_on}")
        elif seconds >= _LOUD_AT_FIRST and not trouble.said:
            mention(f"{self._name}: {fails}. It is tried again")
        else:
            return
        trouble.said = True

    def _recovered(self) -> None:
        if self._trouble is not None and self._trouble.said:
            mention(f"{self._name} is back after {self._trouble.seconds():.1f} s")

    def _first(self, occasion: str) -> bool:
        """Return whether this has not been said yet, and take note that it is."""
        if occasion in self._said:
            return False
        self._said.add(occasion)
        return True


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
    if thread is threading.current_thread():  # a sink asks for what only itself can do
        return done.is_set()
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


def error_of(call: Callable[[], object]) -> BaseException | None:
    """Return what `call` raises: whatever goes wrong in a sink, its thread and training go on.

    In a child that `call` has forked, it is raised: that one is to end, as by ``sys.exit()``.
    """
    process = os.getpid()
    try:
        call()
    except BaseException as error:  # SystemExit would end the thread without a word
        if os.getpid() != process:
            raise
        return error
    return None


def _name_of(sink: Sink) -> str:
    try:
        return repr(sink)
    except Exception:  # noqa: BLE001 - the user's, which must not cost the sink its thread
        return type(sink).__name__


def _blames_record(error: BaseException) -> bool:
    # Asked for first: a network's errors may be ValueErrors, too.
    return not isinstance(error, OSError) and isinstance(error, _THIS_RECORD)


@dataclass(slots=True)
class _Trouble:
    """What holds up the first of those that wait.

    Args:
        error: the newest.
        since: on the monotonic clock, when it was first tried.
        attempts: how often it has been tried.
        suspects: how many records, from the first, have failed since.
        said: whether anything has been said of it.
    """

    error: BaseException
    since: float
    attempts: int = 0
    suspects: int = 1
    said: bool = False

    def seconds(self) -> float:
        return time.monotonic() - self.since


class _Closing(NamedTuple):
    """The end of a sink.

    Args:
        since: on the monotonic clock, when it was asked for.
        seconds: how long failing is borne with.
    """

    since: float
    seconds: float

    def over(self, trouble: _Trouble) -> bool:
        return time.monotonic() > max(self.since, trouble.since) + self.seconds


class _Cause:
    """Why something was left out, how often, and at which steps."""

    def __init__(self, what: str, error: BaseException, step: int | None) -> None:
        self._what = what
        self._error = error
        self._steps = [] if step is None else [step, step]
        self._count = 1

    def again(self, error: BaseException, step: int | None) -> None:
        self._error = error
        self._count += 1
        if step is not None:
            self._steps[1:] = [step]

    def __str__(self) -> str:
        first, last = self._steps or ("", "")
        steps = "" if first == "" else f", step {first}"
        if first != last:
            steps = f", steps {first} to {last}"
        return f"{self._count} x {self._what}{steps}: {self._error!r:.200}"


class Flush:
    """A flush that was asked for.

    Attributes:
        done: set when it is answered.
        give_up_at: when a sink that fails is waited for no longer.
        well: once answered, whether all that was logged since the flush before is where it should be.
    """

    __slots__ = ("done", "give_up_at", "well")

    def __init__(self, done: threading.Event, give_up_at: float) -> None:
        self.done = done
        self.give_up_at = give_up_at
        self.well = False


class _Rewind(NamedTuple):
    step: int


class _Close(NamedTuple):
    done: threading.Event


_Item: TypeAlias = Record | _Rewind | Flush | _Close
