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

import contextlib
import logging
import math
import reprlib
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property, reduce
from itertools import compress
from numbers import Real
from operator import add, mul
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from metricfold._core.device import arrays
from metricfold._core.fold.names import ANYTHING, show
from metricfold._core.fold.sample import (
    EXACT_VALUES,
    FloatArray,
    Pool,
    Window,
    concatenated,
    histogram_from,
    new_histogram,
)
from metricfold._core.fold.statistics import Pools, statistics
from metricfold._core.sketch.weights import LARGEST_WEIGHT
from metricfold.metric import (
    AggregationType,
    Metric,
    MetricState,
    TypeLike,
    escaped,
    is_name,
    quote,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from collections.abc import Set as AbstractSet

    from metricfold._core.sketch import LogLinearHistogram

__all__ = [
    "OTHER",
    "AggregationHandler",
    "ByContract",
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
    "ReducedStates",
    "State",
    "SumAggHandler",
    "WindowState",
    "built_in_handlers",
    "category_of",
    "folds_as",
    "name_of",
    "number_of",
    "quiet",
    "reported",
    "travelling",
]

_logger = logging.getLogger("metricfold")

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

    ordered: ClassVar[bool] = False
    """Whether it matters in which order values come."""
    recent: ClassVar[bool] = False
    """Whether the most recent of them do."""
    counts: dict[str, int] | None = None
    """By category, where categories are counted."""
    replaced: str | None = None
    """One of the texts that count under another, since they cannot be printed."""

    def __init__(self, sums: Lanes, maxs: Lanes = ()) -> None:
        self.sums = sums
        self.maxs = maxs

    def merge(self, other: LaneState) -> None:
        self.sums = _added(self.sums, other.sums)
        if self.maxs:
            self.maxs = tuple(map(_larger, self.maxs, other.maxs))

    def merge_all(self, others: Sequence[LaneState]) -> None:
        """Merge several, in order."""
        if len(others) < 3:
            for other in others:
                self.merge(other)
            return
        self.sums = tuple(map(sum, zip(self.sums, *[other.sums for other in others], strict=True)))
        if self.maxs:
            lanes = zip(self.maxs, *[other.maxs for other in others], strict=True)
            self.maxs = tuple(reduce(_larger, lane) for lane in lanes)

    def copy(self) -> LaneState:
        return LaneState(self.sums, self.maxs)

    def window(self) -> Window | None:
        """Return the values that are kept as they are and those before them, if any are kept."""
        return None

    def trim(self, categories: AbstractSet[str]) -> None:
        """Count all but `categories`, of which `OTHER` is one, as `OTHER`, if they are many."""

    # Of what is more than lanes, that more.

    def part(self) -> Any:
        """Return what a state of a batch holds besides its lanes, in types that pickle fast."""
        return None

    def take_parts(self, parts: Sequence[Any]) -> None:
        """Take in what several `part` have returned, in order; their lanes are merged apart."""


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

    ordered = recent = True

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
        beyond = []
        while self.size - self.chunks[0][0].size >= limit:
            beyond.append(self.chunks.popleft())
            self.size -= beyond[-1][0].size
        known = [] if self.older is None else [self.older]
        # A new one: copies share the old, which never changes.
        self.older = new_histogram(known, *concatenated(beyond))

    def merge(self, other: LaneState) -> None:
        assert isinstance(other, WindowState)
        self.sums = _added(self.sums, other.sums)
        self._follow_with((other,))

    def merge_all(self, others: Sequence[LaneState]) -> None:
        self.sums = tuple(map(sum, zip(self.sums, *[other.sums for other in others], strict=True)))
        self._follow_with(others)

    def _follow_with(self, others: Sequence[LaneState]) -> None:
        older = [] if self.older is None else [self.older]
        for other in others:
            assert isinstance(other, WindowState)
            self.chunks += other.chunks
            self.size += other.size
            if other.older is not None:
                older.append(other.older)
        if len(older) > (self.older is not None):
            self.older = new_histogram(older)
        if self.limit is not None and self.size >= self.limit + _UNFOLDED:
            self._condense(self.limit)

    def copy(self) -> WindowState:
        copied = WindowState(self.sums, (), self.limit)
        copied.chunks, copied.size = self.chunks.copy(), self.size
        copied.older = self.older
        return copied

    def part(self) -> list[bytes | None]:
        values, weights = concatenated(list(self.chunks))
        return [values.tobytes(), None if weights is None else weights.tobytes()]

    def take_parts(self, parts: Sequence[list[bytes | None]]) -> None:
        self._follow_with((WindowState((), [self.values_in(parts)]),))

    @staticmethod
    def values_in(parts: Sequence[list[bytes | None]]) -> tuple[FloatArray, FloatArray | None]:
        """Return the values that `parts` hold, in order, and their weights."""
        values = np.frombuffer(b"".join([part[0] or b"" for part in parts]))
        if all(part[1] is None for part in parts):
            return values, None
        return values, np.frombuffer(b"".join(map(_weights_in, parts)))

    def parted(self) -> tuple[FloatArray, FloatArray | None, WindowState]:
        """Return the values with their weights, and the rest, which has no order and merely counts."""
        values, weights, *_ = self.window()
        count, nans, infinities, *_ = self.sums
        return values, weights, WindowState((count - self.size, nans, infinities, 0.0, 0.0))

    def window(self) -> Window:
        """Return the newest `limit` values, and all before them as a histogram."""
        values, weights = concatenated(list(self.chunks))
        if self.older is not None:
            self.older.settle()
        window = Window(values, weights, values.size, self.older)
        if self.limit is None or values.size <= self.limit:
            return window
        return window.limited(self.limit)


def _weights_in(part: Sequence[bytes | None]) -> bytes:
    values, weights = part
    assert values is not None
    return np.ones(len(values) // 8).tobytes() if weights is None else weights


class CategoryState(LaneState):
    """A total count, and one count per category, in the order in which they first came.

    Args:
        sums: the SUM lanes.
        counts: by category.
        replaced: one of the texts that count under another, since they cannot be printed; or None.
    """

    __slots__ = ("counts", "replaced")

    ordered = True
    counts: dict[str, int]

    def __init__(self, sums: Lanes, counts: dict[str, int], replaced: str | None = None) -> None:
        super().__init__(sums)
        self.counts = counts
        self.replaced = replaced

    def merge(self, other: LaneState) -> None:
        assert isinstance(other, CategoryState)
        self.sums = _added(self.sums, other.sums)
        counts = self.counts
        for category, count in other.counts.items():
            counts[category] = counts.get(category, 0) + count

    def merge_all(self, others: Sequence[LaneState]) -> None:
        for other in others:
            self.merge(other)

    def part(self) -> dict[str, int]:
        return self.counts

    def take_parts(self, parts: Sequence[dict[str, int]]) -> None:
        for counts in parts:
            self.merge(CategoryState((0.0,) * len(self.sums), counts))

    def copy(self) -> CategoryState:
        return CategoryState(self.sums, dict(self.counts))

    def trim(self, categories: AbstractSet[str]) -> None:
        if len(self.counts) <= 2 * len(categories):
            return
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


@dataclass(frozen=True, slots=True)
class ReducedStates:
    """Everyone's states of k keys that one handler finalises at once.

    Args:
        sums: their SUM lanes, shape (k, n).
        maxs: their MAX lanes, shape (k, m).
        seconds: as of one state.
        pools: as of one state, for each key.
        categories: of the last SUM lanes of each.
    """

    sums: FloatArray
    maxs: FloatArray
    seconds: float
    pools: Sequence[Pool] = ()
    categories: tuple[str, ...] = ()

    @classmethod
    def of(cls, state: ReducedState) -> ReducedStates:
        lanes = np.array([state.sums]), np.array([state.maxs])
        return cls(*lanes, state.seconds, (state.pool,), state.categories)


Results: TypeAlias = tuple[FloatArray, npt.NDArray[np.bool_]]
"""What is reported of k states: values, and which of them there are, both of shape (k, s)."""


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
    is_total: ClassVar[bool] = False
    """Whether ``window="auto"`` means the run, as for a sum, rather than the interval."""
    has_lanes: ClassVar[bool] = False
    """Whether values are folded into a `State`, which merges; `laned` says how."""
    has_sample: ClassVar[bool] = False
    """Whether that state keeps values as they are."""
    has_counts: ClassVar[bool] = False
    """Whether it counts categories."""

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

    def registered(self) -> AggregationHandler:
        """Return what handles the metrics of a type that this handler is registered for."""
        return self

    def laned(self) -> LaneHandler:
        """Return the handler as one that folds into lanes; raises TypeError if it has none."""
        raise TypeError(f"{name_of(self)} has no lanes")

    def kind_of(self, label: str) -> str:
        """Return what says how states of this handler are made, and so which of them merge.

        Args:
            label: of the aggregation type that it handles.

        >>> SumAggHandler().kind_of("sum"), SumAggHandler().kind_of("tokens")
        ('sum', 'tokens/3+0')
        >>> DistributionAggHandler(100).kind_of("distribution")
        'distribution/recent'
        """
        return f"{label}/0+0"


class LaneHandler(AggregationHandler):
    """A handler whose state is a few float64 lanes, each combined by SUM or by MAX.

    Declare the lanes by name, fold values into them, and compute the result from the merged
    lanes. ``count``, ``nans`` and ``seconds`` are there in every result. A minimum is the MAX of
    the negative.

    Lanes know nothing of the methods of the contract. A subclass that overrides one of them is a
    handler without lanes: its metrics are handled by the contract alone.

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
    has_lanes = True
    initial: ClassVar[float] = 0.0
    """What `MetricState.value` is before the first value."""
    is_mean: ClassVar[bool] = False
    """Whether the results of several datasets have a mean of their own, each counting once."""

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

    @property
    def sample_limit(self) -> int:
        """How many values of an interval each rank keeps as they are."""
        return 0

    @property
    def is_bounded(self) -> bool:
        """Whether, of the values that it keeps, the run's view is about the most recent alone."""
        return False

    @property
    def most_categories(self) -> int:
        """How many categories it tells apart."""
        return 0

    def laned(self) -> LaneHandler:
        return self

    def kind_of(self, label: str) -> str:
        parts = [label, f"{self.sum_width}+{self.max_width}"]
        if self.has_sample:
            parts.append("recent" if self.is_bounded else "all")
        if self.has_counts:
            parts.append("counts")
        text = "/".join(parts)
        return _KINDS.get(text, text)

    def unbounded(self) -> LaneHandler:
        """Return a handler whose view of the run is about all values that it keeps."""
        return self

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
            lanes = dict(zip(self._lane_names, (*state.sums, *state.maxs), strict=True))
            lanes["seconds"] = state.seconds
            reported[""] = float(self.result(lanes))
        if nans:
            reported["_nan_count"] = nans
        return reported

    # The same of many keys at once, where nothing of it is overridden: see `folds_as`.

    def columns(self, categories: tuple[str, ...]) -> tuple[str, ...]:
        """Return the suffixes of what `finalize_all` gives, of keys that have these categories."""
        return ("", "_nan_count")

    def finalize_all(self, states: ReducedStates) -> Results:
        """Return what `finalize` does, of several keys."""
        count, nans = states.sums[:, COUNT], states.sums[:, NANS]
        lanes = dict(zip(self._lane_names, (*states.sums.T, *states.maxs.T), strict=True))
        spoilt = (nans > 0) & (self.on_nan == "propagate")
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.where(spoilt, math.nan, self.results({**lanes, "seconds": states.seconds}))
        there = (count > nans) | spoilt
        return np.stack([values, nans], axis=1), np.stack([there, (nans > 0) & ~spoilt], axis=1)

    def results(self, lanes: Mapping[str, Any]) -> FloatArray:
        """Return what `result` does of several keys, each lane in an array of shape (k,)."""
        return np.asarray(self.result(lanes))

    def _finalized(self, state: ReducedState) -> dict[str, float]:
        """Return what `finalize_all` says of one."""
        values, there = self.finalize_all(ReducedStates.of(state))
        named = zip(self.columns(state.categories), values[0].tolist(), strict=True)
        return dict(compress(named, there[0].tolist()))

    # The contract, for those who call a handler themselves, override a method of it, or return a
    # state of a type with lanes from a handler of their own. A state's value is what its metadata
    # come to; a value that somebody has set since then is meant, and counts instead of them.

    value_is_all: ClassVar[bool] = False
    """Whether the value alone says all that a state holds."""

    def registered(self) -> AggregationHandler:
        return ByContract(self) if self._is_overridden() else self

    def _is_overridden(self) -> bool:
        """Return whether a subclass or this very object has its own way with the contract."""
        ours = next(_CONTRACTS[kind] for kind in type(self).__mro__ if kind in _CONTRACTS)
        return any(
            name in vars(self) or getattr(type(self), name) is not method
            for name, method in ours.items()
        )

    def initialize_metric_state(
        self, dataset_name: str, metric_name: str, agg_type: TypeLike
    ) -> MetricState:
        state = MetricState(dataset_name, metric_name, self.initial, agg_type)
        self._store(self.empty(), state)
        return state

    def update(self, local_agg_metric: MetricState, metric: Metric) -> None:
        if not metric.weight:
            return
        with quiet():
            state = self._held(local_agg_metric, finished=False)
            state.merge(self._folded(metric))
            self._store(state, local_agg_metric)

    def finalize_local_agg(self, local_agg_metric: MetricState) -> list[MetricState]:
        lanes = self._lanes_of(local_agg_metric.metadata)
        if lanes is not None:
            given = local_agg_metric.value if _is_set(local_agg_metric) else None
            with quiet():
                self._store(lanes, local_agg_metric)
            if given is not None:
                local_agg_metric.value = given
        return [local_agg_metric]

    def finalize_dist_agg(self, local_agg_metrics: list[MetricState]) -> MetricState:
        first, *others = local_agg_metrics
        result = MetricState(first.dataset_name, first.metric_name, self.initial, first.agg_type)
        with quiet():
            merged = self._held(first)
            for state in others:
                merged.merge(self._held(state))
            self._store(merged, result)
        return result

    def report(self, local_agg_metric: MetricState) -> dict[str, float]:
        """Return what to report of a finalised state, by the suffix that the metric's name takes.

        Its metadata may say under ``"seconds"`` what wall time it speaks about.
        """
        metadata = local_agg_metric.metadata
        with quiet():
            held = self._held(local_agg_metric)
            found = self.finalize(self._reduced(held, metadata.get("seconds", math.nan)))
            if self.value_is_all or not _is_set(local_agg_metric):
                return found
            value = number_of(local_agg_metric.value)
            # What is left of a mean that is multiplied by its weight and divided by it.
            known = math.isclose(value, self._value_of(held, metadata), rel_tol=1e-9)
        return found if known and "" not in found else {**found, "": value}

    def _folded(self, metric: Metric) -> State:
        """Return the state of a single metric."""
        key = (metric.dataset_name, metric.name)
        try:
            value, weight = number_of(metric.value), number_of(metric.weight)
        except TypeError as error:
            raise TypeError(f"{show(key)}: {error}") from None
        return self.fold(np.array([value]), None if weight == 1.0 else np.array([weight]))

    def _store(self, state: State, target: MetricState) -> None:
        target.metadata.update(self._metadata(state))
        target.value = target.metadata[_STORED] = self._value_of(state, target.metadata)

    def _metadata(self, state: State) -> dict[str, Any]:
        return dict(zip(self._lane_names, (*state.sums, *state.maxs), strict=True))

    def _value_of(self, state: State, metadata: Mapping[str, Any]) -> float:
        lanes = ReducedState(state.sums, state.maxs, metadata.get("seconds", math.nan))
        return self.finalize_lanes(lanes).get("", self.initial)

    def _reduced(self, state: State, seconds: float) -> ReducedState:
        return ReducedState(state.sums, state.maxs, seconds)

    @cached_property
    def _lane_names(self) -> tuple[str, ...]:
        return *COMMON_LANES, *self.sum_lanes, *self.max_lanes

    def _held(self, state: MetricState, *, finished: bool = True) -> State:
        """Return what anyone's `state` holds; its value, where its metadata do not say.

        Args:
            state: whose metadata may be of any kind.
            finished: whether nothing is added to it any more. Its value then stands for one value
                at least; until then it may be no more than what it began with.
        """
        lanes = self._lanes_of(state.metadata)
        if lanes is not None and not _is_set(state):
            return lanes
        return self._of_value(state.value, lanes, finished=finished)

    def _lanes_of(self, metadata: Mapping[str, Any]) -> State | None:
        """Return the lanes in `metadata`, or None if those are not of this type."""
        # States of the first version bear no mark, but have these names and no others.
        if _STORED not in metadata and metadata.keys() != set(self._lane_names):
            return None
        lanes = _numbers_in(metadata, self._lane_names)
        if lanes is None:
            return None
        return LaneState(lanes[: self.sum_width], lanes[self.sum_width :])

    def _of_value(self, value: Any, lanes: State | None, *, finished: bool) -> State:
        """Return what a state holds of which the value alone is known, or has been set.

        Args:
            value: the state's.
            lanes: what its metadata hold, which the value differs from; None: nothing.
            finished: as in `_held`.
        """
        if not finished and (value is None or not self.value_is_all):
            return self.empty() if lanes is None else lanes
        one = self.fold(np.array([number_of(value)]), None)
        if lanes is not None and lanes.sums[NANS]:
            nans = self.empty()
            nans.sums = (lanes.sums[NANS],) * 2 + nans.sums[2:]
            one.merge(nans)
        return one


class ByContract(AggregationHandler):
    """A handler of lanes whose contract is overridden, and which is therefore asked by it alone.

    Args:
        handler: answers.
    """

    def __init__(self, handler: LaneHandler) -> None:
        self.handler = handler

    @property
    def is_total(self) -> bool:  # type: ignore[override]
        return self.handler.is_total

    @property
    def weighted(self) -> bool:  # type: ignore[override]
        return self.handler.weighted

    def initialize_metric_state(
        self, dataset_name: str, metric_name: str, agg_type: TypeLike
    ) -> MetricState:
        return self.handler.initialize_metric_state(dataset_name, metric_name, agg_type)

    def update(self, local_agg_metric: MetricState, metric: Metric) -> None:
        self.handler.update(local_agg_metric, metric)

    def finalize_local_agg(self, local_agg_metric: MetricState) -> list[MetricState]:
        return self.handler.finalize_local_agg(local_agg_metric)

    def finalize_dist_agg(self, local_agg_metrics: list[MetricState]) -> MetricState:
        return self.handler.finalize_dist_agg(local_agg_metrics)

    def serialize_metadata(self, metadata: dict[str, Any]) -> dict[str, Any]:
        return self.handler.serialize_metadata(metadata)

    def deserialize_metadata(self, metadata: dict[str, Any]) -> dict[str, Any]:
        return self.handler.deserialize_metadata(metadata)


def reported(handler: AggregationHandler, result: MetricState, seconds: float) -> dict[str, float]:
    """Return what to report of a finalised state, by the suffix that the metric's name takes.

    Args:
        handler: of the state's type.
        result: the state, finalised over all ranks.
        seconds: wall time that it speaks about.

    Raises:
        TypeError: the value is no number.
    """
    answering = handler
    if isinstance(handler, ByContract):
        answering = handler.handler
        # In a state of an override's own making, a value that is not the first one has been set.
        result.metadata.setdefault(_STORED, handler.handler.initial)
    if isinstance(answering, LaneHandler):
        result.metadata.setdefault("seconds", seconds)
        return answering.report(result)
    return {"": number_of(result.value)}


def travelling(handler: AggregationHandler | None, result: MetricState) -> tuple[Any, Any]:
    """Return the value and the metadata of a rank's result as other ranks get to see them.

    Args:
        handler: of the result's type, if there is one here.
        result: what a handler finalised to.
    """
    value, metadata = result.value, result.metadata
    if isinstance(handler, LaneHandler):
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


def name_of(handler: AggregationHandler) -> str:
    """Return how messages speak of a handler."""
    return type(handler.handler if isinstance(handler, ByContract) else handler).__name__


_STORED = "__value__"
"""Marks metadata as those of a state of lanes, and says what value they came to."""


def _is_set(state: MetricState) -> bool:
    """Return whether the value is another one than what the metadata came to."""
    stored = state.metadata.get(_STORED, state.value)
    if state.value is stored:
        return False
    try:
        value = number_of(state.value)
    except TypeError:
        return True
    return value != stored and not (math.isnan(value) and stored != stored)  # noqa: PLR0124


def number_of(value: Any) -> float:
    """Return the number that `value` is, or that is all it holds.

    Raises:
        TypeError: it is no number.
    """
    if type(value) is float:
        return value
    # A text may spell a number, and NumPy's masked value is NaN with a warning.
    if value is not np.ma.masked and not isinstance(value, str | bytes | bytearray):
        item = getattr(value, "item", None)
        with contextlib.suppress(Exception):  # a framework's own may be of any kind
            return float(value if item is None else item())
    raise TypeError(f"{quote(value)} is no number")


def category_of(value: Any) -> str:
    """Return the text that `value` counts under.

    Raises:
        TypeError: it is no category.
    """
    if not isinstance(value, str | int | float | Enum):
        raise TypeError(
            f"the value {quote(value)} is no category: give a text, a number, an Enum member, or "
            "an array of one element"
        )
    return str(value)


def _array_of(values: Any) -> FloatArray | None:
    """Return a list of numbers as an array of shape (n,), or None if it is none."""
    if not isinstance(values, list | tuple | deque | np.ndarray):
        return None
    try:
        array = np.asarray(list(values))
    except Exception:  # noqa: BLE001 - what it holds may be of any kind
        return None
    return array.astype(np.float64) if array.ndim == 1 and array.dtype.kind in "biuf" else None


def _numbers_in(metadata: Mapping[str, Any], names: Iterable[str]) -> Lanes | None:
    """Return what `metadata` hold under `names`, or None if one is missing or is no number."""
    try:
        return tuple(number_of(metadata[name]) for name in names)
    except (KeyError, TypeError):
        return None


# -- The built-ins -------------------------------------------------------------------------------


class SumAggHandler(LaneHandler):
    """Total of the values; integers are exact up to 2^53."""

    sum_lanes = ("sum",)
    is_total = True
    value_is_all = True

    def sums_of(self, values: FloatArray, weights: FloatArray | None) -> tuple[float, ...]:
        return (float(values.sum()),)

    def result(self, lanes: Mapping[str, float]) -> float:
        return lanes["sum"]


class RateAggHandler(SumAggHandler):
    """Total of the values per second of wall time, by the slowest rank's clock.

    Over no time, as in a pause that spans an interval, there is no rate to report. By the contract
    the value is the total, which is divided where it is reported.
    """

    is_total = False

    def result(self, lanes: Mapping[str, float]) -> float:
        return lanes["sum"] / lanes["seconds"] if lanes["seconds"] else math.nan

    def finalize_lanes(self, state: ReducedState) -> dict[str, float]:
        reported = super().finalize_lanes(state)
        if not state.seconds:
            reported.pop("", None)
        return reported

    def finalize_all(self, states: ReducedStates) -> Results:
        values, there = super().finalize_all(states)
        there[:, 0] &= states.seconds != 0
        return values, there

    def _value_of(self, state: State, metadata: Mapping[str, Any]) -> float:
        return super()._value_of(state, {"seconds": 1.0, **metadata})


class MeanAggHandler(LaneHandler):
    """Weighted mean: sum(w * x) / sum(w) over the values of all ranks."""

    sum_lanes = ("weighted_sum", "weight")
    weighted = True
    is_mean = True

    def sums_of(self, values: FloatArray, weights: FloatArray | None) -> tuple[float, ...]:
        if weights is None:
            return float(values.sum()), float(values.size)
        return float((values * weights).sum()), float(weights.sum())

    def result(self, lanes: Mapping[str, float]) -> float:
        # Nothing that came in weighs nothing, but another rank may send what it likes.
        return lanes["weighted_sum"] / lanes["weight"] if lanes["weight"] else math.nan

    def results(self, lanes: Mapping[str, Any]) -> FloatArray:
        weight = lanes["weight"]
        return np.where(weight == 0, math.nan, lanes["weighted_sum"] / weight)

    # By the contract: the sum and the count, each value as often as its weight says.

    def _metadata(self, state: State) -> dict[str, Any]:
        _, nans, weighted_sum, weight = state.sums
        return {"sum": weighted_sum, "count": weight, "nans": nans}

    def _lanes_of(self, metadata: Mapping[str, Any]) -> State | None:
        first_version = "weighted_sum" in metadata and _STORED not in metadata
        names = ("weighted_sum", "weight") if first_version else ("sum", "count")
        lanes = _numbers_in(metadata, names)
        if lanes is None or not 0 <= lanes[1] < math.inf:
            return None
        (nans,) = _numbers_in(metadata, ("nans",)) or (0.0,)
        return LaneState((lanes[1] + nans, nans, *lanes))

    def _of_value(self, value: Any, lanes: State | None, *, finished: bool) -> State:
        if lanes is None or not lanes.sums[-1]:
            return super()._of_value(value, lanes, finished=finished)
        *counts, _, weight = lanes.sums
        return LaneState((*counts, number_of(value) * weight, weight))


class MaxAggHandler(LaneHandler):
    """Largest value."""

    max_lanes = ("max",)
    initial = -math.inf
    value_is_all = True

    def maxs_of(self, values: FloatArray) -> tuple[float, ...]:
        return (float(values.max()),)

    def result(self, lanes: Mapping[str, float]) -> float:
        return lanes["max"]


class MinAggHandler(LaneHandler):
    """Smallest value, kept as the MAX of the negative."""

    max_lanes = ("negative_min",)
    initial = math.inf
    value_is_all = True

    def maxs_of(self, values: FloatArray) -> tuple[float, ...]:
        return (-float(values.min()),)

    def result(self, lanes: Mapping[str, float]) -> float:
        return -lanes["negative_min"]


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

    def __init__(
        self, window_size: int | None = 1000, percentiles: Sequence[float] = (5, 50, 95)
    ) -> None:
        super().__init__()
        self.window_size = check_window_size(window_size)
        self.percentiles = check_percentiles(percentiles)
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

    def empty(self) -> WindowState:
        return WindowState((0.0,) * self.sum_width, limit=self.sample_limit)

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
            for column, statistic in enumerate(table.values()):
                values[full, column] = statistic.of(found)
                there[full, column] = found.count >= statistic.least
        return values, there

    # By the contract: the recent values, and a histogram of those before them if there is no bound.

    def update(self, local_agg_metric: MetricState, metric: Metric) -> None:
        if not metric.weight:
            return
        metadata = local_agg_metric.metadata
        with quiet():
            one = self._folded(metric)
            assert isinstance(one, WindowState)
            # In place: a copy of the window for each value would cost as much as it is large.
            if not isinstance(metadata.get("values"), list | deque):
                metadata.update(self._metadata(self._held(local_agg_metric, finished=False)))
            _, nans, infinities, *_ = one.sums
            metadata["nans"] = metadata.get("nans", 0.0) + nans
            metadata["infinities"] = metadata.get("infinities", 0.0) + infinities
            if one.size:
                self._append(metadata, number_of(metric.value), number_of(metric.weight))
            metadata.pop("statistics", None)
            if self.window_size is None and len(metadata["values"]) >= 2 * self.sample_limit:
                self._condense(local_agg_metric)
            mean = self._mean(metadata)
            if mean is not None:
                local_agg_metric.value = metadata[_STORED] = mean

    def _append(self, metadata: dict[str, Any], value: float, weight: float) -> None:
        values, weights = metadata["values"], metadata.get("weights")
        if weights is None and weight != 1.0:
            weights = []
        if weights is not None:
            # Who adds to the values alone means a weight of 1.
            weights = [*weights, *[1.0] * (len(values) - len(weights)), weight]
        values.append(value)
        if self.window_size is not None:
            while len(values) > self.window_size:
                del values[0]
        metadata["weights"] = None if weights is None else weights[len(weights) - len(values) :]

    def _condense(self, state: MetricState) -> None:
        lanes = self._lanes_of(state.metadata)
        assert lanes is not None
        lanes.limit = self.sample_limit
        state.metadata.update(self._metadata(lanes))

    @staticmethod
    def _mean(metadata: Mapping[str, Any]) -> float | None:
        """Return the mean of the recent values, if those are all."""
        values, weights = metadata["values"], metadata.get("weights")
        if not values or metadata.get("older") is not None:
            return None
        if weights is None:
            return float(sum(values) / len(values))
        return float(sum(map(mul, values, weights)) / sum(weights))

    def finalize_local_agg(self, local_agg_metric: MetricState) -> list[MetricState]:
        metadata, most = local_agg_metric.metadata, self.window_size
        values = metadata.get("values")
        if most is not None and isinstance(values, list | deque) and len(values) > most:
            weights = metadata.get("weights")
            metadata["values"] = list(values)[-most:]
            metadata["weights"] = None if weights is None else list(weights)[-most:]
        return super().finalize_local_agg(local_agg_metric)

    def finalize_dist_agg(self, local_agg_metrics: list[MetricState]) -> MetricState:
        result = super().finalize_dist_agg(local_agg_metrics)
        if any(map(_is_set, local_agg_metrics)):
            weights = [self._held(state).sums[-1] for state in local_agg_metrics]
            values = [number_of(state.value) for state in local_agg_metrics]
            result.value = sum(map(mul, values, weights)) / (sum(weights) or math.nan)
        return result

    def _store(self, state: State, target: MetricState) -> None:
        super()._store(state, target)
        found = self.finalize(self._reduced(state, math.nan))
        target.metadata["statistics"] = {k.removeprefix("_stat_"): v for k, v in found.items()}

    def _value_of(self, state: State, metadata: Mapping[str, Any]) -> float:
        found = self.finalize(self._reduced(state, math.nan))
        return found.get("_stat_mean", self.initial)

    def _metadata(self, state: State) -> dict[str, Any]:
        assert isinstance(state, WindowState)
        window = state.window()
        _, nans, infinities, *_ = state.sums
        older = window.older if self.window_size is None else None
        return {
            "values": window.values.tolist(),
            "weights": None if window.weights is None else window.weights.tolist(),
            "older": None if older is None else older.to_dict(),
            "nans": nans,
            "infinities": infinities,
        }

    def _lanes_of(self, metadata: Mapping[str, Any]) -> WindowState | None:
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
        state = self.fold(values, weights)
        found = (_numbers_in(metadata, (name,)) or (0.0,) for name in ("nans", "infinities"))
        (nans,), (infinities,) = found
        lanes = zip(state.sums, (nans + infinities, nans, infinities, 0.0, 0.0), strict=True)
        state.sums = tuple(here + more for here, more in lanes)
        if isinstance(older := metadata.get("older"), Mapping):
            state.older = histogram_from(older)
        return state

    def _of_value(self, value: Any, lanes: State | None, *, finished: bool) -> State:
        # A set value is the mean that somebody wants to see; the values stay what they are.
        return super()._of_value(value, None, finished=finished) if lanes is None else lanes

    def _reduced(self, state: State, seconds: float) -> ReducedState:
        assert isinstance(state, WindowState)
        window = state.window()
        pool = window.interval() if self.window_size is None else window.recent()
        return ReducedState(state.sums, state.maxs, seconds, pool)


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

    def __init__(self, max_categories: int = 1000, *, on_bad_name: str = "replace") -> None:
        super().__init__()
        self.max_categories = check_max_categories(max_categories)
        self.on_bad_name = check_on_bad_name(on_bad_name)
        self._told: set[tuple[str, str]] = set()

    @property
    def most_categories(self) -> int:
        return self.max_categories

    def empty(self) -> CategoryState:
        return CategoryState((0.0,) * self.sum_width, {})

    def fold_categories(self, categories: Iterable[str]) -> CategoryState:
        """Return the state of `categories`.

        Raises:
            ValueError: one is empty or cannot be printed, and is not to be replaced.
        """
        counts: dict[str, int] = {}
        for category in categories:
            counts[category] = counts.get(category, 0) + 1
        bad = [category for category in counts if not is_name(category)]
        for category in bad:
            name, count = self.printable(category), counts.pop(category)
            counts[name] = counts.get(name, 0) + count
        replaced = bad[0] if bad else None
        return CategoryState((float(sum(counts.values())), 0.0), counts, replaced)

    def printable(self, category: str) -> str:
        """Return what an unprintable category counts as; raises ValueError if it is refused."""
        if self.on_bad_name == "replace":
            return escaped(category)
        if not category:
            raise ValueError("the category is empty: give it a text, such as 'none'")
        raise ValueError(
            f"the category {reprlib.repr(category)} holds a line break or another unprintable "
            "character: give a text on one line"
        )

    def tell(self, key: tuple[str, str], replaced: str) -> None:
        """Warn that a category of `key` counts under another text, once for each key."""
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

    # By the contract: how often each category occurred; the value is their sum.

    def update(self, local_agg_metric: MetricState, metric: Metric) -> None:
        if not metric.weight:
            return
        metadata = local_agg_metric.metadata
        try:
            category = category_of(metric.value)
        except TypeError as error:
            key = (metric.dataset_name, metric.name)
            raise TypeError(f"{show(key)}: {error}") from None
        if not isinstance(metadata.get("counts"), Counter):
            metadata.update(self._metadata(self._held(local_agg_metric, finished=False)))
        counts = metadata["counts"]
        one = self.fold_categories([category])
        self._count(counts, one.counts.items())
        if one.replaced is not None:
            self.tell((metric.dataset_name, metric.name), one.replaced)
        local_agg_metric.value = metadata[_STORED] = float(sum(counts.values()))

    def finalize_dist_agg(self, local_agg_metrics: list[MetricState]) -> MetricState:
        result = super().finalize_dist_agg(local_agg_metrics)
        if any(map(_is_set, local_agg_metrics)):
            result.value = sum(number_of(state.value) for state in local_agg_metrics)
        return result

    def _count(self, counts: Counter[str], more: Iterable[tuple[str, float]]) -> None:
        """Add `more`; categories beyond the first `max_categories` are counted as `OTHER`."""
        for category, count in more:
            full = len(counts) - (OTHER in counts) >= self.max_categories
            known = category in counts or not full
            counts[category if known else OTHER] += count  # type: ignore[assignment]

    def _metadata(self, state: State) -> dict[str, Any]:
        assert isinstance(state, CategoryState)
        counts: Counter[str] = Counter()
        self._count(counts, state.counts.items())
        return {"counts": counts}

    def _value_of(self, state: State, metadata: Mapping[str, Any]) -> float:
        return float(state.sums[COUNT])

    def _lanes_of(self, metadata: Mapping[str, Any]) -> CategoryState | None:
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
        self._count(counts, zip(names, found, strict=True))
        return CategoryState((float(sum(found)), 0.0), counts)

    def _of_value(self, value: Any, lanes: State | None, *, finished: bool) -> State:
        if lanes is not None:
            return lanes
        return self.fold_categories([category_of(value)] if finished else [])

    def _reduced(self, state: State, seconds: float) -> ReducedState:
        assert isinstance(state, CategoryState)
        counts = tuple(float(count) for count in state.counts.values())
        return ReducedState(
            state.sums + counts, state.maxs, seconds, categories=tuple(state.counts)
        )


_KINDS = {
    "sum/3+0": "sum",
    "rate/3+0": "rate",
    "mean/4+0": "mean",
    "max/2+1": "max",
    "min/2+1": "min",
    "distribution/5+0/recent": "distribution/recent",
    "distribution/5+0/all": "distribution",
    "categorical_count/2+0/counts": "counts",
}
"""What is made as the built-in type of that name is, by its parts."""


_CONTRACTS: dict[type, dict[str, Any]] = {
    kind: {
        name: getattr(kind, name)
        for name in (
            "initialize_metric_state",
            "update",
            "finalize_local_agg",
            "finalize_dist_agg",
            "report",
            "serialize_metadata",
            "deserialize_metadata",
        )
    }
    for kind in (
        LaneHandler,
        SumAggHandler,
        RateAggHandler,
        MeanAggHandler,
        MaxAggHandler,
        MinAggHandler,
        DistributionAggHandler,
        CategoricalCountAggHandler,
    )
}
"""The contract, and what reports its results, as each handler here has it."""


_REPLACEABLE = {
    name
    for kind in _CONTRACTS
    for name, member in vars(kind).items()
    if not isinstance(member, cached_property)
}
"""What an object may have of its own in the place of its class's."""


def folds_as(handler: AggregationHandler | None) -> type[LaneHandler] | None:
    """Return the class here that folds just as `handler` does, if one does.

    A subclass, or an object of which something has been replaced, may fold otherwise.
    """
    kind = type(handler)
    if kind not in _CONTRACTS or not vars(handler).keys().isdisjoint(_REPLACEABLE):
        return None
    assert issubclass(kind, LaneHandler)
    return kind


def built_in_handlers(
    window_size: int | None = 1000,
    percentiles: Sequence[float] = (5, 50, 95),
    on_nan: str = "propagate",
    max_categories: int = 1000,
    on_bad_name: str = "replace",
) -> dict[TypeLike, AggregationHandler]:
    """Return a handler for every type that has one from the start."""
    return {
        AggregationType.SUM: SumAggHandler(on_nan=on_nan),
        AggregationType.MEAN: MeanAggHandler(on_nan=on_nan),
        AggregationType.MAX: MaxAggHandler(on_nan=on_nan),
        AggregationType.MIN: MinAggHandler(on_nan=on_nan),
        AggregationType.DISTRIBUTION: DistributionAggHandler(window_size, percentiles),
        AggregationType.CATEGORICAL_COUNT: CategoricalCountAggHandler(
            max_categories, on_bad_name=on_bad_name
        ),
        AggregationType.RATE: RateAggHandler(on_nan=on_nan),
    }


# -- Checks --------------------------------------------------------------------------------------


def check_window_size(size: object) -> int | None:
    if size is None:
        return None
    if isinstance(size, bool) or not isinstance(size, int | np.integer) or size <= 0:
        name = f"; if that is the aggregator's name, write name={size!r}" * isinstance(size, str)
        raise ValueError(
            f"the window size is {size!r}: give the number of recent values that each rank keeps, "
            f"1 or more, or None for all{name}"
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


def check_on_bad_name(on_bad_name: str) -> str:
    if on_bad_name not in ("replace", "refuse"):
        raise ValueError(f"on_bad_name={on_bad_name!r}: use 'replace' or 'refuse'")
    return on_bad_name
