"""What an aggregator holds on one rank, and how metrics that have been looked at come to it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np

from metricfold._core.fold.batch import Column, Late, listed
from metricfold._core.fold.custom import CustomStates
from metricfold._core.fold.names import show
from metricfold._core.intake.checkpoint import Restored
from metricfold._core.intake.clock import Clock
from metricfold._core.intake.delta import InTransit
from metricfold._core.intake.inbox import MOST_LATE, Inbox, never_read
from metricfold._core.intake.keys import Admission, KeyTable
from metricfold._core.intake.run import Run
from metricfold._core.intake.timers import Timers
from metricfold._core.reduce.schema import Key
from metricfold._core.runtime.listing import internal
from metricfold._core.runtime.recomputation import not_given_before
from metricfold.metric import Metric, TypeLike

__all__ = ["AggregatorMark", "Held"]

_log = logging.getLogger("metricfold")


class Held:
    """What one rank has taken in, and the run that it adds to.

    Args:
        keys: which metrics there are.
        run: the run.

    Attributes:
        lock: guards all of it, but for the totals of the run.
        newest_mark: what may be rolled back to.
        cuts: how often what had come in was cut off.
        warned: what has been said once.
    """

    def __init__(self, keys: KeyTable, run: Run) -> None:
        self.keys = keys
        self.run = run
        self.lock = threading.RLock()
        self.clock = Clock()
        self.timers = Timers(keys, self.clock)
        self.inbox = Inbox(keys)
        self.custom = CustomStates()
        self.late_custom: list[Late] = []
        self._late_custom_marked = 0
        self._late_errors, self._said_late = "", False
        self.newest_mark: AggregatorMark | None = None
        self.cuts = 0
        self.warned: set[str] = set()

    # -- Taking in

    def take_first(self, key: Key, agg_type: TypeLike, value: Any, weight: Any) -> bool:
        """Take in the first value of a key, if it is such that later ones go the fast way."""
        handler = self.keys.handler_of(key, agg_type)
        take_in = self.inbox.first(key, agg_type, handler, value, weight)
        if take_in is None:
            return False
        self.keys.commit(self.keys.admit_keys([(key, agg_type)]))
        self.clock.begin()
        take_in()
        return True

    def take(self, columns: Sequence[Column], *, counts: bool) -> None:
        """Take in columns, all or none; raises ValueError on a clash.

        Args:
            columns: what has been folded elsewhere, and what handlers without lanes are to get.
            counts: whether anything can reduce what comes; else it does not pile up.
        """
        admission = self.keys.admit(columns)
        if admission.custom:
            self._take_custom(admission, counts=counts)
        else:
            self._commit(admission, counts=counts)
        self.inbox.relieve()

    def _commit(self, admission: Admission, *, counts: bool) -> None:
        """Take over new keys, and then what has come of those with lanes."""
        if admission.new:
            self.keys.commit(admission)
        if admission.lanes or admission.custom:
            self.clock.begin()
        if counts:
            self.inbox.take(admission.lanes)

    def _take_custom(self, admission: Admission, *, counts: bool) -> None:
        late_keys = {late.key for late in self.late_custom}
        now, late = [], []
        for column, handler in admission.custom:
            new = admission.new.get(column.key)
            agg_type = self.keys.type_of(column.key) if new is None else new[0]
            if column.agg_type is not agg_type:  # and equal
                column.agg_type = agg_type
                column.metrics = [one._replace(agg_type=agg_type) for one in column.metrics]
            if column.key in late_keys:
                late += [
                    Late(column.key, column.agg_type, metric.value, metric.weight)
                    for metric in column.metrics
                ]
            else:
                now.append((column.key, handler, column.metrics))
            late += column.late

        before = self.late_custom

        def commit() -> None:
            self.late_custom = before + late if late else before
            try:
                self._commit(admission, counts=counts)
            except BaseException:
                self.late_custom = before
                raise

        self.custom.update(now, commit)
        # With a mark, what came before and after it has to stay apart. Nothing may wait here.
        many = len(self.late_custom) >= MOST_LATE and self.newest_mark is None
        if many and all(map(Late.ready, self.late_custom)):
            if not self._said_late:
                self._said_late = True
                _log.warning("%s", never_read(self.late_custom))
            self._late_errors = self.read_late_custom()

    def pass_over(self, metrics: Iterable[Metric | Column]) -> None:
        """Leave out what a repeated forward gives; what its first has not given is lost, so say so."""
        lost = set()
        for one in metrics:
            if isinstance(one, Column):
                key, counts = one.key, not one.weightless
            else:
                key, counts = one[:2], not (isinstance(one.weight, Real) and one.weight == 0)
            if counts and key not in self.keys.of_key:
                lost.add(show(key))
        lost -= self.warned
        if lost:
            self.warned |= lost
            _log.warning("%s", not_given_before(sorted(lost)))

    def read_late_custom(self) -> str:
        """Hand over values that lay on a device to handlers without lanes; returns an error."""
        errors = [self._late_errors] if self._late_errors else []
        self._late_errors = ""
        arrived = InTransit(self.late_custom).arrive(errors)
        self.late_custom = [
            Late(one.key, one.agg_type, value, weight) for one, value, weight in arrived
        ]

        def commit() -> None:
            del self.late_custom[0]

        while self.late_custom:
            one = self.late_custom[0]
            pairs = [(one.value, one.weight)]
            if isinstance(one.value, np.ndarray):
                pairs = list(zip(listed(one.value), listed(one.weight), strict=True))
            agg_type = self.keys.type_of(one.key)
            metrics = [Metric(*one.key, each, agg_type, own) for each, own in pairs]
            try:
                self.custom.update([(one.key, self.keys.of_key[one.key], metrics)], commit)
            except Exception as failure:  # noqa: BLE001 - the user's; raised on all ranks
                errors.append(f"{show(one.key)}: the handler failed: {failure!r}")
                commit()
        return "; ".join(dict.fromkeys(errors))

    # -- Marks

    def mark(self, name: str) -> AggregatorMark:
        """Return a mark of the aggregator `name` that `rollback` comes back to."""
        self.inbox.mark()
        self.custom.mark()
        self._late_custom_marked = len(self.late_custom)
        self.newest_mark = AggregatorMark(name, self.keys, self.cuts)
        return self.newest_mark

    def rollback(self) -> None:
        """Drop what has come in since the newest mark."""
        self.inbox.rollback()
        self.custom.rollback(self.keys.of_key)
        del self.late_custom[self._late_custom_marked :]

    def let_go_of_mark(self) -> None:
        """What came after it is on its way."""
        self.newest_mark = None
        self.cuts += 1
        self.custom.unmark()

    # -- Dropping

    def forget(self, key: Key) -> int:
        """Drop what has accumulated of `key`; returns how many values that were."""
        self.custom.drop(key)
        self.timers.drop(key)
        marked = self.late_custom[: self._late_custom_marked]
        self._late_custom_marked -= sum(late.key == key for late in marked)
        self.late_custom = [late for late in self.late_custom if late.key != key]
        return self.inbox.drop(key)

    def begin_anew(self, restored: Restored | None) -> None:
        """Replace everything by what a checkpoint held, or by nothing."""
        if restored is not None:
            self.keys.commit_saved(restored.saved.run.schema, restored.admission)
        self.inbox = Inbox(self.keys)
        self.custom = CustomStates()
        self.clock.restart()
        self.timers.begin_anew()
        self.let_go_of_mark()
        self.late_custom = []
        self.run.begin_anew(restored)

    def leave_parent_behind(self) -> None:
        """In a forked child: new locks, and nothing that somebody was in the midst of changing."""
        self.lock = threading.RLock()
        self.clock.leave_parent_behind()
        self.timers.leave_parent_behind()
        self.inbox = Inbox(self.keys)


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
