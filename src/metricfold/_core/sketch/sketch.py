"""LogLinearHistogram: percentiles of any number of values, merged by adding numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from metricfold._core.runtime.listing import internal
from metricfold._core.sketch import plain, wire
from metricfold._core.sketch.contents import Contents, Frame, Total, check_max_buckets
from metricfold._core.sketch.estimation import (
    Profile,
    as_histogram,
    mean_and_deviation,
    quantiles,
)
from metricfold._core.sketch.grid import Buckets, Grid, place
from metricfold._core.sketch.indexing import FloatArray, IntArray
from metricfold._core.sketch.layout import NOTHING, Extents, kept_magnitudes, resolve
from metricfold._core.sketch.record import Histogram
from metricfold._core.sketch.weights import LARGEST_WEIGHT

__all__ = ["LogLinearHistogram"]

_CHUNK = 8192
"""Values are folded so many at a time."""
_MANY_STRAYS = 512
"""Values without a bucket that are worth a new layout before somebody asks."""


@internal("fingerprint", "settle")
class LogLinearHistogram:
    """How values are distributed: any number of them, in a fixed amount of memory.

    A value's bucket is its float's exponent and top m mantissa bits; of each bucket the number of
    values, their mean and their deviation are kept. A histogram starts at m = 16, keeps only
    ranges that are occupied, and halves its resolution where those outgrow `max_buckets`, never
    below m = 4. Its state depends on the values alone, not on their order or on how they were
    split (but for rounding in the mean and deviation of a bucket), so that histograms of parts
    merge into that of the whole.

    Guaranteed: each estimated order statistic x is off by at most |x| · 2^-m (by 2^-(1022 + m) if
    x is subnormal), where `m` is the property of that name. At m = 6 a p50 of 100 is estimated
    between 98.4 and 101.6. Quantiles interpolate between neighbouring order statistics as NumPy
    does. Only values outside of `kept_range` are exempt: none, unless they fill more than
    `max_buckets` / 16 octaves.

    Measured at 10^6 values and 2048 buckets, percentiles 0.1 to 99.9: ranks are right to 0.01 % on
    log-normal, normal, Pareto, bimodal and constant streams and on 2.5 ± 0.01 and 300 ± 0.1 with an
    outlier of 1e30 or 1e-30, and to 0.15 % on integers; `mean` and `std` agree with NumPy's to 12
    digits; 32 values come out exactly. ``docs/histograms.md`` has the table.

    Args:
        max_buckets: how many buckets there may be, 320 or more. Each takes three numbers.

    Raises:
        ValueError: `max_buckets` is too small.

    >>> histogram = LogLinearHistogram()
    >>> histogram.update(np.arange(1, 11))
    >>> histogram.quantile(0.5), histogram.mean, histogram.max
    (5.5, 5.5, 10.0)
    """

    __slots__ = (
        "_buffer",
        "_filled",
        "_grid",
        "_max",
        "_max_buckets",
        "_min",
        "_profile",
        "_straying",
        "_strays",
        "_totals",
        "_weights",
    )

    def __init__(self, max_buckets: int = 2048) -> None:
        self._buffer = np.empty(0)
        self._weights: FloatArray | None = None
        self._filled = 0
        self._strays: list[tuple[IntArray, FloatArray | None]] = []
        self._straying = 0
        self._max_buckets = check_max_buckets(max_buckets)
        self._min, self._max = math.inf, -math.inf
        self._totals = np.zeros(len(Total))
        self._grid = Grid(NOTHING)
        # What follows from all this, once somebody asks.
        self._profile: Profile | None = None

    def _become(self, contents: Contents) -> None:
        self._max_buckets = contents.max_buckets
        self._min, self._max = contents.minimum, contents.maximum
        self._totals, self._grid = contents.totals, contents.grid
        self._profile = None

    # -- Values in

    def update(self, values: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> None:
        """Add values of any shape; a weight of 0 adds nothing.

        NaN and ±inf are counted, and stay out of everything else.

        Raises:
            TypeError: values or weights are not real numbers.
            ValueError: weights have another shape than the values, or one is negative, NaN or
                beyond 1e150.
        """
        array = _numbers("values", values)
        weighing = None
        if weights is not None:
            weighing = _check_weights(_numbers("weights", weights), array.shape)
            array, weighing = array[weighing > 0], weighing[weighing > 0]
        array = array.reshape(-1)
        if self._filled + array.size < _CHUNK:
            self._keep(array, weighing)
            return
        done = 0
        while done < array.size:
            if not self._filled and array.size - done >= _CHUNK:
                part = slice(done, done + _CHUNK)
                chunk = np.ascontiguousarray(array[part], dtype=np.float64)
                self._fold(chunk, None if weighing is None else weighing[part])
            else:
                part = slice(done, min(array.size, done + _CHUNK - self._filled))
                self._keep(array[part], None if weighing is None else weighing[part])
            done = part.stop

    def _keep(self, values: npt.NDArray[Any], weights: FloatArray | None) -> None:
        """Copy a few values to the buffer, and fold it when it is full."""
        begin, end = self._filled, self._filled + values.size
        if end > self._buffer.size:
            grown = np.empty(min(_CHUNK, max(2 * self._buffer.size, end, 64)))
            grown[:begin] = self._buffer[:begin]
            self._buffer = grown
            if self._weights is not None:
                self._weights = np.concatenate([self._weights[:begin], np.ones(grown.size - begin)])
        if weights is not None and self._weights is None:
            self._weights = np.ones(self._buffer.size)
        self._buffer[begin:end] = values
        if self._weights is not None:
            self._weights[begin:end] = 1.0 if weights is None else weights
        self._filled = end
        if end == _CHUNK:
            self._flush()

    def _flush(self) -> None:
        if self._filled:
            filled = slice(0, self._filled)
            weights = None if self._weights is None else self._weights[filled]
            self._filled, self._weights = 0, None
            self._fold(self._buffer[filled], weights)

    def _fold(self, values: FloatArray, weights: FloatArray | None) -> None:
        self._profile = None
        # A stream that widens slowly would be laid out anew for every extreme: let some gather.
        if self._straying > _MANY_STRAYS:
            self._lay_out(roomy=True)
        low, high = float(values.min()), float(values.max())
        totals = self._totals
        if not (math.isfinite(low) and math.isfinite(high)):
            totals[Total.NAN] += np.count_nonzero(np.isnan(values))
            totals[Total.POSITIVE_INFINITY] += np.count_nonzero(values == math.inf)
            totals[Total.NEGATIVE_INFINITY] += np.count_nonzero(values == -math.inf)
            finite = np.isfinite(values)
            values = values[finite]
            weights = None if weights is None else weights[finite]
            if not values.size:
                return
            low, high = float(values.min()), float(values.max())
        totals[Total.COUNT] += values.size
        totals[Total.SQUARES] += values.size if weights is None else weights @ weights
        self._min, self._max = min(self._min, low), max(self._max, high)
        if low <= 0.0 <= high:
            nonzero = np.count_nonzero(values)
            if nonzero < values.size:
                other = values != 0.0
                zeros = values.size - nonzero if weights is None else weights[~other].sum()
                totals[Total.ZERO] += zeros
                values, weights = values[other], None if weights is None else weights[other]
        if values.size:
            self._fold_bits(values.view(np.int64), weights)

    def _fold_bits(self, bits: IntArray, weights: FloatArray | None) -> None:
        rest = self._grid.fold(bits, weights)
        if rest is not None:
            self._strays.append(rest)
            self._straying += rest[0].size

    def _lay_out(self, *, roomy: bool) -> None:
        """Find new places for all values, strays too; with some room for more of them, or none."""
        before, strays = self._grid, self._strays
        self._strays, self._straying = [], 0
        reached = [before.extents, *(Extents.of_bits(bits) for bits, _ in strays)]
        layout = resolve(
            reduce(Extents.joined, reached),
            self._max_buckets,
            before.layout.finest,
            before.layout.dropped,
        )
        self._grid = Grid(layout.with_room() if roomy else layout)
        if before.layout.total:
            place(Buckets.of(before), self._grid.layout, self._grid.sums)
        for bits, weights in strays:
            self._grid.fold(bits, weights)

    def merge(self, *others: LogLinearHistogram) -> None:
        """Add all that `others` have seen; the smallest `max_buckets` holds from then on.

        Raises:
            TypeError: one of them is no LogLinearHistogram.
        """
        for other in others:
            if not isinstance(other, LogLinearHistogram):
                raise TypeError(f"cannot merge a {type(other).__name__} into a LogLinearHistogram")
        self._become(self._contents().joined(*map(LogLinearHistogram._contents, others)))

    def downscale(self) -> None:
        """Halve the resolution: `m` falls by 1, pairs of buckets become one, exactly.

        Buckets that are finer than the coarsest are brought to the same resolution.

        Raises:
            ValueError: m is 0, one bucket per octave.
        """
        contents = self._contents()
        if self.m == 0:
            raise ValueError("the histogram has one bucket per octave: it cannot be any coarser")
        frame = replace(contents.frame, finest=self.m - 1)
        self._become(Contents.of(self._max_buckets, frame, self._totals, contents.buckets))

    @classmethod
    def from_buckets(
        cls,
        index: npt.ArrayLike,
        sums: npt.ArrayLike,
        m: int,
        *,
        count: int,
        squares: float,
        minimum: float,
        maximum: float,
        zeros: float = 0.0,
        nan_count: int = 0,
        posinf_count: int = 0,
        neginf_count: int = 0,
        max_buckets: int = 2048,
    ) -> LogLinearHistogram:
        """Return the histogram of values that have been sorted into buckets elsewhere.

        Args:
            index: signed index of each occupied bucket, as `bucket_index` says it; not 0.
            sums: of w, w·u and w·u² over the values in each, where w is the weight and u in [0, 1)
                the position inside the bucket; shape (3, n).
            m: resolution of the indices; the histogram is no finer.
            count: how many finite values there are.
            squares: sum of their w².
            minimum: the least of them; ignored if there is none.
            maximum: the greatest of them; ignored if there is none.
            zeros: weight of those that are ±0.
            nan_count: how many values were NaN.
            posinf_count: how many were +inf.
            neginf_count: how many were -inf.
            max_buckets: how many buckets there may be.

        Raises:
            ValueError: `m` or `max_buckets` is out of range, an index is 0 or that of no float, or
                shapes differ.
        """
        buckets = Buckets.signed(index, sums, m)
        frame = Frame(buckets.extents, finest=m)
        if count:
            frame = replace(frame, minimum=float(minimum), maximum=float(maximum))
        totals = np.zeros(len(Total))
        totals[Total.COUNT], totals[Total.SQUARES], totals[Total.ZERO] = count, squares, zeros
        totals[Total.NAN] = nan_count
        totals[Total.POSITIVE_INFINITY] = posinf_count
        totals[Total.NEGATIVE_INFINITY] = neginf_count
        return cls._of(Contents.of(check_max_buckets(max_buckets), frame, totals, buckets))

    def copy(self) -> LogLinearHistogram:
        """Return a histogram of the same values that goes its own way."""
        return self._of(self._contents().copy())

    @classmethod
    def _of(cls, contents: Contents) -> LogLinearHistogram:
        histogram = cls(contents.max_buckets)
        histogram._become(contents)
        return histogram

    def _contents(self) -> Contents:
        """Return what the histogram holds, as its values alone determine it."""
        self.settle()
        return Contents(self._max_buckets, self._min, self._max, self._totals, self._grid)

    def settle(self) -> None:
        """Fold what is buffered: until the next update reading changes nothing, on any thread."""
        self._flush()
        if self._straying or self._grid.layout.roomy:
            self._lay_out(roomy=False)

    def fingerprint(self) -> bytes:
        """Return bytes that tell these contents from others."""
        self.settle()
        extremes = np.array([self._min, self._max])
        return b"".join([extremes.tobytes(), self._totals.tobytes(), self._grid.sums.tobytes()])

    # -- Statistics out

    @property
    def max_buckets(self) -> int:
        """How many buckets there may be."""
        return self._max_buckets

    @property
    def m(self) -> int:
        """Mantissa bits of the coarsest bucket index in use: the bound is 2^-m."""
        self.settle()
        return self._grid.layout.coarsest

    @property
    def kept_range(self) -> tuple[float, float]:
        """Magnitudes, from and to (exclusive), of the values for which the bound holds; and 0."""
        self.settle()
        return kept_magnitudes(self._grid.layout.dropped)

    @property
    def count(self) -> int:
        """Number of finite values of weight above 0."""
        return self._total(Total.COUNT)

    @property
    def nan_count(self) -> int:
        """Number of NaN."""
        return self._total(Total.NAN)

    @property
    def posinf_count(self) -> int:
        """Number of +inf."""
        return self._total(Total.POSITIVE_INFINITY)

    @property
    def neginf_count(self) -> int:
        """Number of -inf."""
        return self._total(Total.NEGATIVE_INFINITY)

    @property
    def min(self) -> float:
        """The least value, exactly; NaN if there is none."""
        self._flush()
        return self._min if self._totals[Total.COUNT] else math.nan

    @property
    def max(self) -> float:
        """The greatest value, exactly; NaN if there is none."""
        self._flush()
        return self._max if self._totals[Total.COUNT] else math.nan

    @property
    def mean(self) -> float:
        """The weighted mean; NaN if there is no value."""
        profile = self._estimate()
        return math.nan if profile is None else mean_and_deviation(profile, self._effective())[0]

    @property
    def std(self) -> float:
        """The sample standard deviation; NaN if there are fewer than two values."""
        profile = self._estimate()
        return math.nan if profile is None else mean_and_deviation(profile, self._effective())[1]

    @overload
    def quantile(self, q: float) -> float: ...
    @overload
    def quantile(self, q: npt.NDArray[Any] | list[float] | tuple[float, ...]) -> FloatArray: ...
    def quantile(self, q: npt.ArrayLike) -> float | FloatArray:
        """Return the quantile `q`, or one for each of an array of them; NaN without values.

        NumPy's ``linear`` rule on the estimated order statistics. A weight is a number of copies;
        weights that come to less than one each are scaled to that.

        Raises:
            ValueError: a `q` lies outside of 0..1.
        """
        asked = np.asarray(q, dtype=np.float64)
        if not ((asked >= 0.0) & (asked <= 1.0)).all():
            raise ValueError(f"q={q!r}: a quantile must lie in 0..1")
        profile = self._estimate()
        if profile is None:
            found = np.full(asked.size, math.nan)
        else:
            found = quantiles(profile, self.count, asked.reshape(-1))
        return found.reshape(asked.shape) if asked.ndim else float(found[0])

    def histogram(self, bins: int | None = None) -> Histogram:
        """Return edges and counts, for those who draw them.

        Args:
            bins: how many bins of equal width; None gives the histogram's own buckets, with
                empty ones between those that do not touch.

        Raises:
            ValueError: there is no value, or `bins` is not a whole number above 0.
        """
        whole = isinstance(bins, int | np.integer) and not isinstance(bins, bool)
        if bins is not None and (not whole or bins < 1):
            raise ValueError(f"bins={bins!r}: give a whole number, 1 or more, or None")
        profile = self._estimate()
        if profile is None:
            raise ValueError("the histogram is empty: it has no value to draw")
        return as_histogram(profile, bins)

    def _total(self, total: Total) -> int:
        self._flush()
        return int(self._totals[total])

    def _estimate(self) -> Profile | None:
        self.settle()
        if self._profile is None and self._totals[Total.COUNT]:
            self._profile = Profile.of(
                Buckets.of(self._grid),
                float(self._totals[Total.ZERO]),
                self._min,
                self._max,
            )
        return self._profile

    def _effective(self) -> float:
        """Return the effective sample size, sum(w)² / sum(w²)."""
        assert self._profile is not None
        weight, squares = self._profile.weights.sum(), float(self._totals[Total.SQUARES])
        # Squares of weights below 1e-154 vanish: take such weights for equal.
        if squares == 0.0:
            return float(self._totals[Total.COUNT])
        return float(max(weight * (weight / squares), 1.0))

    # -- Across ranks

    def extents(self) -> FloatArray:
        """Return what fixes a common layout, shape (EXTENTS_WIDTH,).

        Merge those of all histograms by elementwise maximum; its identity is -inf.
        """
        return wire.extents(self._contents().frame)

    def pack(self, extents: npt.ArrayLike, max_buckets: int) -> FloatArray:
        """Return the contents, shape (slot_width(max_buckets),), in the layout of `extents`.

        Merge those of all histograms by elementwise sum; its identity is 0.

        Args:
            extents: merged from all the histograms that will be summed, this one among them.
            max_buckets: how many buckets to use; at most as many as any of the histograms has.

        Raises:
            ValueError: the extents are not of this form or do not cover this histogram, or
                `max_buckets` is too large or too small.
        """
        return wire.pack(self._contents(), extents, max_buckets)

    @classmethod
    def unpack(
        cls, extents: npt.ArrayLike, vector: npt.ArrayLike, max_buckets: int
    ) -> LogLinearHistogram:
        """Return the merge of the histograms whose packed contents were summed to `vector`.

        Args:
            extents: the merged ones with which all were packed.
            vector: the sum.
            max_buckets: with which all were packed.

        Raises:
            ValueError: extents or vector have another size.
        """
        return cls._of(wire.unpack(extents, vector, max_buckets))

    # -- In a checkpoint

    def to_dict(self) -> dict[str, Any]:
        """Return the state as plain types, which JSON holds without loss."""
        return plain.to_dict(self._contents())

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> LogLinearHistogram:
        """Return the histogram of which `to_dict` gave `state`.

        Raises:
            ValueError: it is damaged, or not from here.
        """
        return cls._of(plain.from_dict(state))

    def __repr__(self) -> str:
        return f"LogLinearHistogram(count={self.count}, min={self.min}, max={self.max}, m={self.m})"


def _numbers(what: str, given: npt.ArrayLike) -> npt.NDArray[Any]:
    array = np.asarray(given)
    if array.dtype.kind not in "buif":
        raise TypeError(f"{what} are not real numbers, but of type {array.dtype}")
    return array


def _check_weights(weights: npt.NDArray[Any], shape: tuple[int, ...]) -> FloatArray:
    if weights.shape != shape:
        raise ValueError(f"weights of shape {weights.shape} for values of shape {shape}")
    if not ((weights >= 0) & (weights <= LARGEST_WEIGHT)).all():
        raise ValueError(f"weights must lie in 0..{LARGEST_WEIGHT:g}")
    return weights.astype(np.float64)
