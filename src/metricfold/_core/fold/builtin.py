"""The handlers that are there from the start: identity, merge, fold and result of each.

                    SUM lanes                          MAX lanes     besides
    SUM, RATE       sum
    MEAN            weighted_sum, weight
    MEAN, spread    weighted_sum, weight, and of the values that came one by one: each_sum,
                    each_weight, squares, weight_squares
    MAX                                                max
    MIN                                                negative_min
    LAST                                               last
    DISTRIBUTION    infinities, weighted_sum, weight                 the sample
    CATEGORICAL                                                      the counts

All have ``count`` and ``nans`` before these. `fold_listed` takes Python's own numbers, which NumPy
would need longer for than all the rest takes.
"""

from __future__ import annotations

import logging
import math
import reprlib
from copy import copy
from dataclasses import replace
from functools import cached_property
from numbers import Real
from operator import mul
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np

from metricfold._core.fold.contract import CountsWriting, MeanWriting, SampleWriting, Writing
from metricfold._core.fold.elements import ELEMENT_TYPES
from metricfold._core.fold.handlers import AggregationHandler, LaneHandler, check_choice
from metricfold._core.fold.names import ANYTHING, show
from metricfold._core.fold.sample import EXACT_VALUES
from metricfold._core.fold.state import (
    COMMON_LANES,
    COUNT,
    NANS,
    ReducedState,
    ReducedStates,
    Results,
    Sample,
    State,
)
from metricfold._core.fold.statistics import Pools, statistics
from metricfold._core.sketch.weights import LARGEST_WEIGHT
from metricfold.metric import AggregationType, TypeLike, escaped, is_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from metricfold._core.fold.names import Key
    from metricfold._core.fold.sample import FloatArray


_logger = logging.getLogger("metricfold")


OfEach: TypeAlias = "tuple[Sequence[FloatArray], Sequence[FloatArray]] | None"


class SumAggHandler(LaneHandler):
    """Total of the values; integers are exact up to 2^53."""

    sum_lanes = ("sum",)
    is_total = True
    value_is_all = True

    def sums_of(self, values: FloatArray, weights: FloatArray | None) -> tuple[float, ...]:
        return (float(values.sum()),)

    def lanes_of_each(self, values: FloatArray, weights: FloatArray) -> OfEach:
        return ((values,), ()) if folds_as(self) else None

    def fold_listed(self, values: Sequence[float], weights: Sequence[float] | None) -> State:
        total = _total(values)
        if total is None:
            return super().fold_listed(values, weights)
        return State((float(len(values)), 0.0, total))

    def result(self, lanes: Mapping[str, Any]) -> Any:
        return lanes["sum"]

    results = result


class RateAggHandler(SumAggHandler):
    """Total of the values per second of wall time, by the slowest rank's clock.

    Over no time, as in a pause that spans an interval, there is no rate to report. By the contract
    the value is the total, which is divided where it is reported.
    """

    is_total = False
    seconds_by_hand = 1.0

    def result(self, lanes: Mapping[str, Any]) -> Any:
        return lanes["sum"] / lanes["seconds"] if lanes["seconds"] else math.nan

    def results(self, lanes: Mapping[str, Any]) -> FloatArray:
        return np.where(lanes["seconds"] == 0, math.nan, lanes["sum"] / lanes["seconds"])

    def finalize_lanes(self, state: ReducedState) -> dict[str, float]:
        reported = super().finalize_lanes(state)
        if not state.seconds:
            reported.pop("", None)
        return reported

    def finalize_all(self, states: ReducedStates) -> Results:
        values, there = super().finalize_all(states)
        there[:, 0] &= states.seconds != 0
        return values, there


class MeanAggHandler(LaneHandler):
    """Weighted mean: sum(w * x) / sum(w) over the values of all ranks."""

    sum_lanes: ClassVar[tuple[str, ...]] = ("weighted_sum", "weight")
    weighted = True
    is_mean = True
    writing: ClassVar[Writing] = MeanWriting()

    def goes_on_from(self, sums: int) -> bool:
        return sums in _MEAN_WIDTHS

    def sums_of(self, values: FloatArray, weights: FloatArray | None) -> tuple[float, ...]:
        if weights is None:
            return float(values.sum()), float(values.size)
        return float((values * weights).sum()), float(weights.sum())

    def lanes_of_each(self, values: FloatArray, weights: FloatArray) -> OfEach:
        return ((values * weights, weights), ()) if folds_as(self) else None

    def fold_listed(self, values: Sequence[float], weights: Sequence[float] | None) -> State:
        count = float(len(values))
        total = _total(values if weights is None else map(mul, values, weights))
        weight = count if weights is None else _total(weights)
        if total is None or weight is None:
            return super().fold_listed(values, weights)
        return State((count, 0.0, total, weight))

    def result(self, lanes: Mapping[str, Any]) -> Any:
        # Nothing that came in weighs nothing, but another rank may send what it likes.
        return lanes["weighted_sum"] / lanes["weight"] if lanes["weight"] else math.nan

    def results(self, lanes: Mapping[str, Any]) -> FloatArray:
        return np.where(lanes["weight"] == 0, math.nan, lanes["weighted_sum"] / lanes["weight"])


class SpreadMeanAggHandler(MeanAggHandler):
    """Weighted mean, and its standard error: of the values that came one by one, as if drawn at random.

    What has been folded without squares (on a device, by a data worker, in an earlier checkpoint) is in
    the mean, but says nothing of its error.
    """

    sum_lanes = (
        *MeanAggHandler.sum_lanes,
        *("each_sum", "each_weight", "squares", "weight_squares"),
    )
    writing = Writing()

    def sums_of(self, values: FloatArray, weights: FloatArray | None) -> tuple[float, ...]:
        total, weight = super().sums_of(values, weights)
        weighing = np.ones_like(values) if weights is None else weights
        squares = float(weighing @ values**2), float(weighing @ weighing)
        return total, weight, total, weight, *squares

    def lanes_of_each(self, values: FloatArray, weights: FloatArray) -> OfEach:
        total = values * weights
        return (total, weights, total, weights, total * values, weights**2), ()

    def fold_listed(self, values: Sequence[float], weights: Sequence[float] | None) -> State:
        state = super().fold_listed(values, weights)
        if len(state.sums) == self.sum_width:  # something is not finite
            return state
        weighing = (1.0,) * len(values) if weights is None else weights
        squares = sum(map(mul, weighing, map(mul, values, values)))
        lanes = (*state.sums, *state.sums[-2:], squares, sum(map(mul, weighing, weighing)))
        return replace(state, sums=tuple(map(float, lanes)))

    def fitted(self, state: State) -> State:
        if not state.axes:
            return replace(state, sums=(*state.sums, *(0.0,) * (self.sum_width - len(state.sums))))
        sums = np.zeros((len(state.sums), self.sum_width))
        sums[:, : len(COMMON_LANES) + len(MeanAggHandler.sum_lanes)] = state.sums
        return State.of_cells(sums, np.asarray(state.maxs), state.axes, state.places)

    def suffixes(self) -> tuple[str, ...]:
        return *super().suffixes(), "_weight", "_stderr"

    def finalize(self, state: ReducedState) -> dict[str, float]:
        return self._finalized(state)

    def columns(self, categories: tuple[str, ...]) -> tuple[str, ...]:
        return *super().columns(categories), "_weight", "_stderr"

    def finalize_all(self, states: ReducedStates) -> Results:
        values, there = super().finalize_all(states)
        weight = states.sums[:, self.lane_names.index("weight")]
        each_sum, each_weight, squares, weight_squares = states.sums[:, -4:].T
        with np.errstate(all="ignore"):
            # So many values of equal weights would say as much (Kish).
            number = each_weight**2 / weight_squares
            variance = np.maximum(squares / each_weight - (each_sum / each_weight) ** 2, 0.0)
            errors = np.sqrt(variance / (number - 1))
            known = there[:, 0] & np.isfinite(values[:, 0]) & (number > 1 + _ROUNDED)
        more = np.stack([weight, np.where(known, errors, math.nan)], axis=1)
        return np.hstack([values, more]), np.hstack([there, there[:, :1], known[:, np.newaxis]])


_ROUNDED = 1e-9
"""A number of values that exceeds 1 by no more is 1."""

_MEAN_WIDTHS = {
    len(COMMON_LANES) + len(kind.sum_lanes) for kind in (MeanAggHandler, SpreadMeanAggHandler)
}


class _ExtremeAggHandler(LaneHandler):
    """The largest of the values, each times `sign`."""

    sign: ClassVar[float]
    value_is_all = True

    def maxs_of(self, values: FloatArray) -> tuple[float, ...]:
        return (float((self.sign * values).max()),)

    def lanes_of_each(self, values: FloatArray, weights: FloatArray) -> OfEach:
        return ((), (self.sign * values,)) if folds_as(self) else None

    def fold_listed(self, values: Sequence[float], weights: Sequence[float] | None) -> State:
        if not values or _total(values) is None:
            return super().fold_listed(values, weights)
        extreme = max(values) if self.sign > 0 else min(values)
        return State((float(len(values)), 0.0), (self.sign * extreme,))

    def result(self, lanes: Mapping[str, Any]) -> Any:
        return self.sign * lanes[self.max_lanes[0]]

    results = result


class MaxAggHandler(_ExtremeAggHandler):
    """Largest value."""

    max_lanes = ("max",)
    initial = -math.inf
    sign = 1.0


class MinAggHandler(_ExtremeAggHandler):
    """Smallest value, kept as the MAX of the negative."""

    max_lanes = ("negative_min",)
    initial = math.inf
    sign = -1.0


class LastAggHandler(LaneHandler):
    """The value recorded last.

    Over ranks it is that of the lowest rank that recorded one, over time that of the newest interval
    in which one was recorded. It is a value of one rank, so there is none over datasets. NaN is a value
    like any other, unless it is skipped.
    """

    max_lanes = ("last",)
    initial = math.nan
    is_last = True

    def fold(self, values: FloatArray, weights: FloatArray | None) -> State:
        numbers = values[~np.isnan(values)] if self.on_nan == "skip" else values
        nans = float(values.size - numbers.size)
        maxs = (float(numbers[-1]),) if numbers.size else self.empty().maxs
        return State((float(values.size), nans), maxs, latest=True)

    def result(self, lanes: Mapping[str, Any]) -> Any:
        return lanes["last"]

    results = result


class DistributionAggHandler(LaneHandler):
    """Mean, std, extrema and percentiles of the values, pooled over all ranks.

    NaN and infinities are left out of the statistics and counted. ``std`` is the sample standard
    deviation: absent for one value, 0.0 when all are equal. With weights, ``mean`` is
    sum(w * x) / sum(w) and the variance is unbiased for weights that say how reliable a value is.
    Percentiles are NumPy's by its ``linear`` rule, each value repeated as often as its weight says;
    weights that come to less than one a value are scaled to that. ``count`` is the number of values
    that the other statistics speak about.

    Args:
        window_size: how many of its most recent values each rank keeps, for the view of the run;
            None: no bound, so that the run's view is about all values.
        percentiles: which percentiles to report, ascending, each in 0..100.
    """

    sum_lanes = ("infinities", "weighted_sum", "weight")
    weighted = True
    has_sample = True
    writing = SampleWriting()

    def __init__(
        self, window_size: int | None = 1000, percentiles: Sequence[float] = (5, 50, 95)
    ) -> None:
        super().__init__()
        if window_size is not None:
            name = f"; if that is the aggregator's name, write name={window_size!r}"
            window_size = _check_count(
                window_size,
                f"the window size is {window_size!r}: give the number of recent values that each rank "
                f"keeps, 1 or more, or None for all{name * isinstance(window_size, str)}",
            )
        self.window_size = window_size
        self.percentiles = _check_percentiles(percentiles)
        names = (*statistics(self.percentiles), "nan_count", "inf_count")
        self._suffixes = tuple(f"_stat_{name}" for name in names)

    @property
    def sample_limit(self) -> int:
        return EXACT_VALUES if self.window_size is None else self.window_size

    @property
    def is_bounded(self) -> bool:
        return self.window_size is not None

    def unbounded(self) -> DistributionAggHandler:
        unbounded = copy(self)
        unbounded.window_size = None
        return unbounded

    def empty(self) -> State:
        return State((0.0,) * self.sum_width, sample=Sample(limit=self.sample_limit))

    def fold(self, values: FloatArray, weights: FloatArray | None) -> State:
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
        return State(sums, sample=Sample([(values, weights)]))

    def suffixes(self) -> tuple[str, ...]:
        return self._suffixes

    def finalize_lanes(self, state: ReducedState) -> dict[str, float]:
        # NaN is merely counted here.
        weighted_sum, weight = state.sums[-2:]
        return {"": weighted_sum / weight} if weight else {}

    def columns(self, categories: tuple[str, ...]) -> tuple[str, ...]:
        return self._suffixes

    def finalize(self, state: ReducedState) -> dict[str, float]:
        return self._finalized(state)

    def finalize_all(self, states: ReducedStates) -> Results:
        table = statistics(self.percentiles)
        values = np.zeros((len(states.sums), len(self._suffixes)))
        values[:, -2:] = states.sums[:, (NANS, NANS + 1)]
        there = values > 0
        full = [place for place, pool in enumerate(states.pools) if pool.count]
        if full:
            found = Pools.of([states.pools[place] for place in full], self.percentiles)
            least = [one.least for one in table.values()]
            values[full, :-2] = np.stack([one.of(found) for one in table.values()], axis=1)
            there[full, :-2] = found.count[:, np.newaxis] >= least
        return values, there


class CategoricalCountAggHandler(LaneHandler):
    """How often each category occurred, reported as ``{name}_count_{category}``.

    Args:
        max_categories: how many categories are told apart, over all ranks and the whole run: the
            first that the ranks agree on. What else occurs is counted as `OTHER`.
        on_bad_name: what becomes of a category that is empty or cannot be printed: ``"replace"``
            counts it as ``__empty__``, or with what cannot be printed spelled out, and warns of a
            metric's first; ``"refuse"`` raises ValueError.
    """

    is_total = True
    has_counts = True
    takes = str
    writing = CountsWriting()

    def __init__(self, max_categories: int = 1000, *, on_bad_name: str = "replace") -> None:
        super().__init__()
        self.max_categories = _check_count(
            max_categories,
            f"max_categories={max_categories!r}: give the number of categories to tell apart, 1 or more",
        )
        self.on_bad_name = check_on_bad_name(on_bad_name)
        self._told: set[tuple[str, str]] = set()

    @property
    def most_categories(self) -> int:
        return self.max_categories

    def empty(self) -> State:
        return State((0.0,) * self.sum_width, counts={})

    def fold_listed(self, values: Sequence[str], weights: Sequence[float] | None) -> State:
        counts: dict[str, int] = {}
        for category in values:
            counts[category] = counts.get(category, 0) + 1
        bad = [category for category in counts if not is_name(category)]
        for category in bad:
            name, count = self._printable(category), counts.pop(category)
            counts[name] = counts.get(name, 0) + count
        replaced = bad[0] if bad else None
        return State((float(len(values)), 0.0), counts=counts, replaced=replaced)

    def _printable(self, category: str) -> str:
        if self.on_bad_name == "replace":
            return escaped(category)
        if not category:
            raise ValueError("the category is empty: give it a text, such as 'none'")
        raise ValueError(
            f"the category {reprlib.repr(category)} holds a line break or another unprintable "
            "character: give a text on one line"
        )

    def tell(self, key: Key, replaced: str) -> None:
        if key not in self._told:
            self._told.add(key)
            _logger.warning(
                "%s has a category that cannot be printed, %s, which counts as %r: all such are "
                "spelled out. on_bad_name='refuse' refuses them",
                show(key),
                reprlib.repr(replaced),
                escaped(replaced),
            )

    def suffixes(self) -> tuple[str, ...]:
        return (f"_count_{ANYTHING}",)

    def finalize_lanes(self, state: ReducedState) -> dict[str, float]:
        return {"": float(state.sums[COUNT])}

    def columns(self, categories: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(f"_count_{category}" for category in categories)

    def finalize(self, state: ReducedState) -> dict[str, float]:
        return self._finalized(state)

    def finalize_all(self, states: ReducedStates) -> Results:
        counts = states.sums[:, len(COMMON_LANES) :]
        return counts, counts != 0


def built_in_handlers(
    window_size: int | None = 1000,
    percentiles: Sequence[float] = (5, 50, 95),
    on_nan: str = "propagate",
    max_categories: int = 1000,
    on_bad_name: str = "replace",
    *,
    spread: bool = False,
) -> dict[TypeLike, AggregationHandler]:
    """Return a handler for every type that has one from the start."""
    mean = SpreadMeanAggHandler if spread else MeanAggHandler
    return {
        AggregationType.SUM: SumAggHandler(on_nan=on_nan),
        AggregationType.MEAN: mean(on_nan=on_nan),
        AggregationType.MAX: MaxAggHandler(on_nan=on_nan),
        AggregationType.MIN: MinAggHandler(on_nan=on_nan),
        AggregationType.LAST: LastAggHandler(on_nan=on_nan),
        AggregationType.DISTRIBUTION: DistributionAggHandler(window_size, percentiles),
        AggregationType.CATEGORICAL_COUNT: CategoricalCountAggHandler(
            max_categories, on_bad_name=on_bad_name
        ),
        AggregationType.RATE: RateAggHandler(on_nan=on_nan),
    }


def folds_as(handler: AggregationHandler | None) -> type[LaneHandler] | None:
    """Return the class here that folds just as `handler` does, if one does.

    A subclass, or an object of which something has been replaced, may fold otherwise.
    """
    kind = type(handler)
    if kind not in _BUILT_IN or not vars(handler).keys().isdisjoint(_REPLACEABLE):
        return None
    assert issubclass(kind, LaneHandler)
    return kind


def _total(numbers: Iterable[float]) -> float | None:
    """Return the sum, exact up to one rounding; None for NaN, infinities and an overflow."""
    try:
        total = math.fsum(numbers)
    except (OverflowError, ValueError):
        return None
    return total if math.isfinite(total) else None


# -- Checks --------------------------------------------------------------------------------------


def _check_count(count: object, message: str) -> int:
    if isinstance(count, bool) or not isinstance(count, int | np.integer) or count <= 0:
        raise ValueError(message)
    return int(count)


def _check_percentiles(percentiles: Sequence[float]) -> tuple[float, ...]:
    given_as = f"percentiles={percentiles!r}"
    wanted = "give a list of numbers in 0..100, such as (5, 50, 95)"
    try:
        given = tuple(percentiles)
    except TypeError:
        raise TypeError(f"{given_as}: {wanted}") from None
    for percentile in given:
        if not isinstance(percentile, Real) or isinstance(percentile, bool):
            raise TypeError(f"{given_as}: {percentile!r} is no number: {wanted}")
        if not 0 <= percentile <= 100:
            raise ValueError(f"{given_as}: each must lie in 0..100")
    if given and max(given) <= 1 and any(0 < percentile < 1 for percentile in given):
        hundred = [round(float(percentile) * 100, 6) for percentile in given]
        meant = tuple(int(one) if one.is_integer() else one for one in hundred)
        raise ValueError(
            f"{given_as} are fractions, but percentiles lie in 0..100: write percentiles={meant!r}. "
            "If you do mean those below the first, give one above it too"
        )
    checked = tuple(map(float, given))
    if list(checked) != sorted(set(checked)):
        raise ValueError(f"{given_as}: give them ascending, each once")
    return checked


def check_on_bad_name(on_bad_name: str) -> str:
    return check_choice("on_bad_name", on_bad_name, "replace", "refuse")


_BUILT_IN = {
    *map(type, built_in_handlers().values()),
    SpreadMeanAggHandler,
    *ELEMENT_TYPES.values(),
}
_REPLACEABLE = {
    name
    for kind in _BUILT_IN
    for name in dir(kind)
    if not isinstance(getattr(kind, name), cached_property)
}
"""What an object may have of its own in the place of its class's."""
