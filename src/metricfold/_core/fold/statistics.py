"""What is printed of a DISTRIBUTION: one table, from a name to what computes it of many pools at once.

    found = Pools.of(pools, percentiles)
    {name: statistic.of(found) for name, statistic in statistics(percentiles).items()}

A new statistic is a line in `statistics`: a name, and a function of `Pools`, in which the least, the
greatest, the mean, the deviation and the percentiles of each pool stand in arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from metricfold._core.fold.sample import FloatArray, Pool

_AT_ONCE = 1 << 17
"""So many values of pools of equal size at once: fewer take more calls, and more of them memory."""
_MANY = 750
"""Values from which on those alone are sorted that share a cell with what is asked for."""


class Statistic(NamedTuple):
    """What computes one number of each pool, shape (k,), and how many values that takes at least."""

    of: Callable[[Pools], FloatArray]
    least: int = 1


@lru_cache(maxsize=16)
def statistics(percentiles: tuple[float, ...]) -> Mapping[str, Statistic]:
    """Return what is printed of a DISTRIBUTION, in that order, with these percentiles."""
    return {
        "mean": Statistic(lambda pools: pools.inside(pools.mean)),
        "min": Statistic(lambda pools: pools.minimum),
        "max": Statistic(lambda pools: pools.maximum),
        "std": Statistic(
            lambda pools: np.where(pools.minimum == pools.maximum, 0.0, pools.deviation), least=2
        ),
        **{
            percentile_name(one): Statistic(partial(_percentile, place))
            for place, one in enumerate(percentiles)
        },
        "count": Statistic(lambda pools: pools.count),
    }


def _percentile(place: int, pools: Pools) -> FloatArray:
    return pools.inside(pools.percentiles[:, place])


def percentile_name(percentile: float) -> str:
    """Return ``p05`` for 5, ``p50`` for 50 and ``p99.9`` for 99.9."""
    whole, _, fraction = np.format_float_positional(percentile, trim="-").partition(".")
    return f"p{int(whole):02d}.{fraction}" if fraction else f"p{int(whole):02d}"


@dataclass(frozen=True, slots=True, eq=False)
class Pools:
    """What is known of k pools, none of them empty: arrays of shape (k,), percentiles (k, p).

    The deviation is that of a sample, and means nothing for one value.
    """

    count: FloatArray
    minimum: FloatArray
    maximum: FloatArray
    mean: FloatArray
    deviation: FloatArray
    percentiles: FloatArray

    @classmethod
    def of(cls, pools: Sequence[Pool], percentiles: Sequence[float]) -> Pools:
        """Return what is known of `pools`, with the percentiles, each in 0..100."""
        q = np.array(percentiles) / 100.0
        count, low, high, mean, deviation = np.empty((5, len(pools)))
        found = cls(count, low, high, mean, deviation, np.empty((len(pools), q.size)))
        alike: dict[tuple[int, ...], list[int]] = {}
        for place, pool in enumerate(pools):
            if pool.histogram is None and pool.weights is None:
                alike.setdefault(pool.values.shape, []).append(place)
                continue
            count[place] = pool.count
            low[place], high[place], mean[place], deviation[place], found.percentiles[place] = (
                pool.summary(q)
            )
        for shape, places in alike.items():
            count[places] = size = math.prod(shape)
            step = min(max(_AT_ONCE // size, 1), len(places))
            # Memory that is taken once is also in the cache.
            room = np.empty((2, step, size))
            for first in range(0, len(places), step):
                some = places[first : first + step]
                values, scratch = room[:, : len(some)]
                np.stack([pools[one].values for one in some], out=values.reshape(-1, *shape))
                low[some], high[some] = extremes = values.min(axis=1), values.max(axis=1)
                mean[some], deviation[some] = _moments(values, *extremes, scratch)
                if q.size:
                    found.percentiles[some] = _quantiles(values, *extremes, scratch, q)
        return found

    def inside(self, numbers: FloatArray) -> FloatArray:
        """Return numbers that rounding may have put outside of the values, put inside."""
        return np.minimum(np.maximum(numbers, self.minimum), self.maximum)


# Of rows of values, shape (k, n), n > 0: with the least and the greatest of each, and memory of the
# same shape to work in.


def _moments(
    values: FloatArray, low: FloatArray, high: FloatArray, scratch: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Return mean and sample standard deviation of each row."""
    # Scale to 1, by a power of two so that nothing is rounded: squares of huge values stay finite.
    power = np.clip(np.frexp(np.maximum(-low, high))[1], -1021, 1023)
    scaled = np.multiply(values, np.ldexp(1.0, -power)[:, np.newaxis], out=scratch)
    mean = scaled.mean(axis=1)
    scaled -= mean[:, np.newaxis]
    np.multiply(scaled, scaled, out=scaled)
    square = scaled.sum(axis=1) / max(values.shape[1] - 1, 1)
    return np.ldexp(mean, power), np.ldexp(np.sqrt(square), power)


def _quantiles(
    values: FloatArray, low: FloatArray, high: FloatArray, scratch: FloatArray, q: FloatArray
) -> FloatArray:
    """Return quantiles of each row, by NumPy's ``linear`` rule and to its very bits."""
    size = values.shape[1]
    place = q * (size - 1)
    below = np.floor(place).astype(np.intp)
    above = np.minimum(below + 1, size - 1)
    ranks = np.unique(np.concatenate([below, above]))
    if size < _MANY:
        found = np.sort(values, axis=1)[:, ranks]
    else:
        found = _order_statistics(values, low, high, scratch, ranks)
    one, other = found[:, ranks.searchsorted(below)], found[:, ranks.searchsorted(above)]
    step, gap = place - below, other - one
    mixed: FloatArray = np.where(step >= 0.5, other - gap * (1 - step), one + gap * step)
    return mixed


def _order_statistics(
    values: FloatArray,
    low: FloatArray,
    high: FloatArray,
    scratch: FloatArray,
    ranks: npt.NDArray[np.intp],
) -> FloatArray:
    """Return what ``np.sort(values, 1)[:, ranks]`` is, of many values in less time.

    Only those are sorted that share one of many cells with a rank that is asked for.
    """
    count, size = values.shape
    bits = size.bit_length() - 3
    # One cell at each end is for what rounding puts there. The cells of a row follow the last one's.
    width = (1 << bits) + 2
    cells = _cells(values, low, high, scratch, bits)
    if cells is None:
        return np.partition(values, ranks, axis=1)[:, ranks]
    cells += (np.arange(count) * width)[:, np.newaxis]
    inside = np.bincount(cells.ravel(), minlength=count * width)
    through = inside.cumsum()
    asked = (np.arange(count) * size)[:, np.newaxis] + ranks
    where = through.searchsorted(asked, side="right")
    wanted = np.zeros(inside.size, dtype=np.bool_)
    wanted[where] = True
    some = values[wanted[cells]]
    inside[~wanted] = 0
    taken = inside.cumsum()
    ends = taken[width - 1 :: width, np.newaxis]
    sizes = np.diff(ends, axis=0, prepend=0)
    # As many are not taken below a rank's cell as are taken less there.
    places = asked - through[where] + taken[where] - (ends - sizes)
    beside = np.full((count, sizes.max()), np.inf)
    beside[np.arange(beside.shape[1]) < sizes] = some
    beside.sort(axis=1)
    found: FloatArray = np.take_along_axis(beside, places, axis=1)
    return found


def _cells(
    values: FloatArray, low: FloatArray, high: FloatArray, scratch: FloatArray, bits: int
) -> npt.NDArray[np.int64] | None:
    """Return a cell in 0..2^bits + 1 for each value, the greater the value the higher.

    None if that cannot be.
    """
    cells = scratch.view(np.int64)
    if (low >= 0.0).all():
        # The bits of positive floats are in order, and as fine as the values are; -0 is 0.
        bits_of = (values if (low > 0.0).all() else np.add(values, 0.0, out=scratch)).view(np.int64)
        least, most = (low + 0.0).view(np.int64), high.view(np.int64)
        shift = np.maximum(np.frexp((most - least).astype(float))[1] - bits, 0).astype(np.int64)
        np.right_shift(bits_of, shift[:, np.newaxis], out=cells)
        cells -= (least >> shift)[:, np.newaxis]
        return cells
    # Of both signs most bits lie unused around 0: cut the range into equal parts.
    with np.errstate(all="ignore"):
        scale = (1 << bits) / (high - low)
    if not (np.isfinite(scale) & (scale > 0.0)).all():
        return None
    np.subtract(values, low[:, np.newaxis], out=scratch)
    scratch *= scale[:, np.newaxis]
    # Above 2^52 the bits of a float count by ones.
    scratch += 2.0**52
    cells -= int(np.float64(2.0**52).view(np.int64))
    return cells
