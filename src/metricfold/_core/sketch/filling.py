"""How values find their buckets: two small tables lead from a value's bits to a place, which says if it is right.

    shift, add = octaves[bits >> 52]      place, m = cells[(bits >> shift) + add]
    right where bits >> (52 - m) is the bucket in that place

The tables are an index and no state: some 16,384 cells, an equal number for each octave, made anew when the
buckets have changed. Whole numbers and values of bfloat16 are few and far apart at m = 16: cells may be
coarser than buckets, and find them as fast as dense ones. What finds no place is left over, to be sorted
and joined.
"""

from __future__ import annotations

import numpy as np

from metricfold._core.sketch.buckets import Buckets
from metricfold._core.sketch.indexing import (
    BIAS,
    FIELDS,
    FINEST,
    FRACTION_BITS,
    FloatArray,
    IntArray,
)

__all__ = ["Table"]

_CELLS = 1 << 14
_PREFIXES = 2 * (FIELDS + 1)
"""Of the top 12 bits of a float: sign and exponent."""
_SHARED = 0.02
"""The part of an octave's weight that may lie in cells of several buckets."""

# A cell says a place and m in one number, an octave what to add and how far to shift.
_M_BITS, _SHIFT_BITS = 5, 6
_M_MASK, _SHIFT_MASK = np.int64((1 << _M_BITS) - 1), np.int64((1 << _SHIFT_BITS) - 1)
_NOWHERE = -1 << 40
"""Leads below the first cell."""

_PREFIX_SHIFT = np.uint64(FRACTION_BITS)
_FRACTION = np.int64((1 << FRACTION_BITS) - 1)
_ONE = np.int64(BIAS << FRACTION_BITS)
"""The bits of 1.0."""


class Table:
    """Leads from values, which come at resolution `finest`, to the buckets of one sketch."""

    __slots__ = ("_bucket", "_cells", "_coarse", "_none", "_octaves")

    def __init__(self, buckets: Buckets, finest: int) -> None:
        m = np.maximum(buckets.m, 0)
        # The bits of the values in each, but for those below m: the sign is the first of them.
        bucket = (buckets.edge >> (FINEST - m)) - ((buckets.index < 0) * (1 << (11 + m)))
        self._none, self._coarse = m.size, False
        self._bucket = np.append(bucket, _NOWHERE)  # which no value is in
        self._octaves = np.full(_PREFIXES, _NOWHERE << _SHIFT_BITS)
        # A value that comes finer than what an octave has been given would change that octave.
        settled = np.flatnonzero((buckets.m >= 0) & (buckets.cut | (buckets.m == finest)))
        cells = self._find_cells(buckets.taken(settled), bucket[settled])
        inside = np.flatnonzero(cells >= 0)
        self._cells = np.full(int(cells.max(initial=0)) + 2, self._none << _M_BITS)
        self._cells[cells[inside]] = ((settled << _M_BITS) + m[settled])[inside]

    def _find_cells(self, buckets: Buckets, bucket: IntArray) -> IntArray:
        """Return the cell of each bucket, or -1; the first and the last cell lead nowhere."""
        if not bucket.size:
            return bucket
        first = buckets.octaves()
        octave = np.repeat(np.arange(first.size), np.diff(first, append=bucket.size))
        most = _CELLS // first.size
        low, high = np.minimum.reduceat(bucket, first), np.maximum.reduceat(bucket, first)
        # The cells of an octave reach over all of its buckets, coarse as they may have to be ...
        step = np.maximum(np.frexp((high - low + 1) / most)[1], 0)
        weight = buckets.sums[0]
        near = np.zeros(bucket.size + 1, dtype=np.bool_)
        cell = bucket >> step[octave]
        near[1:-1] = (cell[1:] == cell[:-1]) & (octave[1:] == octave[:-1])
        shared = np.bincount(octave, weight * (near[1:] | near[:-1]), minlength=first.size)
        # ... or, where they cannot tell these apart, over those about the heaviest.
        lost = np.flatnonzero(shared > _SHARED * np.bincount(octave, weight))
        if lost.size:
            heaviest = weight == np.maximum.reduceat(weight, first)[octave]
            middle = np.maximum.reduceat(np.where(heaviest, bucket, low[octave]), first)
            low[lost] = np.maximum(middle - most // 2, low)[lost]
            high[lost] = np.minimum(low + most, high)[lost]
            step[lost] = 0
        self._coarse = bool(step.any())
        begin, end = low >> step, high >> step
        add = 1 + np.cumsum(end - begin + 1) - (end + 1)
        m = buckets.m[first]
        prefix = bucket[first] >> m
        self._octaves[prefix] = (add << _SHIFT_BITS) + (FRACTION_BITS - m + step)
        inside = (bucket >= low[octave]) & (bucket <= high[octave])
        return np.where(inside, (bucket >> step[octave]) + add[octave], -1)

    def fold(self, bits: IntArray, weights: FloatArray | None, sums: FloatArray) -> IntArray:
        """Add values, neither 0 nor infinite, to the sums of the buckets with which the table was made.

        Returns:
            Which of `bits` have no place and have not been added.
        """
        prefix = (bits.view(np.uint64) >> _PREFIX_SHIFT).view(np.int64)
        cell = self._octaves.take(prefix)
        bucket = bits >> (cell & _SHIFT_MASK)
        cell >>= _SHIFT_BITS
        cell += bucket
        m = self._cells.take(cell, mode="clip")
        place = m >> _M_BITS
        m &= _M_MASK
        if self._coarse:
            bucket = bits >> (FRACTION_BITS - m)
        # The cell of a bucket may be that of others too, or of another octave.
        left = np.flatnonzero(bucket != self._bucket.take(place))
        if left.size:
            place[left] = self._none
        # Shift the bits below the index to the top of a mantissa: 1 + u, without rounding.
        magnitude = bits << m
        magnitude &= _FRACTION
        magnitude |= _ONE
        u = magnitude.view(np.float64)
        u -= 1.0
        size = self._none + 1
        sums[0] += np.bincount(place, weights, minlength=size)[:-1]
        moment = u if weights is None else u * weights
        sums[1] += np.bincount(place, moment, minlength=size)[:-1]
        u *= moment
        sums[2] += np.bincount(place, u, minlength=size)[:-1]
        return left
