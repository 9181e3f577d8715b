"""A histogram as numbers that merge by elementwise MAX and elementwise SUM.

Two vectors, each of constant width. *Extents* merge by MAX: which buckets are occupied, and the
extreme values. They fix a layout, in which everyone *packs* the counts and moments of its buckets;
these merge by SUM. Whoever holds both can read them without knowing anything else:

    collective:  extents = max over ranks of extents(histogram)
                 lanes   = sum over ranks of pack(histogram, extents)
    gathered:    each rank sends extents and lanes of its own; the histograms are merged.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from metricfold._core.sketch.contents import Contents, Frame, Total, check_max_buckets
from metricfold._core.sketch.grid import MOMENTS, Grid, place
from metricfold._core.sketch.indexing import FINEST, FloatArray
from metricfold._core.sketch.layout import END_FIELDS, FIRST_FIELDS, SEGMENTS, SIGNED, Extents

__all__ = ["EXTENTS_WIDTH", "extents", "fitting", "pack", "slot_width", "unpack"]

EXTENTS_WIDTH = 2 * SIGNED + 4
"""How many numbers `LogLinearHistogram.extents` returns."""


def slot_width(max_buckets: int) -> int:
    """Return how many numbers `LogLinearHistogram.pack` returns for so many buckets."""
    return len(Total) + MOMENTS * check_max_buckets(max_buckets)


def extents(frame: Frame) -> FloatArray:
    """Return the extremes, shape (EXTENTS_WIDTH,); -inf stands for nothing."""
    occupied = frame.extents.occupied
    return np.concatenate(
        [
            np.where(occupied, frame.extents.high, -math.inf),
            np.where(occupied, -frame.extents.low, -math.inf),
            [frame.maximum, -frame.minimum, -frame.finest, frame.dropped],
        ]
    )


def pack(contents: Contents, merged: npt.ArrayLike, max_buckets: int) -> FloatArray:
    """Return the sums, shape (slot_width(max_buckets),), in the layout of everyone's extents."""
    lanes = np.zeros(slot_width(max_buckets))
    if max_buckets > contents.max_buckets:
        raise ValueError(
            f"a histogram of max_buckets={contents.max_buckets} cannot be packed as finely as "
            f"max_buckets={max_buckets}: pack with the fewest that any histogram has"
        )
    array = _numbers(merged)
    lanes[: len(Total)] = contents.totals
    rows = lanes[len(Total) :].reshape(MOMENTS, -1)
    if max_buckets == contents.max_buckets and (array == extents(contents.frame)).all():
        # Nobody has more: its buckets are in their places.
        rows[:, : contents.grid.layout.total] = contents.grid.sums
        return lanes
    try:
        place(contents.buckets, _frame(array).layout(max_buckets), rows)
    except ValueError:
        raise ValueError(
            "the extents do not cover this histogram: merge extents() of every histogram by "
            "elementwise maximum, this one's too, before packing"
        ) from None
    return lanes


def unpack(merged: npt.ArrayLike, lanes: npt.ArrayLike, max_buckets: int) -> Contents:
    """Return what has been packed, from merged extents and merged lanes."""
    frame = _frame(_numbers(merged))
    array = np.array(lanes, dtype=np.float64)
    if array.shape != (slot_width(max_buckets),):
        raise ValueError(
            f"a histogram of max_buckets={max_buckets} is packed in {slot_width(max_buckets)} "
            f"numbers, not in an array of shape {array.shape}"
        )
    layout = frame.layout(max_buckets)
    grid = Grid(layout)
    grid.sums[:] = array[len(Total) :].reshape(MOMENTS, -1)[:, : layout.total]
    contents = Contents(max_buckets, frame.minimum, frame.maximum, array[: len(Total)], grid)
    contents.check()
    return contents


def fitting(merged: FloatArray, lanes: FloatArray) -> npt.NDArray[np.bool_]:
    """Return of which slots the numbers can be those of a histogram, or of none; shape (k,).

    Cheap enough for all that arrive, and sufficient for `unpack` to take no more memory than slots
    of this size can need.

    Args:
        merged: extents, shape (k, EXTENTS_WIDTH).
        lanes: shape (k, n).
    """
    high, low = merged[:, :SIGNED], -merged[:, SIGNED : 2 * SIGNED]
    maximum, minimum, finest, dropped = (merged[:, 2 * SIGNED :] * (1.0, -1.0, -1.0, 1.0)).T
    within = (high >= low) & (low >= _LOWEST) & (high <= _HIGHEST)
    within &= (high == np.floor(high)) & (low == np.floor(low))
    within |= (high == -math.inf) & (low == math.inf)
    totals = lanes[:, : len(Total)]
    counts = totals[:, [Total.COUNT, Total.NAN, Total.POSITIVE_INFINITY, Total.NEGATIVE_INFINITY]]
    empty = counts[:, 0] == 0
    return (  # type: ignore[no-any-return]
        within.all(axis=1)
        & (finest >= 0)
        & (finest <= FINEST)
        & (finest == np.floor(finest))
        & (dropped >= 0)
        & (dropped <= SEGMENTS)
        & (dropped == np.floor(dropped))
        & ((lanes >= 0) & (lanes < math.inf)).all(axis=1)
        & ((counts == np.floor(counts)) & (counts <= 2.0**53)).all(axis=1)
        & (empty | ((minimum <= maximum) & np.isfinite(minimum) & np.isfinite(maximum)))
    ) | ~(lanes != 0).any(axis=1)


_LOWEST = (FIRST_FIELDS << FINEST).astype(np.float64)
_HIGHEST = ((END_FIELDS << FINEST) - 1).astype(np.float64)
"""The finest buckets with which each signed segment begins and ends."""


def _numbers(merged: npt.ArrayLike) -> FloatArray:
    array = np.asarray(merged, dtype=np.float64)
    if array.shape != (EXTENTS_WIDTH,) or np.isnan(array).any():
        raise ValueError(
            f"extents are {EXTENTS_WIDTH} numbers, none of them NaN: the elementwise maximum of "
            f"extents() of every histogram; got an array of shape {array.shape}"
        )
    return array


def _frame(array: FloatArray) -> Frame:
    high, low = array[:SIGNED], -array[SIGNED : 2 * SIGNED]
    maximum, minus_minimum, minus_finest, dropped = array[2 * SIGNED :].tolist()
    reached = Extents.empty()
    occupied = np.flatnonzero(np.isfinite(high))
    reached.low[occupied] = low[occupied].astype(np.int64)
    reached.high[occupied] = high[occupied].astype(np.int64)
    # The identity of MAX says nothing: nobody has a histogram.
    somebody = math.isfinite(minus_finest)
    return Frame(
        reached,
        -minus_minimum,
        maximum,
        int(-minus_finest) if somebody else FINEST,
        int(dropped) if somebody else 0,
    )
