"""`MetricsAggregator`: takes metrics in, folds them over ranks, and gives results and checkpoints.

aggregator = MetricsAggregator()
aggregator.update(batch.pop("metrics"))                # per-sample metrics, any dataset
aggregator.record("loss", loss, weight=num_tokens)     # a step's metric; nothing waits
snapshot = aggregator.reduce()                         # every rank calls it
state = aggregator.state_dict()                        # every rank calls it; anyone may save it
"""

from __future__ import annotations

import atexit
import itertools
import os
import queue
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from datetime import timedelta
from typing import Any, NoReturn, TypeAlias

from metricfold.checkpoint import Saved, decode, encode, share
from metricfold.communicator import Communicator, MissingRanksError, connect
from metricfold.custom import CustomStates
from metricfold.data.batch import Column, Late, MetricBatch, fold_metrics, fold_value
from metricfold.delta import CutDelta, Delta, InTransit
from metricfold.handlers import (
    AggregationHandler,
    DistributionAggHandler,
    built_in_handlers,
    check_on_nan,
    quiet,
)
from metricfold.keys import Admission, KeyTable
from metricfold.metric import Metric, TypeLike, check_name, resolve_type
from metricfold.naming import show
from metricfold.packing import Key, Kind, Schema
from metricfold.reduction import Contribution, Reduced, Reducer
from metricfold.snapshot import Derived, Handlers, Snapshot, WindowLike, check_window
from metricfold.totals import Totals

__all__ = ["MetricsAggregator"]

_order_of_creation = itertools.count()
_alive: weakref.WeakSet[MetricsAggregator] = weakref.WeakSet()
_EXIT_WAIT = 2.0
"""How many seconds an exit after an exception waits for a reduction under way."""


class MetricsAggregator:
    """Aggregates metrics over samples, datasets and ranks.

    Args:
        dist_window_size: how many of its most recent values of a DISTRIBUTION each rank keeps.
        name: pairs this aggregator with its counterparts on the other ranks; default: the order
            of creation.
        process_group: the ranks to aggregate over: a `torch.distributed` group, or one dimension
            of a `DeviceMesh`; default: all ranks. The group is bound at the first reduction.
        timeout: seconds (or a `timedelta`) to wait for missing ranks; default: the training
            group's own timeout.
        on_nan: ``"propagate"``: SUM, MEAN, MAX, MIN and RATE report NaN when one came in.
            ``"skip"``: they leave NaN out and report how many as ``{name}_nan_count``.
        percentiles: which percentiles a DISTRIBUTION reports, ascending, each in 0..100.
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
        dist_window_size: int = 1000,
        *,
        name: str | None = None,
        process_group: Any = None,
        timeout: float | timedelta | None = None,
        on_nan: str = "propagate",
        percentiles: Sequence[float] = (5, 50, 95),
        communicator: Communicator | None = None,
    ) -> None:
        self._keys = KeyTable(
            built_in_handlers(dist_window_size, percentiles, check_on_nan(on_nan))
        )
        if name is not None:
            check_name("the aggregator's name", name)
        self._timeout = _check_timeout(timeout)
        self.name = f"{next(_order_of_creation)}" if name is None else name
        self._process_group = process_group
        self._derived: dict[str, Derived] = {}
        self._warned: set[str] = set()
        self._delta = Delta()
        self._custom = CustomStates()
        self._late_custom: list[Late] = []
        self._reducer = Reducer()
        self._last: tuple[Reduced, Kind] | None = None
        self._loaded: Saved | None = None
        self._unclaimed: Saved | None = None
        self._own_communicator = communicator is None
        self._communicator: Communicator | None = communicator
        self._generation = 0
        self._past_collectives = 0
        self._dead: Exception | None = None
        self._worker: _Worker | None = None
        self._in_flight: Future[Snapshot] | None = None
        self._renew_locks()
        _alive.add(self)

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
        if isinstance(metrics, MetricBatch):
            columns = self._keys.columns_of(metrics)
        elif isinstance(metrics, list | tuple) and not isinstance(metrics, Metric):
            with quiet():
                columns = fold_metrics(metrics, self._keys.handler_of, wait=False)
        else:
            raise TypeError(
                f"update() takes a list of Metric or a MetricBatch, not {type(metrics).__name__}"
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
    ) -> None:
        """Take in one metric of a step.

        Args:
            name: the metric's name.
            value: a number or any one-element array; one on a device stays there until the next
                reduction, and no graph or buffer of the caller is kept.
            agg: the aggregation, such as ``"mean"`` or `AggregationType.MAX`.
            dataset: the dataset; without one the metric is logged as ``{prefix}/{name}``.
            weight: how much the value counts in a MEAN or DISTRIBUTION, such as its number of
                tokens; a number or a one-element array.

        Raises:
            ValueError, TypeError: as `update`; then nothing has changed.
        """
        check_name("the name of a metric", name)
        if dataset is not None:
            check_name(f"the dataset of metric {name!r}", dataset)
        agg_type = resolve_type(agg)
        key = (dataset or "", name)
        with quiet():
            self._take([fold_value(key, agg_type, value, weight, self._keys.handler_of)])

    def _take(self, columns: Sequence[Column]) -> None:
        with self._lock:
            self._check_usable()
            admission = self._keys.admit(columns)
            if admission.custom:
                self._take_custom(admission)
            if admission.new:
                self._keys.commit(admission)
            self._delta.add(admission.lanes, self._keys.of_key)

    def _take_custom(self, admission: Admission) -> None:
        late_keys = {late.key for late in self._late_custom}
        now, late = [], []
        for column, handler in admission.custom:
            if column.key in late_keys:
                late += [
                    Late(column.key, column.agg_type, metric.value, metric.weight)
                    for metric in column.metrics
                ]
            else:
                now.append((column.key, handler, column.agg_type, column.metrics))
            late += column.late
        self._custom.update(now)
        self._late_custom += late

    def register_handler(self, agg_type: TypeLike, handler: AggregationHandler) -> None:
        """Let `handler` combine the metrics of `agg_type`.

        Do so on every rank. Metrics that another handler has begun keep it; a warning says so.

        Raises:
            TypeError: `handler` is not an `AggregationHandler`.
        """
        with self._lock:
            self._keys.register(agg_type, handler)

    def derive(self, name: str, fn: Derived) -> None:
        """Report a metric that is computed from others after the reduction.

        Args:
            name: what it prints as.
            fn: takes one dataset's metrics by name, such as ``m["loss"]`` or
                ``m["seq_len_stat_p50"]``, and returns a number. It is called for each dataset,
                and for all together; a dataset that lacks a metric it asks for is passed over. If
                it raises, that is warned about once and the others are not affected.

        Raises:
            ValueError: another metric prints that name.
        """
        check_name("the name of a derived metric", name)
        if not callable(fn):
            raise TypeError(f"derive({name!r}, ...) takes a function, not {fn!r}")
        with self._lock:
            self._keys.derive(name)
            self._derived[name] = fn

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
        with self._calls:
            self._drain()
            return self._finish(self._begin(Kind.REDUCE, step))

    def reduce_async(self, step: int | None = None) -> Future[Snapshot]:
        """Begin a reduction, which goes on in the background; every rank calls it.

        What has accumulated is cut off here, on the caller's thread; what comes in later belongs
        to the next reduction. A second call waits for the first. The future raises what `reduce`
        would.
        """
        with self._calls:
            self._drain()
            begun = self._begin(Kind.REDUCE, step)
            if self._worker is None:
                self._worker = _Worker(f"metricfold-{self.name}")
                weakref.finalize(self, self._worker.stop).atexit = False
            self._in_flight = self._worker.submit(lambda: self._finish(begun))
            return self._in_flight

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
        check_name("the prefix", prefix)
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
            self._drain()
            self._finish(self._begin(Kind.STATE_DICT, None))
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
                self._check_usable()
                custom = [
                    ((state["dataset"], state["name"]), state["type"])
                    for states in saved.custom.values()
                    for state in states
                ]
                admission = self._keys.check_saved(saved.run.schema.entries.values(), custom)
                self._keys.commit(admission)
                self._start_from(saved)

    def reset(self) -> None:
        """Forget every value; call it on every rank. Keys keep their aggregation types."""
        with self._calls:
            self._drain()
            with self._lock:
                self._start_from(None)

    def close(self) -> None:
        """Finish what is under way and give the connection back; the aggregator ends here."""
        with self._calls:
            self._drain()
            if self._worker is not None:
                self._worker.stop()
                self._worker = None
            if self._communicator is not None and self._own_communicator:
                self._communicator.close()
            self._dead = self._dead or RuntimeError(
                f"aggregator {self.name!r} is closed: make a new one"
            )

    @property
    def collectives(self) -> int:
        """How many collectives this aggregator has issued so far."""
        current = 0 if self._communicator is None else self._communicator.collectives
        return self._past_collectives + current

    @property
    def schema_rounds(self) -> int:
        """How many reductions had to agree on new keys first; each costs two more collectives."""
        return self._reducer.schema_rounds

    # -- Inside: one reduction

    def _begin(self, kind: Kind, step: int | None) -> _Begun:
        """Cut off what has accumulated, on the caller's thread."""
        with self._lock:
            self._check_usable()
            if self._dead is not None:
                raise self._dead.with_traceback(None)
            if step is not None and (isinstance(step, bool) or not hasattr(step, "__index__")):
                raise TypeError(f"step={step!r}: give the training step as an int")
            communicator = self._connect()
            self._claim_share(communicator)
            cut = self._delta.cut()
            error = self._read_late_custom() or self._keys.trouble()
            custom = b""
            if self._custom and not error:
                try:
                    custom = self._custom.results(self._keys.of_key)
                except Exception as failure:  # noqa: BLE001 - the user's; raised on all ranks
                    error = f"a custom handler failed to finalise: {failure!r}"
            closed = self._custom.close_interval() if kind is Kind.REDUCE else {}
            mine = Contribution(
                kind,
                cut.states,
                cut.seconds,
                custom,
                tuple(self._custom.keys()),
                None if step is None else int(step),
                error,
            )
            return _Begun(communicator, cut, mine, closed)

    def _finish(self, begun: _Begun) -> Snapshot:
        """Take part in the reduction; if it fails, put everything back."""
        mine = begun.mine
        try:
            with quiet():
                begun.cut.settle(self._keys.of_key)
                mine.error = "; ".join(filter(None, (mine.error, *begun.cut.errors)))
                reduced = self._reducer.reduce(begun.communicator, mine, _Agreement(self))
        except BaseException as error:
            with self._lock:
                self._delta.restore(begun.cut)
                self._custom.reopen_interval(begun.closed)
                if isinstance(error, MissingRanksError):
                    self._dead = error
            raise
        with self._lock:
            self._last = (reduced, mine.kind)
            self._loaded = None
            handlers = Handlers(
                dict(self._keys.of_key), self._keys.by_label(), dict(self._derived), self._warned
            )
        return Snapshot(reduced, handlers)

    def _drain(self) -> None:
        """Wait for a reduction under way; what it raises is its future's to tell."""
        if self._in_flight is not None:
            self._in_flight.exception()
            self._in_flight = None

    def _connect(self) -> Communicator:
        """Return what connects the ranks now; a replaced process group is bound anew."""
        if self._communicator is None or not self._communicator.current():
            if self._communicator is not None:
                self._past_collectives += self._communicator.collectives
                self._communicator.close()
                self._generation += 1
                self._reducer.rebind()
            self._communicator = connect(
                self.name, self._process_group, self._timeout, self._generation
            )
        return self._communicator

    def _read_late_custom(self) -> str:
        """Hand over values that lay on a device to handlers without lanes; returns an error."""
        late, self._late_custom = self._late_custom, []
        errors: list[str] = []
        for one, value, weight in InTransit(late).arrive(errors):
            metric = Metric(*one.key, value, one.agg_type, weight)
            try:
                self._custom.update([(one.key, self._keys.of_key[one.key], one.agg_type, [metric])])
            except Exception as failure:  # noqa: BLE001 - the user's; raised on all ranks
                errors.append(f"{show(one.key)}: the handler failed: {failure!r}")
        return "; ".join(errors)

    # -- Inside: state

    def _saved(self) -> Saved:
        """Return the state as of the last reduction."""
        with self._lock:
            loaded, last = self._loaded, self._last
        if loaded is not None:
            return loaded
        if last is None:
            empty = Totals.empty(Schema())
            return Saved(empty, empty, {}, {"run": [], "interval": []})
        reduced, kind = last
        return reduced.saved(interval_open=kind is Kind.STATE_DICT)

    def _start_from(self, saved: Saved | None) -> None:
        """Replace everything that has accumulated; what the ranks have agreed on stays."""
        self._delta = Delta()
        self._custom = CustomStates()
        self._late_custom = []
        self._last = None
        self._loaded = self._unclaimed = saved
        empty = Totals.empty(Schema())
        run, interval = (empty, empty) if saved is None else (saved.run, saved.interval)
        self._reducer.replace_totals(run, interval)

    def _claim_share(self, communicator: Communicator) -> None:
        """Take this rank's share of loaded windows and custom states, now that ranks are known."""
        saved, self._unclaimed = self._unclaimed, None
        if saved is None:
            return
        rank, world_size = communicator.rank, communicator.world_size
        for key, windows in saved.windows.items():
            handler = self._keys.of_key[key]
            assert isinstance(handler, DistributionAggHandler)
            self._reducer.windows[key] = share(windows, rank, world_size, handler.window_size)
        self._custom.inherit(
            {view: states[rank::world_size] for view, states in saved.custom.items()},
            lambda state: (
                self._keys.of_key[state["dataset"], state["name"]],
                self._keys.type_of_label(state["type"]),
            ),
        )

    # -- Inside: processes

    def _renew_locks(self) -> None:
        self._lock = threading.RLock()
        self._calls = threading.RLock()
        self._process = os.getpid()

    def _check_usable(self) -> None:
        if self._process != os.getpid():
            raise RuntimeError(
                f"aggregator {self.name!r} was inherited by a forked process, where its values "
                "would be lost: in data workers emit metrics with a MetricTransform and "
                "MetricsCollator, and update in the training process"
            )
        if self._dead is not None and not isinstance(self._dead, MissingRanksError):
            raise self._dead

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a MetricsAggregator cannot be pickled or copied: it is bound to its process. Save "
            "its state_dict() instead"
        )


class _Begun:
    """A reduction whose delta has been cut off."""

    __slots__ = ("closed", "communicator", "cut", "mine")

    def __init__(
        self, communicator: Communicator, cut: CutDelta, mine: Contribution, closed: Any
    ) -> None:
        self.communicator = communicator
        self.cut = cut
        self.mine = mine
        self.closed = closed


_Task: TypeAlias = tuple[Callable[[], Snapshot], Future[Snapshot]]


class _Worker:
    """A daemon thread that runs one task after the other."""

    def __init__(self, name: str) -> None:
        self._tasks: queue.SimpleQueue[_Task | threading.Event | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, task: Callable[[], Snapshot]) -> Future[Snapshot]:
        future: Future[Snapshot] = Future()
        self._tasks.put((task, future))
        return future

    def stop(self) -> None:
        self._tasks.put(None)

    def finish(self, timeout: float | None) -> bool:
        """Wait until all tasks, and what their futures call, are done; returns whether they are."""
        done = threading.Event()
        self._tasks.put(done)
        return done.wait(timeout)

    def _run(self) -> None:
        while (item := self._tasks.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
                continue
            task, future = item
            try:
                result = task()
            except BaseException as error:  # noqa: BLE001 - the future's reader gets it
                future.set_exception(error)
            else:
                future.set_result(result)
            # Hold neither while waiting for the next one.
            del item, task, future


class _Agreement:
    """What a reduction asks an aggregator (reduction.Registry), under the aggregator's lock."""

    def __init__(self, aggregator: MetricsAggregator) -> None:
        self._aggregator = aggregator
        keys = aggregator._keys  # noqa: SLF001 - its other half
        self.handler = keys.handler
        self.type_label = keys.type_label
        self.suffixes = keys.suffixes

    def adopt(self, schema: Schema) -> tuple[list[Key], str]:
        aggregator = self._aggregator
        with aggregator._lock:  # noqa: SLF001
            losers, trouble = aggregator._keys.adopt(schema)  # noqa: SLF001
            for key in losers:
                aggregator._delta.drop(key)  # noqa: SLF001
                aggregator._custom.drop(key)  # noqa: SLF001
        return losers, trouble


def _check_timeout(timeout: float | timedelta | None) -> timedelta | None:
    if timeout is None or isinstance(timeout, timedelta):
        return timeout
    if isinstance(timeout, bool) or not timeout > 0:
        raise ValueError(f"timeout={timeout!r}: give a number of seconds above 0")
    return timedelta(seconds=float(timeout))


# -- Exit and fork -------------------------------------------------------------------------------


def _drain_at_exit() -> None:
    """Let reductions under way finish; after an exception, wait for them only a moment."""
    failed = getattr(sys, "last_value", None) is not None
    for aggregator in list(_alive):
        worker = aggregator._worker  # noqa: SLF001
        if worker is not None:
            worker.finish(_EXIT_WAIT if failed else None)


_leaked: list[Communicator] = []


def _leave_parent_behind() -> None:
    """In a forked child: new locks (ours may be held by a thread that is not here) and no group.

    The group's destructor would wait for threads that only the parent has, so it must not run.
    """
    for aggregator in list(_alive):
        parent = aggregator._process  # noqa: SLF001
        aggregator._renew_locks()  # noqa: SLF001
        aggregator._process = parent  # noqa: SLF001
        aggregator._in_flight = aggregator._worker = None  # noqa: SLF001
        if aggregator._communicator is not None:  # noqa: SLF001
            _leaked.append(aggregator._communicator)  # noqa: SLF001


atexit.register(_drain_at_exit)
os.register_at_fork(after_in_child=_leave_parent_behind)
