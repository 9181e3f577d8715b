"""What an aggregator holds on one rank, and how metrics that have been looked at come to it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from typing import Any

from metricfold._core.exchange.reducer import Reduced, Reducer
from metricfold._core.exchange.route import Exchange
from metricfold._core.fold.columns import Column
from metricfold._core.fold.custom import CustomStates
from metricfold._core.fold.names import show
from metricfold._core.intake.checkpoint import Restored, Saved, share
from metricfold._core.intake.clock import Clock
from metricfold._core.intake.inbox import Inbox
from metricfold._core.intake.keys import Admission, KeyTable
from metricfold._core.intake.timers import Timers
from metricfold._core.reduce.header import RouteChoice
from metricfold._core.reduce.schema import Key, Schema
from metricfold._core.reduce.totals import Totals
from metricfold._core.runtime.listing import internal
from metricfold._core.runtime.recomputation import not_given_before
from metricfold._core.view.cells import By
from metricfold._core.view.rules import Rules
from metricfold.communicator import Communicator, LocalCommunicator
from metricfold.metric import Metric, TypeLike

__all__ = ["AggregatorMark", "Held", "Run"]

_log = logging.getLogger("metricfold")


class Held:
    """What one rank has taken in, and the run that it adds to.

    Args:
        keys: which metrics there are.
        run: the run.
        by: which axes of metrics remain in what is logged.

    Attributes:
        lock: guards all of it, but for the totals of the run.
        newest_mark: what may be rolled back to.
        warned: what has been said once.
        rules: what looks for alerts.
    """

    def __init__(self, keys: KeyTable, run: Run, by: By = ()) -> None:
        self.keys = keys
        self.run = run
        self.by = by
        self.lock = threading.RLock()
        self.clock = Clock()
        self.timers = Timers(keys, self.clock)
        self.inbox = Inbox(keys)
        self.newest_mark: AggregatorMark | None = None
        self.warned: set[str] = set()
        self.rules = Rules()

    # -- Taking in

    def take_first(self, key: Key, agg_type: TypeLike, value: Any, weight: Any) -> bool:
        """Take in the first value of a key, if it is such that later ones go the fast way."""
        handler = self.keys.handler_of(key, agg_type)

        def commit() -> None:
            self._commit(self.keys.admit_keys([(key, agg_type, "")]), counts=True)

        return self.inbox.first(key, agg_type, handler, value, weight, commit)

    def take(self, columns: Sequence[Column], *, counts: bool) -> None:
        """Take in columns, all or none; raises ValueError on a clash.

        Args:
            columns: what has been folded elsewhere, and what handlers without lanes are to get.
            counts: whether anything can reduce what comes; else it does not pile up.
        """
        admission = self.keys.admit(columns)
        begins = bool(admission.lanes or admission.custom)
        commit = partial(self._commit, admission, counts=begins)
        if counts:
            self.inbox.take(admission.lanes, admission.custom, commit)
        else:
            commit()

    def _commit(self, admission: Admission, *, counts: bool) -> None:
        """Take over what has been admitted; if anything of it counts, time does."""
        self.keys.commit(admission)
        if counts:
            self.clock.begin()

    def pass_over(self, metrics: Iterable[Metric | Column]) -> None:
        """Leave out what a repeated forward gives; what its first has not given is lost, so say so."""
        lost = set()
        for one in metrics:
            if isinstance(one, Column):
                key, counts = one.key, not one.weightless
            else:
                key, counts = one[:2], not (isinstance(one.weight, Real) and one.weight == 0)
            if counts and key not in self.keys.records:
                lost.add(show(key))
        lost -= self.warned
        if lost:
            self.warned |= lost
            _log.warning("%s", not_given_before(sorted(lost)))

    # -- Marks and the rest

    def mark(self, name: str) -> AggregatorMark:
        """Return a mark of the aggregator `name` that `rollback` comes back to."""
        self.inbox.mark()
        self.newest_mark = AggregatorMark(name, self.keys, self.inbox.cuts)
        return self.newest_mark

    def rename(self, key: Key, name: Key | None) -> None:
        """Let what has come of `key` go by another name, for the ranks hold it otherwise; None: drop it."""
        self.timers.drop(key)
        self.inbox.rename(key, name)

    def begin_anew(self, restored: Restored | None) -> None:
        """Replace everything by what a checkpoint held, or by nothing."""
        if restored is not None:
            self.keys.commit_saved(restored.saved.run.schema, restored.admission)
        self.inbox.clear()
        self.clock.restart()
        self.timers.begin_anew()
        self.run.begin_anew(restored)
        self.rules.restore({} if restored is None else restored.saved.rules)

    def leave_parent_behind(self) -> None:
        """In a forked child: new locks, and nothing that somebody was in the midst of changing."""
        self.lock = threading.RLock()
        self.clock.leave_parent_behind()
        self.timers.leave_parent_behind()
        self.inbox = Inbox(self.keys)
        self.rules.lock = threading.RLock()


@internal("cuts", "keys")
@dataclass(frozen=True, slots=True, eq=False)
class AggregatorMark:
    """A place that `MetricsAggregator.rollback` comes back to.

    Args:
        name: of the aggregator.
        keys: its table, which tells it from others of that name. The aggregator itself would keep
            itself alive through its newest mark.
        cuts: how often it had been cut off.
    """

    name: str
    keys: KeyTable = field(repr=False)
    cuts: int


class Run:
    """The run that the ranks add to together: its totals, and what of it a checkpoint has brought.

    Args:
        route: how vectors are to travel.

    Attributes:
        reducer: holds the totals.
        saved: returns what a checkpoint holds as of the last reduction.
    """

    def __init__(self, route: RouteChoice) -> None:
        self.reducer = Reducer(Exchange(LocalCommunicator(), route))
        self.saved: Callable[[], Saved] = _nothing
        self._bound: Communicator | None = None
        self._unclaimed: Restored | None = None

    def bind(self, communicator: Communicator, custom: CustomStates, keys: KeyTable) -> None:
        """Go on over `communicator`, with this rank's share of what a checkpoint held."""
        if communicator is not self._bound:
            self.reducer.bind(Exchange(communicator, self.reducer.exchange.wanted))
            self._bound = communicator
        restored = self._unclaimed
        if restored is None:
            return
        # Should an interrupt come in between, all of it is done again, to the same end.
        rank, world_size = communicator.rank, communicator.world_size
        for key, windows in restored.saved.windows.items():
            limit = keys.records[key].handler.laned().sample_limit
            self.reducer.windows[key] = share(windows, rank, world_size, limit)
        restored.inherit(custom, rank, world_size)
        self._unclaimed = None

    def go_on(self, reduced: Reduced, *, interval_open: bool) -> None:
        self.saved = lambda: Saved.of(reduced, interval_open=interval_open)

    def begin_anew(self, restored: Restored | None) -> None:
        """Go on from what a checkpoint held, or from nothing; what the ranks have agreed on stays."""
        saved = _nothing() if restored is None else restored.saved
        self.saved = lambda: saved
        self._unclaimed = restored
        self.reducer.replace_totals(saved.run, saved.interval, saved.reductions)


def _nothing() -> Saved:
    empty = Totals.empty(Schema())
    return Saved(empty, empty, {}, {"run": [], "interval": []})
