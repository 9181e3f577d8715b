"""How values combine: one handler per aggregation.

A built-in handler is four words. *Identity*: zero in every SUM lane, minus infinity in every MAX
lane. *Merge*: SUM lanes add, MAX lanes take the maximum; both are associative and commutative, so
values may be split over workers, ranks and restarts in any way. *Fold*: many values at once become
lanes. *Result*: the lanes of everyone become a number, and only then is anything divided, rooted
or ranked.

    class MeanAggHandler(LaneHandler):
        sum_lanes = ("weighted_sum", "weight")

        def sums_of(self, values, weights): ...            # fold
        def result(self, lanes):                           # result
            return lanes["weighted_sum"] / lanes["weight"]

A handler of your own either declares lanes like that, and then rides in the one packed collective,
or implements the four methods of `AggregationHandler`, which may keep any state it likes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from copy import copy
from dataclasses import dataclass, field
from numbers import Real
from operator import add
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np

from metricfold.histogram.weights import LARGEST_WEIGHT
from metricfold.metric import AggregationType, Metric, MetricState, TypeLike
from metricfold.naming import ANYTHING
from metricfold.pool import (
    EXACT_VALUES,
    FloatArray,
    Pool,
    Window,
    concatenated,
    histogram_from,
    new_histogram,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from collections.abc import Set as AbstractSet

    from metricfold.histogram import LogLinearHistogram

__all__ = [
    "OTHER",
    "AggregationHandler",
    "CategoricalCountAggHandler",
    "CategoryState",
    "DistributionAggHandler",
    "LaneHandler",
    "LaneState",
    "Lanes",
    "MaxAggHandler",
    "MeanAggHandler",
    "MinAggHandler",
    "RateAggHandler",
    "ReducedState",
    "State",
    "SumAggHandler",
    "WindowState",
    "built_in_handlers",
    "percentile_name",
    "quiet",
]

Lanes: TypeAlias = tuple[float, ...]

COUNT, NANS = 0, 1
"""The two SUM lanes that every state begins with: values received, and how many were NaN."""
COMMON_LANES = ("count", "nans")
OTHER = "__other__"
"""Stands for all categories beyond those that are told apart."""


_UNFOLDED = 16_384
"""So many values beyond the most recent ones pile up before they are folded into a histogram: most
intervals bring fewer, and are folded when they are reduced, where no training step waits."""


def quiet() -> np.errstate:
    """Return a context in which sums may overflow to inf, or inf - inf be NaN, without a warning.

    Such results are reported as what they are; a warning for each would drown them.
    """
    return np.errstate(over="ignore", invalid="ignore")


# -- States: what accumulates between two reductions ---------------------------------------------


class LaneState:
    """Fixed-width accumulators: SUM lanes add, MAX lanes take the maximum.

    They are tuples: to add a few numbers, an array would take several times as long.
    """

    __slots__ = ("maxs", "sums")

    def __init__(self, sums: Lanes, maxs: Lanes = ()) -> None:
        self.sums = sums
        self.maxs = maxs

    def merge(self, other: LaneState) -> None:
        self.sums = _added(self.sums, other.sums)
        if self.maxs:
            self.maxs = tuple(map(_larger, self.maxs, other.maxs))

    def copy(self) -> LaneState:
        return LaneState(self.sums, self.maxs)


def _added(one: Lanes, other: Lanes) -> Lanes:
    # What most states have is written out: it takes a third of the time.
    if len(one) == 3:
        a, b, c = one
        d, e, f = other
        return a + d, b + e, c + f
    if len(one) == 5:
        a, b, c, g, h = one
        d, e, f, i, j = other
        return a + d, b + e, c + f, g + i, h + j
    return tuple(map(add, one, other))


def _larger(one: float, other: float) -> float:
    return one if one >= other or math.isnan(one) else other


class WindowState(LaneState):
    """Counting lanes, the most recent finite values in order of arrival, and those before them.

    Args:
        sums: the SUM lanes.
        chunks: values and weights, or None for weights that are all 1, oldest first.
        limit: about so many values are kept as they are; None: all of them.
        older: histogram of the values that came before the chunks.
    """

    __slots__ = ("chunks", "limit", "older", "size")

    def __init__(
        self,
        sums: Lanes,
        chunks: Iterable[tuple[FloatArray, FloatArray | None]] = (),
        limit: int | None = None,
        older: LogLinearHistogram | None = None,
    ) -> None:
        super().__init__(sums)
        self.limit = limit
        self.chunks = deque(chunk for chunk in chunks if chunk[0].size)
        self.size = sum(values.size for values, _ in self.chunks)
        self.older = older

    def _condense(self, limit: int) -> None:
        """Move the oldest chunks to the histogram, but for the newest `limit` values."""
        if self.older is None:
            self.older = new_histogram()
        beyond = []
        while self.size - self.chunks[0][0].size >= limit:
            beyond.append(self.chunks.popleft())
            self.size -= beyond[-1][0].size
        self.older.update(*concatenated(beyond))

    def merge(self, other: LaneState) -> None:
        assert isinstance(other, WindowState)
        self.sums = _added(self.sums, other.sums)
        self.chunks += other.chunks
        self.size += other.size
        if other.older is not None:
            known = [] if self.older is None else [self.older]
            self.older = new_histogram([*known, other.older])
        if self.limit is not None and self.size >= self.limit + _UNFOLDED:
            self._condense(self.limit)

    def copy(self) -> WindowState:
        older = None if self.older is None else self.older.copy()
        return WindowState(self.sums, self.chunks, self.limit, older)

    def window(self) -> Window:
        """Return the newest `limit` values, and all before them as a histogram."""
        values, weights = concatenated(list(self.chunks))
        if self.older is not None:
            self.older.settle()
        window = Window(values, weights, values.size, self.older)
        if self.limit is None or values.size <= self.limit:
            return window
        return window.limited(self.limit)


class CategoryState(LaneState):
    """A total count, and one count per category."""

    __slots__ = ("counts",)

    def __init__(self, sums: Lanes, counts: dict[str, int]) -> None:
        super().__init__(sums)
        self.counts = counts

    def merge(self, other: LaneState) -> None:
        assert isinstance(other, CategoryState)
        self.sums = _added(self.sums, other.sums)
        counts = self.counts
        for category, count in other.counts.items():
            counts[category] = counts.get(category, 0) + count

    def copy(self) -> CategoryState:
        return CategoryState(self.sums, dict(self.counts))

    def keep(self, categories: AbstractSet[str]) -> None:
        """Count all but `categories`, of which `OTHER` is one, as `OTHER`."""
        counts = {name: count for name, count in self.counts.items() if name in categories}
        rest = sum(self.counts.values()) - sum(counts.values())
        counts[OTHER] = counts.get(OTHER, 0) + rest
        self.counts = counts


State: TypeAlias = LaneState


@dataclass(slots=True)
class ReducedState:
    """Everyone's state of one key, as a handler finalises it.

    Args:
        sums: the SUM lanes, first the count of values received and how many of them were NaN.
        maxs: the MAX lanes.
        seconds: wall time that the state speaks about, by the slowest rank's clock.
        pool: the values of a DISTRIBUTION.
        categories: the categories of a CATEGORICAL_COUNT, in the order of their SUM lanes.
    """

    sums: Lanes
    maxs: Lanes
    seconds: float = 0.0
    pool: Pool = field(default_factory=Pool)
    categories: tuple[str, ...] = ()


# -- The contract --------------------------------------------------------------------------------


class AggregationHandler(ABC):
    """How the values of one aggregation type combine.

    Four methods, in the order of a metric's life. The state may hold anything in ``value`` and
    ``metadata``. Because the contract has no merge, a handler keeps, on each rank, one state for
    the run and one for the interval; each reduction gathers what `finalize_local_agg` returns.
    Declare lanes (`LaneHandler`) to ride in the packed collective instead.
    """

    weighted: ClassVar[bool] = True
    """Whether a metric may have a weight other than 1. One of weight 0 never comes here."""

    @abstractmethod
    def initialize_metric_state(
        self, dataset_name: str, metric_name: str, agg_type: TypeLike
    ) -> MetricState:
        """Return the state of a metric that has seen no value yet."""

    @abstractmethod
    def update(self, local_agg_metric: MetricState, metric: Metric) -> None:
        """Take one value into the state, in place."""

    @abstractmethod
    def finalize_local_agg(self, local_agg_metric: MetricState) -> list[MetricState]:
        """Return this rank's results; each is combined by the handler of its own type."""

    @abstractmethod
    def finalize_dist_agg(self, local_agg_metrics: list[MetricState]) -> MetricState:
        """Combine the ranks' results of one name into one; not called for a single result."""

    def serialize_metadata(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """Return `metadata` as JSON can hold it, for a checkpoint."""
        return metadata

    def deserialize_metadata(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """Return what `serialize_metadata` was given."""
        return metadata


class LaneHandler(AggregationHandler):
    """A handler whose state is a few float64 lanes, each combined by SUM or by MAX.

    Declare the lanes by name, fold values into them, and compute the result from the merged
    lanes. ``count``, ``nans`` and ``seconds`` are there in every result. A minimum is the MAX of
    the negative.

    Args:
        on_nan: ``"propagate"`` reports NaN when one came in; ``"skip"`` leaves NaN out and
            reports how many as ``{name}_nan_count``.

    >>> class RMS(LaneHandler):
    ...     sum_lanes = ("squares",)
    ...
    ...     def sums_of(self, values, weights):
    ...         return (float(values @ values),)
    ...
    ...     def result(self, lanes):
    ...         return (lanes["squares"] / (lanes["count"] - lanes["nans"])) ** 0.5
    """

    sum_lanes: ClassVar[tuple[str, ...]] = ()
    max_lanes: ClassVar[tuple[str, ...]] = ()
    weighted: ClassVar[bool] = False
    """Whether weights matter; where they do not, other weights than 1 and 0 are refused."""
    initial: ClassVar[float] = 0.0
    """What `MetricState.value` is before the first value."""

    def __init__(self, *, on_nan: str = "propagate") -> None:
        self.on_nan = check_on_nan(on_nan)

    # What a subclass says.

    def sums_of(self, values: FloatArray, weights: FloatArray | None) -> tuple[float, ...]:
        """Return the SUM lanes of `values`, shape (n,), without NaN; n may be 0."""
        return ()

    def maxs_of(self, values: FloatArray) -> tuple[float, ...]:
        """Return the MAX lanes of `values`, shape (n,), without NaN, n > 0."""
        return ()

    def result(self, lanes: Mapping[str, float]) -> float:
        """Return the metric's value from everyone's merged lanes."""
        raise TypeError(f"{type(self).__name__} declares lanes, but defines no result()")

    # What follows from it.

    @property
    def sum_width(self) -> int:
        return len(COMMON_LANES) + len(self.sum_lanes)

    @property
    def max_width(self) -> int:
        return len(self.max_lanes)

    def empty(self) -> State:
        """Return the identity of the merge."""
        return LaneState((0.0,) * self.sum_width, (-math.inf,) * self.max_width)

    def fold(self, values: FloatArray, weights: FloatArray | None) -> State:
        """Return the state of `values`, shape (n,), with `weights`, or None if all are 1.

        No weight is 0: such a value is left out before.
        """
        if not self.weighted:
            weights = None
        count, nans = values.size, 0
        # A sum is NaN if a value is (or if infinities cancel): one pass instead of two.
        if math.isnan(values.sum()):
            bad = np.isnan(values)
            nans = int(bad.sum())
            values = values[~bad]
            weights = None if weights is None else weights[~bad]
        sums = (float(count), float(nans), *map(float, self.sums_of(values, weights)))
        maxs = tuple(map(float, self.maxs_of(values))) if values.size else self.empty().maxs
        if len(sums) != self.sum_width or len(maxs) != self.max_width:
            raise ValueError(
                f"{type(self).__name__} declares {len(self.sum_lanes)} SUM and {self.max_width} "
                f"MAX lanes, but sums_of() and maxs_of() returned {len(sums) - 2} and {len(maxs)}"
            )
        return LaneState(sums, maxs)

    def suffixes(self) -> tuple[str, ...]:
        """Return what this handler may append to a metric's name; `ANYTHING` stands for any text."""
        return ("", "_nan_count") if self.on_nan == "skip" else ("",)

    def finalize(self, state: ReducedState) -> dict[str, float]:
        """Return what to report, by the suffix that the metric's name takes; may be empty."""
        return self.finalize_lanes(state)

    def finalize_lanes(self, state: ReducedState) -> dict[str, float]:
        """Return what the lanes alone say."""
        count, nans = float(state.sums[COUNT]), float(state.sums[NANS])
        reported: dict[str, float] = {}
        if nans and self.on_nan == "propagate":
            return {"": math.nan}
        if count > nans:
            names = (*COMMON_LANES, *self.sum_lanes, *self.max_lanes)
            lanes = dict(zip(names, (*state.sums, *state.maxs), strict=True))
            lanes["seconds"] = state.seconds
            reported[""] = float(self.result(lanes))
        if nans:
            reported["_nan_count"] = nans
        return reported

    # The contract, for those who call a handler themselves or return a state of a built-in type
    # from a handler of their own.

    def initialize_metric_state(
        self, dataset_name: str, metric_name: str, agg_type: TypeLike
    ) -> MetricState:
        metadata = self._metadata(self.empty())
        return MetricState(dataset_name, metric_name, self.initial, agg_type, metadata)

    def update(self, local_agg_metric: MetricState, metric: Metric) -> None:
        if not metric.weight:
            return
        weights = None if metric.weight == 1.0 else np.array([metric.weight], dtype=np.float64)
        state = self.empty()
        state.merge(self._state_of(local_agg_metric))
        state.merge(self.fold(np.array([metric.value], dtype=np.float64), weights))
        self._store(state, local_agg_metric)

    def finalize_local_agg(self, local_agg_metric: MetricState) -> list[MetricState]:
        return [local_agg_metric]

    def finalize_dist_agg(self, local_agg_metrics: list[MetricState]) -> MetricState:
        first = local_agg_metrics[0]
        merged = self._state_of(first)
        for state in local_agg_metrics[1:]:
            merged.merge(self._state_of(state))
        result = MetricState(first.dataset_name, first.metric_name, 0.0, first.agg_type)
        self._store(merged, result)
        return result

    def report(self, local_agg_metric: MetricState) -> dict[str, float]:
        """Return what to report of a state, by the suffix that the metric's name takes."""
        seconds = local_agg_metric.metadata.get("seconds", math.nan)
        return self.finalize(self._reduced(self._state_of(local_agg_metric), seconds))

    def _store(self, state: State, target: MetricState) -> None:
        target.metadata.update(self._metadata(state))
        target.value = self.report(target).get("", self.initial)

    def _reduced(self, state: State, seconds: float) -> ReducedState:
        return ReducedState(state.sums, state.maxs, seconds)

    def _metadata(self, state: State) -> dict[str, Any]:
        names = (*COMMON_LANES, *self.sum_lanes, *self.max_lanes)
        return dict(zip(names, (*state.sums, *state.maxs), strict=True))

    def _state_of(self, state: MetricState) -> State:
        """Return the state's lanes; a state that carries only a value counts as that one value."""
        if COMMON_LANES[COUNT] not in state.metadata:
            return self.fold(np.array([state.value], dtype=np.float64), None)
        return LaneState(
            tuple(float(state.metadata[lane]) for lane in (*COMMON_LANES, *self.sum_lanes)),
            tuple(float(state.metadata[lane]) for lane in self.max_lanes),
        )


# -- The built-ins -------------------------------------------------------------------------------


class SumAggHandler(LaneHandler):
    """Total of the values; integers are exact up to 2^53."""

    sum_lanes = ("sum",)

    def sums_of(self, values: FloatArray, weights: FloatArray | None) -> tuple[float, ...]:
        return (float(values.sum()),)

    def result(self, lanes: Mapping[str, float]) -> float:
        return lanes["sum"]


class RateAggHandler(SumAggHandler):
    """Total of the values per second of wall time, by the slowest rank's clock.

    Over no time, as in a pause that spans an interval, there is no rate to report.
    """

    def result(self, lanes: Mapping[str, float]) -> float:
        return lanes["sum"] / lanes["seconds"] if lanes["seconds"] else math.nan

    def finalize_lanes(self, state: ReducedState) -> dict[str, float]:
        reported = super().finalize_lanes(state)
        if not state.seconds:
            reported.pop("", None)
        return reported


class MeanAggHandler(LaneHandler):
    """Weighted mean: sum(w * x) / sum(w) over the values of all ranks."""

    sum_lanes = ("weighted_sum", "weight")
    weighted = True

    def sums_of(self, values: FloatArray, weights: FloatArray | None) -> tuple[float, ...]:
        if weights is None:
            return float(values.sum()), float(values.size)
        return float((values * weights).sum()), float(weights.sum())

    def result(self, lanes: Mapping[str, float]) -> float:
        return lanes["weighted_sum"] / lanes["weight"]


class MaxAggHandler(LaneHandler):
    """Largest value."""

    max_lanes = ("max",)
    initial = -math.inf

    def maxs_of(self, values: FloatArray) -> tuple[float, ...]:
        return (float(values.max()),)

    def result(self, lanes: Mapping[str, float]) -> float:
        return lanes["max"]


class MinAggHandler(LaneHandler):
    """Smallest value, kept as the MAX of the negative."""

    max_lanes = ("negative_min",)
    initial = math.inf

    def maxs_of(self, values: FloatArray) -> tuple[float, ...]:
        return (-float(values.min()),)

    def result(self, lanes: Mapping[str, float]) -> float:
        return -lanes["negative_min"]


class DistributionAggHandler(LaneHandler):
    """Mean, std, extrema and percentiles of the values, pooled over all ranks.

    NaN and infinities are left out of the statistics and counted. ``std`` is the sample standard
    deviation: absent for one value, 0.0 when all are equal. With weights, ``mean`` is
    sum(w * x) / sum(w), the variance is unbiased for weights that say how reliable a value is,
    and percentiles interpolate between values placed by cumulative weight, which is NumPy's
    ``linear`` rule when all weights are equal. ``count`` is the number of values that the other
    statistics speak about.

    Args:
        window_size: how many of its most recent values each rank keeps, for the view of the run;
            None: no bound, so that the run's view is about all values.
        percentiles: which percentiles to report, ascending, each in 0..100.
    """

    sum_lanes = ("infinities", "weighted_sum", "weight")
    weighted = True

    def __init__(
        self, window_size: int | None = 1000, percentiles: Sequence[float] = (5, 50, 95)
    ) -> None:
        super().__init__()
        self.window_size = check_window_size(window_size)
        self.percentiles = check_percentiles(percentiles)
        names = [percentile_name(p) for p in self.percentiles]
        self._percentile_suffixes = [f"_stat_{name}" for name in names]
        self._ranks = np.array(self.percentiles) / 100.0
        statistics = ["mean", "min", "max", "std", *names, "count", "nan_count", "inf_count"]
        self._suffixes = tuple(f"_stat_{statistic}" for statistic in statistics)

    @property
    def limit(self) -> int:
        """How many values of an interval each rank keeps as they are."""
        return EXACT_VALUES if self.window_size is None else self.window_size

    def unbounded(self) -> DistributionAggHandler:
        """Return a handler whose view of the run is about all values."""
        unbounded = copy(self)
        unbounded.window_size = None
        return unbounded

    def empty(self) -> WindowState:
        return WindowState((0.0,) * self.sum_width, limit=self.limit)

    def fold(self, values: FloatArray, weights: FloatArray | None) -> WindowState:
        if weights is not None and weights.size and weights.max() > LARGEST_WEIGHT:
            raise ValueError(
                f"the weight {weights.max():g} is too large: a value of a DISTRIBUTION weighs "
                f"{LARGEST_WEIGHT:g} at most"
            )
        count, nans, infinities = values.size, 0, 0
        total = float(values.sum())
        if not math.isfinite(total):
            finite = np.isfinite(values)
            nans = int(np.isnan(values).sum())
            infinities = int(count - finite.sum() - nans)
            values = values[finite]
            weights = None if weights is None else weights[finite]
            total = float(values.sum())
        if weights is None:
            weight = float(values.size)
        else:
            total, weight = float(values @ weights), float(weights.sum())
        sums = (float(count), float(nans), float(infinities), total, weight)
        return WindowState(sums, [(values, weights)])

    def suffixes(self) -> tuple[str, ...]:
        return self._suffixes

    def finalize_lanes(self, state: ReducedState) -> dict[str, float]:
        # NaN is merely counted here.
        weighted_sum, weight = state.sums[-2:]
        return {"": weighted_sum / weight} if weight else {}

    def finalize(self, state: ReducedState) -> dict[str, float]:
        pool = state.pool
        reported: dict[str, float] = {}
        if pool.count:
            low, high = pool.minimum, pool.maximum
            mean, std = pool.moments()
            reported["_stat_mean"] = min(max(mean, low), high)
            reported["_stat_min"] = low
            reported["_stat_max"] = high
            if pool.count > 1:
                reported["_stat_std"] = 0.0 if low == high else std
            found = np.clip(pool.quantiles(self._ranks), low, high).tolist()
            reported.update(zip(self._percentile_suffixes, found, strict=True))
            reported["_stat_count"] = float(pool.count)
        if state.sums[NANS]:
            reported["_stat_nan_count"] = float(state.sums[NANS])
        if state.sums[2]:
            reported["_stat_inf_count"] = float(state.sums[2])
        return reported

    def _reduced(self, state: State, seconds: float) -> ReducedState:
        assert isinstance(state, WindowState)
        window = state.window()
        pool = window.interval() if self.window_size is None else window.recent()
        return ReducedState(state.sums, state.maxs, seconds, pool)

    def _store(self, state: State, target: MetricState) -> None:
        target.metadata.update(self._metadata(state))
        reported = self.report(target)
        target.metadata["statistics"] = {k.removeprefix("_stat_"): v for k, v in reported.items()}
        target.value = reported.get("_stat_mean", self.initial)

    def _metadata(self, state: State) -> dict[str, Any]:
        assert isinstance(state, WindowState)
        window = state.window()
        lanes = dict(zip((*COMMON_LANES, *self.sum_lanes), state.sums, strict=True))
        return {
            **lanes,
            "values": window.values.tolist(),
            "weights": None if window.weights is None else window.weights.tolist(),
            "older": None if window.older is None else window.older.to_dict(),
        }

    def _state_of(self, state: MetricState) -> WindowState:
        if COMMON_LANES[COUNT] not in state.metadata:
            return self.fold(np.array([state.value], dtype=np.float64), None)
        sums = tuple(float(state.metadata[lane]) for lane in (*COMMON_LANES, *self.sum_lanes))
        weights, older = state.metadata["weights"], state.metadata["older"]
        chunk = (
            np.array(state.metadata["values"], dtype=np.float64),
            None if weights is None else np.array(weights, dtype=np.float64),
        )
        return WindowState(sums, [chunk], older=None if older is None else histogram_from(older))


class CategoricalCountAggHandler(LaneHandler):
    """How often each category occurred, reported as ``{name}_count_{category}``.

    Args:
        max_categories: how many categories are told apart, over all ranks and the whole run: the
            first that the ranks agree on. What else occurs is counted as `OTHER`.
    """

    def __init__(self, max_categories: int = 1000) -> None:
        super().__init__()
        self.max_categories = check_max_categories(max_categories)

    def empty(self) -> CategoryState:
        return CategoryState((0.0,) * self.sum_width, {})

    def fold_categories(self, categories: Iterable[str]) -> CategoryState:
        """Return the state of `categories`."""
        counts: dict[str, int] = {}
        for category in categories:
            counts[category] = counts.get(category, 0) + 1
        return CategoryState((float(sum(counts.values())), 0.0), counts)

    def suffixes(self) -> tuple[str, ...]:
        return (f"_count_{ANYTHING}",)

    def finalize(self, state: ReducedState) -> dict[str, float]:
        counts = state.sums[len(COMMON_LANES) :]
        return {
            f"_count_{category}": count
            for category, count in zip(state.categories, counts, strict=True)
            if count
        }

    def update(self, local_agg_metric: MetricState, metric: Metric) -> None:
        if not metric.weight:
            return
        state = self._state_of(local_agg_metric)
        state.merge(self.fold_categories([str(metric.value)]))
        self._store(state, local_agg_metric)

    def _reduced(self, state: State, seconds: float) -> ReducedState:
        assert isinstance(state, CategoryState)
        counts = tuple(float(count) for count in state.counts.values())
        return ReducedState(
            state.sums + counts, state.maxs, seconds, categories=tuple(state.counts)
        )

    def _store(self, state: State, target: MetricState) -> None:
        target.metadata.update(self._metadata(state))
        target.value = float(state.sums[COUNT])

    def _metadata(self, state: State) -> dict[str, Any]:
        assert isinstance(state, CategoryState)
        return {"count": float(state.sums[COUNT]), "counts": dict(state.counts)}

    def _state_of(self, state: MetricState) -> CategoryState:
        if COMMON_LANES[COUNT] not in state.metadata:
            return self.fold_categories([str(state.value)])
        counts = state.metadata["counts"]
        return CategoryState((float(sum(counts.values())), 0.0), dict(counts))


def built_in_handlers(
    window_size: int | None = 1000,
    percentiles: Sequence[float] = (5, 50, 95),
    on_nan: str = "propagate",
    max_categories: int = 1000,
) -> dict[TypeLike, AggregationHandler]:
    """Return a handler for every type that has one from the start."""
    return {
        AggregationType.SUM: SumAggHandler(on_nan=on_nan),
        AggregationType.MEAN: MeanAggHandler(on_nan=on_nan),
        AggregationType.MAX: MaxAggHandler(on_nan=on_nan),
        AggregationType.MIN: MinAggHandler(on_nan=on_nan),
        AggregationType.DISTRIBUTION: DistributionAggHandler(window_size, percentiles),
        AggregationType.CATEGORICAL_COUNT: CategoricalCountAggHandler(max_categories),
        AggregationType.RATE: RateAggHandler(on_nan=on_nan),
    }


def percentile_name(percentile: float) -> str:
    """Return ``p05`` for 5, ``p50`` for 50 and ``p99.9`` for 99.9."""
    whole, _, fraction = np.format_float_positional(percentile, trim="-").partition(".")
    return f"p{int(whole):02d}.{fraction}" if fraction else f"p{int(whole):02d}"


# -- Checks --------------------------------------------------------------------------------------


def check_window_size(size: object) -> int | None:
    if size is None:
        return None
    if isinstance(size, bool) or not isinstance(size, int | np.integer) or size <= 0:
        raise ValueError(
            f"the window size is {size!r}: give the number of recent values that each rank keeps, "
            "1 or more, or None for all"
        )
    return int(size)


def check_max_categories(most: object) -> int:
    if isinstance(most, bool) or not isinstance(most, int | np.integer) or most <= 0:
        raise ValueError(
            f"max_categories={most!r}: give the number of categories to tell apart, 1 or more"
        )
    return int(most)


def check_percentiles(percentiles: Sequence[float]) -> tuple[float, ...]:
    try:
        given = tuple(percentiles)
    except TypeError:
        raise TypeError(
            f"percentiles={percentiles!r}: give a list of numbers in 0..100, such as (5, 50, 95)"
        ) from None
    for percentile in given:
        if not isinstance(percentile, Real) or isinstance(percentile, bool):
            raise TypeError(
                f"percentiles={percentiles!r}: {percentile!r} is no number: give a list of numbers "
                "in 0..100, such as (5, 50, 95)"
            )
        if not 0 <= percentile <= 100:
            raise ValueError(f"percentiles={percentiles!r}: each must lie in 0..100")
    if given and max(given) <= 1 and any(0 < percentile < 1 for percentile in given):
        hundred = [round(float(percentile) * 100, 6) for percentile in given]
        meant = tuple(int(one) if one.is_integer() else one for one in hundred)
        raise ValueError(
            f"percentiles={percentiles!r} are fractions, but percentiles lie in 0..100: write "
            f"percentiles={meant!r}. If you do mean those below the first, give one above it too"
        )
    checked = tuple(map(float, given))
    if list(checked) != sorted(set(checked)):
        raise ValueError(f"percentiles={percentiles!r}: give them ascending, each once")
    return checked


def check_on_nan(on_nan: str) -> str:
    if on_nan not in ("propagate", "skip"):
        raise ValueError(f"on_nan={on_nan!r}: use 'propagate' or 'skip'")
    return on_nan
