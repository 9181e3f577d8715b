"""`Snapshot`: the result of one reduction, to be looked at from any side.

    snapshot = aggregator.reduce()
    snapshot.as_dict("train", window="interval")
    snapshot.owner("alpaca", "grad_norm")       # which rank had the maximum
    snapshot.lacking("alpaca", "loss")          # which ranks had nothing

Nothing is finalised before it is asked for: a rank that does not look does not pay.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from metricfold.custom import combined
from metricfold.handlers import (
    COUNT,
    NANS,
    AggregationHandler,
    CategoricalCountAggHandler,
    DistributionAggHandler,
    FloatArray,
    LaneHandler,
    Lanes,
    LaneState,
    MeanAggHandler,
    RateAggHandler,
    ReducedState,
    SumAggHandler,
    quiet,
)
from metricfold.histogram import Histogram
from metricfold.metric import check_name
from metricfold.naming import ANYTHING, printed, show
from metricfold.packing import Entry, Key
from metricfold.reduction import Reduced
from metricfold.totals import NOBODY, Totals

__all__ = ["Derived", "Handlers", "Snapshot", "WindowLike", "check_window"]

View: TypeAlias = Literal["run", "interval"]
WindowLike: TypeAlias = str | Mapping[str, str]
"""``"run"``, ``"interval"``, ``"auto"``, or a mapping from metric names to those."""

Derived: TypeAlias = Callable[[Mapping[str, float]], float]
_WINDOWS = ("run", "interval", "auto")
_BUCKETS = 64
_NOTHING = np.empty(0)
_TOTALS = (SumAggHandler, CategoricalCountAggHandler)


@dataclass(frozen=True, slots=True)
class Handlers:
    """What finalises each key of a snapshot.

    Args:
        of_key: the handler of each key.
        of_type: the handler of each type, by its label, for results of custom handlers.
        derived: functions of a dataset's metrics, by the name that they print.
        warned: derived metrics whose failure has been reported.
    """

    of_key: Mapping[Key, AggregationHandler]
    of_type: Mapping[str, AggregationHandler]
    derived: Mapping[str, Derived]
    warned: set[str]


class Snapshot:
    """What all ranks had accumulated when they reduced; immutable, and the same on every rank.

    Attributes:
        world_size: the number of ranks that took part.
        seconds: wall time of the interval, by the slowest rank's clock.
        run_seconds: wall time of the run.
    """

    def __init__(self, reduced: Reduced, handlers: Handlers) -> None:
        self._reduced = reduced
        self._handlers = handlers
        self._listed: dict[View, tuple[list[float], list[float]]] = {}

    @property
    def world_size(self) -> int:
        return self._reduced.world_size

    @property
    def seconds(self) -> float:
        return self._reduced.interval.seconds

    @property
    def run_seconds(self) -> float:
        return self._reduced.run.seconds

    @property
    def empty(self) -> bool:
        """Whether nothing at all came in during the interval."""
        return not self._reduced.interval.sums.any() and not self._reduced.custom.has("interval")

    def as_dict(
        self,
        prefix: str = "data",
        window: WindowLike = "run",
        *,
        rollup: bool = False,
        macro: bool = False,
    ) -> dict[str, float]:
        """Return every metric's value, keyed ``{prefix}_{dataset}/{name}``.

        Args:
            prefix: what keys begin with; a metric without a dataset is ``{prefix}/{name}``.
            window: ``"run"``: everything since the start (a DISTRIBUTION: each rank's most recent
                values). ``"interval"``: what came in since the reduction before; names only keys
                that received something. ``"auto"``: totals (SUM, CATEGORICAL_COUNT) over the run,
                everything else over the interval. A mapping chooses per metric name; names that
                it lacks are ``"auto"``.
            rollup: report ``{prefix}/{name}`` too, over all datasets, for names that occur in
                more than one: an exact merge of their states, not a mean of their results.
            macro: report ``{prefix}/{name}_macro`` for such names of type MEAN: the plain mean of
                the datasets' means.

        Raises:
            ValueError: an empty prefix or an unknown window.
        """
        check_name("the prefix", prefix)
        check_window(window)
        if window != "run":
            self._warn_if_empty()
        groups: dict[str, dict[str, float]] = {}
        with quiet():
            for key, view in self._views(window):
                dataset, name = key
                group = groups.setdefault(dataset, {})
                for suffix, value in self._finalized(key, view).items():
                    group[name + suffix] = value
        self._add_custom(window, groups)
        if rollup or macro:
            with quiet():
                self._roll_up(window, groups.setdefault("", {}), rollup=rollup, macro=macro)
        self._derive(groups)
        named: dict[str, float] = {}
        for dataset, group in sorted(groups.items()):
            head = prefix + printed((dataset, ""))
            for name, value in group.items():
                named[head + name] = value
        return named

    def histograms(self, prefix: str = "data", window: WindowLike = "auto") -> dict[str, Histogram]:
        """Return the histogram of every DISTRIBUTION that has values, keyed as in `as_dict`."""
        check_name("the prefix", prefix)
        check_window(window)
        found: dict[str, Histogram] = {}
        for key, view in self._views(window):
            if isinstance(self._handlers.of_key[key], DistributionAggHandler):
                state = self._state(key, view)
                if state.values.size:
                    found[prefix + printed(key)] = _histogram(state.values, state.weights)
        return found

    def histogram(self, dataset: str | None, name: str, window: View = "run") -> Histogram:
        """Return how the values of one DISTRIBUTION spread: edges, counts and moments.

        Raises:
            KeyError: there is no such metric.
            ValueError: it is not a DISTRIBUTION, or the view has no values of it.
        """
        key = self._key(dataset, name)
        if not isinstance(self._handlers.of_key[key], DistributionAggHandler):
            raise ValueError(f"{show(key)} is no DISTRIBUTION, so it has no histogram")
        state = self._state(key, _check_view(window))
        if not state.values.size:
            raise ValueError(f"{show(key)} has no values in the {window} view")
        return _histogram(state.values, state.weights)

    # -- Per rank

    def per_rank(self, dataset: str | None, name: str) -> list[float | None]:
        """Return what each rank's own values of the interval give; None where it had none.

        A DISTRIBUTION gives its mean, a CATEGORICAL_COUNT its count of values.

        Raises:
            KeyError: there is no such metric.
            ValueError: its handler has no lanes.
        """
        key = self._key(dataset, name)
        handler = self._handlers.of_key[key]
        if not isinstance(handler, LaneHandler):
            raise ValueError(f"{show(key)} has a handler without lanes: no values per rank")
        return [self._rank_value(key, handler, rank) for rank in range(self.world_size)]

    def owner(self, dataset: str | None, name: str, window: View = "interval") -> int | None:
        """Return the rank that the MAX or MIN came from.

        Of several that had it in one reduction the lowest, over several reductions the first. If
        a NaN came in, the rank that it came from. None if the view has no value, or if its owner
        is not known: it came out of a checkpoint, or is a NaN of an earlier interval.

        Raises:
            KeyError: there is no such metric.
            ValueError: it is neither MAX nor MIN.
        """
        key = self._key(dataset, name)
        place = self._reduced.schema.maxs[key]
        if place.stop - place.start != 1:
            raise ValueError(f"{show(key)} is neither a MAX nor a MIN, so no rank owns it")
        totals = self._totals(_check_view(window))
        nans = self._reduced.schema.sums[key].start + NANS
        handler = self._handlers.of_key[key]
        if totals.sums[nans] and isinstance(handler, LaneHandler) and handler.on_nan != "skip":
            ranks = np.flatnonzero(self._reduced.rows.sums[:, nans])
            return int(ranks[0]) if ranks.size else None
        owner = int(totals.owners[place][0])
        return None if owner == NOBODY else owner

    def lacking(self, dataset: str | None, name: str) -> list[int]:
        """Return the ranks that had no value of this metric in the interval, ascending.

        Raises:
            KeyError: there is no such metric.
            ValueError: its handler has no lanes.
        """
        key = self._key(dataset, name)
        place = self._reduced.schema.sums[key]
        if place.start == place.stop:
            raise ValueError(f"{show(key)} has a handler without lanes: it is not known per rank")
        counts = self._reduced.rows.sums[:, place.start + COUNT]
        return [int(rank) for rank in np.flatnonzero(counts == 0)]

    # -- Inside

    def _key(self, dataset: str | None, name: str) -> Key:
        key = (dataset or "", name)
        if key not in self._reduced.schema:
            known = ", ".join(sorted(printed(key).lstrip("_/") for key in self._handlers.of_key))
            raise KeyError(f"there is no {show(key)}; there are: {known or 'none'}")
        return key

    def _totals(self, view: View) -> Totals:
        return self._reduced.run if view == "run" else self._reduced.interval

    def _views(self, window: WindowLike) -> Iterator[tuple[Key, View]]:
        """Yield each key with lanes that its view has values of."""
        for entry in self._reduced.schema:
            if entry.custom:
                continue
            handler = self._handlers.of_key[entry.key]
            view = _choose(window, entry.key[1], handler)
            if self._lanes(view)[0][self._reduced.schema.sums[entry.key].start + COUNT]:
                yield entry.key, view

    def _lanes(self, view: View) -> tuple[list[float], list[float]]:
        """Return the SUM and MAX lanes of a view as numbers, which is quicker key by key."""
        listed = self._listed.get(view)
        if listed is None:
            totals = self._totals(view)
            listed = self._listed[view] = (totals.exact_sums().tolist(), totals.maxs.tolist())
        return listed

    def _state(self, key: Key, view: View) -> ReducedState:
        """Return the merged state of one key."""
        schema = self._reduced.schema
        entry = schema.entries[key]
        sums, maxs = self._lanes(view)
        values, weights = self._pool(entry, view)
        return ReducedState(
            tuple(sums[schema.sums[key]]),
            tuple(maxs[schema.maxs[key]]),
            self._totals(view).seconds,
            values,
            weights,
            entry.categories,
        )

    def _pool(self, entry: Entry, view: View) -> tuple[FloatArray, FloatArray | None]:
        if not entry.capacity:
            return _NOTHING, None
        windows = [self._reduced.schema.window_of(row, entry.key) for row in self._reduced.windows]
        kept = [
            slice(window.values.size - window.fresh, None) if view == "interval" else slice(None)
            for window in windows
        ]
        pairs = list(zip(windows, kept, strict=True))
        values = np.concatenate([window.values[keep] for window, keep in pairs])
        if not entry.weighted:
            return values, None
        return values, np.concatenate(
            [window.weights[keep] for window, keep in pairs if window.weights is not None]
        )

    def _finalized(self, key: Key, view: View) -> dict[str, float]:
        handler = self._handlers.of_key[key]
        assert isinstance(handler, LaneHandler)
        return handler.finalize(self._state(key, view))

    def _rank_value(self, key: Key, handler: LaneHandler, rank: int) -> float | None:
        schema, rows = self._reduced.schema, self._reduced.rows
        sums: Lanes = tuple(rows.sums[rank, schema.sums[key]].tolist())
        if not sums[COUNT]:
            return None
        if isinstance(handler, CategoricalCountAggHandler):
            return sums[COUNT]
        if isinstance(handler, DistributionAggHandler):
            window = schema.window_of(self._reduced.windows[rank], key)
            fresh = slice(window.values.size - window.fresh, None)
            weights = None if window.weights is None else window.weights[fresh]
            state = ReducedState(sums, (), 0.0, window.values[fresh], weights)
            return handler.finalize(state).get("_stat_mean")
        maxs: Lanes = tuple(rows.maxs[rank, schema.maxs[key]].tolist())
        state = ReducedState(sums, maxs, self.seconds)
        return handler.finalize(state).get("")

    def _add_custom(self, window: WindowLike, groups: dict[str, dict[str, float]]) -> None:
        """Add the results of handlers without lanes; one that fails is left out and named."""
        for view in ("run", "interval"):
            for key, label, results in self._reduced.custom.names(view):
                if _choose(window, key[1]) != view:
                    continue
                try:
                    values = combined(key, label, results, self._handlers.of_type.get(label))
                except Exception as error:  # noqa: BLE001 - the user's handler
                    self._warn_once(f"{key}", f"{show(key)} is left out: {error!r}")
                    continue
                group = groups.setdefault(key[0], {})
                for suffix, value in values.items():
                    if key[1] + suffix in group:
                        self._warn_once(
                            f"{key}",
                            f"a custom handler finalised to the name {key[1] + suffix!r}, which "
                            f"another metric of the same dataset prints: that one is kept",
                        )
                    else:
                        group[key[1] + suffix] = value

    def _roll_up(
        self, window: WindowLike, group: dict[str, float], *, rollup: bool, macro: bool
    ) -> None:
        """Add the metrics over all datasets to the group without a dataset."""
        namesakes: dict[str, list[Entry]] = {}
        for entry in self._reduced.schema:
            if entry.key[0] and not entry.custom:
                namesakes.setdefault(entry.key[1], []).append(entry)
        views = dict(self._views(window))
        for name, entries in namesakes.items():
            members = [entry.key for entry in entries if entry.key in views]
            # The same name may be another aggregation in another dataset: those do not add up.
            if len(entries) < 2 or len({entry.type for entry in entries}) > 1 or not members:
                continue
            handler = self._handlers.of_key[members[0]]
            assert isinstance(handler, LaneHandler)
            if rollup:
                merged = _merged([self._state(key, views[key]) for key in members])
                results = handler.finalize(merged)
                group.update({name + suffix: value for suffix, value in results.items()})
            if macro and isinstance(handler, MeanAggHandler):
                if f"{name}_macro" in group:
                    raise ValueError(
                        f"macro=True would print {name}_macro, which is a metric of its own: give "
                        "that one another name"
                    )
                means = [self._finalized(key, views[key]).get("", np.nan) for key in members]
                group[f"{name}_macro"] = float(np.mean(means))

    def _derive(self, groups: Mapping[str, dict[str, float]]) -> None:
        for name, function in self._handlers.derived.items():
            missing: set[str] = set()
            derived_any = False
            for dataset, group in groups.items():
                try:
                    group[name] = float(function(_Recorded(group)))
                    derived_any = True
                except _MissingError as error:
                    missing.add(error.args[0])
                except Exception as error:  # noqa: BLE001 - the user's function; isolated, named
                    derived_any = True
                    where = f"dataset {dataset!r}" if dataset else "all datasets together"
                    self._warn_once(
                        name,
                        f"the derived metric {name!r} failed for {where} and is left out: "
                        f"{error!r}",
                    )
            known = self._printable_names()
            unknown = [metric for metric in sorted(missing) if not known(metric)]
            if unknown and not derived_any:
                self._warn_once(
                    name,
                    f"the derived metric {name!r} needs {', '.join(map(repr, unknown))}, which no "
                    f"dataset has; there are: {', '.join(sorted({key[1] for key in self._keys()}))}",
                )

    def _printable_names(self) -> Callable[[str], bool]:
        """Return what tells whether some key may print a name, now or in another interval."""
        names = [
            name + suffix
            for (_, name), handler in self._handlers.of_key.items()
            for suffix in (handler.suffixes() if isinstance(handler, LaneHandler) else (ANYTHING,))
        ]
        return lambda wanted: any(
            wanted.startswith(name[:-1]) if name.endswith(ANYTHING) else wanted == name
            for name in names
        )

    def _keys(self) -> Iterator[Key]:
        return iter(self._handlers.of_key)

    def _warn_if_empty(self) -> None:
        if self.empty and self._reduced.run.sums.any():
            self._warn_once(
                "",
                "the interval is empty: nothing came in since the reduction before. For two views "
                "of one interval, take both from one snapshot = aggregator.reduce()",
            )

    def _warn_once(self, about: str, message: str) -> None:
        if about not in self._handlers.warned:
            self._handlers.warned.add(about)
            warnings.warn(message, RuntimeWarning, stacklevel=4)


class _MissingError(KeyError):
    """A derived metric asked for a metric that its dataset does not have."""


class _Recorded(dict[str, float]):
    def __missing__(self, name: str) -> float:
        raise _MissingError(name)


def _is_total(handler: AggregationHandler | None) -> bool:
    return isinstance(handler, _TOTALS) and not isinstance(handler, RateAggHandler)


def check_window(window: WindowLike) -> None:
    """Refuse a window that is none."""
    chosen = list(window.values()) if isinstance(window, Mapping) else [window]
    for one in chosen:
        if not isinstance(one, str) or one not in _WINDOWS:
            raise ValueError(
                f"window={one!r}: use 'run', 'interval', 'auto', or a dict from metric names to "
                "those"
            )


def _check_view(window: str) -> View:
    if window not in ("run", "interval"):
        raise ValueError(f"window={window!r}: use 'run' or 'interval'")
    return "run" if window == "run" else "interval"


def _choose(window: WindowLike, name: str, handler: AggregationHandler | None = None) -> View:
    chosen = window if isinstance(window, str) else window.get(name, "auto")
    if chosen == "auto":
        return "run" if _is_total(handler) else "interval"
    return _check_view(chosen)


def _merged(states: list[ReducedState]) -> ReducedState:
    """Merge the states of several datasets."""
    categories = tuple(sorted({category for s in states for category in s.categories}))
    fixed = len(states[0].sums) - len(states[0].categories)
    merged = LaneState(states[0].sums[:fixed], states[0].maxs)
    for state in states[1:]:
        merged.merge(LaneState(state.sums[:fixed], state.maxs))
    if categories:
        counts: dict[str, float] = dict.fromkeys(categories, 0.0)
        for state in states:
            for category, count in zip(state.categories, state.sums[fixed:], strict=True):
                counts[category] += count
        merged.sums += tuple(counts.values())
    weights = None
    if any(state.weights is not None for state in states):
        weights = np.concatenate(
            [np.ones(s.values.size) if s.weights is None else s.weights for s in states]
        )
    return ReducedState(
        merged.sums,
        merged.maxs,
        states[0].seconds,
        np.concatenate([state.values for state in states]),
        weights,
        categories,
    )


def _histogram(values: FloatArray, weights: FloatArray | None) -> Histogram:
    low, high = float(values.min()), float(values.max())
    # Fewer than so many floats between the extremes cannot be cut into buckets.
    narrow = high - low <= _BUCKETS * np.spacing(max(abs(low), abs(high)))
    counts, edges = np.histogram(
        values, bins=1 if narrow else _BUCKETS, range=(low, high), weights=weights
    )
    weighed: Any = 1.0 if weights is None else weights
    return Histogram(
        edges=edges.astype(np.float64),
        counts=counts.astype(np.float64),
        minimum=low,
        maximum=high,
        total=float((values * weighed).sum()),
        total_squares=float((values * values * weighed).sum()),
    )
