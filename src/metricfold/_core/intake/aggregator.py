"""`MetricsAggregator`: takes metrics in, folds them over ranks, and gives results and checkpoints.

    aggregator = MetricsAggregator()
    aggregator.update(batch.pop("metrics"))                # per-sample metrics, any dataset
    aggregator.record("loss", loss, weight=num_tokens)     # a step's metric; nothing waits
    snapshot = aggregator.reduce()                         # every rank calls it
    state = aggregator.state_dict()                        # every rank calls it; anyone may save it

What comes in piles up in an `Inbox`; a reduction cuts it off and, if it fails, puts it back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from datetime import timedelta
from itertools import chain
from typing import Any, NoReturn, overload

from metricfold._core.device.arrays import unwrapped
from metricfold._core.device.rows import Accumulator, AnyAccumulator, Drained
from metricfold._core.exchange.link import Link
from metricfold._core.fold import hints
from metricfold._core.fold.axes import Block, axes_of, block_of
from metricfold._core.fold.batch import MetricBatch, say_replaced
from metricfold._core.fold.builtin import built_in_handlers
from metricfold._core.fold.columns import (
    Column,
    fold_block,
    fold_each,
    fold_metrics,
    fold_together,
    fold_value,
)
from metricfold._core.fold.elements import element_handlers
from metricfold._core.fold.handlers import AggregationHandler
from metricfold._core.fold.names import Key, check_prefix, show
from metricfold._core.fold.state import quiet
from metricfold._core.fold.values import is_many
from metricfold._core.intake.checkpoint import Restored, decode, encode
from metricfold._core.intake.clock import Pause
from metricfold._core.intake.held import AggregatorMark, Held, Run
from metricfold._core.intake.keys import KeyTable
from metricfold._core.intake.reduction import Reduction
from metricfold._core.intake.timers import Timer
from metricfold._core.reduce.header import Kind, check_route
from metricfold._core.runtime.copies import where_found
from metricfold._core.runtime.listing import internal
from metricfold._core.runtime.processes import watch_forks
from metricfold._core.runtime.recomputation import recomputed
from metricfold._core.runtime.staging import refuse_while_traced
from metricfold._core.runtime.uncompiled import leave_alone, uncompiled
from metricfold._core.view.cells import By, check_by
from metricfold._core.view.derived import Derived, DerivedMetric, check_derived_window
from metricfold._core.view.rules import Rule
from metricfold._core.view.snapshot import Snapshot
from metricfold._core.view.windows import WindowLike, check_window
from metricfold.communicator import Communicator
from metricfold.data.sample import guard_default_collate
from metricfold.metric import Metric, TypeLike, check_name, resolve_type

__all__ = ["AggregatorMark", "MetricsAggregator"]

_LONGEST_TIMEOUT = 1e8  # three years, in seconds; what comes after overflows in torch


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
        route: ``"gather"``: everyone's vectors are gathered. ``"tree"``: they are merged pairwise on
            the way, so that what a rank sends and receives hardly grows with their number.
            ``"auto"``: the tree where a gather would move more than 4 MiB in all.
        by: which axes of metrics remain in what is logged, as in `Snapshot.as_dict`, such as
            ``{"expert_tokens": "layer"}``.
        spread: let each MEAN report ``{name}_weight``, the sum of its weights, and ``{name}_stderr``, the
            standard error of the mean as if its values had been drawn at random, once there are two. It
            is about the values that came one by one: what a device or a data worker has folded is in the
            mean alone, and so is what a checkpoint without it brings.
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
        by: By = (),
        spread: bool = False,
        communicator: Communicator | None = None,
    ) -> None:
        guard_default_collate()
        built_in = built_in_handlers(
            dist_window_size, percentiles, on_nan, max_categories, on_bad_name, spread=spread
        )
        keys = KeyTable({**built_in, **element_handlers(on_nan)})
        if name is not None:
            check_name("the aggregator's name", name)
        self._held = Held(keys, Run(check_route(route)), check_by(by))
        self._link = Link(name, process_group, _check_timeout(timeout), communicator)
        watch_forks(self)
        leave_alone()

    def __repr__(self) -> str:
        parts = [f"name={self.name!r}"]
        communicator = self._link.communicator
        if communicator is not None:
            parts.append(f"rank={communicator.rank}, world_size={communicator.world_size}")
        held = self._held
        parts.append(f"keys={len(held.keys.records)}, seconds={held.clock.interval:.4g}")
        if self._link.dead is not None:
            parts.append("out of use")
        return f"MetricsAggregator({', '.join(parts)})"

    @property
    def name(self) -> str:
        """What pairs it with its counterparts on the other ranks."""
        return self._link.name

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
            self._held.pass_over(metrics.columns if isinstance(metrics, MetricBatch) else metrics)
            return
        held = self._held
        with held.lock:
            if self._link.dead is None and held.inbox.update(metrics):
                return
        if isinstance(metrics, MetricBatch):
            if metrics.replaced:
                say_replaced(metrics, held.keys.handler_of)
            columns = held.keys.columns_of(metrics)
        elif isinstance(metrics, list | tuple) and not isinstance(metrics, Metric):
            with quiet():
                columns = fold_metrics(metrics, held.keys.handler_of, in_worker=False)
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
        axes: Mapping[str, int | Sequence[str]] | None = None,
        ids: Mapping[str, Any] | None = None,
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
                such as of a step's time; otherwise it does where vectors are gathered (`route`).
            axes: names and sizes of a metric that has many cells, such as ``{"layer": 24, "expert":
                64}``: `value` is then an array of that shape, and each cell has a value of its own. In
                the place of a size may be a list of labels, which need not be those of other ranks.
                The metric prints what all cells come to; `Snapshot.array` returns the cells.
            ids: which cells `value` holds, if not all: ``{"layer": range(12, 24)}``, or one number or
                label, which takes no dimension of `value`.

        Raises:
            ValueError, TypeError: as `update`; then nothing has changed.

        >>> import numpy as np
        >>> aggregator = MetricsAggregator()
        >>> aggregator.record("len", np.array([[3, 5], [4, 0]]), "max", each=True)
        >>> losses, mask = np.array([2.0, 4.0, 9.0]), np.array([True, True, False])
        >>> aggregator.record("loss", losses, weight=mask)
        >>> aggregator.get_metrics_for_logging("train")
        {'train/len': 5.0, 'train/loss': 3.0}
        >>> aggregator.record("tokens", np.arange(6).reshape(2, 3), "sum", axes={"layer": 2, "expert": 3})
        >>> aggregator.record("tokens", 10, "sum", axes={"layer": 2, "expert": 3}, ids={"layer": 1, "expert": 0})
        >>> aggregator.reduce().as_dict("train")["train/tokens"]
        25.0
        """
        refuse_while_traced("record", name, value, weight)
        if recomputed():
            self._held.pass_over([Metric(dataset or "", name, value, agg, weight)])
            return
        held = self._held
        plain = not (each or per_rank or axes or ids)
        if plain:
            with held.lock:
                if self._link.dead is None and held.inbox.record(name, value, agg, dataset, weight):
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
        if plain:
            with held.lock:
                self._link.check()
                if self._link.dead is None and held.take_first(key, agg_type, value, weight):
                    return
        with quiet():
            if axes or ids:
                column = fold_block(
                    key, agg_type, value, weight, _block(key, axes, ids), held.keys.handler_of
                )
            else:
                fold = fold_each if each or is_many(value, weight) else fold_value
                column = fold(key, agg_type, value, weight, held.keys.handler_of)
        if per_rank and column.state is None and not column.weightless:
            raise ValueError(
                f"{show(key)} has a handler without lanes, so per_rank=True has no effect: leave "
                "it out"
            )
        self._take([column])
        if per_rank and not column.weightless:
            held.keys.records[key].per_rank = True

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
        held = self._held
        if not repeated:
            with held.lock:
                if self._link.dead is None and held.inbox.record_all(metrics, agg, dataset, weight):
                    return
        if not isinstance(metrics, Mapping):
            raise TypeError(
                f"record_all() takes the values by name, as in {{'loss': loss}}, not "
                f"{type(metrics).__name__}{hints.for_metrics(metrics)}"
            )
        if repeated:
            held.pass_over(
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
            columns = fold_together(values, weight, held.keys.handler_of)
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
        timer = self._held.timers.known(name)
        if timer is None:
            check_name("the name of a timer", name)
            with self._held.lock:
                self._link.check()
                timer = self._held.timers.add(name)
        return timer

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
        self._link.check()
        return Pause(self._held.clock)

    @overload
    def drain(self, accumulator: AnyAccumulator, /) -> AnyAccumulator: ...

    @overload
    def drain(
        self, accumulator: AnyAccumulator, another: Accumulator, /, *more: Accumulator
    ) -> tuple[Any, ...]: ...

    def drain(self, *accumulators: Any) -> Any:
        """Take in what an accumulator on the device holds, and return an empty one.

        Nothing waits: the transfer begins here, and the next reduction waits for it. Ranks need not
        drain alike.

        Args:
            accumulators: one, such as a `metricfold.jax.DeviceAccumulator` or a
                `metricfold.torch.ModelWatch`, or several, of which all are taken in or none: whatever says
                its metrics (``layout``), begins a transfer (``start_read``) and empties itself
                (``empty``). One that several processes hold together, as of a jitted step over all of
                them, is to be drained on each of them, and counts once.

        Returns:
            One that is empty, in the place of one, and a tuple of them for several. Those of torch are
            emptied in place.

        Raises:
            ValueError: a metric has another aggregation type here, or a name that another claims, or
                an accumulator cannot be read, or comes twice; then nothing has changed.
            TypeError: one is no accumulator.
        """
        refuse_while_traced("drain")
        if not accumulators:
            raise TypeError("drain() takes an accumulator, or several: give what is to be drained")
        for place, one in enumerate(accumulators):
            if isinstance(one, type) or not isinstance(one, Accumulator):
                raise TypeError(
                    "drain() takes an accumulator, such as a metricfold.jax.DeviceAccumulator, not "
                    f"{type(one).__name__}"
                )
            if any(one is another for another in accumulators[:place]):
                raise ValueError(f"drain() was given {one!r:.200} twice: it would count twice")
        held = self._held
        with held.lock:
            self._link.check()
            admission = held.keys.admit_drained(
                chain.from_iterable(one.layout.keys() for one in accumulators)
            )
            drained = [Drained(one) for one in accumulators]
            empty = tuple(one.empty() for one in accumulators)
            held.keys.commit(admission)
            held.clock.begin()
            if self._link.dead is None:
                held.inbox.take_drained(drained)
        return empty[0] if len(empty) == 1 else empty

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
        with self._held.lock:
            self._link.check()
            return self._held.mark(self.name)

    def rollback(self, mark: AggregatorMark) -> None:
        """Drop just what has come in since `mark`, as if it had never been; the mark stays good.

        What an accumulator on the device held is dropped if it has been drained since; roll back
        one that has not by its own `rollback`. The time that has passed, and times that a `timer`
        took, are not taken back.

        Args:
            mark: the newest that `mark` returned.

        Raises:
            ValueError: the mark is of another aggregator, is not the newest, or what came after it
                has been reduced, saved or replaced, or put back when that failed. Then nothing has
                changed.
            TypeError: it is no mark.
        """
        refuse_while_traced("rollback")
        if not isinstance(mark, AggregatorMark):
            raise TypeError(f"rollback() takes what mark() returned, not {type(mark).__name__}")
        held = self._held
        with held.lock:
            self._link.check()
            if mark.keys is not held.keys:
                raise ValueError(
                    f"this mark is of aggregator {mark.name!r}, not of {self.name!r}: give each "
                    "back to its own"
                )
            if mark.cuts != held.inbox.cuts:
                raise ValueError(
                    "what came in after this mark has been reduced, saved or replaced already, or put "
                    "back when that failed: call mark() anew after a log, state_dict(), "
                    "load_state_dict() or reset()"
                )
            if mark is not held.newest_mark:
                raise ValueError(
                    "a newer mark has been made since this one, and only the newest can be rolled "
                    "back to: call mark() once, where a step begins"
                )
            held.inbox.rollback()

    def _take(self, columns: Sequence[Column]) -> None:
        with self._held.lock:
            self._link.check()
            self._held.take(columns, counts=self._link.dead is None)

    def register_handler(self, agg_type: TypeLike, handler: AggregationHandler) -> None:
        """Let `handler` combine the metrics of `agg_type`.

        Do so on every rank. Metrics that another handler has begun keep it; a warning says so.

        Raises:
            TypeError: `handler` is not an `AggregationHandler`.
        """
        with self._held.lock:
            self._held.keys.register(agg_type, handler)

    def derive(self, name: str, fn: Derived, window: str | None = None) -> None:
        """Report a metric that is computed from others after the reduction.

        Args:
            name: what it prints as.
            fn: takes one dataset's metrics by name, such as ``m["loss"]`` or
                ``m["seq_len_stat_p50"]``, and returns a number. A metric with axes is an array of its
                cells, as `Snapshot.array` returns it. It is called for each dataset,
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
        with self._held.lock:
            self._held.keys.derive(name, metric)

    def alert_on(self, *rules: Rule, local: bool = False) -> None:
        """Look for trouble in what each reduction has merged; call it alike on every rank.

        A rule is given the `Snapshot` of the interval, without derived metrics, and a dict of what it
        remembers, which checkpoints keep. Since it sees the same on every rank, so are its alerts:
        `Snapshot.alerts`, and what `MetricsLogger.log` returns.

        Args:
            rules: such as ``NonFinite("*/loss")``, or functions of (snapshot, memory) that return an
                `Alert`, a text, several of them, or None.
            local: they look at what ranks may see differently, such as a disk. What one finds, its
                rank logs at once; all hear of it in the next reduction, of several findings in several,
                what is severe first. What these remember is in no checkpoint.

        Raises:
            TypeError: one is no rule.
            ValueError: there is that rule already; then none has been added.
        """
        with self._held.lock:
            self._held.rules.add(rules, local=local)

    def _check_call(self, name: str) -> None:
        """Refuse a call that all ranks make where it cannot be."""
        refuse_while_traced(name)
        self._held.rules.refuse_within(name)

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
        self._check_call("reduce")
        return self._link.run(Reduction(self._held, Kind.REDUCE, step))

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
        self._check_call("reduce_async")
        return self._link.start(Reduction(self._held, Kind.REDUCE, step, sink_failed=sink_failed))

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
        if sync:
            self._check_call("state_dict")
            with self._link.alone():
                self._link.run(Reduction(self._held, Kind.STATE_DICT, None))
                return self._saved()
        return self._saved()

    def _saved(self) -> dict[str, Any]:
        """Return the state as of the last reduction."""
        self._link.check_whole()
        rules = self._held.rules
        with rules.lock:
            return encode(replace(self._held.run.saved(), rules=rules.saved()))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state; call it on every rank with the same state.

        What has not been reduced yet is discarded. The ranks may be more or fewer than those that
        saved.

        Raises:
            ValueError: the state is foreign, newer, truncated or damaged, or holds a metric whose
                handler is not registered; then nothing has changed.
        """
        self._held.rules.refuse_within("load_state_dict")
        saved = decode(state_dict)
        with self._link.alone(), self._held.lock:
            self._link.check_replaceable()
            restored = Restored.of(saved, self._held.keys)
            with self._link.replacing():
                self._held.begin_anew(restored)

    def reset(self) -> None:
        """Forget every value; call it on every rank. Keys keep their aggregation types."""
        self._check_call("reset")
        with self._link.alone(), self._held.lock, self._link.replacing():
            self._held.begin_anew(None)

    def close(self) -> None:
        """Finish what is under way and give the connection back; the aggregator ends here."""
        self._link.close()

    def waits_for(self) -> tuple[int, ...]:
        """Return the ranks that a reduction under way waits for, as far as they can be told.

        They are ranks of the whole job. It asks the job's store, but no other rank; a reduction that
        has waited for less than a second may wait for fewer.
        """
        return self._link.waits_for()

    def has_failed(self) -> bool:
        """Return whether the reduction under way has failed, and only looks for who was missing."""
        return self._link.has_failed()

    @property
    def collectives(self) -> int:
        """How many collectives this aggregator has issued so far."""
        return self._link.collectives

    @property
    def schema_rounds(self) -> int:
        """How many reductions had to agree on new keys first; each costs two or three more collectives."""
        return self._held.run.reducer.schema_rounds

    # -- Processes

    def leave_parent_behind(self) -> None:
        """In a forked child: new locks, for ours may be held by a thread that is not here."""
        self._link.leave_parent_behind()
        self._held.leave_parent_behind()

    def __reduce__(self) -> NoReturn:
        found = where_found(self)
        raise TypeError(
            "a MetricsAggregator cannot be pickled or copied: it is bound to its process. "
            + (f"This one is {found}: keep it out of what is copied or sent. " if found else "")
            + "Make one in each process, such as in the function that a worker runs, and save or send its "
            "state_dict()"
        )


def _block(
    key: Key, axes: Mapping[str, int | Sequence[str]] | None, ids: Mapping[str, Any] | None
) -> Block:
    """Return the cells that a value is of; errors name the metric."""
    try:
        declared = axes_of(axes or {})
        labelled = {axis.name: (axes or {})[axis.name] for axis in declared if not axis.size}
        return block_of(declared, {**labelled, **(ids or {})})
    except (TypeError, ValueError) as error:
        raise type(error)(f"{show(key)}: {error}") from None


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
