"""Sketches in vectors: a slot of one width each, and how two vectors of them merge.

A slot is what one sketch holds: totals, limits (0 for extremes that nobody has), and of each bucket its key,
which is never 0, and three sums. A slot of zeros is that of no sketch, and the identity.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from metricfold._core.sketch import BUCKETS
from metricfold._core.sketch.buckets import MOMENTS, ROW_BITS, BoolArray, Buckets
from metricfold._core.sketch.contents import NOTHING, Contents, Limit, Total
from metricfold._core.sketch.indexing import FloatArray
from metricfold._core.sketch.sketch import LogLinearHistogram

__all__ = ["fitting", "joined", "pack", "slot_width", "unpack"]

_TOTALS = len(Total)
_HEAD = _TOTALS + len(Limit)
_COLUMNS = 1 + MOMENTS
_WIDTH = _HEAD + _COLUMNS * BUCKETS

_AT_ONCE = 64
"""So many pairs at once: enough that calls do not count, few enough that it takes some MB."""


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
    buckets, row = contents.buckets, contents.buckets.row
    some = contents.totals[:, Total.COUNT, np.newaxis] > 0.0
    slots = np.zeros((len(some), _WIDTH))
    slots[:, :_TOTALS] = contents.totals
    slots[:, _TOTALS:_HEAD] = np.where(some | (NOTHING == 0.0), contents.limits, 0.0)
    columns = slots[:, _HEAD:].reshape(-1, _COLUMNS, BUCKETS).swapaxes(0, 1)
    inside = np.arange(BUCKETS) < np.bincount(row, minlength=len(slots))[:, np.newaxis]
    for column, numbers in zip(columns, (buckets.moved(-row).key, *buckets.sums), strict=True):
        column[inside] = numbers
    slots += 0.0  # of two zeros the one without a sign
    return slots


def _read(slots: FloatArray) -> tuple[Contents, BoolArray]:
    """Return what is in slots, and which of them hold a sketch or none; the others hold nothing."""
    good = np.isfinite(slots).all(axis=1)
    columns = slots[:, _HEAD:].reshape(-1, _COLUMNS, BUCKETS).swapaxes(0, 1)
    with np.errstate(invalid="ignore"):
        codes = columns[0].astype(np.int64)
    good &= ((codes == columns[0]) & (codes >> ROW_BITS == 0)).all(axis=1)
    # Beyond as many buckets as there are nothing may stand.
    inside = np.arange(BUCKETS) < np.count_nonzero(codes, axis=1)[:, np.newaxis]
    good &= ~((columns != 0.0) & ~inside).any(axis=(0, 2))
    inside &= good[:, np.newaxis]
    row = np.repeat(np.arange(good.size), np.count_nonzero(inside, axis=1))
    held = np.stack([column[inside] for column in columns[1:]])
    totals, limits = slots[:, :_TOTALS], slots[:, _TOTALS:_HEAD]
    some = totals[:, Total.COUNT, np.newaxis] > 0.0
    limits = np.where(some | (NOTHING == 0.0), limits, NOTHING)
    contents = Contents(totals, limits, Buckets(codes[inside], held).moved(row))
    good &= contents.sound()
    if not good.all():
        contents, _ = _read(np.where(good[:, np.newaxis], slots, 0.0))
    return contents, good
