"""Sketches in vectors: a slot of one width each, and how two vectors of them merge.

A slot is what one sketch holds: totals, extremes, by how much it is coarser than the finest and by how much
nearer than the farthest, and of each bucket its key (never 0, which says that no more follow) and three sums.
A slot of zeros is that of no sketch, and the identity.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from metricfold._core.sketch import BUCKETS
from metricfold._core.sketch.buckets import FARTHEST, MOMENTS, ROW_BITS, BoolArray, Buckets
from metricfold._core.sketch.contents import Contents, Total
from metricfold._core.sketch.indexing import FINEST, FloatArray
from metricfold._core.sketch.sketch import LogLinearHistogram

__all__ = ["fitting", "joined", "pack", "slot_width", "unpack"]

_TOTALS = slice(0, len(Total))
_LOW, _HIGH, _COARSER, _NEARER, _CODES = range(len(Total), len(Total) + 5)
_SUMS = _CODES + BUCKETS
_WIDTH = _SUMS + MOMENTS * BUCKETS
_COLUMNS = range(_CODES, _WIDTH, BUCKETS)

_AT_ONCE = 8
"""So many pairs at once: what is computed of them stays in the cache."""
_MOST_LIMITED = (FINEST, FARTHEST + 1)


def slot_width() -> int:
    """Return how many numbers a slot has."""
    return _WIDTH


def pack(sketch: LogLinearHistogram | None) -> FloatArray:
    """Return what a sketch holds, or that there is none, as one slot.

    Raises:
        ValueError: the sketch is not of `BUCKETS` buckets.
    """
    if sketch is None:
        return np.zeros(_WIDTH)
    if sketch.max_buckets != BUCKETS:
        raise ValueError(
            f"a sketch of max_buckets={sketch.max_buckets} does not travel: merge it into one of "
            f"{BUCKETS}"
        )
    slot: FloatArray = _packed(sketch.contents())[0]
    return slot


def unpack(slot: npt.ArrayLike) -> LogLinearHistogram | None:
    """Return the sketch that is in a slot; None if there is none.

    Raises:
        ValueError: no sketch comes to these numbers.
    """
    array = np.array(slot, dtype=np.float64)
    if array.shape != (_WIDTH,):
        raise ValueError(f"a slot has {_WIDTH} numbers, not an array of shape {array.shape}")
    if not array.any():
        return None
    contents, good = _read(array[np.newaxis])
    if not good[0]:
        raise ValueError("these are not the numbers of a sketch")
    return LogLinearHistogram.of(contents, BUCKETS)


def fitting(slots: FloatArray) -> BoolArray:
    """Return which slots, shape (n, slot_width()), hold a sketch or none; shape (n,)."""
    return _read(slots)[1]


def joined(lower: FloatArray, upper: FloatArray) -> FloatArray:
    """Return the merge of each pair of slots, shape (p, slot_width()).

    Commutative to the last bit, associative but for rounding in the moments of a bucket, and the same
    on every machine: what is added up is added one after the other. A pair of which one is not
    `fitting` comes to a slot of NaN, which is not fitting.
    """
    out = np.empty_like(lower)
    for begin in range(0, len(lower), _AT_ONCE):
        part = slice(begin, begin + _AT_ONCE)
        contents, good = _read(np.concatenate([lower[part], upper[part]]))
        pairs = good.size // 2
        one, other = contents.rows(0, pairs), contents.rows(pairs, good.size)
        out[part] = _packed(one.joined(other, BUCKETS))
        out[part][~(good[:pairs] & good[pairs:])] = math.nan
    return out


def _packed(contents: Contents) -> FloatArray:
    buckets = contents.buckets
    slots = np.zeros((len(contents.totals), _WIDTH))
    slots[:, _TOTALS] = contents.totals
    some = contents.totals[:, Total.COUNT] > 0.0
    slots[some, _LOW], slots[some, _HIGH] = contents.low[some], contents.high[some]
    slots[:, _COARSER] = FINEST - contents.finest
    slots[:, _NEARER] = FARTHEST - contents.reach
    row = buckets.row
    held = np.bincount(row, minlength=len(slots))
    place = np.arange(row.size) - np.repeat(held.cumsum() - held, held) + row * _WIDTH
    codes = buckets.moved(-row).key
    for begin, numbers in zip(_COLUMNS, (codes, *buckets.sums), strict=True):
        slots.ravel()[place + begin] = numbers
    slots += 0.0  # of two zeros the one without a sign
    return slots


def _read(slots: FloatArray) -> tuple[Contents, BoolArray]:
    """Return what is in slots, and which of them hold a sketch or none; the others hold nothing."""
    good = np.isfinite(slots).all(axis=1)
    with np.errstate(invalid="ignore"):
        codes = slots[:, _CODES:_SUMS].astype(np.int64)
        good &= ((codes == slots[:, _CODES:_SUMS]) & (codes >> ROW_BITS == 0)).all(axis=1)
    there = codes != 0
    good &= ~(there[:, 1:] & ~there[:, :-1]).any(axis=1)
    place = (there & good[:, np.newaxis]).ravel().nonzero()[0]
    row, sums = place // BUCKETS, slots[:, _SUMS:].reshape(-1, MOMENTS, BUCKETS).swapaxes(0, 1)
    held = np.ascontiguousarray(sums).reshape(MOMENTS, -1).take(place, axis=1)
    buckets = Buckets(codes.ravel().take(place), held).moved(row)
    # Beyond the last code nothing may stand.
    moments = np.bincount(row, np.count_nonzero(held, axis=0), minlength=good.size)
    good &= np.count_nonzero(slots[:, _SUMS:], axis=1) == moments
    limits = slots[:, _COARSER : _NEARER + 1]
    good &= ((limits >= 0.0) & (limits <= _MOST_LIMITED) & (limits == np.floor(limits))).all(axis=1)
    coarser, nearer = np.where(good[:, np.newaxis], limits, 0.0).astype(np.int64).T
    totals = slots[:, _TOTALS]
    some = totals[:, Total.COUNT] > 0.0
    contents = Contents(
        totals,
        np.where(some, slots[:, _LOW], math.inf),
        np.where(some, slots[:, _HIGH], -math.inf),
        FINEST - coarser,
        FARTHEST - nearer,
        buckets,
    )
    good &= contents.sound()
    return contents.only(good), good
