"""`Snapshot`: the result of one reduction, to be looked at from any side.

    snapshot = aggregator.reduce()
    snapshot.as_dict("train", window="interval")
    snapshot.owner("alpaca", "grad_norm")       # which rank had the maximum
    snapshot.lacking("alpaca", "loss")          # which ranks had nothing

Nothing is finalised before it is asked for: a rank that does not look does not pay.
"""

from __future__ import annotations

import difflib
import fnmatch
import logging
import re
import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeVar, overload

import numpy as np

from metricfold._core.exchange.reducer import Reduced
from metricfold._core.fold.axes import RANK
from metricfold._core.fold.handlers import LaneHandler
from metricfold._core.fold.names import (
    Meaning,
    check_prefix,
    printed,
    repeated,
    show,
    statistic_of,
    suffixes_of,
)
from metricfold._core.fold.sample import FloatArray
from metricfold._core.fold.state import COUNT, NANS, ReducedState
from metricfold._core.reduce.schema import Key
from metricfold._core.reduce.sections import NOBODY
from metricfold._core.runtime.listing import internal
from metricfold._core.runtime.uncompiled import uncompiled
from metricfold._core.sketch import Histogram
from metricfold._core.view.alert import Alerts
from metricfold._core.view.cells import (
    By,
    Cells,
    Folding,
    cells_along,
    check_axes,
    check_by,
    not_by_rank,
)
from metricfold._core.view.html import as_table
from metricfold._core.view.report import Handlers, Report, matches
from metricfold._core.view.tables import Rollup, check_rollup
from metricfold._core.view.timing import TimerKeys, Timing
from metricfold._core.view.windows import View, WindowLike, check_view, check_window, view_of

__all__ = ["Snapshot"]

_logger = logging.getLogger("metricfold")

T = TypeVar("T")

_NO_ALERTS = Alerts()
_BESIDE = "_nan_count"
"""What may come beside a value, also where there is none."""
_PATIENCE = 3
"""After so many reductions what has not come is likely misspelled."""
_MOST_NAMED = 8
"""So many keys a message names."""


@internal("cells_of_ranks", "meanings", "not_shown", "shown_by")
@uncompiled
class Snapshot:
    """What all ranks had accumulated when they reduced; immutable, and the same on every rank.

    Attributes:
        world_size: the number of ranks that took part.
        seconds: wall time of the interval, by the slowest rank's clock: from the first value on,
            without what a `MetricsAggregator.pause` took.
        run_seconds: the same of the run, over restarts.
        alerts: what the rules of `MetricsAggregator.alert_on` have found in it.
    """

    def __init__(self, reduced: Reduced, handlers: Handlers, alerts: Alerts = _NO_ALERTS) -> None:
        self.alerts = alerts
        self._whole, self._handlers = reduced, handlers

    @cached_property
    def _folding(self) -> Folding | None:
        """What makes plain metrics of those that are shown by cell or by rank; None: all are plain."""
        whole, handlers = self._whole, self._handlers
        if not handlers.by and not any(entry.axes for entry in whole.schema):
            return None
        return handlers.plans.folding(whole.schema, handlers.of_key, handlers.by, whole.world_size)

    @cached_property
    def _reduced(self) -> Reduced:
        """The result of plain metrics."""
        return self._whole if self._folding is None else self._folding.reduced(self._whole)

    @cached_property
    def _cells(self) -> Cells:
        return Cells(self._whole, self._handlers.of_key)

    @cached_property
    def _report(self) -> Report:
        handlers = self._handlers
        if self._folding is not None:
            handlers = replace(handlers, of_key=self._folding.of_key)
        return Report(self._reduced, handlers, self._cells)

    @property
    def world_size(self) -> int:
        return self._whole.world_size

    @property
    def seconds(self) -> float:
        return self._whole.interval.seconds

    @property
    def run_seconds(self) -> float:
        return self._whole.run.seconds

    @property
    def sink_failed(self) -> bool:
        """Whether a sink had failed, on any rank, of a logger with ``on_sink_error="raise"``."""
        return self._whole.sink_failed

    @property
    def empty(self) -> bool:
        """Whether nothing at all came in during the interval."""
        return not self._whole.interval.sums.any() and not self._whole.custom.has("interval")

    def shown_by(self, by: By) -> Snapshot:
        """Return the same result, of which these axes remain unless others are asked for."""
        by = check_by(by)
        if by == self._handlers.by:
            return self
        return Snapshot(self._whole, replace(self._handlers, by=by), self.alerts)

    def as_dict(
        self,
        prefix: str = "data",
        window: WindowLike = "run",
        *,
        rollup: Rollup = False,
        macro: bool = False,
        by: By | None = None,
    ) -> dict[str, float]:
        """Return every metric's value, keyed ``{prefix}_{dataset}/{name}``.

        Args:
            prefix: what keys begin with; a metric without a dataset is ``{prefix}/{name}``.
            window: ``"run"``: everything since the start (a DISTRIBUTION: each rank's most recent
                values). ``"interval"``: what came in since the reduction before; names only keys
                that received something. ``"auto"``: totals (SUM, CATEGORICAL_COUNT) over the run,
                everything else over the interval. A mapping chooses per metric name; names that
                it lacks are ``"auto"``.
            rollup: report ``{prefix}/{name}`` too, over all datasets, be it one or many: an exact
                merge of their states, not a mean of their results. ``"levels"``: those of datasets
                whose names begin alike as well, such as ``{prefix}_code/{name}`` over
                ``code/python`` and ``code/rust``. Metrics whose handler has no lanes have none.
            macro: report ``{prefix}/{name}_macro`` for names of type MEAN: the plain mean of the
                datasets' means.
            by: of metrics with axes, which of these remain: a mapping from names to an axis, or
                several, or one for every metric that has it. ``{"expert_tokens": "layer"}`` reports
                ``{prefix}_{dataset}/expert_tokens/layer_07`` too, merged exactly over all other axes.
                The axis ``"rank"``, which every metric has, is what each rank had of the interval.
                None: what the aggregator was made with.

        What was recorded under a name is what it prints: a total that would print the same is left
        out, with a warning.

        Raises:
            ValueError: an empty prefix, an unknown window, a ``rollup`` that is none, or an axis in
                ``by`` that a metric does not have.
        """
        check_prefix(prefix)
        check_window(window)
        check_rollup(rollup)
        if by is not None:
            other = self.shown_by(by)
            if wrong := other.not_shown():
                raise ValueError(wrong[0])
            return other.as_dict(prefix, window, rollup=rollup, macro=macro)
        for one in self.not_shown():
            self._report.warn_once(one, f"{one}. It is left out")
        self._warn_of_unmatched()
        self._warn_of_repeated(prefix)
        if window != "run":
            self._warn_if_empty()
        shown = self._report.table(window, rollup=rollup, macro=macro)
        return dict(zip(map(prefix.__add__, shown.values), shown.values.values(), strict=True))

    def value(
        self,
        dataset: str | None,
        name: str,
        stat: str | None = None,
        window: WindowLike = "auto",
    ) -> float | None:
        """Return one number that `as_dict` shows, such as for a decision to stop; None without values.

        Args:
            dataset: the dataset. None: of a metric without one; of a name that datasets have, the
                total over them.
            name: of the metric, be it recorded, derived or what a handler of yours calls its result.
            stat: of a DISTRIBUTION the statistic, such as ``"mean"``, ``"p50"`` or ``"count"``; of a
                CATEGORICAL_COUNT the category; of others what may come beside the value, such as
                ``"nan_count"``.
            window: as in `as_dict`.

        Raises:
            KeyError: there is no such metric, or it has no such statistic; names those that are near.
            ValueError: the metric is more than one number and `stat` does not say which, or an unknown
                window.

        >>> from metricfold import MetricsAggregator
        >>> aggregator = MetricsAggregator()
        >>> for loss in (1.0, 2.0, 6.0):
        ...     aggregator.record("loss", loss, dataset="alpaca")
        ...     aggregator.record("spread", loss, "distribution", dataset="alpaca")
        >>> snapshot = aggregator.reduce()
        >>> snapshot.value("alpaca", "loss"), snapshot.value("alpaca", "spread", "p50")
        (3.0, 2.0)
        """
        check_window(window)
        suffixes, found = self._results((dataset or "", name), window)
        wanted = [""] if stat is None else suffixes_of(stat)
        for suffix in wanted:
            if suffix in found:
                return found[suffix]
        printable = [*(suffixes or ()), *found]
        if stat is None and "" not in printable and any(one != _BESIDE for one in printable):
            raise ValueError(
                f"{show((dataset or '', name))} is more than one number: say which, such as "
                f"stat={statistic_of(printable[0]) or 'a category'!r}"
            )
        known = (any(matches(one, suffix) for one in wanted) for suffix in printable)
        if stat is not None and printable and not any(known):
            there = list(dict.fromkeys(statistic_of(suffix) for suffix in printable if suffix))
            near = difflib.get_close_matches(str(stat), there, n=len(there) or 1, cutoff=0.0)
            raise KeyError(
                f"{show((dataset or '', name))} has no {stat!r}"
                + (f"; it has: {', '.join(near)}" if near else ": leave stat= out")
            )
        return None

    def names(self, pattern: str = "*") -> list[tuple[str | None, str]]:
        """Return the dataset and the name of each metric that a pattern matches, sorted.

        Args:
            pattern: as a shell has it, of ``{dataset}/{name}``, or ``/{name}`` without a dataset, so
                that ``"*/loss"`` means both. Metrics whose handlers have no lanes match none.
        """
        matched = re.compile(fnmatch.translate(pattern)).match
        return [
            (entry.key[0] or None, entry.key[1])
            for entry in self._whole.schema
            if not entry.custom and matched("/".join(entry.key))
        ]

    def level(self, dataset: str | None, name: str) -> float | None:
        """Return what a metric comes to in the interval, as one number; None without values.

        As of each rank in `per_rank`: of a DISTRIBUTION it is the mean, and no value is looked at.

        Raises:
            KeyError: there is no such metric.
            ValueError: its handler has no lanes.
        """
        return self._report.level(self._key_with_lanes(dataset, name))

    def suspects(self, pattern: str = "*") -> list[tuple[str | None, str]]:
        """Return those of `names` that may not be finite in the interval, or had NaN left out of it.

        That is a look at all states at once; what one of these is, `results` says.
        """
        suspects = set(self._report.suspects())
        if not suspects:
            return []
        return [key for key in self.names(pattern) if (key[0] or "", key[1]) in suspects]

    def bad_cells(self, dataset: str | None, name: str) -> list[str]:
        """Return the cells that are not finite in the interval, or had NaN left out, such as ``layer 07``.

        None are of a metric without axes.

        Raises:
            KeyError: there is no such metric.
        """
        key = self._key(dataset, name)
        if key not in self._cells.there:
            return []
        return self._cells.bad(key)

    def results(
        self, dataset: str | None, name: str, window: WindowLike = "interval"
    ) -> dict[str, float]:
        """Return all that a metric prints, by what follows its name; empty without values.

        Raises:
            KeyError: there is no such metric.
            ValueError: an unknown window.
        """
        check_window(window)
        return dict(self._results((dataset or "", name), window)[1])

    def array(
        self,
        dataset: str | None,
        name: str,
        by: str | Sequence[str] | None = None,
        window: WindowLike = "auto",
    ) -> tuple[FloatArray, tuple[tuple[str, ...], ...]]:
        """Return the values of a metric with axes, and what its cells are called along each.

        Args:
            dataset: as in `value`: None, of a name that datasets have, is the total over them.
            name: of the metric.
            by: the axes that remain, in this order, merged exactly over all others; None: all. Every
                metric has the axis ``"rank"``: what each rank had of the interval.
            window: as in `as_dict`.

        Returns:
            An array with a dimension for each axis, NaN where a cell has no value, but 0 if it is a
            SUM that others have values of: an expert that got no tokens. And for each axis the labels
            along it, or padded numbers.

        Raises:
            KeyError: there is no such metric.
            ValueError: it has no such axis, or none at all; the run is asked for by rank; the ranks'
                values were merged on the way (``route="tree"``), and the metric was not recorded with
                ``per_rank=True``; datasets differ in axes, or its handler has no lanes; or an unknown
                window.

        >>> import numpy as np
        >>> from metricfold import MetricsAggregator
        >>> aggregator = MetricsAggregator()
        >>> tokens = np.array([[1, 2, 3], [4, 5, 6]])
        >>> aggregator.record("tokens", tokens, "sum", axes={"layer": 2, "expert": 3})
        >>> values, (layers,) = aggregator.reduce().array(None, "tokens", by=("layer",))
        >>> dict(zip(layers, values.tolist()))
        {'0': 6.0, '1': 15.0}
        """
        check_window(window)
        names = check_axes(by) if by is not None else None
        schema = self._whole.schema
        keys = [(dataset or "", name)]
        if keys[0] not in schema and dataset is None:
            keys = [entry.key for entry in schema if entry.key[1] == name]
        if not keys or keys[0] not in schema:
            raise self._unknown((dataset or "", name))
        first = schema.entries[keys[0]]
        if first.custom:
            raise ValueError(f"{show(keys[0])} has a handler without lanes: it has no cells")
        if not names and not first.axes:
            raise ValueError(
                f"{show(keys[0])} has no axes: value() returns its number, and by='rank' each rank's"
            )
        view = view_of(window, name, is_total=self._handlers.of_key[keys[0]].is_total)
        if RANK in (names or ()):
            if view_of(window, name, is_total=False) == "run":
                raise ValueError(
                    f"{show(keys[0])} by rank is about the interval, and not about the run, which may "
                    "have had other ranks: leave window= out"
                )
            view = "interval"
        values, axes = self._cells.array(keys, view, names)
        return values, tuple(axis.names() for axis in axes)

    def arrays(
        self, prefix: str = "data", window: WindowLike = "auto", *, rollup: Rollup = False
    ) -> dict[str, dict[str, Any]]:
        """Return the cells of every metric with axes that has values, keyed as in `as_dict`.

        Args:
            prefix: as in `as_dict`.
            window: as in `as_dict`.
            rollup: which totals over datasets to return too, as in `as_dict`.

        Returns:
            Of each metric ``"axes"``, a list of the name and the size, or the labels, of each axis, and
            ``"values"``, what `array` returns. Nobody may change these.
        """
        check_prefix(prefix)
        check_window(window)
        check_rollup(rollup)
        return {
            prefix + printed(key): {
                "axes": [[axis.name, axis.size or [*axis.labels]] for axis in axes],
                "values": values,
            }
            for key, (values, axes) in self._report.arrays(window, rollup=rollup).items()
        }

    def histograms(self, prefix: str = "data", window: WindowLike = "auto") -> dict[str, Histogram]:
        """Return the histogram of every DISTRIBUTION that has values, keyed as in `as_dict`."""
        check_prefix(prefix)
        check_window(window)
        found: dict[str, Histogram] = {}
        for entry in self._reduced.schema.distributions:
            is_total = self._handlers.of_key[entry.key].is_total
            pool = self._reduced.pool(entry, view_of(window, entry.key[1], is_total=is_total))
            if pool.count:
                found[prefix + printed(entry.key)] = pool.drawn()
        return found

    def histogram(self, dataset: str | None, name: str, window: View = "run") -> Histogram:
        """Return how the values of one DISTRIBUTION spread: edges, counts and moments.

        Raises:
            KeyError: there is no such metric.
            ValueError: it is not a DISTRIBUTION, or the view has no values of it.
        """
        key = self._key(dataset, name)
        entry = self._reduced.schema.entries[key]
        if not entry.distributed:
            raise ValueError(f"{show(key)} is no DISTRIBUTION, so it has no histogram")
        pool = self._reduced.pool(entry, check_view(window))
        if not pool.count:
            raise ValueError(f"{show(key)} has no values in the {window} view")
        return pool.drawn()

    # -- Per rank

    def per_rank(self, dataset: str | None, name: str) -> list[float | None]:
        """Return what each rank's own values of the interval give; None where it had none.

        A DISTRIBUTION gives its mean, a CATEGORICAL_COUNT its count of values.

        Raises:
            KeyError: there is no such metric.
            ValueError: its handler has no lanes; or the ranks' values were merged on the way
                (``route="tree"``), and the metric was not recorded with ``per_rank=True``.
        """
        key = self._key_with_lanes(dataset, name)
        rows = self._reduced.rows
        if key not in rows.schema:
            raise ValueError(not_by_rank(key))
        handler = self._handler(key)
        sums, maxs = rows.sums[:, rows.schema.sums[key]], rows.maxs[:, rows.schema.maxs[key]]
        found: list[float | None] = []
        for one, other in zip(sums.tolist(), maxs.tolist(), strict=True):
            state = ReducedState(tuple(one), tuple(other), self.seconds)
            found.append(handler.finalize_lanes(state).get("") if one[COUNT] else None)
        return found

    @overload
    def owner(self, dataset: str | None, name: str, window: View = ...) -> int | None: ...
    @overload
    def owner(
        self, dataset: str | None, name: str, window: View = ..., *, by: str | Sequence[str]
    ) -> dict[str, int | None]: ...
    def owner(
        self,
        dataset: str | None,
        name: str,
        window: View = "interval",
        *,
        by: str | Sequence[str] | None = None,
    ) -> int | dict[str, int | None] | None:
        """Return the rank that the MAX, MIN or LAST came from.

        Of several that had it in one reduction the lowest, over several reductions the first. If
        a NaN came in, the lowest rank that it came from. None if the view has no value, or if its
        owner is not known: it came out of a checkpoint, or is a NaN of an earlier interval.

        With `by`, the axes that remain, it is a dict: of each cell, called as it is printed behind the
        metric's name, such as ``"layer_07"``. Where vectors are merged on the way (``route="tree"``),
        that of a cell's NaN is not known, unless recorded with ``per_rank=True``.

        Raises:
            KeyError: there is no such metric.
            ValueError: it is neither MAX nor MIN, or has no such axis.
        """
        if by is not None:
            return self._of_cells(
                lambda shown, cell: shown.owner(dataset, cell, window), dataset, name, by
            )
        key = self._key_with_owner(dataset, name)
        totals = self._report.totals_of(check_view(window))
        nans = self._reduced.schema.sums[key].start + NANS
        if totals.sums[nans] and self._handler(key).on_nan != "skip":
            return self._owner_of_nan(key)
        owner = int(totals.owners[self._reduced.schema.maxs[key]][0])
        return None if owner == NOBODY else owner

    def nan_rank(self, dataset: str | None, name: str) -> int | None:
        """Return the lowest rank that had a NaN of this metric in the interval.

        None if none had, or if it is not known: where vectors are merged on the way
        (``route="tree"``), of MAX and MIN alone, unless recorded with ``per_rank=True``.

        Raises:
            KeyError: there is no such metric.
            ValueError: its handler has no lanes.
        """
        key = self._key_with_lanes(dataset, name)
        attendance = self._reduced.attendance
        if attendance is not None and key not in self._reduced.rows.schema:
            owner = attendance.nan_owners.get(key, NOBODY)
            return None if owner == NOBODY else owner
        return self._owner_of_nan(key)

    def cells_of_ranks(
        self, dataset: str | None, name: str
    ) -> tuple[tuple[tuple[str, ...], ...], FloatArray] | None:
        """Return the labels of a metric's axes and the MAX lanes of each rank's cells, as these came.

        These are of the interval, of shape (ranks, cells, lanes); None if they are not known: where
        vectors are merged on the way (``route="tree"``).
        """
        rows, key = self._whole.rows, (dataset or "", name)
        if key not in rows.schema:
            return None
        entry = rows.schema.entries[key]
        maxs = rows.maxs[:, rows.schema.maxs[key]]
        labels = tuple(axis.names() for axis in entry.axes)
        return labels, maxs.reshape(len(maxs), entry.cells, entry.maxs)

    @overload
    def tied(self, dataset: str | None, name: str, window: View = ...) -> int: ...
    @overload
    def tied(
        self, dataset: str | None, name: str, window: View = ..., *, by: str | Sequence[str]
    ) -> dict[str, int]: ...
    def tied(
        self,
        dataset: str | None,
        name: str,
        window: View = "interval",
        *,
        by: str | Sequence[str] | None = None,
    ) -> int | dict[str, int]:
        """Return how many ranks had the MAX or MIN in the reduction that it came from.

        0 if the view has no value, or if it came out of a checkpoint. Where cells are merged it is at
        least as many: those of the cell that most ranks share.

        With `by` it is a dict, as in `owner`.

        Raises:
            KeyError: there is no such metric.
            ValueError: it is neither MAX nor MIN, or has no such axis.
        """
        if by is not None:
            return self._of_cells(
                lambda shown, cell: shown.tied(dataset, cell, window), dataset, name, by
            )
        key = self._key_with_owner(dataset, name)
        return int(
            self._report.totals_of(check_view(window)).tied[self._reduced.schema.maxs[key]][0]
        )

    @overload
    def lacking(self, dataset: str | None, name: str) -> list[int]: ...
    @overload
    def lacking(
        self, dataset: str | None, name: str, *, by: str | Sequence[str]
    ) -> dict[str, list[int]]: ...
    def lacking(
        self, dataset: str | None, name: str, *, by: str | Sequence[str] | None = None
    ) -> list[int] | dict[str, list[int]]:
        """Return the ranks that had no value of this metric in the interval, ascending.

        With `by` it is a dict, as in `owner`.

        Raises:
            KeyError: there is no such metric.
            ValueError: its handler has no lanes; or so many ranks merge their values on the way
                that it is known how many those are (`lacking_count`), but not which, nor of cells;
                or it has no such axis.
        """
        if by is not None:
            return self._of_cells(
                lambda shown, cell: shown.lacking(dataset, cell), dataset, name, by
            )
        key = self._key_with_lanes(dataset, name)
        rows = self._reduced.rows
        if key in rows.schema:
            counts = rows.sums[:, rows.schema.sums[key].start + COUNT]
            return [int(rank) for rank in np.flatnonzero(counts == 0)]
        attendance = self._reduced.attendance
        if attendance is None or key not in attendance.keys:
            raise ValueError(not_by_rank(key))
        lacking = attendance.lacking(key)
        if lacking is None:
            raise ValueError(
                f"{self.world_size - attendance.present(key)} of {self.world_size} ranks lack "
                f"{show(key)}, but not which: so many ranks count themselves on the way. Record it "
                "with per_rank=True"
            )
        return lacking

    def lacking_count(self, dataset: str | None, name: str) -> int:
        """Return how many ranks had no value of this metric in the interval.

        Raises:
            KeyError: there is no such metric.
            ValueError: its handler has no lanes.
        """
        key = self._key_with_lanes(dataset, name)
        attendance = self._reduced.attendance
        if attendance is None or key not in attendance.keys:
            return len(self.lacking(dataset, name))
        return self.world_size - attendance.present(key)

    def timing(self, name: str) -> Timing:
        """Return what the timer `name` took in the interval, and which ranks are slow and fast.

        Of several ranks with the same share the lowest is named. An interval that was all pause has
        shares of 0.

        Raises:
            KeyError: there is no such timer, or no rank has used it in the interval.
        """
        keys = TimerKeys.of(name)
        schema = self._reduced.schema
        if ("", keys.share) not in schema:
            raise KeyError(
                f"no rank has used a timer {name!r}: aggregator.timer({name!r}) makes one"
            )
        mean, longest, share = (
            self._report.printed(("", key), "interval").get("") if ("", key) in schema else None
            for key in keys.names()
        )
        if mean is None and share is None:
            raise KeyError(f"no rank has used the timer {name!r} in the interval")
        shares = [(own or 0.0) * self.world_size for own in self.per_rank(None, keys.share)]
        slowest, fastest = (shares.index(one) for one in (max(shares), min(shares)))
        return Timing(
            mean,
            longest,
            None if longest is None else self.owner(None, keys.max),
            share or 0.0,
            slowest,
            shares[slowest],
            fastest,
            shares[fastest],
            statistics.median(shares),
        )

    def __repr__(self) -> str:
        return (
            f"Snapshot(world_size={self.world_size}, keys={len(self._reduced.schema.entries)}, "
            f"seconds={self.seconds:.4g}, run_seconds={self.run_seconds:.4g})"
        )

    def _repr_html_(self) -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an interval without values is shown as one
            values = self.as_dict("in", "auto", rollup=True)
        return as_table(repr(self), values, self.meanings("in", values))

    # -- Inside

    def _handler(self, key: Key) -> LaneHandler:
        """Return the handler of a metric, or of a cell of one."""
        folding = self._folding
        return (self._handlers if folding is None else folding).of_key[key].laned()

    def _of_cells(
        self,
        ask: Callable[[Snapshot, str], T],
        dataset: str | None,
        name: str,
        by: str | Sequence[str],
    ) -> dict[str, T]:
        """Ask for each cell along some axes, by what is printed behind the metric's name."""
        names = check_axes(by)
        key = self._key(dataset, name)
        if not names or RANK in names:
            raise ValueError(
                f"by={by!r}: name an axis of {show(key)}; what is asked is about ranks"
            )
        other = self.shown_by({name: names})
        if wrong := other.not_shown():
            raise ValueError(wrong[0])
        axes = self._whole.schema.entries[key].axes
        kept = [next(axis for axis in axes if axis.name == one) for one in names]
        cells = ["/".join(cell) for cell in cells_along(kept)]
        return {cell: ask(other, f"{name}/{cell}") for cell in cells}

    def meanings(self, prefix: str, keys: Iterable[str]) -> dict[str, Meaning]:
        """Return what keys that `as_dict`, `histograms` or `arrays` has given stand for."""
        return {key: self._report.meaning(key.removeprefix(prefix)) for key in keys}

    def not_shown(self) -> list[str]:
        """Return what is asked for by axes, and cannot be, in words."""
        return [] if self._folding is None else self._folding.said(self._whole.rows)

    def _key(self, dataset: str | None, name: str) -> Key:
        key = (dataset or "", name)
        if key not in self._reduced.schema:
            raise self._unknown(key)
        return key

    def _unknown(self, key: Key) -> KeyError:
        """Return the error that names the keys that are nearest to one that is not there."""
        texts = {"/".join(known): known for known in sorted(self._handlers.of_key)}
        near = difflib.get_close_matches("/".join(key), texts, n=_MOST_NAMED, cutoff=0.0)
        # First those that have the very name.
        keys = sorted((texts[text] for text in near), key=lambda known: known[1] != key[1])
        some = "there are" if len(texts) <= _MOST_NAMED else f"of {len(texts)} the nearest are"
        said = ", ".join(map(show, keys))
        return KeyError(f"there is no {show(key)}; {some}: {said or 'none'}")

    def _results(
        self, key: Key, window: WindowLike
    ) -> tuple[tuple[str, ...] | None, Mapping[str, float]]:
        """Return what a metric may print behind its name, if that is known, and what it does.

        Raises:
            KeyError: there is no such metric.
        """
        dataset, name = key
        entry = self._reduced.schema.entries.get(key)
        if entry is not None and not entry.custom:
            handler = self._handler(key)
            return handler.suffixes(), self._report.printed(key, window)
        table = self._report.table(window, rollup=not dataset, macro=False)
        printing = table.groups().get(dataset, {})
        found = {
            text.removeprefix(name): value
            for text, value in printing.items()
            if text.startswith(name) and text[len(name) : len(name) + 1] in ("", "_")
        }
        namesakes = [] if dataset else self._report.over_datasets(levels=False).members.get(key, [])
        if namesakes:
            suffixes = {suffix: None for one in namesakes for suffix in one.suffixes}
            return tuple(suffixes), {
                text: value
                for text, value in found.items()
                if any(matches(text, suffix) for suffix in suffixes)
            }
        named_so = any(
            result.key == key
            for view in ("run", "interval")
            for result in self._reduced.custom.of(view)
        )
        if name in self._handlers.derived:
            return ("",), {"": printing[name]} if name in printing else {}
        if entry is None and not named_so:
            raise self._unknown(key)
        return None, {text: value for text, value in found.items() if self._prints(key, text)}

    def _prints(self, key: Key, suffix: str) -> bool:
        """Return whether what is printed so is of this metric, and of no other."""
        if key[1] + suffix in self._handlers.derived:
            return False
        return self._report.claims.owner(key, suffix) is None

    def _key_with_lanes(self, dataset: str | None, name: str) -> Key:
        key = self._key(dataset, name)
        if self._reduced.schema.entries[key].custom:
            raise ValueError(f"{show(key)} has a handler without lanes: it is not known per rank")
        return key

    def _key_with_owner(self, dataset: str | None, name: str) -> Key:
        key = self._key(dataset, name)
        if self._reduced.schema.entries[key].maxs != 1:
            raise ValueError(f"{show(key)} is neither a MAX nor a MIN, so no rank owns it")
        return key

    def _owner_of_nan(self, key: Key) -> int | None:
        rows, attendance = self._reduced.rows, self._reduced.attendance
        if key in rows.schema:
            ranks = np.flatnonzero(rows.sums[:, rows.schema.sums[key].start + NANS])
            return int(ranks[0]) if ranks.size else None
        # Of cells of a metric that is merged on the way it is not told.
        owner = NOBODY if attendance is None else attendance.nan_owners.get(key, NOBODY)
        return None if owner == NOBODY else owner

    def _warn_if_empty(self) -> None:
        if self.empty and self._reduced.run.sums.any():
            self._report.warn_once(
                "",
                "the interval is empty: nothing came in since the reduction before. For two views "
                "of one interval, take both from one snapshot = aggregator.reduce()",
            )

    def _warn_of_unmatched(self) -> None:
        """Say what `by` names that is not there, once it has had time to come."""
        if self._folding is None or self._whole.reductions <= _PATIENCE:
            return
        for name in self._folding.unmatched:
            self._report.warn_once(
                f"by {name}",
                f"by= names {name!r}, which no metric so far "
                + ("is called" if isinstance(self._handlers.by, Mapping) else "has as an axis"),
            )

    def _warn_of_repeated(self, prefix: str) -> None:
        about = f"prefix {prefix}"
        checked = self._report.plan.checked
        if about in self._handlers.warned or prefix in checked:
            return
        checked.add(prefix)
        text = repeated(prefix, (name for _, name in self._handlers.of_key))
        if text:
            self._handlers.warned.add(about)
            _logger.warning(text)
