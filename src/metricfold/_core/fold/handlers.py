"""How values combine: the contract of a handler, and of one whose state are lanes.

A handler is four words. *Identity*: zero in every SUM lane, minus infinity in every MAX lane.
*Merge*: SUM lanes add, MAX lanes take the maximum. *Fold*: many values at once become lanes.
*Result*: the lanes of everyone become a number, and only then is anything divided, rooted or ranked.

A handler of your own either declares lanes (`LaneHandler`), and then rides in the one packed
collective, or implements the four methods of `AggregationHandler`, which may keep any state it likes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import cached_property
from itertools import compress
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from metricfold._core.fold import contract
from metricfold._core.fold.kinds import Parts, kind_of_parts
from metricfold._core.fold.state import (
    COMMON_LANES,
    COUNT,
    NANS,
    ReducedState,
    ReducedStates,
    Results,
    State,
    quiet,
)
from metricfold._core.fold.values import number_of
from metricfold.metric import Metric, MetricState, TypeLike

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from metricfold._core.fold.names import Key
    from metricfold._core.fold.sample import FloatArray


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
    has_sample: ClassVar[bool] = False
    """Whether its states, if it has lanes, keep values as they are."""
    has_counts: ClassVar[bool] = False
    """Whether its states, if it has lanes, count categories."""
    takes_values: ClassVar[bool] = True
    """Whether values may be recorded; of other types, states alone come in that were made elsewhere."""
    is_last: ClassVar[bool] = False
    """Whether its MAX lanes, if it has lanes, hold the newest value, and not the largest."""

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

    @property
    def has_lanes(self) -> bool:
        """Whether values are folded into a `State`, which merges; `laned` says how."""
        return False

    def laned(self) -> LaneHandler:
        """Return the handler as one that folds into lanes; raises TypeError if it does not."""
        raise TypeError(f"{type(self).__name__} has no lanes")

    def kind_of(self, label: str) -> str:
        """Return what says how states of a type of this `label` are made, and so which merge.

        >>> from metricfold import DistributionAggHandler, SumAggHandler
        >>> SumAggHandler().kind_of("sum"), SumAggHandler().kind_of("tokens")
        ('sum', 'tokens/3+0')
        >>> DistributionAggHandler(100).kind_of("distribution")
        'distribution/recent'
        """
        return kind_of_parts(Parts(label, 0, 0))


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
    is_mean: ClassVar[bool] = False
    """Whether the results of several datasets have a mean of their own, each counting once."""
    takes: ClassVar[type] = float
    """What its values are: numbers, or texts (str)."""

    def __init__(self, *, on_nan: str = "propagate") -> None:
        self.on_nan = check_choice("on_nan", on_nan, "propagate", "skip")

    def sums_of(self, values: FloatArray, weights: FloatArray | None) -> tuple[float, ...]:
        """Return the SUM lanes of `values`, shape (n,), without NaN; n may be 0."""
        return ()

    def maxs_of(self, values: FloatArray) -> tuple[float, ...]:
        """Return the MAX lanes of `values`, shape (n,), without NaN, n > 0."""
        return ()

    def result(self, lanes: Mapping[str, float]) -> float:
        """Return the metric's value from everyone's merged lanes."""
        raise TypeError(f"{type(self).__name__} declares lanes, but defines no result()")

    @property
    def sum_width(self) -> int:
        return len(COMMON_LANES) + len(self.sum_lanes)

    @property
    def max_width(self) -> int:
        return len(self.max_lanes)

    @cached_property
    def lane_names(self) -> tuple[str, ...]:
        return *COMMON_LANES, *self.sum_lanes, *self.max_lanes

    @property
    def sample_limit(self) -> int:
        """How many values of an interval each rank keeps as they are."""
        return 0

    @property
    def may_have_axes(self) -> bool:
        """Whether its states are lanes and nothing besides, so that there may be many in one key."""
        return not (self.has_sample or self.has_counts or self.is_last)

    @property
    def is_bounded(self) -> bool:
        """Whether, of the values that it keeps, the run's view is about the most recent alone."""
        return False

    @property
    def most_categories(self) -> int:
        """How many categories it tells apart."""
        return 0

    @cached_property
    def has_lanes(self) -> bool:
        """Whether neither a subclass nor this very object has its own way with the contract."""
        return not any(
            name in vars(self) or getattr(type(self), name) is not getattr(LaneHandler, name)
            for name in _CONTRACT
        )

    def laned(self) -> LaneHandler:
        return self if self.has_lanes else super().laned()

    def kind_of(self, label: str) -> str:
        if not self.has_lanes:
            return super().kind_of(label)
        sample = ("recent" if self.is_bounded else "all") if self.has_sample else ""
        lanes = self.sum_width, self.max_width
        return kind_of_parts(Parts(label, *lanes, sample, self.has_counts, self.is_last))

    def unbounded(self) -> LaneHandler:
        """Return a handler whose view of the run is about all values that it keeps."""
        return self

    def empty(self) -> State:
        """Return the identity of the merge."""
        return State((0.0,) * self.sum_width, (-math.inf,) * self.max_width, latest=self.is_last)

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
        return State(sums, maxs)

    def fold_cells(self, values: FloatArray, weights: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return the lanes of single values, each of a cell of its own: shapes (n, SUM), (n, MAX).

        Args:
            values: shape (n,).
            weights: of the same shape; what has weight 0 leaves its cell empty.
        """
        sums = np.zeros((len(values), self.sum_width))
        maxs = np.full((len(values), self.max_width), -np.inf)
        lanes = self.lanes_of_each(values, weights)
        if lanes is None:
            for place in np.flatnonzero(weights).tolist():
                one = slice(place, place + 1)
                state = self.fold(values[one], weights[one])
                sums[one], maxs[one] = state.sums, state.maxs
            return sums, maxs
        counts, bad = weights != 0, np.isnan(values)
        sums[:, COUNT], sums[:, NANS] = counts, counts & bad
        of_sums, of_maxs = lanes
        for column, lane in enumerate(of_sums, len(COMMON_LANES)):
            sums[:, column] = np.where(counts & ~bad, lane, 0.0)
        for column, lane in enumerate(of_maxs):
            maxs[:, column] = np.where(counts & ~bad, lane, -np.inf)
        return sums, maxs

    def lanes_of_each(
        self, values: FloatArray, weights: FloatArray
    ) -> tuple[Sequence[FloatArray], Sequence[FloatArray]] | None:
        """Return the SUM and the MAX lanes of each value by itself, as far as they are the handler's own.

        None: `fold` is asked for one after the other. What is said of NaN and of weight 0 is not used.
        """
        return None

    def settled(self, sums: FloatArray, maxs: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return the lanes of cells, shapes (..., SUM) and (..., MAX), once everyone's are merged.

        Before they are merged with one another, or make a result: a chance to divide out what ranks
        hold in common. Cells have merged over ranks and time, as any lanes do.
        """
        return sums, maxs

    def goes_on_from(self, sums: int) -> bool:
        """Whether a saved state may have so many SUM lanes, of which the first are the same as here."""
        return sums == self.sum_width

    def fitted(self, state: State) -> State:
        """Return a state that was folded elsewhere, by the built-in handler of its type, in the lanes here."""
        return state

    def fold_listed(self, values: Sequence[Any], weights: Sequence[float] | None) -> State:
        """Return the state of a list of what the handler `takes`; as `fold`."""
        with quiet():
            return self.fold(as_array(values), None if weights is None else as_array(weights))

    def tell(self, key: Key, replaced: str) -> None:
        """Warn of what `State.replaced` says of values of `key`, once for each key."""

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
            lanes = dict(zip(self.lane_names, (*state.sums, *state.maxs), strict=True))
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
        lanes = dict(zip(self.lane_names, (*states.sums.T, *states.maxs.T), strict=True))
        spoilt = (nans > 0) & (self.on_nan == "propagate")
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.where(spoilt, math.nan, self.results({**lanes, "seconds": states.seconds}))
        there = (count > nans) | spoilt
        return np.stack([values, nans], axis=1), np.stack([there, (nans > 0) & ~spoilt], axis=1)

    def results(self, lanes: Mapping[str, Any]) -> FloatArray:
        """Return what `result` does of several keys, each lane in an array of shape (k,).

        It is computed key by key unless a subclass does better; NaN stands where there is no value.
        """
        found = np.full(len(lanes["count"]), math.nan)
        for place in np.flatnonzero(lanes["count"] > lanes["nans"]).tolist():
            found[place] = self.result({name: float(lane[place]) for name, lane in lanes.items()})
        return found

    def _finalized(self, state: ReducedState) -> dict[str, float]:
        """Return what `finalize_all` says of one."""
        values, there = self.finalize_all(ReducedStates.of(state))
        named = zip(self.columns(state.categories), values[0].tolist(), strict=True)
        return dict(compress(named, there[0].tolist()))

    # The contract, which `contract.py` keeps for all.

    initial: ClassVar[float] = 0.0
    """What `MetricState.value` is before the first value."""
    value_is_all: ClassVar[bool] = False
    """Whether the value alone says all that a state holds."""
    seconds_by_hand: ClassVar[float] = math.nan
    """What wall time `MetricState.value` speaks about, as long as nobody has said it."""
    writing: ClassVar[contract.Writing] = contract.Writing()

    def initialize_metric_state(
        self, dataset_name: str, metric_name: str, agg_type: TypeLike
    ) -> MetricState:
        state = MetricState(dataset_name, metric_name, self.initial, agg_type)
        contract.write(self, self.empty(), state)
        return state

    def update(self, local_agg_metric: MetricState, metric: Metric) -> None:
        if metric.weight:
            with quiet():
                self.writing.add(self, metric, local_agg_metric)

    def finalize_local_agg(self, local_agg_metric: MetricState) -> list[MetricState]:
        """Return the state, with no more than the handler keeps."""
        state = self.writing.read(self, local_agg_metric.metadata)
        if state is not None:
            given = local_agg_metric.value if contract.is_set(local_agg_metric) else None
            if state.sample is not None and self.is_bounded:
                state.sample.limit = self.sample_limit
            with quiet():
                contract.write(self, state, local_agg_metric)
            if given is not None:
                local_agg_metric.value = given
        return [local_agg_metric]

    def finalize_dist_agg(self, local_agg_metrics: list[MetricState]) -> MetricState:
        first, values = local_agg_metrics[0], [state.value for state in local_agg_metrics]
        result = MetricState(first.dataset_name, first.metric_name, self.initial, first.agg_type)
        with quiet():
            held = [contract.state_of(self, state) for state in local_agg_metrics]
            is_set = any(map(contract.is_set, local_agg_metrics))
            value = self.writing.combined(held, values) if is_set else None
            # Of several ranks the last value is the lowest one's.
            merged, *others = [*held[1:][::-1], held[0]] if self.is_last else held
            merged.merge_all(others)
            contract.write(self, merged, result)
        if value is not None:
            result.value = value
        return result

    def report(self, local_agg_metric: MetricState) -> dict[str, float]:
        """Return what to report of a finalised state, by the suffix that the metric's name takes.

        Its metadata may say under ``"seconds"`` what wall time it speaks about.
        """
        seconds = local_agg_metric.metadata.get("seconds", math.nan)
        with quiet():
            held = contract.state_of(self, local_agg_metric)
            found = self.finalize(contract.reduced(self, held, seconds))
            if self.value_is_all or not contract.is_set(local_agg_metric):
                return found
            value = number_of(local_agg_metric.value)
            # What is left of a mean that is multiplied by its weight and divided by it.
            stored = self.writing.value_of(self, held, seconds)
            known = math.isclose(value, stored, rel_tol=1e-9)
        return found if known and "" not in found else {**found, "": value}


_CONTRACT = (
    "initialize_metric_state",
    "update",
    "finalize_local_agg",
    "finalize_dist_agg",
    "report",
    "serialize_metadata",
    "deserialize_metadata",
)
"""The contract, and what reports its results."""


def reported(handler: AggregationHandler, result: MetricState, seconds: float) -> dict[str, float]:
    """Return what to report of a state that is finalised over all ranks, by suffix.

    Raises:
        TypeError: the value is no number.
    """
    if not isinstance(handler, LaneHandler):
        return {"": number_of(result.value)}
    if not handler.has_lanes:
        # In a state of an override's own making, a value that is not the first one has been set.
        result.metadata.setdefault(contract.STORED, handler.initial)
    result.metadata.setdefault("seconds", seconds)
    return handler.report(result)


def as_array(numbers: Sequence[float]) -> FloatArray:
    # Of a copy: a signal's handler that folds would empty the list, which NumPy does not survive.
    copied = tuple(numbers)
    try:
        return np.fromiter(copied, dtype=np.float64, count=len(copied))
    except OverflowError:
        raise ValueError("a value is too large for a 64-bit float: scale it down") from None


def check_choice(name: str, given: str, *choices: str) -> str:
    """Return an argument that has to be one of `choices`."""
    if given not in choices:
        raise ValueError(f"{name}={given!r}: use {' or '.join(map(repr, choices))}")
    return given
