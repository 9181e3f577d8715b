"""The values of a DISTRIBUTION: exact while they are few, a histogram beyond.

A `Pool` is what a view speaks about, of any number of ranks. A `Window` is what one rank holds: its
most recent values, and a histogram of those of the open interval that are no longer among them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from metricfold._core import sketch as histograms  # its sketch is loaded when it is first needed
from metricfold._core.sketch import BUCKETS, Histogram
from metricfold._core.sketch.weights import concatenated

if TYPE_CHECKING:
    from metricfold._core.sketch import LogLinearHistogram


FloatArray: TypeAlias = npt.NDArray[np.float64]
Weights: TypeAlias = FloatArray | None

EXACT_VALUES = 1000
"""Without a window size, so many values of a rank and interval, and of a view, are kept exactly."""
MOST_SAVED = 65_536
"""So many recent values of one metric a checkpoint holds, over all ranks."""
_BINS = 64
_NOTHING = np.empty(0)


def new_histogram(
    parts: Iterable[LogLinearHistogram] = (),
    values: FloatArray = _NOTHING,
    weights: Weights = None,
) -> LogLinearHistogram:
    """Return a new histogram of what `parts` hold and of `values`."""
    histogram = histograms.LogLinearHistogram(BUCKETS)
    if parts := list(parts):
        histogram.merge(*parts)
    if values.size:
        histogram.update(values, weights)
    histogram.settle()
    return histogram


def histogram_from(state: Mapping[str, Any]) -> LogLinearHistogram:
    """Return the histogram of which `to_dict` gave `state`; raises ValueError if it is none of ours."""
    if state["max_buckets"] != BUCKETS:
        raise ValueError(f"it holds a histogram of max_buckets={state['max_buckets']!r}")
    return histograms.LogLinearHistogram.from_dict(state)


@dataclass(frozen=True, slots=True)
class Pool:
    """Finite values of positive weight: all of them exact, or all in a histogram.

    Values may have the shape in which they came from the ranks. Weights are None if all are 1; a
    histogram is settled, so that several threads may read it.
    """

    values: FloatArray = field(default_factory=lambda: _NOTHING)
    weights: Weights = None
    histogram: LogLinearHistogram | None = None

    @classmethod
    def joined(cls, pools: Sequence[Pool], most: float = math.inf) -> Pool:
        """Return all that `pools` hold, exactly if none is a histogram and they are `most` or fewer.

        Associative and commutative, but for the order of the values.
        """
        values, weights = concatenated([(pool.values, pool.weights) for pool in pools])
        parts = [pool.histogram for pool in pools if pool.histogram is not None]
        if not parts and values.size <= most:
            return cls(values, weights)
        if len(parts) == 1 and not values.size:
            return cls(histogram=parts[0])
        return cls(histogram=new_histogram(parts, values, weights))

    def condensed(self) -> LogLinearHistogram | None:
        """Return all that is here as a histogram; None if nothing is."""
        if self.histogram is None and self.values.size:
            return new_histogram((), self.values, self.weights)
        return self.histogram

    @property
    def count(self) -> int:
        return self.values.size if self.histogram is None else self.histogram.count

    def summary(self, q: FloatArray = _NOTHING) -> tuple[float, float, float, float, FloatArray]:
        """Return the least, the greatest, mean, sample deviation, and the quantiles `q` in 0..1.

        There must be a value; the deviation of one alone means nothing.
        """
        if (one := self.histogram) is not None:
            return one.min, one.max, one.mean, one.std, one.quantile(q) if q.size else q
        extremes = float(self.values.min()), float(self.values.max())
        found = quantiles(self.values, self.weights, q) if q.size else q
        return *extremes, *_moments(self.values, self.weights), found

    def drawn(self) -> Histogram:
        """Return edges and counts, for those who draw them; there must be a value."""
        if self.histogram is None:
            return _drawn(self.values, self.weights)
        return self.histogram.histogram(_BINS)

    def fingerprint(self) -> bytes:
        """Return bytes that tell this pool from others, if not from all."""
        if self.histogram is not None:
            return self.histogram.fingerprint()
        weights = b"" if self.weights is None else self.weights.tobytes()
        return self.values.tobytes() + weights


class Window(NamedTuple):
    """What one rank holds of a DISTRIBUTION.

    Args:
        values: its most recent ones, oldest first, shape (n,).
        weights: shape (n,), or None if all are 1.
        fresh: how many of them, at the end, came in during the interval that is still open.
        older: histogram of the values of that interval that came before these; settled.
    """

    values: FloatArray = _NOTHING
    weights: Weights = None
    fresh: int = 0
    older: LogLinearHistogram | None = None

    def followed_by(self, newer: Window, limit: int) -> Window:
        """Return the newest `limit` of these values and the `newer` ones, which are all fresh."""
        if newer.values.size == limit and not self.fresh and self.older is None:
            return newer
        parts = [one.older for one in (self, newer) if one.older is not None]
        older = new_histogram(parts) if len(parts) > 1 else next(iter(parts), None)
        values, weights = concatenated([(self.values, self.weights), (newer.values, newer.weights)])
        return Window(values, weights, self.fresh + newer.values.size, older).limited(limit)

    def limited(self, limit: int) -> Window:
        """Return the newest `limit` values; what else is fresh joins the histogram."""
        beyond = self.values.size - limit
        if beyond <= 0:
            return self
        older = self.older
        if self.fresh > limit:
            parts = [] if older is None else [older]
            older = new_histogram(parts, *self._cut(slice(-self.fresh, -limit)))
        return Window(*self._cut(slice(beyond, None)), min(self.fresh, limit), older)

    def _cut(self, places: Any) -> tuple[FloatArray, Weights]:
        return self.values[places], None if self.weights is None else self.weights[places]

    def closed(self) -> Window:
        """Return the same values, none of which belongs to the interval that now begins."""
        return Window(self.values, self.weights)

    def thinned(self, most: int) -> Window:
        """Return at most so many of the values, evenly spread over their ages."""
        size = self.values.size
        if size <= most:
            return self
        kept = np.linspace(0, size - 1, most).round().astype(np.intp)
        fresh = int((kept >= size - self.fresh).sum())
        return Window(*self._cut(kept), fresh, self.older)

    def recent(self) -> Pool:
        """Return the most recent values."""
        return Pool(self.values, self.weights)

    def interval(self) -> Pool:
        """Return what came in during the open interval."""
        exact = Pool(*self._cut(slice(self.values.size - self.fresh, None)))
        return exact if self.older is None else Pool.joined([exact, Pool(histogram=self.older)])


# -- Statistics of exact values ------------------------------------------------------------------


def quantiles(values: FloatArray, weights: FloatArray | None, q: FloatArray) -> FloatArray:
    """Return the quantiles `q`, each in 0..1, of `values`, shape (n,), n > 0.

    NumPy's ``linear`` rule; with weights that of `sketch.estimate`, each value a cell of no width.
    """
    if weights is None or (weights[0] <= 1.0 and (weights == weights[0]).all()):
        return np.quantile(values, q)
    from metricfold._core.sketch import estimate  # noqa: PLC0415 - loaded when it is first needed

    cells = estimate.Profile.of_values(values, weights)
    return estimate.quantiles(cells, values.size, q)


def _moments(values: FloatArray, weights: FloatArray | None) -> tuple[float, float]:
    # Scale to 1, by a power of two so that nothing is rounded: squares of huge values stay finite.
    scale = math.ldexp(1.0, min(math.frexp(float(np.abs(values).max()))[1], 1023))
    scaled = values / scale
    weights = np.ones(values.shape) if weights is None else weights / weights.max()
    total = weights.sum()
    mean = (weights * scaled).sum() / total
    freedom = total - (weights**2).sum() / total
    square = (weights * (scaled - mean) ** 2).sum() / freedom if freedom > 0 else 0.0
    return float(mean * scale), float(math.sqrt(square) * scale)


def _drawn(values: FloatArray, weights: FloatArray | None) -> Histogram:
    low, high = float(values.min()), float(values.max())
    edges = _edges(low, high)
    ones = np.ones(values.shape) if weights is None else weights
    counts = np.histogram(values, edges, weights=ones)[0]
    with np.errstate(over="ignore", invalid="ignore"):
        total, squares = (values * ones).sum(), (values * values * ones).sum()
    return Histogram(edges, counts, low, high, float(total), float(squares))


def _edges(low: float, high: float) -> FloatArray:
    """Return edges of bins from `low` to `high`, ascending."""
    if low == high:
        # One of them has to be another number, and above the greatest float there is none.
        above = float(np.nextafter(high, math.inf))
        return np.array([low, above] if above < math.inf else [0.0, high])
    # Halves first: the range of huge values of both signs is no number.
    edges: FloatArray = np.linspace(low / 2, high / 2, _BINS + 1) * 2
    edges[0], edges[-1] = low, high
    # Fewer floats than bins cannot be told apart.
    return edges if (np.diff(edges) > 0).all() else np.array([low, high])
