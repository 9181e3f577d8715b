"""What buckets say about the values in them.

Of each bucket the number, the mean and the standard deviation of its values are known, and the
bounds that they lie in. Counts say without error which bucket an order statistic is in, so no
estimate is off by more than the bucket's width. Inside, one or two values come out exactly, and
many are assumed to lie as `shape` says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from metricfold._core.sketch import Histogram
from metricfold._core.sketch.buckets import Buckets
from metricfold._core.sketch.indexing import FloatArray, IntArray
from metricfold._core.sketch.shape import Shapes

__all__ = ["Profile", "as_histogram", "at_or_below", "mean_and_deviation", "quantiles"]

_MANY = 8
"""Values in a cell from which on their distribution has a shape."""
_NOTABLE = 1 / 512
"""The part of all values from which on the shape of a cell matters: without one, ranks are off by
at most 0.06 of the cell's part."""
_TINY = 2.0**-1022
_NOISE = 2.0**-50
"""A variance below so much of the mean square is rounding."""


@dataclass(frozen=True, slots=True, eq=False)
class Profile:
    """Cells in ascending order of their values; none empty, no two overlap; each array of shape (n,)."""

    weights: FloatArray
    means: FloatArray
    deviations: FloatArray
    """Of the population."""
    lows: FloatArray
    """The least float that belongs to the cell, or the least value of all."""
    highs: FloatArray
    """The greatest float that belongs to the cell, or the greatest value of all."""

    @classmethod
    def of_values(cls, values: FloatArray, weights: FloatArray) -> Profile:
        """Return a cell of no width for each value, shape (n,)."""
        order = np.argsort(values, kind="stable")
        values, weights = values[order], weights[order]
        return cls(weights, values, np.zeros(values.size), values, values)

    @classmethod
    def of(cls, buckets: Buckets, zeros: float, minimum: float, maximum: float) -> Profile:
        """Return the cells of `buckets` and of the weight of `zeros`, between the extremes."""
        count, first, second = buckets.sums
        least, greatest = buckets.bounds
        negative = buckets.index < 0
        with np.errstate(under="ignore", over="ignore"):
            units = buckets.units.astype(np.int32)
            square = count * second - first * first
            square[square < _NOISE * count * second] = 0.0
            deviations = np.ldexp(np.sqrt(square) / count, units)
            means = buckets.origins + np.ldexp(first / count, units)
            means = np.minimum(np.maximum(means, least), greatest)
        columns = [
            count,
            np.where(negative, -means, means),
            deviations,
            np.where(negative, -greatest, least),
            np.where(negative, -least, greatest),
        ]
        if zeros:
            below = np.count_nonzero(negative)
            cell = (zeros, 0.0, 0.0, 0.0, 0.0)
            columns = [
                np.insert(column, below, own) for column, own in zip(columns, cell, strict=True)
            ]
        weights, means, deviations, lows, highs = columns
        lows, highs = np.maximum(lows, minimum), np.minimum(highs, maximum)
        deviations[lows == highs] = 0.0
        return cls(weights, np.minimum(np.maximum(means, lows), highs), deviations, lows, highs)


def mean_and_deviation(profile: Profile, count: int, squares: float) -> tuple[float, float]:
    """Return the mean, and the sample standard deviation (NaN of one value).

    `count` is the number of values, `squares` the sum of the squares of their weights.
    """
    weight = profile.weights.sum()
    # The effective sample size. Squares of weights below 1e-154 vanish: take such weights for equal.
    effective = max(weight * (weight / squares), 1.0) if squares else float(count)
    low, high = float(profile.lows[0]), float(profile.highs[-1])
    # Scaled by a power of two, so that nothing is rounded, and squares neither overflow nor vanish.
    exponent = int(np.frexp(max(-low, high))[1])
    means = np.ldexp(profile.means, -exponent)
    deviations = np.ldexp(profile.deviations, -exponent)
    shares = profile.weights / weight
    mean = float((shares * means).sum())
    variance = float((shares * ((means - mean) ** 2 + deviations**2)).sum())
    deviation = math.nan
    if effective > 1.0:
        deviation = 0.0 if low == high else math.sqrt(variance / (1.0 - 1.0 / effective))
    return min(max(_scaled(mean, exponent), low), high), _scaled(deviation, exponent)


def quantiles(profile: Profile, count: int, q: FloatArray) -> FloatArray:
    """Return the quantiles `q`, each in 0..1, shape (k,).

    NumPy's ``linear`` rule on the estimated order statistics, with weights as numbers of copies. A
    sample of n values stands for N = max(sum(w), n): weights that come to less, such as shares, are
    scaled to n. Quantile q is the mean of the ascending values over the stretch of cumulated weight
    from q(N - 1) to q(N - 1) + 1. So whole weights say what repeating the values would, unit weights
    what NumPy says, and sum(w) and n are all that has to be known of a sample to merge it.
    """
    counts = _counts(profile.weights, count)
    through = np.cumsum(counts)
    before = np.concatenate(([0.0], through[:-1]))
    last = len(counts) - 1
    whole = through[-1]
    reach = max(whole - 1.0, 0.0)
    starts = reach * q
    first = np.searchsorted(through, starts, side="right")
    final = np.searchsorted(through, starts + 1.0, side="left")
    # Beside huge weights 1 is nothing: what it falls short by says how much of the stretch lies in
    # each of two cells that meet there. Elsewhere it is 0.
    short = ((whole - reach) - 1.0) * q
    if short.any():
        first = np.minimum(first, np.searchsorted(through, starts, side="left"))
        final = np.maximum(final, np.searchsorted(through, starts, side="right"))
    first, final = np.minimum(first, last), np.minimum(final, last)

    values = _covered(profile, counts, first, (starts - before[first]) + short)
    length = np.clip((through[first] - starts) - short, 0.0, 1.0)
    for k in np.flatnonzero(final > first + 1):
        # Whole cells inside a stretch: only where values weigh less than 1.
        inner = slice(first[k] + 1, final[k])
        inside = float(counts[inner].sum())
        if inside:
            mean = float((counts[inner] / inside) @ profile.means[inner])
            values[k] = _between(values[k], mean, inside / (length[k] + inside))
            length[k] += inside
    crossing = np.flatnonzero(final > first)
    if crossing.size:
        cell = final[crossing]
        start = (starts[crossing] - before[cell]) + short[crossing]
        beyond = _covered(profile, counts, cell, start)
        share = np.maximum(1.0 - length[crossing], 0.0)
        values[crossing] = _between(values[crossing], beyond, share)
    # The extremes are known, if they are all that the stretch holds.
    if counts[0] >= 1.0:
        values[q == 0.0] = profile.lows[0]
    if counts[-1] >= 1.0:
        values[q == 1.0] = profile.highs[-1]
    return values


def _counts(weights: FloatArray, count: int) -> FloatArray:
    """Return how many values each cell stands for."""
    if weights.sum() >= count:
        return weights  # as they are: whole numbers stay exact
    # Scale first: the sum of tiny weights must not vanish.
    weights = weights / weights.max()
    scaled: FloatArray = weights * (count / weights.sum())
    return scaled


def as_histogram(profile: Profile, bins: int | None) -> Histogram:
    """Return edges and counts: the cells themselves, or `bins` bins of equal width."""
    low, high = float(profile.lows[0]), float(profile.highs[-1])
    if bins is None or low == high:
        edges, counts = _outlines(profile)
    else:
        # Halves first: the range of huge values of both signs is no number.
        edges = np.linspace(low / 2, high / 2, bins + 1) * 2
        edges[0], edges[-1] = low, high
        reached = _below(profile, edges)
        reached[0], reached[-1] = 0.0, profile.weights.sum()
        counts = np.maximum(np.diff(reached), 0.0)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        squares = profile.means**2 + profile.deviations**2
        return Histogram(
            edges=edges,
            counts=counts,
            minimum=low,
            maximum=high,
            total=float((profile.weights * profile.means).sum()),
            total_squares=float((profile.weights * squares).sum()),
        )


def _outlines(profile: Profile) -> tuple[FloatArray, FloatArray]:
    """Return the edges and counts of all cells, and of the gaps between them."""
    with np.errstate(over="ignore"):
        ends = np.nextafter(profile.highs, math.inf)
    if profile.lows[-1] < profile.highs[-1]:
        ends[-1] = profile.highs[-1]
    starts = profile.lows.copy()
    if math.isinf(ends[-1]):
        # The greatest float of all and nothing else: there is no edge above it.
        starts[-1], ends[-1] = np.nextafter(starts[-1], 0.0), starts[-1]
    # A cell, the gap after it, and so on; gaps of no width go.
    edges = np.stack([starts, ends], axis=1).ravel()
    counts = np.stack([profile.weights, np.zeros_like(profile.weights)], axis=1).ravel()[:-1]
    wide = edges[:-1] < edges[1:]
    return np.append(edges[:-1][wide], edges[-1]), counts[wide]


def at_or_below(profile: Profile, values: FloatArray) -> FloatArray:
    """Return the part of all weight that is at or below each of some `values`."""
    # What is at or below a number is below the next one.
    with np.errstate(over="ignore"):
        beyond = np.nextafter(values, math.inf)
    found: FloatArray = np.clip(_below(profile, beyond) / profile.weights.sum(), 0.0, 1.0)
    found[values >= profile.highs[-1]] = 1.0
    return found


def _below(profile: Profile, values: FloatArray) -> FloatArray:
    """Return the weight below each of some `values`."""
    through = np.cumsum(profile.weights)
    cell = np.minimum(np.searchsorted(profile.highs, values), through.size - 1)
    weights, means, deviations = (
        part[cell] for part in (profile.weights, profile.means, profile.deviations)
    )
    with np.errstate(over="ignore"):
        first = np.maximum(means - math.sqrt(3.0) * deviations, profile.lows[cell])
        final = np.minimum(means + math.sqrt(3.0) * deviations, profile.highs[cell])
        share = np.clip((values - first) / np.maximum(final - first, _TINY), 0.0, 1.0)
    many = (weights >= max(_MANY, _NOTABLE * through[-1])) & (deviations > 0.0)
    if many.any():
        with np.errstate(over="ignore"):
            z = (values[many] - means[many]) / deviations[many]
        shapes, shape = _shapes(profile, cell[many])
        share[many] = np.where(shapes.known[shape], shapes.share(shape, z), share[many])
    share[values > profile.highs[-1]] = 1.0
    found: FloatArray = through[cell] - weights * (1.0 - share)
    return found


def _covered(profile: Profile, counts: FloatArray, cell: IntArray, start: FloatArray) -> FloatArray:
    """Return the mean of `cell` in start..start + 1: order statistic r of its n values covers r..r+1."""
    n = counts[cell]
    start, end = np.clip(start, 0.0, n), np.clip(start + 1.0, 0.0, n)
    middle = 0.5 * (start + end)
    # A few values are spread evenly with the deviation that they have: that is exact for two.
    surplus = np.maximum(n - 1.0, 0.0)
    place = np.clip((2.0 * middle - n) / np.maximum(surplus, _TINY), -1.0, 1.0)
    deviations = place * np.sqrt(3.0 * surplus / (n + 1.0))

    many = (n >= np.maximum(_MANY, _NOTABLE * counts.sum())) & (profile.deviations[cell] > 0.0)
    if many.any():
        shapes, shape = _shapes(profile, cell[many])
        found = shapes.quantile(shape, middle[many] / n[many])
        deviations[many] = np.where(shapes.known[shape], found, deviations[many])
    with np.errstate(over="ignore"):
        values = profile.means[cell] + profile.deviations[cell] * deviations
    covered: FloatArray = np.clip(values, profile.lows[cell], profile.highs[cell])
    return covered


def _shapes(profile: Profile, cell: IntArray) -> tuple[Shapes, IntArray]:
    """Return how values lie in some cells, each once, and the number among these of each in `cell`."""
    cells, shape = np.unique(cell, return_inverse=True)
    means, deviations = profile.means[cells], profile.deviations[cells]
    with np.errstate(over="ignore"):
        low = (profile.lows[cells] - means) / deviations
        high = (profile.highs[cells] - means) / deviations
    return Shapes(low, high), shape


def _between(one: FloatArray, other: FloatArray | float, share: FloatArray) -> FloatArray:
    """Return one + share * (other - one), for values of any size."""
    with np.errstate(over="ignore", invalid="ignore"):
        gap = other - one
        mixed = np.where(np.isfinite(gap), one + share * gap, one * (1.0 - share) + other * share)
    between: FloatArray = np.clip(mixed, np.minimum(one, other), np.maximum(one, other))
    return between


def _scaled(number: float, exponent: int) -> float:
    # The deviation of values near both ends of the floats lies beyond them.
    with np.errstate(over="ignore"):
        return float(np.ldexp(number, exponent))
