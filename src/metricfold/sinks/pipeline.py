"""From a source to the sinks, on threads that the training never waits for.

    log() -> [entry] -> finalising thread -> [record] -> worker thread -> sink
                                          -> [record] -> worker thread -> sink

Entries stay in order: each waits for its reduction, becomes a record, and is offered to every sink.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, NamedTuple, TypeAlias, cast

from metricfold._core.fold.names import Meaning
from metricfold._core.runtime.processes import start_thread
from metricfold._core.sketch import Histogram
from metricfold._core.view.alert import Alert, Alerts
from metricfold._core.view.cells import By
from metricfold._core.view.snapshot import Snapshot
from metricfold._core.view.tables import Rollup
from metricfold._core.view.windows import WindowLike
from metricfold.sinks.early import Watch
from metricfold.sinks.loud import mention, say
from metricfold.sinks.record import Record, Sink, checked_numbers
from metricfold.sinks.selection import SelectiveSink
from metricfold.sinks.worker import Consumer, Patience, Rewind, SinkWorker, error_of

__all__ = ["Entry", "Extra", "Pipeline"]

_log = logging.getLogger("metricfold")

Extra: TypeAlias = Mapping[str, float] | Callable[[Snapshot], Mapping[str, float | None]]
"""Further numbers by key, or a function of the result that gives them."""


class Entry(NamedTuple):
    """What one `log` call accepted."""

    step: int
    wall_time: float  # in Unix seconds
    source: Mapping[str, float] | Future[Snapshot]  # a result may still be to come
    prefix: str  # empty for a dict that was given none
    window: WindowLike
    rollup: Rollup
    extra: Extra
    by: By | None = None  # None: as the aggregator has it


class Pipeline(Consumer):
    """The threads of one logger; made on the rank that writes."""

    def __init__(
        self,
        sinks: Sequence[Sink],
        queue_size: int,
        on_alert: Callable[[Alert], object] | None = None,
        run: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._header = None if run is None else dict(run)
        self._headed = False  # whether the sinks have been told, and no rewind has taken it back
        self._meanings: dict[str, dict[str, Meaning]] = {}  # of keys, by prefix
        self._on_alert = on_alert
        self._queue_size = queue_size
        parts = [
            part
            for sink in sinks
            for part in (sink.parts() if isinstance(sink, SelectiveSink) else (sink,))
        ]
        self._takes_arrays = any(getattr(part, "arrays", True) for part in parts)
        self._workers = [SinkWorker(part, queue_size) for part in parts]
        self._watch = Watch()
        self._own: set[str] = set()  # keys that were logged as extra= or in a dict
        self._clashes: set[str] = set()
        self._hurry: Future[None] = Future()  # done: wait for no reduction any more
        self._thread = start_thread(self._run, name="metricfold log")

    def submit(self, entry: Entry) -> None:
        """Accept `entry` for every sink for which not too many wait already."""
        accepting: list[SinkWorker] = []
        try:
            for worker in self._workers:
                worker.reserve(entry.step, accepting)
        finally:
            # Also if an interrupt comes meanwhile: what a sink has accepted, it is given.
            told = self._on_alert is not None and self._inbox.qsize() < self._queue_size
            if accepting or told:
                self._inbox.put((entry, accepting))

    def rewind(self, step: int) -> None:
        self._inbox.put(Rewind(step))

    def flush(self, patience: Patience) -> bool:
        """Wait until what was accepted is flushed, and return whether it is."""
        made = self._made(patience)
        flushes = [(worker, worker.flush()) for worker in self._workers]
        answers = [worker.wait(flush.done, patience) and flush.well for worker, flush in flushes]
        return made and all(answers)

    def close(self, patience: Patience, *, hurry: bool) -> None:
        """Write and flush what was accepted, close the sinks, and end the threads.

        What could not be written is said in one table. In a `hurry`, no reduction is waited for.
        """
        if hurry and not self._hurry.done():
            self._hurry.set_result(None)
        self._made(patience)
        self._inbox.put(None)
        closings = [(worker, worker.close(patience)) for worker in self._workers]
        self._say([worker.report(closed=worker.wait(done, patience)) for worker, done in closings])

    def give_up(self) -> None:
        """Say what has not been written, of which nothing more will be."""
        self._say([worker.report(closed=True) for worker in self._workers])

    def is_here(self) -> bool:
        """Return whether it is one of its own threads that asks: a sink's, or a function's it calls."""
        return super().is_here() or any(worker.is_here() for worker in self._workers)

    def failures(self) -> int:
        """Return a number that grows with each record that is missing, and each loud failure."""
        return sum(worker.failures() for worker in self._workers)

    def failure(self) -> str:
        return "; ".join(filter(None, (worker.failure() for worker in self._workers)))

    @staticmethod
    def _say(reports: Sequence[Sequence[str]]) -> None:
        if lines := [line for report in reports for line in report]:
            say("not all that was logged has been written:\n  " + "\n  ".join(lines))

    def _made(self, patience: Patience) -> bool:
        """Wait until the entries accepted so far are records, and return whether they are."""
        passed = threading.Event()
        self._inbox.put(passed)
        return self.wait(passed, patience)

    def _run(self) -> None:
        while (item := self._inbox.get()) is not None:
            match item:
                case Rewind(step):
                    self._watch.rewind(step)
                    self._headed = False
                    for worker in self._workers:
                        worker.put(item)
                case threading.Event():
                    item.set()
                case entry, workers:
                    self._hand_over(entry, workers)
            self._handled += 1

    def _hand_over(self, entry: Entry, workers: Sequence[SinkWorker]) -> None:
        """Give the record of `entry`, once its reduction is done, to the workers that wait for it."""
        record = self._record(entry)
        if record is not None:
            self._watch.step(record.step, record.prefix)
        for worker in workers:
            if record is not None:
                worker.put(record)
            else:
                # What a failed reduction raises the logger raises, where the training can see it.
                worker.release(unmade=not _has_failed(entry.source))
        # Last: however long it takes, the record is on its way.
        self._tell(_alerts_in(entry.source))

    def _record(self, entry: Entry) -> Record | None:
        if isinstance(entry.source, Future):
            either: list[Future[Any]] = [entry.source, self._hurry]
            wait(either, return_when=FIRST_COMPLETED)
            if not entry.source.done():
                mention(
                    f"the metrics of step {entry.step} are lost: their reduction was still waiting "
                    "for other ranks when this process ended"
                )
                return None
            if _has_failed(entry.source):
                return None
        try:
            extra = _extra(entry)
            arrays: dict[str, dict[str, Any]] = {}
            meanings: dict[str, Meaning] = {}
            self._own |= extra.keys()
            if isinstance(entry.source, Future):
                snapshot = entry.source.result()
                # What an aggregator of the user's own making returns need not know of axes.
                if entry.by is not None and hasattr(snapshot, "shown_by"):
                    snapshot = snapshot.shown_by(entry.by)
                metrics, histograms = self._aggregated(entry, snapshot)
                if self._takes_arrays and hasattr(snapshot, "arrays"):
                    found = snapshot.arrays(entry.prefix, entry.window, rollup=entry.rollup)
                    # Not those of totals that are left out for what is logged under their names.
                    arrays = {key: one for key, one in found.items() if key in metrics}
                meanings = self._told(entry.prefix, snapshot, [*metrics, *histograms, *arrays])
            else:
                metrics, histograms = dict(entry.source), {}
                self._own |= metrics.keys()
            self._warn_of_clashes(
                extra.keys() & metrics.keys(),
                "extra= names {}, which are metrics of their own: the metrics are kept and the extra "
                "values left out; give these another name",
            )
            together = metrics | extra | metrics
            said = [alert.to_json() for alert in _alerts_in(entry.source)]
            run = None if self._headed else self._header
            self._headed = True
            return Record(
                entry.step,
                entry.wall_time,
                together,
                histograms,
                entry.prefix,
                arrays,
                said,
                run,
                meanings,
            )
        except BaseException:  # noqa: BLE001 - training must not die of it, least of all on one rank
            _log.exception("the metrics of step %d are left out", entry.step)
            return None

    def _told(self, prefix: str, snapshot: Snapshot, keys: Sequence[str]) -> dict[str, Meaning]:
        """Return what these keys stand for; each is looked into once."""
        known = self._meanings.setdefault(prefix, {})
        # Of an aggregator of the user's own making nothing is known.
        if hasattr(snapshot, "meanings") and (new := [key for key in keys if key not in known]):
            known |= snapshot.meanings(prefix, new)
        return {key: known[key] for key in keys if key in known}

    def _tell(self, alerts: Alerts) -> None:
        if self._on_alert is None:
            return
        for alert in alerts:
            if (error := error_of(self._on_alert, alert)) is not None:
                _log.error("on_alert failed for the alert %r", alert.message, exc_info=error)

    def _aggregated(
        self, entry: Entry, snapshot: Snapshot
    ) -> tuple[dict[str, float], dict[str, Histogram]]:
        metrics = snapshot.as_dict(entry.prefix, entry.window, rollup=entry.rollup)
        self._watch.aggregated(entry.step, entry.prefix, metrics)
        if entry.rollup and not self._own.isdisjoint(metrics):
            recorded = snapshot.as_dict(entry.prefix, entry.window, rollup=False)
            totals = (self._own & metrics.keys()) - recorded.keys()
            metrics = {key: value for key, value in metrics.items() if key not in totals}
            self._warn_of_clashes(
                totals,
                "{} would be totals over datasets, but are logged as extra= or in a dict: those "
                "are kept and the totals left out; to have both, give these another name",
            )
        return metrics, snapshot.histograms(entry.prefix, entry.window)

    def _warn_of_clashes(self, keys: AbstractSet[str], message: str) -> None:
        """Say, once for each key, what is left out."""
        if clashes := keys - self._clashes:
            self._clashes |= clashes
            mention(message.format(", ".join(map(repr, sorted(clashes)))))


def _extra(entry: Entry) -> dict[str, float]:
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


def _alerts_in(source: Mapping[str, float] | Future[Snapshot]) -> Alerts:
    """Return what the rules have found in a reduction that has ended well."""
    if not isinstance(source, Future) or not source.done() or _has_failed(source):
        return Alerts()
    # Of an aggregator of the user's own making nothing is known.
    return cast("Alerts", getattr(source.result(), "alerts", Alerts()))


def _has_failed(source: Mapping[str, float] | Future[Snapshot]) -> bool:
    """Return whether it is a reduction that is over and has no result."""
    if not isinstance(source, Future) or not source.done():
        return False
    return source.cancelled() or source.exception() is not None
