"""`MetricsLogger`: every rank calls `log`, rank 0 writes, and the training waits for nobody."""

from __future__ import annotations

import math
import operator
import os
import reprlib
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeVar, cast

from metricfold._core.fold import hints
from metricfold._core.fold.names import check_prefix, repeated
from metricfold._core.runtime.copies import OneInUse, where_found
from metricfold._core.runtime.listing import internal, shortened
from metricfold._core.runtime.staging import refuse_while_traced
from metricfold._core.runtime.uncompiled import leave_alone, uncompiled
from metricfold._core.view.alert import Alert, Alerts
from metricfold._core.view.cells import By, check_by
from metricfold._core.view.snapshot import Snapshot
from metricfold._core.view.tables import Rollup, check_rollup
from metricfold._core.view.windows import WindowLike, check_window
from metricfold.sinks.ends import SECONDS, look_after, unwatch, watch
from metricfold.sinks.header import Header
from metricfold.sinks.loud import mention
from metricfold.sinks.pipeline import Entry, Extra, Pipeline
from metricfold.sinks.record import Sink, checked_numbers
from metricfold.sinks.worker import Patience, error_of, name_of

if TYPE_CHECKING:
    from metricfold._core.intake.aggregator import MetricsAggregator

__all__ = ["MetricsLogger", "SinkError"]

T = TypeVar("T")

_PATIENCE = Patience(30.0)  # in which a sink must get something done for close() to go on waiting
_DYING_PATIENCE = 5.0
_GRACE_AFTER_ERROR = 2.0  # seconds for a reduction that other ranks may never join
_SAY_AFTER = 10.0  # seconds of waiting for other ranks, after which close() says so


class SinkError(RuntimeError):
    """A sink has failed, and its logger was made with ``on_sink_error="raise"``."""


@internal("end_on_exit", "end_on_signal")
@uncompiled
class MetricsLogger(OneInUse):
    """Hands metrics to sinks, in the background and on one rank only.

        with MetricsLogger([ConsoleSink(), JSONLSink("run.jsonl")]) as logger:
            logger.log(step, aggregator, prefix="train", extra={"lr": 3e-4})

    `log` starts the reduction and returns; numbers are finished and written on other threads. A
    sink that is slow or fails is left to itself: the others, and the training, go on. What was
    accepted is written before `close` returns, on exit, and on SIGTERM, after which the handler
    that was there before is called (only where the logger was made in the main thread, which is
    the only one that Python lets handle signals).

    Args:
        sinks: where records go; objects with the four methods of `Sink`. Every rank makes the same
            ones.
        queue_size: how many records may wait for each sink; further ones are refused, counted and
            reported, since the alternatives are to stall the training or to fill its memory.
        on_sink_error: ``"report"``: a sink that fails is reported, and training goes on.
            ``"raise"``: it is a `SinkError` too, as soon as a record is missing for good, or a sink
            has failed for so long that it is reported. All ranks raise it in the log after, of the
            same aggregator; where only dicts and snapshots are logged, rank 0 raises it.
        on_alert: called with each `Alert` that the rules of an aggregator find, on rank 0, on a thread
            of the logger; for what training itself is to do, look at what `log` returns.
        config: the settings of the run, which sinks write with its first record, and `compare` and
            trackers show: a dict, a dataclass, a namespace of argparse, or an object with ``to_dict``,
            as it is now. It is written as it is: leave out what is secret.
        name: what the run is called where runs are shown.
        total_steps: how many steps there will be, so that what shows the run can say when it ends.
        better: for names of metrics whether ``"higher"`` or ``"lower"`` is better, such as
            ``{"accuracy": "higher"}``, for display alone. ``loss``, names that end in ``_loss``, and
            ``perplexity`` are lower without it.

    Raises:
        TypeError: something is not a sink, or `config` no configuration.
        ValueError: a `queue_size` below 1, an unknown `on_sink_error`, an empty name, a number of steps
            below 1, or what is neither ``"higher"`` nor ``"lower"``.
    """

    def __init__(
        self,
        sinks: Sequence[Sink],
        *,
        queue_size: int = 1000,
        on_sink_error: str = "report",
        on_alert: Callable[[Alert], object] | None = None,
        config: object = None,
        name: str | None = None,
        total_steps: SupportsIndex | None = None,
        better: Mapping[str, str] | None = None,
    ) -> None:
        is_path = isinstance(sinks, str | os.PathLike)
        if is_path or not isinstance(sinks, Sequence):
            sink = f"JSONLSink({sinks!r})" if is_path else "sink"
            raise TypeError(f"sinks must be a list of sinks, but is {sinks!r}: write [{sink}]")
        for one in sinks:
            _check_sink(one)
        if operator.index(queue_size) < 1:
            raise ValueError(f"queue_size is {queue_size}, but must be at least 1")
        self._sinks = tuple(sinks)
        self._queue_size = queue_size
        if on_sink_error not in ("report", "raise"):
            raise ValueError(f"on_sink_error={on_sink_error!r}: use 'report' or 'raise'")
        self._raises = on_sink_error == "raise"
        if on_alert is not None and not callable(on_alert):
            raise TypeError(f"on_alert={on_alert!r}: give a function of an Alert")
        self._on_alert = on_alert
        self._header = Header.checked(config, name, total_steps, better)
        self._start()

    def _start(self) -> None:
        """Begin, in this process and with nothing logged."""
        self._used = self._closing = self._closed = self._dying = False
        self._pid = os.getpid()
        self._rank = 0
        self._pipeline: Pipeline | None = None  # made by the first call on the rank that writes
        # Reductions that are under way or have failed, and whose they are. Each call on this dict
        # is atomic: reductions end on threads of their own.
        self._reductions: dict[Future[Snapshot], weakref.ref[object]] = {}
        # What the last log of each aggregator has found, perhaps still to come; the newest last.
        self._found: list[tuple[weakref.ref[object], Future[Alerts]]] = []
        self._reduces = False  # whether all ranks can be told in a reduction
        self._failures = 0  # of sinks, that have been raised or are on their way to be
        self._prefixes: set[str] = set()  # that a key has been said to repeat
        self._accepting = threading.RLock()  # so that close() loses nothing that log() accepts
        self._ending = threading.RLock()  # of who closes; reentrant, for a signal's handler may
        watch(self)
        leave_alone()

    def __repr__(self) -> str:
        sinks = shortened(map(repr, self._sinks))
        return f"MetricsLogger([{sinks}]{', closed' if self._closing else ''})"

    def __enter__(self) -> MetricsLogger:  # noqa: PYI034 - typing.Self needs Python 3.11
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None:
            self.close()
        else:
            _report(self._close(grace=_GRACE_AFTER_ERROR))

    def log(
        self,
        step: SupportsIndex,
        source: MetricsAggregator | Snapshot | Mapping[str, float],
        *,
        prefix: str | None = None,
        window: WindowLike = "auto",
        rollup: Rollup = True,
        extra: Extra | None = None,
        by: By | None = None,
    ) -> Alerts:
        """Log the metrics of `source` at `step`; every rank calls it, global rank 0 writes.

        An aggregator is reduced, which closes its interval. The call does not wait for other ranks,
        unless the reduction of the `log` before it is still under way.

        Args:
            step: the training step, at least 0.
            source: an aggregator, a `Snapshot`, or numbers by key. Only rank 0's snapshot or
                numbers are looked at.
            prefix: what keys start with, such as ``"train"``. Needed for an aggregator and for a
                `Snapshot`; keys of a dict are used as they are, or as ``{prefix}/{key}``.
            window: see `MetricsAggregator.get_metrics_for_logging`; a dict has none.
            rollup: which totals over datasets to log, as in `Snapshot.as_dict`; a dict has none. A
                key that is logged in a dict or as `extra` stays what it is: a total that would
                print the same is left out, with a warning.
            extra: further numbers, such as a learning rate, with their keys as they are; or a
                function that gives them when it is handed the `Snapshot`, such as
                ``lambda s: {"train/grad_rank": s.owner(None, "grad_norm")}``, called on a thread
                of the logger; what it gives as None is left out. Only rank 0's are looked at.
            by: which axes of metrics remain, as in `Snapshot.as_dict`; what a metric does not have is
                left out, with a warning. None: what the aggregator was made with; a dict has none.

        Returns:
            What the rules of `MetricsAggregator.alert_on` found in the log before of the same
            aggregator, the same on every rank: so all may stop by it, at the same step. Empty at its
            first log, and for a dict or a snapshot; of the last log see `alerts`.

        Raises:
            TypeError: an argument of the wrong kind, such as a value that is not a number.
            ValueError: a negative step, an empty prefix, an unknown window or rollup, an axis twice in `by`.
            SinkError: a sink has failed, and this logger raises such errors.
            Exception: what this aggregator's reduction before has raised, on every rank alike.
        """
        refuse_while_traced("log")
        self._check_open()
        look_after()
        wall_time = time.time()
        step = _checked_step(step)
        if prefix is not None:
            check_prefix(prefix)
        check_window(window)
        check_rollup(rollup)
        by = None if by is None else check_by(by)
        found = Alerts()
        if not isinstance(source, Mapping | Snapshot):
            found = self._alerts_before(source)
        values = self._values(source, step, prefix)
        if values is None:
            return found
        # Only now that this rank has joined the reduction may what rank 0 alone was given be
        # refused: the other ranks would wait for it.
        if callable(extra):
            if not isinstance(values, Future):
                raise TypeError("extra is a function of a Snapshot, but the source is a dict")
        else:
            extra = checked_numbers("extra", extra or {})
        if not self._reduces and (failure := self._sink_error()) is not None:
            raise failure
        with self._accepting:
            if not self._closing:
                self._opened().submit(
                    Entry(step, wall_time, values, prefix or "", window, rollup, extra, by)
                )
        # Closed meanwhile: by another thread, or by a signal's handler in this one.
        self._check_open()
        return found

    def alerts(self) -> Alerts:
        """Wait for the last log of an aggregator, and return what its rules have found, as `log` does.

        Any rank may call it, also after `close`; what it returns after the same log is the same.

        Raises:
            RuntimeError: in a fork of the process that logs.
            Exception: what that reduction has raised, on every rank alike.
        """
        refuse_while_traced("alerts")
        self._check_process()
        if not self._found:
            return Alerts()
        return self._found[-1][1].result()

    def rewind(self, step: SupportsIndex) -> None:
        """Take back what sinks hold of the steps after `step`: call it after loading a checkpoint.

        Training goes on at ``step + 1``, and no step is shown twice: `JSONLSink` cuts its file,
        `TensorBoardSink` tells TensorBoard to drop the later steps; of other sinks see `rewind`
        there. Every rank calls it, global rank 0 acts.

        Args:
            step: the last step that stays; -1 takes back everything.
        """
        self._check_open()
        step = _checked_step(step, least=-1)
        if self._writes():
            self._opened().rewind(step)

    def flush(self) -> bool:
        """Wait until everything logged so far is where its sinks put it, and return whether it is.

        False if anything logged since the flush before is missing in a sink. A sink that fails is
        waited for 5 s, and one that gets nothing done half a minute.
        """
        self._check_open()
        wait(list(self._reductions))
        return self._pipeline is None or self._pipeline.flush(_PATIENCE)

    def close(self) -> None:
        """Write everything logged, close the sinks, and raise the error of a failed reduction."""
        if self._pipeline is not None and self._pipeline.is_here():
            raise RuntimeError(
                "a sink, or a function that a logger calls, cannot close that logger, which would "
                "wait for it: close it where it was made"
            )
        errors = self._close(grace=None)
        _report(errors[1:])
        if errors:
            raise errors[0]

    def end_on_exit(self, *, deadline: float) -> None:
        """Close, when the interpreter exits without anyone having done so."""
        try:
            _report(self._close(grace=max(deadline - time.monotonic(), 0.0)))
        except BaseException:  # Ctrl-C once more: nobody asks again
            if self._pipeline is not None:
                self._pipeline.give_up()
            raise

    def end_on_signal(self, *, dying: bool, deadline: float) -> None:
        """Write, within seconds, everything logged; close as well if the process is about to die."""
        self._dying = self._dying or dying
        patience = Patience(_DYING_PATIENCE, deadline)
        if dying and not self._closing:
            self._close(grace=_DYING_PATIENCE, patience=patience)
            return
        self._wait_to_die(list(self._reductions), _DYING_PATIENCE)
        if self._pipeline is not None:
            self._pipeline.flush(patience)

    def _close(self, *, grace: float | None, patience: Patience = _PATIENCE) -> list[BaseException]:
        """Close, unless that is done, and return the errors of reductions that nobody has been told of.

        Reductions under way are waited for so many seconds of `grace`; None: as long as they take.
        `patience` is that with each sink; one with a deadline is that of a process that dies.
        """
        if self._pid != os.getpid():
            return []
        with self._accepting:
            self._closing = True
        # Another thread may be at it: the process must not end before that one is done. Or an
        # interrupt has come in between: then this call goes on with it.
        if not self._ending.acquire(timeout=patience.seconds + (grace or 0.0)):
            return []
        try:
            if self._closed:
                return []
            errors = self._end(grace, patience)
            self._closed = True
        finally:
            self._ending.release()
        unwatch(self)
        return errors

    def _end(self, grace: float | None, patience: Patience) -> list[BaseException]:
        reductions = list(self._reductions)
        # On ranks that write nothing too: a rank that leaves would fail the reduction of the rest.
        if grace is None:
            unfinished = wait(reductions, timeout=_SAY_AFTER).not_done
            if unfinished:
                mention(
                    f"close() waits for {self._awaited(unfinished)}, not yet in the reduction of the "
                    "last log, until the aggregator's timeout"
                )
                unfinished = wait(reductions).not_done
        elif patience.deadline < math.inf:
            unfinished = self._wait_to_die(reductions, grace)
        else:
            unfinished = wait(reductions, timeout=grace).not_done
        if self._pipeline is not None:
            self._pipeline.close(patience, hurry=bool(unfinished))
        else:
            for sink in self._sinks:
                if (error := error_of(sink.close)) is not None:
                    mention(f"{name_of(sink)} could not be closed: {_named(error)}")
        self._reductions.clear()
        finished = (future for future in reductions if future.done() and not future.cancelled())
        errors = [*map(self._error_of, finished), self._sink_error()]
        return [error for error in errors if error is not None]

    def _wait_to_die(
        self, reductions: Sequence[Future[Snapshot]], seconds: float
    ) -> set[Future[Snapshot]]:
        """Wait for reductions as long as they may still succeed; returns those that have not ended."""
        give_up_at = time.monotonic() + seconds
        while unfinished := wait(reductions, timeout=0.02).not_done:
            # A rank that dies as well has left: to find out which one that was takes a second.
            if all(self._asked(future, "has_failed", bool) for future in unfinished):
                break
            if time.monotonic() > give_up_at:
                break
        return unfinished

    def _awaited(self, unfinished: set[Future[Snapshot]]) -> str:
        """Return whom these reductions wait for, in words."""
        asked: list[tuple[int, ...]]
        asked = [self._asked(future, "waits_for", tuple) for future in unfinished]
        ranks = sorted({rank for ranks in asked for rank in ranks})
        return f"rank(s) {', '.join(map(str, ranks))}" if ranks else "other ranks"

    def _asked(self, future: Future[Snapshot], what: str, unknown: Callable[[], T]) -> T:
        """Ask whose reduction this is; of an aggregator of the user's own making nothing is known."""
        owner = self._reductions.get(future)
        answer: Callable[[], T] = getattr(owner and owner(), what, unknown)
        return answer()

    def _values(
        self, source: object, step: int, prefix: str | None
    ) -> Mapping[str, float] | Future[Snapshot] | None:
        """Return what is to be written of `source`, perhaps still to come; None on ranks that do not."""
        if isinstance(source, Mapping):
            if not self._writes():
                return None
            return self._prefixed(checked_numbers("source", source), prefix)
        if not isinstance(source, Snapshot) and not hasattr(source, "reduce_async"):
            raise TypeError(
                f"cannot log {reprlib.repr(source)}: give an aggregator, a Snapshot, or a dict of "
                f"numbers{hints.for_source(source)}"
            )
        if prefix is None:
            raise TypeError(
                f"log() of a {type(source).__name__} needs a prefix for its keys, such as "
                "prefix='train'"
            )
        future: Future[Snapshot] = Future()
        if isinstance(source, Snapshot):
            future.set_result(source)
        else:
            future = self._reduced(cast("MetricsAggregator", source), step)
        return future if self._writes() else None

    def _prefixed(self, numbers: dict[str, float], prefix: str | None) -> dict[str, float]:
        if prefix is None:
            return numbers
        if prefix not in self._prefixes and (text := repeated(prefix, numbers)):
            self._prefixes.add(prefix)
            mention(text)
        return {f"{prefix}/{key}": value for key, value in numbers.items()}

    def _raise_error_of(self, source: object) -> None:
        # Waits for its reduction before, as the aggregator would: only so do all ranks raise in the
        # same call, and none is alone in the next reduction.
        for future, owner in list(self._reductions.items()):
            if owner() is source:
                error = self._error_of(future)
                self._reductions.pop(future, None)
                if error is not None:
                    raise error

    def _reduced(self, source: MetricsAggregator, step: int) -> Future[Snapshot]:
        self._raise_error_of(source)
        self._reduces = True
        if self._raises and self._new_failures():
            future = source.reduce_async(step=step, sink_failed=True)
        else:
            future = source.reduce_async(step=step)
        self._reductions[future] = weakref.ref(source)
        future.add_done_callback(self._forget_if_well)
        others = [
            one for one in self._found if (known := one[0]()) is not None and known is not source
        ]
        self._found = [*others, (weakref.ref(source), _alerts_of(future))]
        return future

    def _alerts_before(self, source: object) -> Alerts:
        """Return what the log before has found, which the reduction of this one waits for anyway."""
        found = next((found for owner, found in self._found if owner() is source), None)
        # What that reduction has raised, the next one does.
        return Alerts() if found is None or found.exception() is not None else found.result()

    def _forget_if_well(self, future: Future[Snapshot]) -> None:
        if future.cancelled() or self._error_of(future) is None:
            self._reductions.pop(future, None)

    def _error_of(self, future: Future[Snapshot]) -> BaseException | None:
        """Wait for a reduction, and return what all ranks are to raise."""
        error = future.exception()
        if error is None and self._raises and future.result().sink_failed:
            return self._sink_error_of_all()
        return error

    def _new_failures(self) -> bool:
        """Return whether a sink has failed that nobody has been told of, and take note of it."""
        failures = 0 if self._pipeline is None else self._pipeline.failures()
        new, self._failures = failures > self._failures, max(failures, self._failures)
        return new

    def _sink_error(self) -> SinkError | None:
        """Return what rank 0 raises by itself."""
        return self._sink_error_of_all() if self._raises and self._new_failures() else None

    def _sink_error_of_all(self) -> SinkError:
        if self._pipeline is None:
            return SinkError("a sink has failed on rank 0, whose own SinkError says how")
        return SinkError(f"a sink has failed: {self._pipeline.failure()}")

    def _writes(self) -> bool:
        from metricfold.communicator import global_rank  # noqa: PLC0415

        # A rank that was not the first stays silent when the process group is gone, where every
        # rank looks like the first.
        self._rank = max(self._rank, global_rank())
        return self._rank == 0

    def _opened(self) -> Pipeline:
        if self._pipeline is None:
            run = self._header.of_process()
            self._pipeline = Pipeline(self._sinks, self._queue_size, self._on_alert, run)
        return self._pipeline

    def _in_use(self) -> bool:
        return self._used or self._closing

    def __getstate__(self) -> dict[str, Any]:
        if self._in_use():
            found = where_found(self)
            where = f"This one is {found}. " if found else ""
            raise TypeError(
                f"a MetricsLogger that is in use cannot be pickled: it has threads. {where}Make one "
                "in each process, or send it before the first log"
            )
        locks = ("_accepting", "_ending")
        return {name: value for name, value in vars(self).items() if name not in locks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            raise RuntimeError(
                "this MetricsLogger belongs to the process that made it, and this is a fork of "
                "that: log there, or make a logger here"
            )

    def _check_open(self) -> None:
        self._check_process()
        if self._closing:
            if self._dying:  # of a signal, at any moment: there is nobody left to tell
                time.sleep(SECONDS)
            raise RuntimeError("this MetricsLogger is closed: make a new one, or close it later")
        self._used = True


def _alerts_of(reduction: Future[Snapshot]) -> Future[Alerts]:
    """Return what a reduction finds, and not the whole of its result, which may be large."""
    found: Future[Alerts] = Future()

    def over(reduction: Future[Snapshot]) -> None:
        if reduction.cancelled():
            found.set_result(Alerts())
        elif (error := reduction.exception()) is not None:
            found.set_exception(error)
        else:
            # Of an aggregator of the user's own making nothing is known.
            found.set_result(getattr(reduction.result(), "alerts", Alerts()))

    reduction.add_done_callback(over)
    return found


def _report(errors: Sequence[BaseException]) -> None:
    for error in errors:
        if not isinstance(error, SinkError):  # of which the table has said so
            mention(f"the reduction of the last log failed: {_named(error)}")


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _check_sink(sink: object) -> None:
    if isinstance(sink, type):
        raise TypeError(f"{sink!r} is a class, not a sink: write {sink.__name__}(...)")
    methods = ("write", "flush", "close", "rewind")
    if lacking := [name for name in methods if not callable(getattr(sink, name, None))]:
        is_path = isinstance(sink, str | os.PathLike)
        hint = f"; for a file of JSON lines write JSONLSink({sink!r})" if is_path else ""
        raise TypeError(f"{sink!r} is not a sink: it lacks the methods {', '.join(lacking)}{hint}")


def _checked_step(step: SupportsIndex, least: int = 0) -> int:
    try:
        number = operator.index(step)
    except TypeError:
        raise TypeError(
            f"step is {reprlib.repr(step)}, but must be a whole number{hints.for_step(step)}"
        ) from None
    if number < least:
        raise ValueError(f"step is {number}, but must be at least {least}")
    return number
