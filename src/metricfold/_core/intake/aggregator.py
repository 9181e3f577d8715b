"""`MetricsAggregator`: takes metrics in, folds them over ranks, and gives results and checkpoints.

    aggregator = MetricsAggregator()
    aggregator.update(batch.pop("metrics"))                # per-sample metrics, any dataset
    aggregator.record("loss", loss, weight=num_tokens)     # a step's metric; nothing waits
    snapshot = aggregator.reduce()                         # every rank calls it
    state = aggregator.state_dict()                        # every rank calls it; anyone may save it

What comes in piles up in an `Inbox`; a reduction cuts it off and, if it fails, puts it back.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import operator
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import timedelta
from numbers import Real
from typing import Any, NamedTuple, NoReturn, SupportsIndex

import numpy as np

from metricfold._core.device.arrays import unwrapped
from metricfold._core.device.rows import AnyAccumulator, Drained, Layout
from metricfold._core.exchange.reduction import Contribution, Outcome, Reduced, Reducer
from metricfold._core.fold import hints
from metricfold._core.fold.batch import (
    Column,
    Late,
    MetricBatch,
    fold_each,
    fold_metrics,
    fold_together,
    fold_value,
    is_many,
    listed,
    say_replaced,
)
from metricfold._core.fold.custom import CustomResults, CustomStates, restored
from metricfold._core.fold.handlers import (
    AggregationHandler,
    built_in_handlers,
    check_on_nan,
    name_of,
    quiet,
)
from metricfold._core.fold.names import check_prefix, show
from metricfold._core.fold.sample import Window
from metricfold._core.intake.checkpoint import Saved, decode, encode, share
from metricfold._core.intake.clock import Clock, Pause
from metricfold._core.intake.delta import CutDelta, InTransit
from metricfold._core.intake.inbox import MOST_LATE, Inbox, never_read
from metricfold._core.intake.keys import INSTEAD, Admission, KeyRegistry, KeyTable
from metricfold._core.intake.timers import Elapsed, Timer
from metricfold._core.reduce.header import Kind, check_route
from metricfold._core.reduce.schema import Key, Schema
from metricfold._core.reduce.totals import Totals
from metricfold._core.runtime.copies import where_found
from metricfold._core.runtime.listing import internal
from metricfold._core.runtime.processes import Worker, watch_forks
from metricfold._core.runtime.recomputation import not_given_before, recomputed
from metricfold._core.runtime.staging import refuse_while_traced
from metricfold._core.runtime.uncompiled import leave_alone, uncompiled
from metricfold._core.view.derived import Derived, DerivedMetric, check_derived_window
from metricfold._core.view.snapshot import Handlers, Snapshot, WindowLike, check_window
from metricfold._core.view.timing import TimerKeys
from metricfold.communicator import (
    Communicator,
    LocalCommunicator,
    MissingRanksError,
    connect,
)
from metricfold.data.sample import guard_default_collate
from metricfold.metric import (
    AggregationType,
    Metric,
    MetricState,
    TypeLike,
    check_name,
    resolve_type,
)

__all__ = ["AggregatorMark", "MetricsAggregator"]

_log = logging.getLogger("metricfold")

_order_of_creation = itertools.count()
_namesakes: dict[str, itertools.count[int]] = {}

_LARGEST_STEP = 2**53  # what a float64 holds exactly
_LONGEST_TIMEOUT = 1e8  # three years, in seconds; what comes after overflows in torch

_leaked: list[Communicator] = []
"""What forked children have inherited. A group's destructor would wait for threads that only the
parent has, so it must not run there."""


@internal("has_failed", "leave_parent_behind", "waits_for")
@uncompiled
class MetricsAggregator:
    """Aggregates metrics over samples, datasets and ranks.

    Args:
        dist_window_size: how many of its most recent values of a DISTRIBUTION each rank keeps, for
            the view of the run; None: that view is about all values since the start.
        name: pairs this aggregator with its counterparts on the other ranks; default: the order
            of creation.
        process_group: the ranks to aggregate over: a `torch.distributed` group, or one dimension
            of a `DeviceMesh`; default: all ranks. The group is bound at the first reduction.
        timeout: seconds (or a `timedelta`) to wait for missing ranks; default: the training
            group's own timeout, or ten minutes over JAX processes.
        on_nan: ``"propagate"``: SUM, MEAN, MAX, MIN and RATE report NaN when one came in.
            ``"skip"``: they leave NaN out and report how many as ``{name}_nan_count``.
        percentiles: which percentiles a DISTRIBUTION reports, ascending, each in 0..100.
        max_categories: how many categories of a CATEGORICAL_COUNT are told apart over all ranks;
            the rest are counted as ``__other__``.
        on_bad_name: what becomes of a category that is empty or cannot be printed: ``"replace"``
            counts it as ``__empty__``, or with what cannot be printed spelled out, and warns of a
            metric's first; ``"refuse"`` raises. Batches bring what their `MetricsCollator` chose.
        route: ``"narrow"``: one all-gather per reduction. ``"wide"``: two all-reduces, whose cost
            for a rank does not grow with their number. ``"auto"``: the wide one where an
            all-gather would move more than 4 MiB in all.
        communicator: moves vectors between ranks; default: found by what is initialised.

    `update` and `record` never wait for a device. The calls that talk to other ranks (`reduce`,
    `reduce_async`, `get_metrics_for_logging`, `state_dict`) must be made by all of them, in the
    same order. If some rank does not come in time they raise `MissingRanksError`, which names it.

    >>> aggregator = MetricsAggregator()
    >>> aggregator.record("loss", 2.0, weight=3)
    >>> aggregator.record("loss", 4.0, weight=1)
    >>> aggregator.get_metrics_for_logging(prefix="train")
    {'train/loss': 2.5}
    """

    def __init__(
        self,
        dist_window_size: int | None = 1000,
        *,
        name: str | None = None,
        process_group: Any = None,
        timeout: float | timedelta | None = None,
        on_nan: str = "propagate",
        percentiles: Sequence[float] = (5, 50, 95),
        max_categories: int = 1000,
        on_bad_name: str = "replace",
        route: str = "auto",
        communicator: Communicator | None = None,
    ) -> None:
        guard_default_collate()
        self._keys = KeyTable(
            built_in_handlers(
                dist_window_size, percentiles, check_on_nan(on_nan), max_categories, on_bad_name
            )
        )
        if name is not None:
            check_name("the aggregator's name", name)
        self._timeout = _check_timeout(timeout)
        self.name = f"{next(_order_of_creation)}" if name is None else name
        # A second aggregator of one name pairs with the second ones on the other ranks.
        self._namesake = next(_namesakes.setdefault(self.name, itertools.count()))
        self._process_group = process_group
        self._warned: set[str] = set()
        self._inbox = Inbox(self._keys)
        self._clock = Clock()
        self._custom = CustomStates()
        self._late_custom: list[Late] = []
        self._late_errors, self._said_late = "", False
        self._timers: dict[str, Elapsed] = {}
        self._mark: AggregatorMark | None = None
        self._late_custom_marked = 0
        self._cuts = 0
        self._reducer = Reducer(check_route(route))
        self._last: tuple[Reduced, Kind] | None = None
        self._loaded: Saved | None = None
        self._unclaimed: _Unclaimed | None = None
        self._own_communicator = communicator is None
        self._communicator: Communicator | None = communicator
        self._generation = 0
        self._past_collectives = 0
        self._dead: Exception | None = None
        self._worker: Worker | None = None
        self._in_flight: Future[Snapshot] | None = None
        self._renew_locks()
        self._process = os.getpid()
        watch_forks(self)
        leave_alone()

    def __repr__(self) -> str:
        parts = [f"name={self.name!r}"]
        communicator = self._communicator
        if communicator is not None:
            parts.append(f"rank={communicator.rank}, world_size={communicator.world_size}")
        parts.append(f"keys={len(self._keys.of_key)}, seconds={self._clock.interval:.4g}")
        if self._dead is not None:
            parts.append("out of use")
        return f"MetricsAggregator({', '.join(parts)})"

    # -- Taking metrics in

    def update(self, metrics: Sequence[Metric] | MetricBatch) -> None:
        """Take in the metrics of some samples.

        Args:
            metrics: a list of `Metric`, possibly empty, or what `MetricsCollator` made of a batch.

        Raises:
            ValueError, TypeError: a metric is not valid: its key has another aggregation type
                already, its name clashes with another, its value or weight is of the wrong kind.
                Then nothing has changed, not even for the metrics before it.
        """
        refuse_while_traced("update")
        if recomputed():
            self._pass_over(metrics.columns if isinstance(metrics, MetricBatch) else metrics)
            return
        with self._lock:
            if self._dead is None and self._inbox.update(metrics):
                return
        if isinstance(metrics, MetricBatch):
            if metrics.replaced:
                say_replaced(metrics, self._keys.handler_of)
            columns = self._keys.columns_of(metrics)
        elif isinstance(metrics, list | tuple) and not isinstance(metrics, Metric):
            with quiet():
                columns = fold_metrics(metrics, self._keys.handler_of, in_worker=False)
        else:
            raise TypeError(
                "update() takes a list of Metric or a MetricBatch, not "
                f"{type(metrics).__name__}{hints.for_metrics(metrics)}"
            )
        self._take(columns)

    def record(
        self,
        name: str,
        value: Any,
        agg: TypeLike = "mean",
        *,
        dataset: str | None = None,
        weight: Any = 1.0,
        each: bool = False,
        per_rank: bool = False,
    ) -> None:
        """Take in one metric of a step, or each element of an array.

        Args:
            name: the metric's name.
            value: a number or any one-element array; one on a device stays there until the next
                reduction, and no graph or buffer of the caller is kept. With ``each=True`` or
                an array of weights: a NumPy, torch or JAX array of any shape, whose elements each
                count. Masked ones do not. Integers beyond 2^53 are refused there if a float64 does
                not hold them.
            agg: the aggregation, such as ``"mean"`` or `AggregationType.MAX`.
            dataset: the dataset; without one the metric is logged as ``{prefix}/{name}``.
            weight: how much the value counts in a MEAN or DISTRIBUTION, such as its number of
                tokens; a number or a one-element array. Other types take 1, or 0: a value of weight
                0 contributes nothing, in any type, not even its name. On a device any weight may be
                given to them, and what is not 0 is 1. An array of the shape of `value` weighs each
                of its elements; what is masked has weight 0.
            each: count each element of an array; `weight` may then be one for all.
            per_rank: let `Snapshot.per_rank` know each rank's value however many ranks there are,
                such as of a step's time; otherwise it does on the narrow route alone.

        Raises:
            ValueError, TypeError: as `update`; then nothing has changed.

        >>> aggregator = MetricsAggregator()
        >>> aggregator.record("len", np.array([[3, 5], [4, 0]]), "max", each=True)
        >>> losses, mask = np.array([2.0, 4.0, 9.0]), np.array([True, True, False])
        >>> aggregator.record("loss", losses, weight=mask)
        >>> aggregator.get_metrics_for_logging("train")
        {'train/len': 5.0, 'train/loss': 3.0}
        """
        refuse_while_traced("record", name, value, weight)
        if recomputed():
            self._pass_over([Metric(dataset or "", name, value, agg, weight)])
            return
        if not (each or per_rank):
            with self._lock:
                if self._dead is None and self._inbox.record(name, value, agg, dataset, weight):
                    return
        check_name("the name of a metric", name)
        if dataset is not None:
            check_name(f"the dataset of metric {name!r}", dataset)
        value, weight = unwrapped(value), unwrapped(weight)
        try:
            agg_type = resolve_type(agg)
        except TypeError as error:
            raise TypeError(f"{error}{hints.for_agg(name, value, agg)}") from None
        key = (dataset or "", name)
        if not (each or per_rank) and self._take_first(key, agg_type, value, weight):
            return
        with quiet():
            fold = fold_each if each or is_many(value, weight) else fold_value
            column = fold(key, agg_type, value, weight, self._keys.handler_of)
        if per_rank and column.state is None and not column.weightless:
            raise ValueError(
                f"{show(key)} has a handler without lanes, so per_rank=True has no effect: leave "
                "it out"
            )
        self._take([column])
        if per_rank:
            self._keys.per_rank.add(key)

    def record_all(
        self,
        metrics: Mapping[str, Any],
        agg: TypeLike | Mapping[str, TypeLike] = "mean",
        *,
        dataset: str | None = None,
        weight: Any = 1.0,
    ) -> None:
        """Take in several metrics of a step: all of them, or none if one cannot be.

        Args:
            metrics: by name, a value as `record` takes it.
            agg: the aggregation of all, or of each by name.
            dataset: as in `record`.
            weight: of each; a number or a one-element array. Types in which no weight counts leave
                their metric out if it is 0, and take it once for any other.

        Raises:
            ValueError, TypeError: as `record`, or `agg` lacks one of the names; then nothing has
                changed.

        >>> aggregator = MetricsAggregator()
        >>> types = {"loss": "mean", "grad_norm": "max"}
        >>> aggregator.record_all({"loss": 2.0, "grad_norm": 0.5}, types, weight=3)
        >>> aggregator.record_all({"loss": 4.0, "grad_norm": 0.7}, types, weight=1)
        >>> aggregator.get_metrics_for_logging("train")
        {'train/grad_norm': 0.7, 'train/loss': 2.5}
        """
        refuse_while_traced("record_all")
        repeated = recomputed()
        if not repeated:
            with self._lock:
                if self._dead is None and self._inbox.record_all(metrics, agg, dataset, weight):
                    return
        if not isinstance(metrics, Mapping):
            raise TypeError(
                f"record_all() takes the values by name, as in {{'loss': loss}}, not "
                f"{type(metrics).__name__}{hints.for_metrics(metrics)}"
            )
        if repeated:
            self._pass_over(
                [Metric(dataset or "", name, value, "", weight) for name, value in metrics.items()]
            )
            return
        if dataset is not None:
            check_name("the dataset of the metrics", dataset)
        weight = unwrapped(weight)
        values: dict[Key, tuple[TypeLike, Any]] = {}
        for name, value in metrics.items():
            check_name("the name of a metric", name)
            key = (dataset or "", name)
            if isinstance(agg, Mapping) and name not in agg:
                raise ValueError(
                    f"{show(key)} has no aggregation: agg= has {', '.join(map(repr, agg))}. Name "
                    "that of each metric, or give one for all"
                )
            values[key] = (agg[name] if isinstance(agg, Mapping) else agg, value)
        with quiet():
            columns = fold_together(values, weight, self._keys.handler_of)
        self._take(columns)

    def timer(self, name: str) -> Timer:
        """Time a block, a function or the items of an iterable, as a metric of this rank.

        A log then has the mean seconds of one use, ``{prefix}/{name}_seconds``, those of the longest,
        ``{prefix}/{name}_seconds_max``, and the share of the interval's time over all ranks,
        ``{prefix}/{name}_share``. `Snapshot.timing` tells the slowest and the fastest rank.

        It is the host's time: on a GPU, a block that only enqueues work takes the time to enqueue.
        A block that raises counts, too. Timers may be nested and run on several threads; one that is
        nested in itself, on one thread, counts once. A use belongs to the interval in which it ends,
        and each interval's share has the part that fell into it, without that of a `pause`.

        Args:
            name: of what is timed.

        Raises:
            ValueError: another metric has one of these names; then nothing has changed.

        >>> aggregator = MetricsAggregator()
        >>> with aggregator.timer("data"):
        ...     batch = [1, 2, 3]
        >>> for batch in aggregator.timer("data").over([batch, batch]):
        ...     pass
        >>> snapshot = aggregator.reduce()
        >>> sorted(snapshot.as_dict("train"))
        ['train/data_seconds', 'train/data_seconds_max', 'train/data_share']
        >>> snapshot.timing("data").slowest
        0
        """
        elapsed = self._timers.get(name) if isinstance(name, str) else None
        if elapsed is None:
            check_name("the name of a timer", name)
            keys = TimerKeys.of(name)
            with self._lock:
                self._check_usable()
                types = [(("", key), agg_type) for key, agg_type in keys.types()]
                admission = self._keys.admit_keys(types)
                handlers = [self._keys.handler_of(*one) for one in types]
                if not all(handler is not None and handler.has_lanes for handler in handlers):
                    raise ValueError(
                        f"timer {name!r} needs handlers with lanes for 'mean', 'max' and 'rate', but "
                        f"another one is registered here: {INSTEAD}"
                    )
                self._keys.commit(admission)
                self._keys.per_rank.add(("", keys.share))
                elapsed = self._timers.setdefault(name, Elapsed(self._clock))
        return Timer(elapsed)

    def pause(self) -> Pause:
        """Leave the time of a block, such as an evaluation or a save, out of what counts.

        Rates, shares of timers, `Snapshot.seconds` and `Snapshot.run_seconds` are as if it had taken
        no time. What is recorded in it counts as ever. Every rank has the block, for seconds are the
        slowest rank's. Blocks may be nested, and run on several threads.

        Time counts from the first value on that comes in, also after `load_state_dict` and `reset`.

        >>> aggregator = MetricsAggregator()
        >>> aggregator.record("tokens_per_second", 1000, "rate")
        >>> with aggregator.pause():
        ...     pass  # evaluate()
        """
        refuse_while_traced("pause")
        with self._lock:
            self._check_usable()
        return Pause(self._clock)

    def _stop_watches(self, world_size: int, shown: float) -> tuple[list[Column], str]:
        """Return metrics of the times that timers have taken, and an error, for all ranks.

        Args:
            world_size: the number of ranks.
            shown: what the clock shows where the interval ends.
        """
        columns: list[Column] = []
        errors = []
        for name, elapsed in self._timers.items():
            taken = elapsed.take(shown, self._inbox.cuts)
            keys = TimerKeys.of(name)
            uses = float(taken.uses)
            numbers: list[tuple[str, AggregationType, float, float]] = []
            if uses:
                mean = self._keys.handler_of(("", keys.mean), AggregationType.MEAN)
                weight = uses if mean is None or mean.weighted else 1.0
                numbers.append((keys.mean, AggregationType.MEAN, taken.total / uses, weight))
                numbers.append((keys.max, AggregationType.MAX, taken.longest, 1.0))
            if uses or taken.counted:
                # Added up over ranks and divided by the time: the mean of the ranks' shares.
                share = taken.counted / world_size
                numbers.append((keys.share, AggregationType.RATE, share, 1.0))
            try:
                columns += [
                    fold_value(("", key), agg_type, value, weight, self._keys.handler_of)
                    for key, agg_type, value, weight in numbers
                ]
            except Exception as failure:  # noqa: BLE001 - the user's; raised on all ranks
                errors.append(f"timer {name!r}: the handler failed: {failure!r}")
        return columns, "; ".join(errors)

    def drain(self, accumulator: AnyAccumulator) -> AnyAccumulator:
        """Take in what an accumulator on the device holds, and return an empty one.

        Nothing waits: the transfer begins here, and the next reduction waits for it. Ranks need not
        drain alike.

        Args:
            accumulator: such as a `metricfold.jax.DeviceAccumulator`. One that several processes
                hold together, as of a jitted step over all of them, is to be drained on each of
                them, and counts once.

        Raises:
            ValueError: one of its metrics has another aggregation type here, or a name that
                another claims, or it cannot be read; then nothing has changed.
            TypeError: it is no accumulator.
        """
        refuse_while_traced("drain")
        if not isinstance(getattr(accumulator, "layout", None), Layout):
            raise TypeError(
                "drain() takes an accumulator, such as a metricfold.jax.DeviceAccumulator, not "
                f"{type(accumulator).__name__}"
            )
        with self._lock:
            self._check_usable()
            admission = self._keys.admit_drained(accumulator.layout.keys())
            drained, empty = Drained(accumulator), accumulator.empty()
            self._keys.commit_drained(admission)
            if not self._clock.running:
                self._clock.start(time.perf_counter())
            if self._dead is None:
                self._inbox.take_accumulator(drained)
        return empty

    def mark(self) -> AggregatorMark:
        """Return a mark to come back to by `rollback`, such as where a step begins.

        It takes the time of what has come in since the mark before, not of what has accumulated, and
        lasts until the next mark or the next call that talks to other ranks.

        >>> aggregator = MetricsAggregator()
        >>> for loss in (1.0, float("nan"), 3.0):
        ...     mark = aggregator.mark()
        ...     aggregator.record("loss", loss)
        ...     if loss != loss:
        ...         aggregator.rollback(mark)
        >>> aggregator.get_metrics_for_logging("train")
        {'train/loss': 2.0}
        """
        refuse_while_traced("mark")
        with self._lock:
            self._check_usable()
            self._inbox.mark()
            self._custom.mark()
            self._late_custom_marked = len(self._late_custom)
            self._mark = AggregatorMark(self.name, self._keys, self._cuts)
            return self._mark

    def rollback(self, mark: AggregatorMark) -> None:
        """Drop just what has come in since `mark`, as if it had never been; the mark stays good.

        What an accumulator on the device held is dropped if it has been drained since; roll back
        one that has not by its own `rollback`. The time that has passed, and times that a `timer`
        took, are not taken back.

        Args:
            mark: the newest that `mark` returned.

        Raises:
            ValueError: the mark is of another aggregator, is not the newest, or what came after it
                has been reduced, saved or replaced. Then nothing has changed.
            TypeError: it is no mark.
        """
        refuse_while_traced("rollback")
        if not isinstance(mark, AggregatorMark):
            raise TypeError(f"rollback() takes what mark() returned, not {type(mark).__name__}")
        with self._lock:
            self._check_usable()
            if mark.keys is not self._keys:
                raise ValueError(
                    f"this mark is of aggregator {mark.name!r}, not of {self.name!r}: give each "
                    "back to its own"
                )
            if mark.cuts != self._cuts:
                raise ValueError(
                    "what came in after this mark has been reduced, saved or replaced already: call "
                    "mark() anew after a log, state_dict(), load_state_dict() or reset()"
                )
            if mark is not self._mark:
                raise ValueError(
                    "a newer mark has been made since this one, and only the newest can be rolled "
                    "back to: call mark() once, where a step begins"
                )
            self._inbox.rollback()
            self._custom.rollback(self._keys.of_key)
            del self._late_custom[self._late_custom_marked :]

    def _cut_off(self) -> None:
        """Let go of the mark: what came after it is on its way."""
        self._mark = None
        self._cuts += 1
        self._custom.unmark()

    def _pass_over(self, metrics: Iterable[Metric | Column]) -> None:
        """Leave out what a repeated forward gives; what its first has not given is lost, so say so."""
        lost = set()
        for one in metrics:
            if isinstance(one, Column):
                key, counts = one.key, not one.weightless
            else:
                key, counts = one[:2], not (isinstance(one.weight, Real) and one.weight == 0)
            if counts and key not in self._keys.of_key:
                lost.add(show(key))
        lost -= self._warned
        if lost:
            self._warned |= lost
            _log.warning("%s", not_given_before(sorted(lost)))

    def _take_first(self, key: Key, agg_type: TypeLike, value: Any, weight: Any) -> bool:
        """Take in the first value of a key, if it is such that later ones go the fast way."""
        with self._lock:
            self._check_usable()
            handler = self._keys.handler_of(key, agg_type)
            take_in = self._inbox.first(key, agg_type, handler, value, weight)
            if take_in is None or self._dead is not None:
                return False
            self._keys.commit(self._keys.admit_keys([(key, agg_type)]))
            if not self._clock.running:
                self._clock.start(time.perf_counter())
            take_in()
            return True

    def _take(self, columns: Sequence[Column]) -> None:
        with self._lock:
            self._check_usable()
            admission = self._keys.admit(columns)
            if admission.custom:
                self._take_custom(admission)
            else:
                self._commit(admission)
            self._inbox.relieve()

    def _commit(self, admission: Admission) -> None:
        """Take over new keys, and then what has come of those with lanes."""
        if admission.new:
            self._keys.commit(admission)
        if (admission.lanes or admission.custom) and not self._clock.running:
            self._clock.start(time.perf_counter())
        if self._dead is None:  # else nothing can reduce it any more: do not pile it up
            self._inbox.take(admission.lanes)

    def _take_custom(self, admission: Admission) -> None:
        late_keys = {late.key for late in self._late_custom}
        now, late = [], []
        for column, handler in admission.custom:
            new = admission.new.get(column.key)
            agg_type = self._keys.type_of(column.key) if new is None else new[0]
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

        before = self._late_custom

        def commit() -> None:
            self._late_custom = before + late if late else before
            try:
                self._commit(admission)
            except BaseException:
                self._late_custom = before
                raise

        self._custom.update(now, commit)
        # With a mark, what came before and after it has to stay apart. Nothing may wait here.
        many = len(self._late_custom) >= MOST_LATE and self._mark is None
        if many and all(map(Late.ready, self._late_custom)):
            if not self._said_late:
                self._said_late = True
                _log.warning("%s", never_read(self._late_custom))
            self._late_errors = self._read_late_custom()

    def register_handler(self, agg_type: TypeLike, handler: AggregationHandler) -> None:
        """Let `handler` combine the metrics of `agg_type`.

        Do so on every rank. Metrics that another handler has begun keep it; a warning says so.

        Raises:
            TypeError: `handler` is not an `AggregationHandler`.
        """
        with self._lock:
            self._keys.register(agg_type, handler)

    def derive(self, name: str, fn: Derived, window: str | None = None) -> None:
        """Report a metric that is computed from others after the reduction.

        Args:
            name: what it prints as.
            fn: takes one dataset's metrics by name, such as ``m["loss"]`` or
                ``m["seq_len_stat_p50"]``, and returns a number. It is called for each dataset,
                and for datasets together; a dataset that lacks a metric it asks for is passed over.
                If it raises, that is warned about once and the others are not affected.
            window: ``"interval"`` or ``"run"``: all that `fn` is given speaks about that, whatever
                the log shows. It is what a ratio of two SUMs needs: in a log, these are totals of
                the run. None: `fn` is given what the log shows.

        Raises:
            ValueError: another metric prints that name, or another window.

        >>> aggregator = MetricsAggregator()
        >>> aggregator.derive("success_rate", lambda m: m["passed"] / m["tried"], window="interval")
        >>> aggregator.record("passed", 3, "sum")
        >>> aggregator.record("tried", 4, "sum")
        >>> aggregator.reduce().as_dict("train", window="auto")
        {'train/passed': 3.0, 'train/tried': 4.0, 'train/success_rate': 0.75}
        """
        if callable(name) and isinstance(fn, str):
            raise TypeError(
                f"derive() takes the name first, and then the function: write derive({fn!r}, function)"
            )
        check_name("the name of a derived metric", name)
        if not callable(fn):
            raise TypeError(f"derive({name!r}, ...) takes a function, not {fn!r}")
        metric = DerivedMetric(fn, check_derived_window(name, window))
        with self._lock:
            self._keys.derive(name, metric)

    # -- Results

    def reduce(self, step: int | None = None) -> Snapshot:
        """Reduce over all ranks and close the interval; every rank calls it.

        Args:
            step: the caller's step; if the ranks give different ones, all raise.

        Raises:
            MissingRanksError: a rank did not come within the timeout. The aggregator cannot talk
                to other ranks any more; make a new one and load the last state.
            RuntimeError: the ranks disagree about the call, step or state, or one has failed;
                raised on all alike, and nothing is lost.
            ValueError: ranks hold one key with different types; raised on all, once.
        """
        return self._reduced(Kind.REDUCE, step)

    def reduce_async(
        self, step: int | None = None, *, sink_failed: bool = False
    ) -> Future[Snapshot]:
        """Begin a reduction, which goes on in the background; every rank calls it.

        What has accumulated is cut off here, on the caller's thread; what comes in later belongs
        to the next reduction. A second call waits for the first. The future raises what `reduce`
        would. Over JAX processes it is done when the call returns.

        Args:
            step: as in `reduce`.
            sink_failed: what `Snapshot.sink_failed` is to be on all ranks; a `MetricsLogger`'s.
        """
        refuse_while_traced("reduce_async")
        with self._calls:
            self._drain()
            begun = _Begun()
            try:
                if self._begin(begun, Kind.REDUCE, step, sink_failed=sink_failed).any_thread:
                    if self._worker is None:
                        self._worker = Worker(f"metricfold-{self.name}")
                    self._in_flight = Future()
                    self._worker.submit(lambda: self._finish_there(begun), self._in_flight)
                    return self._in_flight
                return _done(lambda: self._finish_there(begun))
            except BaseException as error:
                # The worker may have it already, and then goes on with it.
                if begun.claim():
                    self._in_flight = None
                    self._undo(begun, error)
                raise

    def get_metrics_for_logging(
        self, prefix: str = "data", window: WindowLike = "run"
    ) -> dict[str, float]:
        """Reduce, and return every metric's value; every rank calls it.

        Args:
            prefix: keys are ``{prefix}_{dataset}/{name}``.
            window: as in `Snapshot.as_dict`: ``"run"``, ``"interval"``, ``"auto"``, or a dict.

        Raises:
            ValueError: an empty prefix or an unknown window; else as `reduce`.
        """
        check_prefix(prefix)
        check_window(window)
        return self.reduce().as_dict(prefix, window)

    # -- Checkpoints

    def state_dict(self, sync: bool = True) -> dict[str, Any]:
        """Return the state of the whole run, valid on any number of ranks.

        Args:
            sync: fold in what is pending on all ranks; every rank calls it, and gets the same.
                False: do not talk to other ranks, and return the state as of the last reduction,
                for exception paths and for savers that run on one rank.

        Returns:
            ``{"format": str, "version": int, "payload": str}``. The open interval stays open: the
            next log speaks about what came in before the save too.
        """
        if not sync:
            return encode(self._saved())
        with self._calls:
            self._reduced(Kind.STATE_DICT, None)
            return encode(self._saved())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state; call it on every rank with the same state.

        What has not been reduced yet is discarded. The ranks may be more or fewer than those that
        saved.

        Raises:
            ValueError: the state is foreign, newer, truncated or damaged, or holds a metric whose
                handler is not registered; then nothing has changed.
        """
        saved = decode(state_dict)
        with self._calls:
            self._drain()
            with self._lock:
                if not isinstance(self._dead, _HalfwayError):
                    self._check_usable()
                custom = [
                    ((state["dataset"], state["name"]), state["type"])
                    for states in saved.custom.values()
                    for state in states
                ]
                entries = saved.run.schema.entries.values()
                admission = self._keys.check_saved(entries, custom)
                states = self._revived(saved, admission)
                self._begin_anew()
                self._keys.commit_saved(entries, admission)
                self._start_from(saved, states)

    def reset(self) -> None:
        """Forget every value; call it on every rank. Keys keep their aggregation types."""
        refuse_while_traced("reset")
        with self._calls:
            self._drain()
            with self._lock:
                self._start_from(None, {})

    def close(self) -> None:
        """Finish what is under way and give the connection back; the aggregator ends here."""
        with self._calls:
            self._drain()
            self._worker = None
            if self._communicator is not None and self._own_communicator:
                self._communicator.close()
            self._dead = self._dead or RuntimeError(
                f"aggregator {self.name!r} is closed: make a new one"
            )

    def waits_for(self) -> tuple[int, ...]:
        """Return the ranks that a reduction under way waits for, as far as they can be told.

        They are ranks of the whole job. It asks the job's store, but no other rank; a reduction that
        has waited for less than a second may wait for fewer.
        """
        return () if self._communicator is None else self._communicator.waits_for()

    def has_failed(self) -> bool:
        """Return whether the reduction under way has failed, and only looks for who was missing."""
        return self._communicator is not None and self._communicator.failed

    @property
    def collectives(self) -> int:
        """How many collectives this aggregator has issued so far."""
        current = 0 if self._communicator is None else self._communicator.collectives
        return self._past_collectives + current

    @property
    def schema_rounds(self) -> int:
        """How many reductions had to agree on new keys first; each costs two or three more collectives."""
        return self._reducer.schema_rounds

    # -- Inside: one reduction

    def _reduced(self, kind: Kind, step: int | None) -> Snapshot:
        """Reduce on the caller's thread."""
        refuse_while_traced(kind.name.lower())
        with self._calls:
            self._drain()
            begun = _Begun()
            try:
                self._begin(begun, kind, step)
                return self._finish(begun)
            except BaseException as error:
                self._undo(begun, error)
                raise

    def _begin(
        self, begun: _Begun, kind: Kind, step: int | None, *, sink_failed: bool = False
    ) -> Communicator:
        """Cut off what has accumulated, on the caller's thread."""
        with self._lock:
            self._check_usable()
            if self._dead is not None:
                raise self._dead.with_traceback(None)
            begun.communicator = communicator = self._connect()
            self._claim_share(communicator)
            shown = self._clock.now()
            times, untimed = self._stop_watches(communicator.world_size, shown)
            self._cut_off()
            cut = self._inbox.cut(times, begun)
            self._clock.cut(shown, begun)
            # From here on the others are on their way: join them whatever happens, and say so there.
            number, wrong = _checked_step(step)
            error = wrong or untimed or self._read_late_custom() or self._keys.trouble()
            custom = b""
            if self._custom and not error:
                try:
                    custom = self._custom.results(self._keys.of_key, self._keys.by_label())
                except Exception as failure:  # noqa: BLE001 - the user's; raised on all ranks
                    error = f"a custom handler failed to finalise: {str(failure) or repr(failure)}"
            if kind is Kind.REDUCE and not error:
                self._custom.close_interval(begun)
            begun.mine = Contribution(
                kind,
                cut.states,
                begun.seconds,
                custom,
                tuple(self._custom.keys()),
                number,
                error,
                sink_failed,
            )
            return communicator

    def _finish(self, begun: _Begun) -> Snapshot:
        """Take part in the reduction."""
        mine, cut, communicator = begun.mine, begun.cut, begun.communicator
        assert mine is not None
        assert cut is not None
        assert communicator is not None
        with quiet():
            mine.error = "; ".join(filter(None, (mine.error, *self._settled(cut))))
            registry = KeyRegistry(self._keys, self._lock, self._forget)
            with communicator.interrupts_deferred():
                reduced = self._reducer.reduce(communicator, mine, registry)
                with self._lock:
                    self._last = (reduced, mine.kind)
                    self._loaded = None
        with self._lock:
            handlers = Handlers(
                dict(self._keys.of_key),
                self._keys.by_label(),
                dict(self._keys.derived),
                self._warned,
            )
        return Snapshot(reduced, handlers)

    def _finish_there(self, begun: _Begun) -> Snapshot:
        """Take part in the reduction, on the worker's thread."""
        if not begun.claim():
            raise RuntimeError("what was cut off for this reduction has been put back")
        try:
            return self._finish(begun)
        except BaseException as error:
            self._undo(begun, error)
            raise

    def _undo(self, begun: _Begun, error: BaseException) -> None:
        """Put back what a reduction has cut off, unless other ranks may have merged it.

        An exchange that this rank has begun and not finished has put it out of step: what it sent
        next would be of another size than what the others expect, which aborts processes.
        """
        outcome = Outcome.PENDING if begun.mine is None else begun.mine.outcome
        if outcome is Outcome.MERGED:
            return
        if outcome is Outcome.OPEN:
            if isinstance(error, MissingRanksError):
                self._dead = error
                return
            assert begun.communicator is not None
            why = f"{type(error).__name__}: {error}".rstrip(": ")
            self._dead = MissingRanksError(
                f"aggregator {self.name!r}: this rank left a reduction in the middle ({why}), and the "
                "others may have finished it. This aggregator cannot talk to other ranks any more: "
                "make a new one on all ranks and load the last state"
            )
            begun.communicator.abandon(why)
            return
        with self._lock:
            if begun.cut is not None:
                self._inbox.restore(begun.cut)
                self._clock.restore(begun.seconds)
                self._custom.reopen_interval(begun.closed)

    def _settled(self, cut: CutDelta) -> list[str]:
        """Wait for values on devices; returns what went wrong, for all ranks to hear."""
        try:
            cut.settle(self._keys.of_key)
        except Exception as failure:  # noqa: BLE001 - such as an error of the device
            cut.errors.append(f"values could not be read from their device: {failure!r}")
        return cut.errors

    def _forget(self, key: Key) -> int:
        """Drop what has accumulated of `key`; returns how many values that were."""
        self._custom.drop(key)
        # Whoever uses such a timer again is told, as anyone who records such a metric is.
        self._timers = {
            name: elapsed
            for name, elapsed in self._timers.items()
            if key[0] or key[1] not in TimerKeys.of(name).names()
        }
        marked = self._late_custom[: self._late_custom_marked]
        self._late_custom_marked -= sum(late.key == key for late in marked)
        self._late_custom = [late for late in self._late_custom if late.key != key]
        return self._inbox.drop(key)

    def _drain(self) -> None:
        """Wait for a reduction under way; what it raises is its future's to tell."""
        if self._in_flight is not None:
            self._in_flight.exception()
            self._in_flight = None

    def _connect(self) -> Communicator:
        """Return what connects the ranks now; a replaced process group is bound anew."""
        before = self._communicator
        if before is None or (self._own_communicator and not before.current()):
            generation = 0 if before is None else self._generation + 1
            name = f"{self.name}/{self._namesake}" if self._namesake else self.name
            now = connect(name, self._process_group, self._timeout, generation)
            if before is not None:
                if before.world_size > 1 and isinstance(now, LocalCommunicator):
                    raise RuntimeError(
                        f"the process group of aggregator {self.name!r} is gone, and with it the "
                        "other ranks' share: reduce before destroy_process_group() or "
                        "jax.distributed.shutdown(). "
                        "state_dict(sync=False) has the state as of the last reduction"
                    )
                self._past_collectives += before.collectives
                before.close()
                self._reducer.rebind()
            self._communicator, self._generation = now, generation
            return now
        return before

    def _read_late_custom(self) -> str:
        """Hand over values that lay on a device to handlers without lanes; returns an error."""
        errors = [self._late_errors] if self._late_errors else []
        self._late_errors = ""
        arrived = InTransit(self._late_custom).arrive(errors)
        self._late_custom = [
            Late(one.key, one.agg_type, value, weight) for one, value, weight in arrived
        ]

        def commit() -> None:
            del self._late_custom[0]

        while self._late_custom:
            one = self._late_custom[0]
            pairs = [(one.value, one.weight)]
            if isinstance(one.value, np.ndarray):
                pairs = list(zip(listed(one.value), listed(one.weight), strict=True))
            agg_type = self._keys.type_of(one.key)
            metrics = [Metric(*one.key, each, agg_type, own) for each, own in pairs]
            try:
                self._custom.update([(one.key, self._keys.of_key[one.key], metrics)], commit)
            except Exception as failure:  # noqa: BLE001 - the user's; raised on all ranks
                errors.append(f"{show(one.key)}: the handler failed: {failure!r}")
                commit()
        return "; ".join(dict.fromkeys(errors))

    # -- Inside: state

    def _saved(self) -> Saved:
        """Return the state as of the last reduction."""
        with self._lock:
            if isinstance(self._dead, _HalfwayError):
                raise self._dead.with_traceback(None)
            loaded, last = self._loaded, self._last
        if loaded is not None:
            return loaded
        if last is None:
            empty = Totals.empty(Schema())
            return Saved(empty, empty, {}, {"run": [], "interval": []})
        reduced, kind = last
        return Saved.of(reduced, interval_open=kind is Kind.STATE_DICT)

    def _revived(self, saved: Saved, admission: Admission) -> dict[str, list[MetricState]]:
        """Return the states of custom handlers; raises ValueError if one cannot be restored."""
        revived: dict[str, list[MetricState]] = {}
        for view, states in saved.custom.items():
            revived[view] = []
            for state in states:
                key = (state["dataset"], state["name"])
                handler = self._keys.of_key.get(key) or admission.new[key][1]
                try:
                    revived[view].append(
                        restored(state, handler, self._keys.type_of_label(state["type"]))
                    )
                except Exception as failure:
                    raise ValueError(
                        f"the state of {show(key)} cannot be restored by "
                        f"{name_of(handler)}.deserialize_metadata: {failure!r}"
                    ) from failure
        new = {key: handler for key, (_, handler) in admission.new.items()}
        self._try_out(revived, {**self._keys.of_key, **new}, saved)
        return revived

    def _try_out(
        self,
        revived: Mapping[str, Sequence[MetricState]],
        handlers: Mapping[Key, AggregationHandler],
        saved: Saved,
    ) -> None:
        """Raise ValueError for states that later calls would fail on: finalise and save them once."""
        for totals in (saved.run, saved.interval):
            for key, state in totals.states():
                handler = handlers[key]
                try:
                    handler.laned().finalize(state)
                except Exception as failure:
                    raise ValueError(
                        f"the state of {show(key)} is none that {name_of(handler)} can finalise: "
                        f"{failure!r}. Load an earlier checkpoint"
                    ) from failure
        if not any(revived.values()):
            return
        states = CustomStates()
        for view, some in revived.items():
            states.inherit(view, some)
        try:
            results = CustomResults([states.results(handlers, self._keys.by_label())])
            if results.unsaved:
                raise TypeError(results.unsaved)  # noqa: TRY301 - as the others
            for view, totals in (("run", saved.run), ("interval", saved.interval)):
                for result in results.of(view):
                    result.finalised(self._keys.by_label().get(result.label), totals.seconds)
        except Exception as failure:
            raise ValueError(
                f"the states of custom handlers cannot go on from what was saved: {failure!r}. Load an "
                "earlier checkpoint, or register the handlers that saved it"
            ) from failure

    def _start_from(self, saved: Saved | None, custom: dict[str, list[MetricState]]) -> None:
        """Replace everything that has accumulated; what the ranks have agreed on stays."""
        self._begin_anew()
        self._inbox = Inbox(self._keys)
        self._custom = CustomStates()
        self._clock.restart()
        for elapsed in self._timers.values():
            elapsed.take(self._clock.now(), -1)
        self._cut_off()
        self._late_custom = []
        self._last = None
        self._loaded = saved
        self._unclaimed = None if saved is None else _Unclaimed(saved.windows, custom)
        empty = Totals.empty(Schema())
        run, interval = (empty, empty) if saved is None else (saved.run, saved.interval)
        self._reducer.replace_totals(run, interval, 0 if saved is None else saved.reductions)
        assert isinstance(self._dead, _HalfwayError)
        self._dead = self._dead.before

    def _begin_anew(self) -> None:
        """Refuse everything, should an interrupt come until all has been replaced."""
        if not isinstance(self._dead, _HalfwayError):
            self._dead = _HalfwayError(self.name, self._dead)

    def _claim_share(self, communicator: Communicator) -> None:
        """Take this rank's share of loaded windows and custom states, now that ranks are known."""
        saved, self._unclaimed = self._unclaimed, None
        if saved is None:
            return
        rank, world_size = communicator.rank, communicator.world_size
        for key, windows in saved.windows.items():
            limit = self._keys.of_key[key].laned().sample_limit
            self._reducer.windows[key] = share(windows, rank, world_size, limit)
        for view, states in saved.custom.items():
            self._custom.inherit(view, states[rank::world_size])

    # -- Inside: processes

    def leave_parent_behind(self) -> None:
        """In a forked child: new locks, for ours may be held by a thread that is not here."""
        self._renew_locks()
        self._clock.leave_parent_behind()
        for elapsed in self._timers.values():
            elapsed.leave_parent_behind()
        self._timers = {}
        self._inbox = Inbox(self._keys)
        self._in_flight = self._worker = None
        if self._communicator is not None:
            _leaked.append(self._communicator)

    def _renew_locks(self) -> None:
        self._lock = threading.RLock()
        self._calls = threading.RLock()

    def _check_usable(self) -> None:
        if self._process != os.getpid():
            raise RuntimeError(
                f"aggregator {self.name!r} was inherited by a forked process, where its values "
                "would be lost: in data workers emit metrics with a MetricTransform and "
                "MetricsCollator, and update in the training process"
            )
        if self._dead is not None and not isinstance(self._dead, MissingRanksError):
            raise self._dead.with_traceback(None)

    def __reduce__(self) -> NoReturn:
        found = where_found(self)
        raise TypeError(
            "a MetricsAggregator cannot be pickled or copied: it is bound to its process. "
            + (f"This one is {found}: keep it out of what is copied or sent. " if found else "")
            + "Save its state_dict() instead"
        )


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


class _HalfwayError(RuntimeError):
    """One state has not quite taken the place of another.

    Args:
        name: of the aggregator.
        before: what made it unusable before that.
    """

    def __init__(self, name: str, before: Exception | None) -> None:
        super().__init__(
            f"aggregator {name!r} holds parts of two states, for load_state_dict() or reset() was "
            "interrupted: call it again"
        )
        self.before = before


class _Unclaimed(NamedTuple):
    """What a checkpoint held that is shared out once the ranks are known."""

    windows: Mapping[Key, Sequence[Window]]
    custom: Mapping[str, Sequence[MetricState]]


class _Begun:
    """A reduction, from the moment on in which what has accumulated is cut off.

    Each part stands here as soon as there is one, so that an interrupt between two lines loses none.
    """

    __slots__ = ("_owner", "closed", "communicator", "cut", "mine", "seconds")

    def __init__(self) -> None:
        self.communicator: Communicator | None = None
        self.cut: CutDelta | None = None
        self.seconds = 0.0
        self.closed: Mapping[Key, list[MetricState]] = {}
        self.mine: Contribution | None = None
        self._owner = threading.Lock()

    def claim(self) -> bool:
        """Return whether the caller is the first: only one of two threads may go on with it."""
        return self._owner.acquire(blocking=False)


def _done(task: Callable[[], Snapshot]) -> Future[Snapshot]:
    """Return the finished future of `task`, run here and now."""
    future: Future[Snapshot] = Future()
    try:
        future.set_result(task())
    except Exception as error:  # noqa: BLE001 - the future's reader gets it
        future.set_exception(error)
    return future


def _checked_step(step: object) -> tuple[int | None, str]:
    """Return the step, and what is wrong with it."""
    if step is None:
        return None, ""
    number = -1
    if isinstance(step, SupportsIndex) and not isinstance(step, bool):
        # An array has this method too, and may refuse.
        with contextlib.suppress(Exception):
            number = operator.index(step)
    if 0 <= number < _LARGEST_STEP:
        return number, ""
    return None, f"step={step!r:.80}: give the training step as an int, 0 or more"


def _check_timeout(timeout: float | timedelta | None) -> timedelta | None:
    if timeout is None:
        return None
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise TypeError(f"timeout={timeout!r}: give a number of seconds, or a timedelta")
    if not 0 < seconds <= _LONGEST_TIMEOUT:
        raise ValueError(
            f"timeout={timeout!r}: give a number of seconds above 0 and up to {_LONGEST_TIMEOUT:g}"
        )
    return timedelta(seconds=seconds)
