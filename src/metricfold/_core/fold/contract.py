"""A `MetricState` as a `State` that is written down, for those who call a handler with lanes themselves.

Its metadata say what the parts hold, as a `Writing` knows, and its value what these come to. A value
that somebody has set since then is meant, and counts instead of them.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter, deque
from collections.abc import Mapping
from operator import mul
from typing import TYPE_CHECKING, Any

import numpy as np

from metricfold._core.device import arrays
from metricfold._core.fold.sample import FloatArray, histogram_from
from metricfold._core.fold.state import NANS, OTHER, Lanes, ReducedState, State
from metricfold._core.fold.values import category_of, named, number_of
from metricfold.metric import Metric, MetricState, escaped, is_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from metricfold._core.fold.handlers import AggregationHandler, LaneHandler


STORED = "__value__"
"""Marks metadata as those of a state of lanes, and says what value they came to."""


def travelling(handler: AggregationHandler | None, result: MetricState) -> tuple[Any, Any]:
    """Return the value and the metadata of a rank's result as other ranks get to see them."""
    value, metadata = result.value, result.metadata
    if handler is not None and handler.has_lanes:
        # Whatever else the metadata hold is the business of who made them.
        with contextlib.suppress(TypeError, ValueError):  # said where the result is missed
            result = handler.finalize_dist_agg([result])
            return result.value, result.metadata
        metadata = {}
    elif handler is not None:
        metadata = handler.serialize_metadata(metadata)
    if arrays.backend_of(value) is not None:
        with contextlib.suppress(TypeError):
            value = number_of(value)
    return value, metadata


def write(handler: LaneHandler, state: State, target: MetricState) -> None:
    writing, metadata = handler.writing, target.metadata
    metadata.update(writing.written(handler, state))
    seconds = metadata.get("seconds", handler.seconds_by_hand)
    target.value = metadata[STORED] = writing.value_of(handler, state, seconds)


def state_of(handler: LaneHandler, target: MetricState, *, finished: bool = True) -> State:
    """Return what anyone's state holds; its value, where its metadata do not say.

    The value of one that is `finished`, to which nothing is added any more, stands for one value at
    least; until then it may be no more than what it began with.
    """
    state = handler.writing.read(handler, target.metadata)
    if state is not None and not is_set(target):
        return state
    return handler.writing.standing_for(handler, target.value, state, finished=finished)


def is_set(state: MetricState) -> bool:
    """Return whether the value is another one than what the metadata came to."""
    stored = state.metadata.get(STORED, state.value)
    if state.value is stored:
        return False
    try:
        value = number_of(state.value)
    except TypeError:
        return True
    return value != stored and not (math.isnan(value) and stored != stored)  # noqa: PLR0124


def reduced(handler: LaneHandler, state: State, seconds: float) -> ReducedState:
    """Return a state as if it were everyone's."""
    reduced = ReducedState(state.sums, state.maxs, seconds)
    if state.counts is not None:
        reduced.categories = tuple(state.counts)
        reduced.sums = (*state.sums, *map(float, state.counts.values()))
    if state.sample is not None:
        window = state.sample.window()
        reduced.pool = window.recent() if handler.is_bounded else window.interval()
    return reduced


class Writing:
    """How a state stands in metadata: here each lane under its name."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def written(self, handler: LaneHandler, state: State) -> dict[str, Any]:
        """Return the metadata of `state`."""
        return dict(zip(handler.lane_names, (*state.sums, *state.maxs), strict=True))

    def read(self, handler: LaneHandler, metadata: Mapping[str, Any]) -> State | None:
        """Return what `metadata` say, or None if they are not of this type."""
        names = handler.lane_names
        # States of the first version bear no mark, but have these names and no others.
        if STORED not in metadata and metadata.keys() != set(names):
            return None
        lanes = _numbers_in(metadata, names)
        width = handler.sum_width
        if lanes is None:
            return None
        return State(lanes[:width], lanes[width:], latest=handler.is_last)

    def value_of(self, handler: LaneHandler, state: State, seconds: float) -> float:
        """Return what `MetricState.value` says of `state`."""
        lanes = ReducedState(state.sums, state.maxs, seconds)
        return handler.finalize_lanes(lanes).get("", handler.initial)

    def standing_for(
        self, handler: LaneHandler, value: Any, held: State | None, *, finished: bool
    ) -> State:
        """Return what a state comes to whose value alone is known, or differs from what is `held`."""
        if not finished and (value is None or not handler.value_is_all):
            return handler.empty() if held is None else held
        one = handler.fold(np.array([number_of(value)]), None)
        if held is not None and held.sums[NANS]:
            nans = handler.empty()
            nans.sums = (held.sums[NANS],) * 2 + nans.sums[2:]
            one.merge(nans)
        return one

    def combined(self, held: Sequence[State], values: Sequence[Any]) -> float | None:
        """Return what values come to some of which have been set; None: what is held says it."""
        return None

    def add(self, handler: LaneHandler, metric: Metric, target: MetricState) -> None:
        """Take one value into a state, in place."""
        state = state_of(handler, target, finished=False)
        state.merge(_folded(handler, metric))
        write(handler, state, target)


class MeanWriting(Writing):
    """The sum and the count, each value as often as its weight says."""

    def written(self, handler: LaneHandler, state: State) -> dict[str, Any]:
        _, nans, weighted_sum, weight = state.sums
        return {"sum": weighted_sum, "count": weight, "nans": nans}

    def read(self, handler: LaneHandler, metadata: Mapping[str, Any]) -> State | None:
        first_version = "weighted_sum" in metadata and STORED not in metadata
        names = ("weighted_sum", "weight") if first_version else ("sum", "count")
        lanes = _numbers_in(metadata, names)
        if lanes is None or not 0 <= lanes[1] < math.inf:
            return None
        (nans,) = _numbers_in(metadata, ("nans",)) or (0.0,)
        return State((lanes[1] + nans, nans, *lanes))

    def standing_for(
        self, handler: LaneHandler, value: Any, held: State | None, *, finished: bool
    ) -> State:
        if held is None or not held.sums[-1]:
            return super().standing_for(handler, value, held, finished=finished)
        *counts, _, weight = held.sums
        return State((*counts, number_of(value) * weight, weight))


class SampleWriting(Writing):
    """The recent values, and a histogram of those before them if there is no bound."""

    def written(self, handler: LaneHandler, state: State) -> dict[str, Any]:
        assert state.sample is not None
        window = state.sample.window()
        _, nans, infinities, *_ = state.sums
        older = None if handler.is_bounded else window.older
        found = handler.finalize(reduced(handler, state, math.nan))
        return {
            "values": window.values.tolist(),
            "weights": None if window.weights is None else window.weights.tolist(),
            "older": None if older is None else older.to_dict(),
            "nans": nans,
            "infinities": infinities,
            "statistics": {name.removeprefix("_stat_"): value for name, value in found.items()},
        }

    def read(self, handler: LaneHandler, metadata: Mapping[str, Any]) -> State | None:
        values = _array_of(metadata.get("values"))
        weights = metadata.get("weights")
        if values is None:
            return None
        if weights is not None:
            weights = _array_of(weights)
            if weights is None:
                return None
            weights = np.concatenate([weights, np.ones(max(values.size - weights.size, 0))])
            weights = weights[weights.size - values.size :]
        state = handler.fold(values, weights)
        found = (_numbers_in(metadata, (name,)) or (0.0,) for name in ("nans", "infinities"))
        (nans,), (infinities,) = found
        lanes = zip(state.sums, (nans + infinities, nans, infinities, 0.0, 0.0), strict=True)
        state.sums = tuple(here + more for here, more in lanes)
        if isinstance(older := metadata.get("older"), Mapping):
            assert state.sample is not None
            state.sample.older = histogram_from(older)
        return state

    def value_of(self, handler: LaneHandler, state: State, seconds: float) -> float:
        found = handler.finalize(reduced(handler, state, seconds))
        return found.get("_stat_mean", handler.initial)

    def standing_for(
        self, handler: LaneHandler, value: Any, held: State | None, *, finished: bool
    ) -> State:
        # A set value is the mean that somebody wants to see; the values stay what they are.
        if held is not None:
            return held
        return super().standing_for(handler, value, None, finished=finished)

    def combined(self, held: Sequence[State], values: Sequence[Any]) -> float:
        weights = [state.sums[-1] for state in held]
        total: float = sum(map(mul, map(number_of, values), weights), 0.0)
        return total / (sum(weights) or math.nan)

    def add(self, handler: LaneHandler, metric: Metric, target: MetricState) -> None:
        metadata, one = target.metadata, _folded(handler, metric)
        # In place: a copy of the window for each value would cost as much as it is large.
        if not isinstance(metadata.get("values"), list | deque):
            metadata.update(self.written(handler, state_of(handler, target, finished=False)))
        for name, more in zip(("nans", "infinities"), one.sums[NANS:], strict=False):
            metadata[name] = metadata.get(name, 0.0) + more
        if one.sample is not None and one.sample.size:
            most = handler.sample_limit if handler.is_bounded else None
            _append(metadata, number_of(metric.value), number_of(metric.weight), most)
        values = metadata["values"]
        if not handler.is_bounded and len(values) >= 2 * handler.sample_limit:
            state = self.read(handler, metadata)
            assert state is not None
            assert state.sample is not None
            state.sample.limit = handler.sample_limit
            metadata.update(self.written(handler, state))
        metadata.pop("statistics", None)
        if values and metadata.get("older") is None:  # else its mean takes more than a sum
            weights = metadata.get("weights") or [1.0] * len(values)
            target.value = sum(map(mul, values, weights)) / sum(weights)
            metadata[STORED] = target.value = float(target.value)


def _append(metadata: dict[str, Any], value: float, weight: float, most: int | None) -> None:
    """Append a value to the window, of which at most so many are kept."""
    values, weights = metadata["values"], metadata.get("weights")
    if weights is None and weight != 1.0:
        weights = []
    if weights is not None:
        # Who adds to the values alone means a weight of 1.
        weights = [*weights, *[1.0] * (len(values) - len(weights)), weight]
    values.append(value)
    while most is not None and len(values) > most:
        del values[0]
    metadata["weights"] = None if weights is None else weights[len(weights) - len(values) :]


class CountsWriting(Writing):
    """How often each category occurred; the value is their sum."""

    def written(self, handler: LaneHandler, state: State) -> dict[str, Any]:
        counts: Counter[str] = Counter()
        _count(handler, counts, (state.counts or {}).items())
        return {"counts": counts}

    def read(self, handler: LaneHandler, metadata: Mapping[str, Any]) -> State | None:
        given = metadata.get("counts")
        if not isinstance(given, Mapping):
            return None
        found = _numbers_in(given, given)
        if found is None or not all(0 <= count < math.inf for count in found):
            return None
        names = (
            category if is_name(category) else escaped(category) for category in map(str, given)
        )
        counts: Counter[str] = Counter()
        _count(handler, counts, zip(names, found, strict=True))
        return State((float(sum(found)), 0.0), counts=counts)

    def standing_for(
        self, handler: LaneHandler, value: Any, held: State | None, *, finished: bool
    ) -> State:
        if held is not None:
            return held
        return handler.fold_listed([category_of(value)] if finished else [], None)

    def combined(self, held: Sequence[State], values: Sequence[Any]) -> float:
        return sum(map(number_of, values), 0.0)

    def add(self, handler: LaneHandler, metric: Metric, target: MetricState) -> None:
        metadata, key = target.metadata, (metric.dataset_name, metric.name)
        category = named(key, category_of, metric.value)
        if not isinstance(metadata.get("counts"), Counter):
            metadata.update(self.written(handler, state_of(handler, target, finished=False)))
        counts = metadata["counts"]
        one = handler.fold_listed([category], None)
        _count(handler, counts, (one.counts or {}).items())
        if one.replaced is not None:
            handler.tell(key, one.replaced)
        target.value = metadata[STORED] = float(sum(counts.values()))


def _count(handler: LaneHandler, counts: Counter[str], more: Iterable[tuple[str, float]]) -> None:
    """Add `more`; categories beyond those that the handler tells apart are counted as `OTHER`."""
    for category, count in more:
        full = len(counts) - (OTHER in counts) >= handler.most_categories
        known = category in counts or not full
        counts[category if known else OTHER] += count  # type: ignore[assignment]


def _folded(handler: LaneHandler, metric: Metric) -> State:
    numbers = (metric.value, metric.weight)
    value, weight = (named(metric[:2], number_of, number) for number in numbers)
    return handler.fold(np.array([value]), None if weight == 1.0 else np.array([weight]))


def _array_of(values: Any) -> FloatArray | None:
    """Return a list of numbers as an array of shape (n,), or None if it is none."""
    if isinstance(values, list | tuple | deque | np.ndarray):
        with contextlib.suppress(Exception):  # what it holds may be of any kind
            array = np.asarray(list(values))
            if array.ndim == 1 and array.dtype.kind in "biuf":
                return array.astype(np.float64)
    return None


def _numbers_in(metadata: Mapping[str, Any], names: Iterable[str]) -> Lanes | None:
    """Return what `metadata` hold under `names`, or None if one is missing or is no number."""
    try:
        return tuple(number_of(metadata[name]) for name in names)
    except (KeyError, TypeError):
        return None
