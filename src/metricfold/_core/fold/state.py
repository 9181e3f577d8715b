"""What a key has accumulated: a `State`, whose parts merge each in its own way.

`README.md` in this folder has the table of the parts, and says for each why it does not matter how the
values were split.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from metricfold._core.fold.axes import Axes, IndexArray, cells, moved, united
from metricfold._core.fold.sample import FloatArray, Pool, Window, new_histogram
from metricfold._core.sketch.weights import concatenated

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from collections.abc import Set as AbstractSet

    from metricfold._core.sketch import LogLinearHistogram


Lanes: TypeAlias = tuple[float, ...]
Counts: TypeAlias = dict[str, int]
"""By category, in the order in which they first came."""

COUNT, NANS = 0, 1
"""The two SUM lanes that every state begins with: values received, and how many were NaN."""
COMMON_LANES = ("count", "nans")
OTHER = "__other__"
"""Stands for all categories beyond those that are told apart."""

_UNFOLDED = 16_384
"""So many values beyond the most recent ones pile up before they are folded into a histogram: most
intervals bring fewer, and are folded when they are reduced, where no training step waits."""


def quiet() -> np.errstate:
    """Return a context in which sums overflow to inf or NaN without a warning: they are reported."""
    return np.errstate(over="ignore", invalid="ignore")


@dataclass(slots=True, eq=False)
class State:
    """What one rank has accumulated of one key.

    The lanes are tuples: to add a few numbers, an array would take several times as long.

    Args:
        sums: the SUM lanes.
        maxs: the MAX lanes.
        sample: the values of a DISTRIBUTION; None: it keeps none.
        counts: the categories of a CATEGORICAL_COUNT; None: it counts none.
        replaced: one of the categories that count under another text, since they cannot be printed.
        latest: whether the MAX lanes hold the newest value, and not the largest.
        axes: along which there are cells: then the lanes are arrays, a row of them for each cell, and
            never changed in place.
        places: of the cells that the rows are of, each once; None: they are of all, in order.
    """

    sums: Lanes
    maxs: Lanes = ()
    sample: Sample | None = None
    counts: Counts | None = None
    replaced: str | None = None
    latest: bool = False
    axes: Axes = ()
    places: IndexArray | None = None

    @classmethod
    def of_cells(
        cls, sums: FloatArray, maxs: FloatArray, axes: Axes, places: IndexArray | None = None
    ) -> State:
        """Return a state with cells: SUM lanes of shape (cells, n), and MAX lanes (cells, m)."""
        return cls(cast("Lanes", sums), cast("Lanes", maxs), axes=axes, places=places)

    @property
    def ordered(self) -> bool:
        """Whether it matters in which order values come."""
        return self.recent or self.counts is not None

    @property
    def recent(self) -> bool:
        """Whether the most recent values do, so that later ones have to wait for those before."""
        return self.sample is not None or self.latest

    @property
    def count(self) -> float:
        """How many values came in."""
        return float(np.sum(self.sums[:, COUNT]) if self.axes else self.sums[COUNT])  # type: ignore[call-overload]

    @property
    def nans(self) -> float:
        """How many of them were NaN."""
        return float(np.sum(self.sums[:, NANS]) if self.axes else self.sums[NANS])  # type: ignore[call-overload]

    @property
    def any_number(self) -> bool:
        return self.sums[COUNT] > self.sums[NANS]

    def merge(self, other: State) -> None:
        """Take in what `other` holds; its values are the newer ones.

        Associative, with the empty state as its identity, and commutative but for what depends on
        the order in which values and categories came: no two routes join the same values alike.
        """
        self.merge_all((other,))

    def merge_all(self, others: Sequence[State]) -> None:
        """Merge several, in order."""
        if self.axes or (others and others[0].axes):
            self._merge_cells(others)
            return
        for other in others:
            self.sums = tuple(map(add, self.sums, other.sums))
            if self.latest:
                self.maxs = other.maxs if other.latest and other.any_number else self.maxs
            elif self.maxs:
                self.maxs = tuple(map(_larger, self.maxs, other.maxs))
            self._count(other.counts or {})
        if self.sample is not None:
            self.sample.follow_with([one.sample for one in others if one.sample is not None])

    def _merge_cells(self, others: Sequence[State]) -> None:
        """Merge several with cells; one without, which has no values, becomes one with them."""
        some = [one for one in (self, *others) if one.axes]
        if len(some) == 1:
            (one,) = some
            self.sums, self.maxs, self.axes, self.places = one.sums, one.maxs, one.axes, one.places
            return
        axes = reduce(united, [one.axes for one in some])
        sums, maxs = some[0].rows(axes)
        with quiet():
            for other in some[1:]:
                at = other.rows_at(axes)
                sums[at] += other.sums
                tops, own = np.asarray(other.maxs), maxs[at]
                maxs[at] = np.where(is_first(own, tops), own, tops)
        self.sums, self.maxs, self.axes = cast("Lanes", sums), cast("Lanes", maxs), axes
        self.places = None

    def laid_out(self, axes: Axes) -> tuple[FloatArray, FloatArray]:
        """Return the lanes of all cells along axes, which have the labels of its own."""
        if axes == self.axes and self.places is None:
            return np.asarray(self.sums), np.asarray(self.maxs)
        return self.rows(axes)

    def rows(self, axes: Axes) -> tuple[FloatArray, FloatArray]:
        """Return the same in arrays that are nobody else's."""
        own, tops = np.asarray(self.sums), np.asarray(self.maxs)
        sums = np.zeros((cells(axes), own.shape[1]))
        maxs = np.full((len(sums), tops.shape[1]), -np.inf)
        at = self.rows_at(axes)
        sums[at], maxs[at] = own, tops
        return sums, maxs

    def rows_at(self, axes: Axes) -> IndexArray | slice:
        """Return where its rows stand among all cells along axes."""
        places = moved(self.axes, axes)
        if self.places is None:
            return slice(None) if places is None else places
        return self.places if places is None else places[self.places]

    def _count(self, more: Counts) -> None:
        for category, count in more.items():
            assert self.counts is not None
            self.counts[category] = self.counts.get(category, 0) + count

    def copy(self) -> State:
        sample = None if self.sample is None else self.sample.copy()
        counts = None if self.counts is None else dict(self.counts)
        return State(
            self.sums, self.maxs, sample, counts, None, self.latest, self.axes, self.places
        )

    def plain(self) -> tuple[Lanes, Lanes, Any]:
        """Return its SUM and MAX lanes, and what it holds besides, if anything, in plain types."""
        part: Any = self.counts if self.sample is None else self.sample.plain()
        if self.latest:
            part = list(self.maxs) if self.any_number else []
        return self.sums, self.maxs, part

    def take_plain(self, parts: Sequence[Any]) -> None:
        """Take in what the third of several `plain` have been, in order; not their lanes."""
        if self.latest:
            self.maxs = tuple(next(filter(None, reversed(parts)), self.maxs))
        elif self.sample is not None:
            self.sample.follow_with([Sample.of(parts)])
        else:
            for part in parts:
                self._count(part)

    def kept(self, part: Any = None) -> tuple[FloatArray, FloatArray | None]:
        """Return the values, with weights, that are kept here, or in the third of a `plain`."""
        part = self.plain()[2] if part is None else part
        if self.latest:
            return np.array(part, dtype=np.float64), None
        return concatenated(list(Sample.of([part]).chunks))

    def trim(self, categories: AbstractSet[str]) -> None:
        """Count all but `categories`, of which `OTHER` is one, as `OTHER`, if they are many."""
        if self.counts is None or len(self.counts) <= 2 * len(categories):
            return
        counts = {name: count for name, count in self.counts.items() if name in categories}
        rest = sum(self.counts.values()) - sum(counts.values())
        counts[OTHER] = counts.get(OTHER, 0) + rest
        self.counts = counts


def is_first(a: FloatArray, b: FloatArray) -> npt.NDArray[np.bool_]:
    """Return where `a` is the larger of both, NaN beyond all and 0 beyond -0, or they are the same."""
    # Not np.maximum: which zero of two it returns, and which NaN, depends on strides and SIMD.
    alike = (a == b) & (np.signbit(a) <= np.signbit(b))
    return (a > b) | np.isnan(a) | alike  # type: ignore[no-any-return]


def _larger(one: float, other: float) -> float:
    if one == other:
        return one or one + other  # 0 is beyond -0, whichever comes first
    return one if one > other or math.isnan(one) else other


class Sample:
    """The most recent finite values in order of arrival, and those before them.

    Args:
        chunks: values and weights, or None for weights that are all 1, oldest first.
        limit: about so many values are kept as they are; None: all of them.
        older: histogram of the values that came before the chunks.
    """

    __slots__ = ("chunks", "limit", "older", "size")

    def __init__(
        self,
        chunks: Iterable[tuple[FloatArray, FloatArray | None]] = (),
        limit: int | None = None,
        older: LogLinearHistogram | None = None,
    ) -> None:
        self.limit = limit
        self.chunks = deque(chunk for chunk in chunks if chunk[0].size)
        self.size = sum(values.size for values, _ in self.chunks)
        self.older = older

    def follow_with(self, others: Sequence[Sample]) -> None:
        """Let the values of `others` follow, in order."""
        for other in others:
            self.chunks += other.chunks
            self.size += other.size
        known = [] if self.older is None else [self.older]
        older = [other.older for other in others if other.older is not None]
        beyond = []
        if self.limit is not None and self.size >= self.limit + _UNFOLDED:
            while self.size - self.chunks[0][0].size >= self.limit:
                beyond.append(self.chunks.popleft())
                self.size -= beyond[-1][0].size
        if older or beyond:
            # A new one: copies share the old, which never changes.
            self.older = new_histogram([*known, *older], *concatenated(beyond))

    def copy(self) -> Sample:
        return Sample(self.chunks, self.limit, self.older)

    def window(self) -> Window:
        """Return the newest `limit` values, and all before them as a histogram."""
        values, weights = concatenated(list(self.chunks))
        if self.older is not None:
            self.older.settle()
        window = Window(values, weights, values.size, self.older)
        return window if self.limit is None else window.limited(self.limit)

    def plain(self) -> list[bytes | None]:
        """Return the values that are kept as they are, and their weights, as bytes of float64."""
        values, weights = concatenated(list(self.chunks))
        return [values.tobytes(), None if weights is None else weights.tobytes()]

    @classmethod
    def of(cls, plains: Sequence[Sequence[bytes | None]]) -> Sample:
        """Return the values of which `plain` gave these, in order."""
        values = np.frombuffer(b"".join([plain[0] or b"" for plain in plains]))
        if all(plain[1] is None for plain in plains):
            return cls([(values, None)])
        return cls([(values, np.frombuffer(b"".join(map(_weights_in, plains))))])


def _weights_in(plain: Sequence[bytes | None]) -> bytes:
    values, weights = plain
    assert values is not None
    return np.ones(len(values) // 8).tobytes() if weights is None else weights


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
    """Everyone's states of k keys that one handler finalises at once: lanes of shape (k, n)."""

    sums: FloatArray
    maxs: FloatArray
    seconds: FloatArray
    pools: Sequence[Pool] = ()
    categories: tuple[str, ...] = ()

    @classmethod
    def of(cls, state: ReducedState) -> ReducedStates:
        sums, maxs, seconds = map(np.array, ([state.sums], [state.maxs], [state.seconds]))
        return cls(sums, maxs, seconds, (state.pool,), state.categories)


Results: TypeAlias = tuple[FloatArray, npt.NDArray[np.bool_]]
"""What is reported of k states: values, and which of them there are, both of shape (k, s)."""
