"""How the contents of buckets are stored, folded and re-binned.

Of each bucket three sums are kept, over the (weighted) values in it: 1, u and u², where u in [0, 1)
is the position inside the bucket. They merge by addition, and when two halves become one bucket
they carry over exactly: a value at u in half j is at (j + u) / 2 of the whole. In a segment that is
one bucket, u is the magnitude in a unit of the segment's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from metricfold._core.sketch.indexing import (
    BIAS,
    FINEST,
    FRACTION_BITS,
    MAGNITUDE,
    FloatArray,
    IntArray,
    from_bits,
    lower_edge,
    width,
)
from metricfold._core.sketch.layout import (
    END_FIELDS,
    FIELDS,
    FIRST_FIELDS,
    MIDDLE_EXPONENTS,
    SEGMENT_OF_PREFIX,
    SEGMENTS,
    SIGNED,
    WHOLE,
    Extents,
    Layout,
    segment_of,
)

__all__ = ["MOMENTS", "Buckets", "Grid", "place"]

MOMENTS = 3
"""Sums per bucket: of 1, u and u²."""

_FRACTION = np.int64((1 << FRACTION_BITS) - 1)
_PREFIX_SHIFT = np.uint64(FRACTION_BITS)
_ONE = np.int64(BIAS << FRACTION_BITS)
"""The bits of 1.0."""

# How the place of a value's bucket follows from its bits, in one integer per segment: what to add
# to the bucket index, the sign, and m.
_M_BITS = 5
_M_MASK = np.int64((1 << _M_BITS) - 1)
_SIGN = 1 << _M_BITS
_ADD_SHIFT = _M_BITS + 1
_NOWHERE = 1 << 50
"""Leads far beyond the last bucket."""
_NOBODY = -1

_HALVINGS = np.ldexp(1.0, -np.arange(FINEST + 1))


@dataclass(frozen=True, slots=True, eq=False)
class Buckets:
    """Occupied buckets, by segment and then by index.

    Args:
        segment: signed segment of each, shape (n,).
        index: `k` of `bucket_index` at the resolution `m`; 0 for a whole segment; shape (n,).
        m: shape (n,).
        sums: of 1, u and u²; shape (3, n).
    """

    segment: IntArray
    index: IntArray
    m: IntArray
    sums: FloatArray

    @classmethod
    def empty(cls) -> Buckets:
        none = np.empty(0, dtype=np.int64)
        return cls(none, none, none, np.empty((MOMENTS, 0)))

    @classmethod
    def signed(cls, index: npt.ArrayLike, sums: npt.ArrayLike, m: int) -> Buckets:
        """Return buckets given by the signed indices of `bucket_index`, 0 not among them.

        Raises:
            ValueError: an index is 0 or beyond those of floats, or there are not three sums of each.
        """
        if not 0 <= m <= FINEST:
            raise ValueError(f"m={m!r}: the resolution must lie in 0..{FINEST}")
        given = np.asarray(index, dtype=np.int64)
        array = np.array(sums, dtype=np.float64)
        if given.ndim != 1 or array.shape != (MOMENTS, given.size):
            raise ValueError(
                f"indices of shape {given.shape} and sums of shape {array.shape}: give n indices, "
                f"and {MOMENTS} sums of each, shape ({MOMENTS}, n)"
            )
        bucket = np.abs(given) - 1
        if ((bucket < 0) | (bucket >> m >= FIELDS)).any():
            raise ValueError(f"at m={m}, an index is 0 or beyond those of finite floats")
        segment = SEGMENT_OF_PREFIX[(bucket >> m) + (FIELDS + 1) * (given < 0)]
        return cls(segment, bucket, np.full(bucket.size, m), array)

    @classmethod
    def of(cls, *grids: Grid) -> Buckets:
        """Return the occupied buckets of `grids`, one after the other."""
        sums = np.concatenate([grid.sums for grid in grids], axis=1)
        size = np.concatenate([grid.layout.size for grid in grids])
        first = np.concatenate([grid.layout.first for grid in grids])
        m = np.concatenate([grid.layout.m for grid in grids])
        occupied = np.flatnonzero(sums[0])
        owner = np.arange(size.size).repeat(size).take(occupied)
        index = occupied + (first - size.cumsum() + size).take(owner)
        return cls(owner % SIGNED, index, m.take(owner), sums.take(occupied, axis=1))

    @classmethod
    def joined(cls, *parts: Buckets) -> Buckets:
        return cls(
            np.concatenate([part.segment for part in parts]),
            np.concatenate([part.index for part in parts]),
            np.concatenate([part.m for part in parts]),
            np.concatenate([part.sums for part in parts], axis=1),
        )

    @property
    def extents(self) -> Extents:
        return Extents.of(self.segment, self.index, self.m)

    @property
    def origins(self) -> FloatArray:
        """The magnitudes at u = 0."""
        whole = self.m == WHOLE
        return np.where(whole, 0.0, lower_edge(self.index, np.maximum(self.m, 0)))

    @property
    def units(self) -> FloatArray:
        """The difference in magnitude between u = 0 and u = 1."""
        whole = np.ldexp(1.0, MIDDLE_EXPONENTS[self.segment])
        return np.where(self.m == WHOLE, whole, width(self.index, np.maximum(self.m, 0)))

    @property
    def bounds(self) -> tuple[FloatArray, FloatArray]:
        """The least and the greatest magnitude, other than 0, that belongs to each bucket."""
        whole = self.m == WHOLE
        shift = FRACTION_BITS - np.where(whole, 0, self.m)
        starts = np.where(whole, FIRST_FIELDS[self.segment], self.index) << shift
        ends = np.where(whole, END_FIELDS[self.segment], self.index + 1) << shift
        return from_bits(np.maximum(starts, 1)), from_bits(ends - 1)

    def at(self, m: IntArray) -> Buckets:
        """Return the same contents in the coarser buckets that hold them, not yet joined."""
        steps = self.m - m
        if not steps.any():
            return self
        to_whole = m == WHOLE
        some = bool(to_whole.any())
        if some:
            steps = np.where(to_whole, 0, steps)
        index = self.index >> steps
        # u in the coarser bucket is shift + scale * u.
        scale = _HALVINGS.take(steps)
        shift = (self.index - (index << steps)) * scale
        if some:
            exponents = -MIDDLE_EXPONENTS[self.segment]
            index = np.where(to_whole, 0, index)
            scale = np.where(to_whole, np.ldexp(self.units, exponents), scale)
            shift = np.where(to_whole, np.ldexp(self.origins, exponents), shift)
        count, first, second = self.sums
        shifted, scaled = shift * count, scale * first
        sums = np.empty_like(self.sums)
        sums[0] = count
        sums[1] = shifted + scaled
        sums[2] = shift * (shifted + 2.0 * scaled) + scale * (scale * second)
        return Buckets(self.segment, index, m, sums)


def place(buckets: Buckets, layout: Layout, sums: FloatArray) -> None:
    """Add `buckets` to `sums`, shape (3, n), in the places that `layout` gives them.

    Raises:
        ValueError: the layout has no place for a bucket, or only a finer one.
    """
    segment = buckets.segment
    m = layout.m.take(segment)
    if (m > buckets.m).any():
        raise ValueError("a bucket cannot be divided into finer ones")
    buckets = buckets.at(m)
    offset = buckets.index - layout.first.take(segment)
    # What is negative is huge without its sign.
    if (offset.view(np.uint64) >= layout.size.take(segment).view(np.uint64)).any():
        raise ValueError("a bucket lies outside of the extents")
    where = layout.start.take(segment) + offset
    for k, moment in enumerate(buckets.sums):
        sums[k] += np.bincount(where, moment, minlength=sums.shape[1])


class Grid:
    """The buckets of a layout and what is in them.

    Args:
        layout: which buckets there are.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        # A guard at either end, whose content means nothing.
        self._sums = np.zeros((MOMENTS, layout.total + 2))

    @property
    def sums(self) -> FloatArray:
        """Of 1, u and u² of each bucket; shape (3, n), not a copy."""
        return self._sums[:, 1:-1]

    @property
    def extents(self) -> Extents:
        """Of what is in the buckets."""
        return Buckets.of(self).extents if self.layout.roomy else self.layout.extents

    def copy(self) -> Grid:
        grid = Grid(self.layout)
        grid.sums[:] = self.sums
        return grid

    def fold(
        self, bits: IntArray, weights: FloatArray | None
    ) -> tuple[IntArray, FloatArray | None] | None:
        """Add values, neither 0 nor infinite, given by their bits.

        Returns:
            Those that have no bucket here and have not been added, as a copy; None if all have.
        """
        if not self.layout.total:
            return bits.copy(), weights
        prefix = (bits.view(np.uint64) >> _PREFIX_SHIFT).view(np.int64)
        codes = self._codes.take(prefix, mode="clip")
        m = codes & _M_MASK
        magnitude = bits & MAGNITUDE
        where = (magnitude >> (FRACTION_BITS - m)) + (codes >> _ADD_SHIFT)
        # A value beyond its segment's buckets would land in those of another, or on a guard.
        strange = self._owners.take(where, mode="clip") != codes
        some = bool(strange.any())
        if some:
            where[strange] = 0
        # Shift the bits below the index to the top of a mantissa: 1 + u, without rounding.
        magnitude <<= m
        magnitude &= _FRACTION
        magnitude |= _ONE
        u = magnitude.view(np.float64)
        u -= 1.0
        self._add(where, u, weights)
        if not some:
            return None
        return self._fold_whole(bits[strange], None if weights is None else weights[strange])

    def _fold_whole(
        self, bits: IntArray, weights: FloatArray | None
    ) -> tuple[IntArray, FloatArray | None] | None:
        """Add those values that lie in segments of one bucket, and return the others."""
        segment = segment_of(bits)
        whole = (self.layout.m[segment] == WHOLE) & (self.layout.size[segment] > 0)
        if not whole.any():
            return bits, weights
        segment = segment[whole]
        u = np.ldexp(from_bits(bits[whole] & MAGNITUDE), -MIDDLE_EXPONENTS[segment])
        self._add(1 + self.layout.start[segment], u, None if weights is None else weights[whole])
        if whole.all():
            return None
        return bits[~whole], None if weights is None else weights[~whole]

    # The tables that find a value's bucket, made when the first is looked for.

    @cached_property
    def _codes(self) -> IntArray:
        """By the top 12 bits of a float."""
        return self._code_of_segment.take(SEGMENT_OF_PREFIX)

    @cached_property
    def _owners(self) -> IntArray:
        """The code of the segment that each bucket, or guard, belongs to."""
        owners = np.full(self.layout.total + 2, _NOBODY)
        owners[1:-1] = np.repeat(self._code_of_segment, self.layout.size)
        return owners

    @cached_property
    def _code_of_segment(self) -> IntArray:
        layout = self.layout
        codes = ((1 + layout.start - layout.first) << _ADD_SHIFT) + np.maximum(layout.m, 0)
        codes[SEGMENTS:] += _SIGN
        codes[~layout.divided] = _NOWHERE << _ADD_SHIFT
        return codes

    def _add(self, where: IntArray, u: FloatArray, weights: FloatArray | None) -> None:
        n = self._sums.shape[1]
        first = u if weights is None else u * weights
        self._sums[0] += np.bincount(where, weights, minlength=n)
        self._sums[1] += np.bincount(where, first, minlength=n)
        u *= first
        self._sums[2] += np.bincount(where, u, minlength=n)
