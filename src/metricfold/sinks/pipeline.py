"""From a source to the sinks, on threads that the training never waits for.

    log() -> [entry] -> finalising thread -> [record] -> worker thread -> sink
                                          -> [record] -> worker thread -> sink

Entries stay in order: each waits for its reduction, becomes a record, and is offered to every sink.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import FIRST_COMPLETED, Future, wait
from enum import Enum
from typing import Any, NamedTuple, TypeAlias

from metricfold._core.runtime.processes import start_thread
from metricfold._core.sketch import Histogram
from metricfold._core.view.snapshot import Snapshot
from metricfold._core.view.tables import Rollup
from metricfold._core.view.windows import WindowLike
from metricfold.sinks.early import Watch
from metricfold.sinks.loud import say
from metricfold.sinks.record import Record, Sink, checked_numbers
from metricfold.sinks.selection import SelectiveSink
from metricfold.sinks.worker import SinkWorker, wait_for

__all__ = ["Entry", "Extra", "Pipeline"]

_log = logging.getLogger("metricfold")


Extra: TypeAlias = Mapping[str, float] | Callable[[Snapshot], Mapping[str, float | None]]
"""Further numbers by key, or a function of the result that gives them."""


class Entry(NamedTuple):
    """What one `log` call accepted.

    Args:
        step: the training step.
        wall_time: when `log` was called, in Unix seconds.
        source: numbers by key, or the result, perhaps still to come, of a reduction.
        prefix: what keys start with; empty for a dict that was given none.
        window: what its numbers speak about.
        rollup: which totals over datasets it has.
        extra: further numbers by key, or what gives them.
    """

    step: int
    wall_time: float
    source: Mapping[str, float] | Future[Snapshot]
    prefix: str
    window: WindowLike
    rollup: Rollup
    extra: Extra


class Pipeline:
    """The threads of one logger; made on the rank that writes.

    Args:
        sinks: where records go.
        queue_size: how many records may wait for each sink.
    """

    def __init__(self, sinks: Sequence[Sink], queue_size: int) -> None:
        parts = [
            part
            for sink in sinks
            for part in (sink.parts() if isinstance(sink, SelectiveSink) else (sink,))
        ]
        self._workers = [SinkWorker(part, queue_size) for part in parts]
        # A SimpleQueue may be used in a signal handler that interrupts a `put` to the same queue.
        self._inbox: queue.SimpleQueue[_Accepted | _Rewind | _Barrier | None] = queue.SimpleQueue()
        self._handled = 0
        self._watch = Watch()
        self._own: set[str] = set()  # keys that were logged as extra= or in a dict
        self._clashes: set[str] = set()
        self._hurry: Future[None] = Future()  # done: wait for no reduction any more
        self._thread = start_thread(self._run, name="metricfold log")

    def submit(self, entry: Entry) -> None:
        """Accept `entry` for every sink for which not too many wait already."""
        accepted = _Accepted(entry, [])
        try:
            for worker in self._workers:
                worker.reserve(entry.step, accepted.workers)
        finally:
            # Also if an interrupt comes meanwhile: what a sink has accepted, it is given.
            if accepted.workers:
                self._inbox.put(accepted)

    def rewind(self, step: int) -> None:
        """Rewind all sinks to `step`, after everything accepted so far."""
        self._inbox.put(_Rewind(step))

    def flush(self, *, patience: float, deadline: float | None = None) -> bool:
        """Wait until what was accepted is flushed, and return whether it is.

        Args:
            patience: seconds without progress after which a thread is waited for no longer.
            deadline: on the monotonic clock, when to stop waiting in any case.
        """
        made = self._made(patience, deadline)
        flushes = [(worker, worker.flush()) for worker in self._workers]
        answers = [
            worker.wait(flush.done, patience=patience, deadline=deadline) and flush.well
            for worker, flush in flushes
        ]
        return made and all(answers)

    def close(self, *, hurry: bool, patience: float, deadline: float | None = None) -> None:
        """Write and flush what was accepted, close the sinks, and end the threads.

        What could not be written is said in one table.

        Args:
            hurry: do not wait for reductions that are still under way.
            patience: seconds without progress after which a thread is waited for no longer.
            deadline: on the monotonic clock, when to stop waiting in any case.
        """
        if hurry and not self._hurry.done():
            self._hurry.set_result(None)
        self._made(patience, deadline)
        self._inbox.put(None)
        closings = [(worker, worker.close(patience)) for worker in self._workers]
        table: list[str] = []
        for worker, done in closings:
            closed = worker.wait(done, patience=patience, deadline=deadline)
            table += worker.report(closed=closed)
        _say(table)

    def give_up(self) -> None:
        """Say what has not been written, of which nothing more will be."""
        _say([line for worker in self._workers for line in worker.report(closed=True)])

    def is_here(self) -> bool:
        """Return whether it is one of the sinks that asks."""
        return any(worker.is_here() for worker in self._workers)

    def failures(self) -> int:
        """Return a number that grows with each record that is missing, and each loud failure."""
        return sum(worker.failures() for worker in self._workers)

    def failure(self) -> str:
        """Return what has failed, in words."""
        return "; ".join(filter(None, (worker.failure() for worker in self._workers)))

    def _made(self, patience: float, deadline: float | None) -> bool:
        """Wait until the entries accepted so far are records, and return whether they are."""
        barrier = _Barrier(threading.Event())
        self._inbox.put(barrier)
        return wait_for(barrier.passed, self._thread, lambda: self._handled, patience, deadline)

    def _run(self) -> None:
        while (item := self._inbox.get()) is not None:
            match item:
                case _Accepted(entry, workers):
                    made = self._made_of(entry)
                    if isinstance(made, Record):
                        self._watch.step(made.step, made.prefix)
                    for worker in workers:
                        if isinstance(made, Record):
                            worker.put(made)
                        else:
                            worker.release(unmade=made is _Unmade.SAID)
                case _Rewind(step):
                    self._watch.rewind(step)
                    for worker in self._workers:
                        worker.rewind(step)
                case _Barrier(passed):
                    passed.set()
            self._handled += 1

    def _made_of(self, entry: Entry) -> Record | _Unmade:
        """Return the record of `entry`, once its reduction is done."""
        if isinstance(entry.source, Future):
            either: list[Future[Any]] = [entry.source, self._hurry]
            wait(either, return_when=FIRST_COMPLETED)
            if not entry.source.done():
                _log.warning(
                    "the metrics of step %d are lost: their reduction was still waiting for other "
                    "ranks when this process ended",
                    entry.step,
                )
                return _Unmade.SAID
            if entry.source.cancelled() or entry.source.exception() is not None:
                return _Unmade.RAISED
        try:
            return self._record(entry)
        except BaseException:  # noqa: BLE001 - training must not die of it, least of all on one rank
            _log.exception("the metrics of step %d are left out", entry.step)
            return _Unmade.SAID

    def _record(self, entry: Entry) -> Record:
        histograms: dict[str, Histogram] = {}
        given = self._extra(entry)
        self._own |= given.keys()
        if isinstance(entry.source, Future):
            snapshot = entry.source.result()
            metrics = snapshot.as_dict(entry.prefix, entry.window, rollup=entry.rollup)
            histograms = snapshot.histograms(entry.prefix, entry.window)
            self._watch.aggregated(entry.step, entry.prefix, metrics)
            if entry.rollup and not self._own.isdisjoint(metrics):
                recorded = snapshot.as_dict(entry.prefix, entry.window, rollup=False)
                totals = (self._own & metrics.keys()) - recorded.keys()
                metrics = {key: value for key, value in metrics.items() if key not in totals}
                self._warn_of_clashes(
                    totals,
                    "%s would be totals over datasets, but are logged as extra= or in a dict: those "
                    "are kept and the totals left out; to have both, give these another name",
                )
        else:
            metrics = dict(entry.source)
            self._own |= metrics.keys()
        extra = {key: value for key, value in given.items() if key not in metrics}
        self._warn_of_clashes(
            given.keys() - extra.keys(),
            "extra= names %s, which are metrics of their own: the metrics are kept and the extra "
            "values left out; give these another name",
        )
        together = {**metrics, **extra}
        return Record(entry.step, entry.wall_time, together, histograms, entry.prefix)

    def _warn_of_clashes(self, keys: AbstractSet[str], message: str) -> None:
        """Say, once for each key, what is left out."""
        clashes = keys - self._clashes
        if clashes:
            self._clashes |= clashes
            _log.warning(message, ", ".join(repr(key) for key in sorted(clashes)))

    @staticmethod
    def _extra(entry: Entry) -> Mapping[str, float]:
        function = entry.extra
        if not callable(function):
            return checked_numbers("extra", function)
        assert isinstance(entry.source, Future)
        try:
            found = function(entry.source.result())
            known = {key: value for key, value in found.items() if value is not None}
            return checked_numbers("extra", known)
        except BaseException:  # noqa: BLE001 - the user's; the metrics are written all the same
            _log.exception("the extra numbers of step %d are left out", entry.step)
            return {}


def _say(table: Sequence[str]) -> None:
    if table:
        say("not all that was logged has been written:\n  " + "\n  ".join(table))


class _Unmade(Enum):
    """Why there is no record."""

    SAID = "something failed, which has been said"
    RAISED = "its reduction failed, which the logger raises where the training can see it"


class _Accepted(NamedTuple):
    entry: Entry
    workers: list[SinkWorker]


class _Rewind(NamedTuple):
    step: int


class _Barrier(NamedTuple):
    passed: threading.Event
