"""Histograms as numbers that merge by elementwise MAX and elementwise SUM: for one more minor version.

*Extents* say how coarse each octave is, and the extreme values; they merge by MAX. All then cut the octaves
that anybody has into equal parts, as many as there are buckets for, and add up what is in each.
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from metricfold._core.sketch.buckets import MOMENTS, Buckets
from metricfold._core.sketch.contents import NOTHING, Contents, Limit, Total, check_max_buckets
from metricfold._core.sketch.indexing import FINEST, FloatArray, IntArray

if TYPE_CHECKING:
    from metricfold._core.sketch.sketch import LogLinearHistogram

__all__ = ["extents", "pack", "unpack"]

_OCTAVES = 4096
_WIDTH = _OCTAVES + 2
_ABSENT = -1
"""Stands for `m` of an octave that nobody has."""


def extents(self: LogLinearHistogram) -> FloatArray:
    """Return what fixes a common layout, shape (4098,); deprecated.

    Merge those of all histograms by elementwise maximum; its identity is -inf.
    """
    _warn("extents")
    contents = self.contents()
    found = np.full(_WIDTH, -math.inf)
    found[_octaves(contents.buckets)] = FINEST - contents.buckets.m
    found[_OCTAVES:] = contents.limits[0, [Limit.HIGH, Limit.MINUS_LOW]]
    return found


def pack(self: LogLinearHistogram, extents: npt.ArrayLike, max_buckets: int) -> FloatArray:
    """Return the contents, shape (6 + 3 * max_buckets,), in the layout of `extents`; deprecated.

    The extents are merged from all the histograms that will be summed, this one among them. Merge what
    is packed by elementwise sum; its identity is 0.

    Raises:
        ValueError: the extents are not of this form or do not cover this histogram, or
            `max_buckets` is too small.
    """
    _warn("pack")
    contents = self.contents()
    check_max_buckets(max_buckets)
    m, starts = _layout(_checked(extents), max_buckets)
    octave = _octaves(contents.buckets)
    if not ((m[octave] != _ABSENT) & (m[octave] <= contents.buckets.m)).all():
        raise ValueError(
            "the extents do not cover this histogram: merge extents() of every histogram by "
            "elementwise maximum, this one's too, before packing"
        )
    buckets = contents.buckets.at(m[octave])
    place = starts[octave] + ((buckets.edge & ((1 << FINEST) - 1)) >> (FINEST - buckets.m))
    sums = [np.bincount(place, moment, minlength=max_buckets) for moment in buckets.sums]
    return np.concatenate([contents.totals[0], *sums])


def unpack(
    cls: type[LogLinearHistogram], extents: npt.ArrayLike, vector: npt.ArrayLike, max_buckets: int
) -> LogLinearHistogram:
    """Return the merge of the histograms whose packed contents were summed to `vector`; deprecated.

    Extents and `max_buckets` are those with which all were packed.

    Raises:
        ValueError: extents or vector have another size, or no histograms come to them.
    """
    _warn("unpack")
    array, reached = np.array(vector, dtype=np.float64), _checked(extents)
    size = len(Total) + MOMENTS * check_max_buckets(max_buckets)
    if array.shape != (size,):
        raise ValueError(
            f"a histogram of max_buckets={max_buckets} is packed in {size} numbers, not in an array of "
            f"shape {array.shape}"
        )
    m, starts = _layout(reached, max_buckets)
    sums = array[len(Total) :].reshape(MOMENTS, -1)
    place = np.flatnonzero(sums[0, : starts[-1]])
    octave = np.searchsorted(starts, place, side="right") - 1
    inside, begin = (place - starts[octave]) << (FINEST - m[octave]), octave - _OCTAVES // 2
    index = (begin << FINEST) + np.where(begin < 0, ~inside & ((1 << FINEST) - 1), inside)
    limits = NOTHING[np.newaxis].copy()
    limits[0, [Limit.HIGH, Limit.MINUS_LOW]] = reached[_OCTAVES:]
    cut = np.ones(place.size, dtype=np.bool_)
    buckets = Buckets.of(index, m[octave], sums[:, place], cut).ordered()
    contents = Contents(array[np.newaxis, : len(Total)], limits, buckets)
    if not contents.sound().all():
        raise ValueError("these are not the numbers of a histogram")
    return cls.of(contents, max_buckets)


def _warn(method: str) -> None:
    warnings.warn(
        f"LogLinearHistogram.{method} goes in the next minor version: it cuts octaves into equal parts, "
        "which is coarser than the histogram. Gather to_dict() of each, and merge them",
        DeprecationWarning,
        stacklevel=3,
    )


def _octaves(buckets: Buckets) -> IntArray:
    return (buckets.index >> FINEST) + _OCTAVES // 2


def _checked(merged: npt.ArrayLike) -> FloatArray:
    array = np.asarray(merged, dtype=np.float64)
    if array.shape != (_WIDTH,) or np.isnan(array).any():
        raise ValueError(
            f"extents are {_WIDTH} numbers, none of them NaN: the elementwise maximum of "
            f"extents() of every histogram; got an array of shape {array.shape}"
        )
    return array


def _layout(extents: FloatArray, max_buckets: int) -> tuple[IntArray, IntArray]:
    """Return how fine each octave is, where its buckets begin, and where the last ones end."""
    coarser = extents[:_OCTAVES]
    there = coarser >= 0.0
    octaves = int(np.count_nonzero(there))
    if octaves > max_buckets or (coarser > FINEST).any():
        raise ValueError(
            f"{octaves} octaves are occupied: in max_buckets={max_buckets} they cannot be summed; "
            "gather the histograms, as to_dict() says them, and merge them"
        )
    finest = (max_buckets // max(octaves, 1)).bit_length() - 1
    m = np.full(_OCTAVES, _ABSENT)
    m[there] = np.minimum(FINEST - coarser[there].astype(np.int64), finest)
    sizes = np.where(there, np.int64(1) << np.maximum(m, 0), 0)
    return m, np.append(0, np.cumsum(sizes))
