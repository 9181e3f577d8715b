"""Histograms as numbers that merge by elementwise MAX and elementwise SUM: for one more minor version.

*Extents* say how fine each octave is, and the extreme values; they merge by MAX. All then cut the octaves
that anybody has into equal parts, as many as there are buckets for, and add up what is in each.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from metricfold._core.sketch.buckets import FARTHEST, MOMENTS, Buckets
from metricfold._core.sketch.contents import Contents, Total, check_max_buckets
from metricfold._core.sketch.indexing import FINEST, FloatArray, IntArray

__all__ = ["EXTENTS_WIDTH", "extents", "pack", "unpack"]

_OCTAVES = 4096
EXTENTS_WIDTH = _OCTAVES + 2
"""How many numbers `LogLinearHistogram.extents` returns."""


def extents(contents: Contents) -> FloatArray:
    """Return what fixes a common layout; its identity is -inf."""
    buckets = contents.buckets
    found = np.full(EXTENTS_WIDTH, -math.inf)
    found[(buckets.index >> FINEST) + _OCTAVES // 2] = FINEST - buckets.m
    found[_OCTAVES:] = contents.high[0], -contents.low[0]
    return found


def pack(contents: Contents, merged: npt.ArrayLike, max_buckets: int) -> FloatArray:
    """Return the sums in the layout that everyone's extents fix."""
    lanes = np.zeros(len(Total) + MOMENTS * check_max_buckets(max_buckets))
    lanes[: len(Total)] = contents.totals[0]
    octaves, m = _layout(_numbers(merged), max_buckets)
    buckets = contents.buckets
    octave = np.searchsorted(octaves, buckets.index >> FINEST)
    known = np.append(octaves, _OCTAVES)[octave] == buckets.index >> FINEST
    if not known.all() or (m[octave] > buckets.m).any():
        raise ValueError(
            "the extents do not cover this histogram: merge extents() of every histogram by "
            "elementwise maximum, this one's too, before packing"
        )
    buckets = buckets.at(m[octave])
    inside = (buckets.edge & ((1 << FINEST) - 1)) >> (FINEST - buckets.m)
    place = _starts(m)[octave] + inside
    rows = lanes[len(Total) :].reshape(MOMENTS, -1)
    for row, moment in enumerate(buckets.sums):
        rows[row] += np.bincount(place, moment, minlength=max_buckets)
    return lanes


def unpack(merged: npt.ArrayLike, lanes: npt.ArrayLike, max_buckets: int) -> Contents:
    """Return what has been packed, from merged extents and summed lanes."""
    array, reached = np.array(lanes, dtype=np.float64), _numbers(merged)
    size = len(Total) + MOMENTS * check_max_buckets(max_buckets)
    if array.shape != (size,):
        raise ValueError(
            f"a histogram of max_buckets={max_buckets} is packed in {size} numbers, not in an array of "
            f"shape {array.shape}"
        )
    octaves, m = _layout(reached, max_buckets)
    sums = array[len(Total) :].reshape(MOMENTS, -1)
    place = np.flatnonzero(sums[0, : _starts(m)[-1]])
    octave = np.searchsorted(_starts(m), place, side="right") - 1
    edge = (place - _starts(m)[octave]) << (FINEST - m[octave])
    below = np.where(octaves[octave] < 0, ~edge & ((1 << FINEST) - 1), edge)
    index = (octaves[octave] << FINEST) + below
    order = np.argsort(index)
    buckets = Buckets.of(index, m[octave], sums[:, place], np.ones(place.size, dtype=np.bool_))
    contents = Contents(
        array[np.newaxis, : len(Total)],
        -reached[-1:],
        reached[-2:-1],
        np.array([FINEST]),
        np.array([FARTHEST]),
        buckets.taken(order),
    )
    if not contents.sound().all():
        raise ValueError("these are not the numbers of a histogram")
    return contents


def _numbers(merged: npt.ArrayLike) -> FloatArray:
    array = np.asarray(merged, dtype=np.float64)
    if array.shape != (EXTENTS_WIDTH,) or np.isnan(array).any():
        raise ValueError(
            f"extents are {EXTENTS_WIDTH} numbers, none of them NaN: the elementwise maximum of "
            f"extents() of every histogram; got an array of shape {array.shape}"
        )
    return array


def _layout(array: FloatArray, max_buckets: int) -> tuple[IntArray, IntArray]:
    """Return the occupied octaves, and how fine each is."""
    coarse = array[:_OCTAVES]
    octaves = np.flatnonzero(coarse >= 0.0)
    if octaves.size > max_buckets or (coarse[octaves] > FINEST).any():
        raise ValueError(
            f"{octaves.size} octaves are occupied: in max_buckets={max_buckets} they cannot be summed; "
            "gather the histograms, as to_dict() says them, and merge them"
        )
    finest = (max_buckets // max(octaves.size, 1)).bit_length() - 1
    m: IntArray = np.minimum(FINEST - coarse[octaves].astype(np.int64), finest)
    return octaves - _OCTAVES // 2, m


def _starts(m: IntArray) -> IntArray:
    """Return where the buckets of each octave begin, and where the last ones end."""
    return np.concatenate([[0], np.cumsum(np.int64(1) << m)])
